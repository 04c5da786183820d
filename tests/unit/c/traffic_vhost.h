/* SPDX-License-Identifier: Apache-2.0 */
/* A guest's driver for test_traffic.c: one split ring in a memfd, a batch of requests, then their completions. */
#ifndef TRAFFIC_VHOST_H
#define TRAFFIC_VHOST_H

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>

#include "traffic.h"
#include "vhost.h"

#define GUEST_BASE 0x100000ull
#define USER_BASE 0x7f0000000000ull
#define GUEST_SIZE (1u << 20)
#define RING_SIZE 32u
#define AT_AVAIL 0x1000u
#define AT_USED 0x2000u
#define AT_HEADERS 0x3000u /* 16 bytes and a status for each of the batch */
#define AT_SEGMENTS 0x4000u
#define AT_DATA 0x10000u

struct guest {
    int memory_fd, kick, call;
    uint8_t *memory; /* the guest's own mapping */
    uint16_t avail, used;
    bool event_idx;
    struct owner *owner;
};

static inline void guest_init(struct guest *guest, struct owner *owner, bool event_idx)
{
    *guest = (struct guest){.memory_fd = memfd_create("guest", MFD_CLOEXEC), .owner = owner, .event_idx = event_idx};
    CHECK(guest->memory_fd >= 0 && ftruncate(guest->memory_fd, GUEST_SIZE) == 0);
    guest->memory = mmap(NULL, GUEST_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, guest->memory_fd, 0);
    CHECK(guest->memory != MAP_FAILED);
    guest->kick = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    guest->call = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
}

static inline void guest_free(struct guest *guest)
{
    munmap(guest->memory, GUEST_SIZE);
    close(guest->memory_fd);
    close(guest->kick);
    close(guest->call);
}

static inline void guest_desc(struct guest *guest, unsigned index, uint32_t at, uint32_t length, uint16_t flags)
{
    struct vhost_desc *desc = (struct vhost_desc *)guest->memory + index;
    *desc = (struct vhost_desc){GUEST_BASE + at, length, flags, (uint16_t)(index + 1)};
}

static inline void guest_request(struct guest *guest, unsigned index)
{
    static const uint32_t types[] = {0, 1, 13, 11, 4};
    const struct operation *operation = &guest->owner->batch[index];
    uint32_t header = AT_HEADERS + 32 * index, data = AT_DATA + LONGEST * index, length = operation->blocks * BLOCK;
    bool range = operation->kind == KIND_ZEROES || operation->kind == KIND_DISCARD;
    struct {
        uint32_t type, reserved;
        uint64_t sector;
    } words = {types[operation->kind], 0, range ? 0 : operation->block};
    struct vhost_segment segment = {operation->block, operation->blocks,
                                    operation->kind == KIND_ZEROES && operation->value & 1};
    memcpy(guest->memory + header, &words, sizeof words);
    guest->memory[header + 16] = 0xEE;
    memcpy(guest->memory + AT_SEGMENTS + 16 * index, &segment, sizeof segment);
    memcpy(guest->memory + data, guest->owner->data[index], length);
    guest_desc(guest, 3 * index, header, 16, 1);
    if (range)
        guest_desc(guest, 3 * index + 1, AT_SEGMENTS + 16 * index, 16, 1);
    else
        guest_desc(guest, 3 * index + 1, data, length, operation->kind == KIND_READ ? 3 : 1);
    guest_desc(guest, 3 * index + 2, header + 16, 1, 2);
    uint16_t *avail = (uint16_t *)(guest->memory + AT_AVAIL);
    avail[2 + guest->avail++ % RING_SIZE] = (uint16_t)(3 * index);
}

static inline void guest_kick(struct guest *guest)
{
    uint16_t *avail = (uint16_t *)(guest->memory + AT_AVAIL);
    uint64_t one = 1;
    __atomic_store_n(&avail[2 + RING_SIZE], guest->used, __ATOMIC_SEQ_CST); /* used_event */
    __atomic_store_n(&avail[1], guest->avail, __ATOMIC_SEQ_CST);
    CHECK(write(guest->kick, &one, sizeof one) == sizeof one);
}

static inline void guest_wait(struct guest *guest)
{
    uint16_t *used = (uint16_t *)(guest->memory + AT_USED), *avail = (uint16_t *)(guest->memory + AT_AVAIL);
    struct pollfd watch = {.fd = guest->call, .events = POLLIN};
    uint64_t count;
    while (guest->used != guest->avail) {
        __atomic_store_n(&avail[2 + RING_SIZE], guest->used, __ATOMIC_SEQ_CST);
        if (__atomic_load_n(&used[1], __ATOMIC_SEQ_CST) == guest->used) {
            CHECK(poll(&watch, 1, 60000) == 1); /* a notification is never lost */
            ssize_t n = read(guest->call, &count, sizeof count);
            (void)n;
            continue;
        }
        uint32_t *element = (uint32_t *)(used + 2) + 2 * (guest->used++ % RING_SIZE);
        unsigned index = element[0] / 3;
        CHECK(index < guest->owner->batch_size && guest->memory[AT_HEADERS + 32 * index + 16] == 0);
        const struct operation *operation = &guest->owner->batch[index];
        if (operation->kind == KIND_READ)
            memcpy(guest->owner->data[index], guest->memory + AT_DATA + LONGEST * index, operation->blocks * BLOCK);
        completed(guest->owner, index);
    }
}

static inline void guest_work(struct guest *guest, unsigned batches)
{
    while (batches--) {
        fill_batch(guest->owner);
        for (unsigned i = 0; i < guest->owner->batch_size; i++)
            guest_request(guest, i);
        guest_kick(guest);
        guest_wait(guest);
    }
}

/* ---- the back end's side, for the control thread ---- */

static inline void guest_start_queue(struct guest *guest, bt_vhost *session, uint32_t base, int thread)
{
    CHECK(bt_vhost_queue_set_size(session, 0, RING_SIZE) == 0 && bt_vhost_queue_set_base(session, 0, base) == 0);
    CHECK(bt_vhost_queue_set_addresses(session, 0, USER_BASE, USER_BASE + AT_AVAIL, USER_BASE + AT_USED) == 0);
    CHECK(bt_vhost_queue_set_kick(session, 0, guest->kick) == 0);
    CHECK(bt_vhost_queue_set_call(session, 0, guest->call) == 0);
    CHECK(bt_vhost_queue_start(session, 0, thread) == 0);
}

static inline bt_vhost *guest_session(struct guest *guest, bt_datapath *dp, uint64_t tag, bt_object *gate)
{
    const struct bt_vhost_region region = {GUEST_BASE, GUEST_SIZE, USER_BASE, 0};
    bt_vhost *session = bt_vhost_new(dp, tag, gate, 1, DISK_BLOCKS * BLOCK, BLOCK, true, "12345678901234567890");
    CHECK(session && bt_vhost_add_region(session, &region, guest->memory_fd) == 0);
    uint64_t features = 1ull << 32 | 1ull << 13 | 1ull << 14 | (guest->event_idx ? 1ull << 29 : 0);
    CHECK(bt_vhost_set_features(session, features) == 0);
    bt_vhost_set_write_through(session, false);
    return session;
}

#endif
