/* SPDX-License-Identifier: Apache-2.0 */
/* libFuzzer on the border between a guest's memory and the datapath: rings, descriptor chains, request headers.
 *
 * Built from vhost_*.c and iov.c alone; the rest of the datapath is stubs here. A stub takes each request as the
 * graph would, checks that it keeps to the guest's memory and to the device's size, touches all its bytes, and
 * completes it at once, later, or with an error.
 *
 * Input: 8 bytes of set-up, then what guest memory holds from address 0 on: available ring, descriptors, used
 * ring, and at 0x200 whatever the descriptors point to. test_vhost_ring.py makes seeds. */
#define _GNU_SOURCE
#include <stdio.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "vhost.h"

#define HALF 0x8000u /* each of the first two regions, which are neighbours */
#define FAR 0x100000000ull
#define FAR_SIZE 0x3000u
#define CAPACITY (1u << 20)
#define MAX_RING_BITS 4
#define AVAIL 0x0u /* small rings, close together, so that short inputs reach everything */
#define DESC 0x40u
#define USED 0x140u
#define ROUNDS 4

#define CHECK(condition)                                                                                              \
    do {                                                                                                              \
        if (!(condition)) {                                                                                           \
            fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition);                                 \
            abort();                                                                                                  \
        }                                                                                                             \
    } while (0)

static struct bt_vhost *session;
static struct bt_thread thread;
static struct bt_deferred *deferred;
static struct bt_poller *poller;
static struct bt_request *pending;
static unsigned started, completed, stops, chance;
static int kick_fd, memory_fd;
static unsigned char *memory; /* HALF, HALF, FAR_SIZE in one file */

/* ---- the rest of the datapath ---- */

void bt_object_ref(bt_object *object) { (void)object; }
void bt_object_unref(bt_object *object) { (void)object; }
struct bt_thread *bt_thread_get(bt_datapath *dp, int index) { (void)dp; return index == 0 ? &thread : NULL; }
void bt_thread_post(struct bt_thread *to, struct bt_message *message) { message->fn(message, to); }
void bt_poller_add(struct bt_thread *to, struct bt_poller *added) { (void)to; poller = added; }
void bt_poller_remove(struct bt_thread *to, struct bt_poller *removed) { (void)to; CHECK(poller == removed); poller = NULL; }
int bt_watch_add(struct bt_thread *to, struct bt_watch *watch, uint32_t events) { (void)to, (void)watch, (void)events; return 0; }
void bt_watch_remove(struct bt_thread *to, struct bt_watch *watch) { (void)to, (void)watch; }
void bt_timer_add(struct bt_thread *to, struct bt_timer *timer) { (void)to, (void)timer; }
void bt_timer_cancel(struct bt_thread *to, struct bt_timer *timer) { (void)to, (void)timer; }
void bt_grace(bt_datapath *dp, void (*fn)(void *arg), void *arg) { (void)dp; fn(arg); }
void bt_hurry(bt_datapath *dp, _Atomic bool *flag) { (void)dp; atomic_store(flag, true); }
void bt_unhurry(bt_datapath *dp, _Atomic bool *flag) { (void)dp; atomic_store(flag, false); }
void bt_event_send(bt_datapath *dp, const struct bt_event *event) { (void)dp; CHECK(event->type == BT_EVENT_SESSION); }
void bt_event_done(bt_datapath *dp, uint64_t cookie, int64_t result) { (void)dp, (void)result; CHECK(cookie == 7); stops++; }

void bt_defer(struct bt_thread *to, struct bt_deferred *added)
{
    (void)to;
    CHECK(!deferred || deferred == added);
    deferred = added;
}

static bool in_guest(const struct iovec *iov)
{
    const struct vhost_memory *mapped = &session->memory;
    for (uint32_t i = 0; i < mapped->count; i++) {
        const struct vhost_region *region = &mapped->regions[i];
        uintptr_t start = (uintptr_t)region->host, at = (uintptr_t)iov->iov_base;
        if (at >= start && bt_range_ok(at - start, iov->iov_len, region->size))
            return true;
    }
    return false;
}

static void check_request(const struct bt_request *request)
{
    uint64_t total = 0;
    CHECK(bt_range_ok(request->offset, request->length, CAPACITY));
    CHECK(request->offset % session->block_size == 0 && request->length % session->block_size == 0);
    CHECK(session->writable || request->op == BT_READ || request->op == BT_FLUSH);
    for (int i = 0; i < request->iovcnt; i++) {
        CHECK(in_guest(&request->iov[i]));
        total += request->iov[i].iov_len;
    }
    CHECK(total >= request->length || (request->op != BT_READ && request->op != BT_WRITE));
}

static void complete(struct bt_request *request)
{
    static unsigned char content[FAR_SIZE];
    if (request->op == BT_READ)
        bt_iov_zero(request->iov, request->iovcnt, 0, request->length);
    if (request->op == BT_WRITE)
        bt_iov_to_buffer(request->iov, request->iovcnt, 0, content, bt_min(request->length, sizeof content));
    request->ret = chance % 5 == 0 ? -EIO : 0;
    completed++;
    request->done(request);
}

void bt_request_start(struct bt_request *request)
{
    check_request(request);
    started++;
    chance = chance * 1103515245u + 12345u;
    if (chance & 0x10000) {
        request->next = pending;
        pending = request;
    } else {
        complete(request);
    }
}

/* ---- the front end ---- */

static void complete_pending(void)
{
    while (pending) {
        struct bt_request *request = pending;
        pending = request->next;
        complete(request);
    }
}

static void run_deferred(void)
{
    struct bt_deferred *now = deferred;
    deferred = NULL;
    if (now)
        now->fn(now, &thread);
}

static void set_up(void)
{
    memory_fd = memfd_create("guest", 0);
    CHECK(ftruncate(memory_fd, 2 * HALF + FAR_SIZE) == 0);
    memory = mmap(NULL, 2 * HALF + FAR_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, memory_fd, 0);
    kick_fd = eventfd(0, 0);
    session = bt_vhost_new(NULL, 1, NULL, 1, CAPACITY, 512, true, "12345678901234567890");
    const struct bt_vhost_region regions[] = {
        {HALF, HALF, HALF, HALF}, {FAR, FAR_SIZE, FAR, 2 * HALF}, {0, HALF, 0, 0}};
    for (int i = 0; i < 3; i++)
        CHECK(bt_vhost_add_region(session, &regions[i], memory_fd) == 0);
    CHECK(bt_vhost_queue_set_addresses(session, 0, DESC, AVAIL, USED) == 0);
    CHECK(bt_vhost_queue_set_kick(session, 0, kick_fd) == 0);
}

static void play(unsigned rounds, unsigned step)
{
    for (unsigned i = 0; i < rounds && poller; i++) {
        poller->poll(poller, &thread);
        if (i % 2)
            complete_pending();
        run_deferred();
        uint16_t *avail = (uint16_t *)(memory + AVAIL);
        avail[1] = (uint16_t)(avail[1] + step);
        if (poller && poller->arm(poller, &thread))
            poller->disarm(poller, &thread);
    }
}

int LLVMFuzzerTestOneInput(const unsigned char *data, size_t size);
int LLVMFuzzerTestOneInput(const unsigned char *data, size_t size)
{
    if (size < 8)
        return 0;
    if (!session)
        set_up();
    memset(memory, 0, 2 * HALF + FAR_SIZE);
    memcpy(memory, data + 8, bt_min(size - 8, 2 * HALF + FAR_SIZE));
    started = completed = stops = 0;
    chance = data[3];
    session->writable = data[1] & 1;
    session->block_size = data[1] & 2 ? 4096 : 512;
    uint64_t features = (data[1] & 4 ? 1ull << 28 : 0) | (data[1] & 8 ? 1ull << 29 : 0);
    CHECK(bt_vhost_set_features(session, features | (data[1] & 16 ? 3ull << 13 : 0)) == 0);
    CHECK(bt_vhost_queue_set_size(session, 0, 1u << (data[0] % (MAX_RING_BITS + 1))) == 0);
    CHECK(bt_vhost_queue_set_base(session, 0, data[4]) == 0);
    CHECK(bt_vhost_queue_start(session, 0, 0) == 0);
    play(1 + data[2] % ROUNDS, data[5]);
    CHECK(bt_vhost_queue_stop(session, 0, 7) == 0);
    complete_pending();
    run_deferred();
    CHECK(stops == 1 && started == completed && !poller && !deferred);
    bt_vhost_queue_stopped(session, 0);
    return 0;
}
