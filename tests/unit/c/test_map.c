/* SPDX-License-Identifier: Apache-2.0 */
/* A map over a file without Python: lanes on two I/O threads read and change their own blocks of shared granules,
 * while the control thread loads and evicts slices, grants clusters, flushes, drains a gate, synchronizes and makes
 * the map larger.
 *
 * test_map FILE [OPERATIONS] [SEED] [BACKING]: the files are made and overwritten. With BACKING, a copy-on-read object
 * is above the map, and lanes populate it, too. Exits 1 at the first difference. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <unistd.h>

#include "check.h"
#include "core.h"
#include "lanes.h"

#define GRANULE_BITS 12
#define SLICE_BITS 4
#define SLICE_ENTRIES (1u << SLICE_BITS)
#define BLOCK 512u
#define LANES 32u
#define SIZE (1u << 20)
#define BLOCKS (SIZE / BLOCK)
#define SLICES (SIZE >> GRANULE_BITS >> SLICE_BITS)
#define DONE_COOKIE 1
#define BACKED_BLOCKS (BLOCKS / 4 * 3 + 1)

struct lane {
    struct bt_message message;
    struct bt_request request;
    struct iovec iov;
    unsigned number;
    uint32_t random;
    unsigned left;
    unsigned block;
    uint8_t model[BLOCKS / LANES]; /* the byte that fills each block of the lane; 0: zeros */
    uint8_t data[BLOCK];
};

static bt_datapath *dp;
static bt_object *map, *gate, *backing, *cor;
static struct lane lanes[LANES];
static _Atomic unsigned running = LANES;
static uint64_t tables[SLICES][SLICE_ENTRIES];
static uint64_t next_cluster;
static uint64_t flushes, loads;

/* ---- lanes, on the I/O threads ---- */

static void step(struct lane *lane);

static void check_read(struct lane *lane)
{
    for (unsigned i = 0; i < BLOCK; i++)
        CHECK(lane->data[i] == lane->model[lane->block / LANES]);
}

static void step_done(struct bt_request *request)
{
    struct lane *lane = BT_CONTAINER(request, struct lane, request);
    CHECK(request->ret == 0);
    if (request->op == BT_READ)
        check_read(lane);
    next_step(request, &lane->message, &lane->left, &running);
}

static int choose(struct lane *lane, uint32_t dice)
{
    if (dice < 40) {
        lane->model[lane->block / LANES] = (uint8_t)(next_random(&lane->random) | 1);
        memset(lane->data, lane->model[lane->block / LANES], BLOCK);
        return BT_WRITE;
    }
    if (dice < 50) {
        lane->model[lane->block / LANES] = 0;
        return BT_ZEROES;
    }
    return dice < 52 ? BT_FLUSH : dice < 56 && backing ? BT_CACHE : BT_READ;
}

static void step(struct lane *lane)
{
    uint32_t dice = next_random(&lane->random) % 100;
    lane->block = lane->number + LANES * (next_random(&lane->random) % (BLOCKS / LANES));
    int op = choose(lane, dice);
    int flags = dice % 7 == 0 ? BT_FUA : dice % 2 ? BT_UNMAP : 0;
    if (op == BT_CACHE)
        flags = dice % 2 ? BT_POPULATE : 0;
    lane->iov = (struct iovec){lane->data, BLOCK};
    begin(&lane->request, gate, op, flags, lane->block * BLOCK, &lane->iov, step_done);
}

static void step_message(struct bt_message *message, struct bt_thread *thread)
{
    struct lane *lane = BT_CONTAINER(message, struct lane, message);
    lane->request.thread = thread;
    step(lane);
}

/* ---- what Python would do, on the control thread ---- */

static void flush_tables(void)
{
    uint64_t dirty[SLICES];
    int n = bt_map_dirty(map, dirty, SLICES);
    for (int i = 0; i < n; i++)
        CHECK(bt_map_clean(map, dirty[i], tables[dirty[i]]) == 0);
    bt_map_shrink(map, 3 * SLICE_ENTRIES * 8);
    flushes++;
}

static void answer_fault(const struct bt_event *event)
{
    uint64_t slice = event->offset >> GRANULE_BITS >> SLICE_BITS;
    if (event->reason == BT_FAULT_LOAD) {
        int ret = bt_map_load(map, slice, tables[slice], true);
        CHECK(ret == 0 || ret == -EEXIST);
        loads++;
        bt_fault_retry(event->request);
    } else if (event->reason == BT_FAULT_GRANT) {
        CHECK(bt_map_grant(map, next_cluster << GRANULE_BITS, 5, true) == 0);
        next_cluster += 5;
        bt_fault_retry(event->request);
    } else {
        CHECK(event->reason == BT_FAULT_FLUSH);
        flush_tables();
        bt_fault_done(event->request, 0);
    }
}

/* Handles events until the one with this cookie comes; 0: what is there now. */
static void handle_events(uint64_t cookie)
{
    struct bt_event events[16];
    struct pollfd watch = {.fd = bt_datapath_eventfd(dp), .events = POLLIN};
    bool waiting = cookie != 0;
    do {
        int n = bt_events(dp, events, 16);
        for (int i = 0; i < n; i++) {
            if (events[i].type == BT_EVENT_FAULT)
                answer_fault(&events[i]);
            else if (events[i].type == BT_EVENT_DONE && events[i].tag == cookie)
                waiting = false;
        }
        if (!n)
            poll(&watch, 1, 2);
    } while (waiting);
}

static void disturb(unsigned turn)
{
    if (turn % 16 == 3) {
        bt_gate_drain(gate, DONE_COOKIE);
        handle_events(DONE_COOKIE);
        bt_gate_resume(gate, NULL);
    } else if (turn % 16 == 7) {
        bt_synchronize(map, DONE_COOKIE);
        handle_events(DONE_COOKIE);
    } else if (turn % 16 == 11) {
        static uint64_t room = SIZE;
        room += SLICE_ENTRIES << GRANULE_BITS;
        CHECK(bt_map_reserve(map, room) == 0 && bt_map_slices(map) == room >> GRANULE_BITS >> SLICE_BITS);
        bt_object_set_size(map, room); /* nothing is asked of the new part: what is old must stay */
    } else if (turn % 4 == 1) {
        bt_map_shrink(map, 2 * SLICE_ENTRIES * 8);
    }
}

/* Granules of one byte, of zeros, and mixed ones; it ends within a granule, before the map does. */
static uint8_t backed(unsigned block)
{
    unsigned granule = block / ((1u << GRANULE_BITS) / BLOCK);
    return block >= BACKED_BLOCKS || granule % 3 == 0 ? 0 : (uint8_t)(block * 7 % 255 + 1);
}

static void make_backing(const char *path)
{
    uint8_t block[BLOCK];
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    CHECK(fd >= 0);
    for (unsigned i = 0; i < BACKED_BLOCKS; i++) {
        memset(block, backed(i), BLOCK);
        CHECK(pwrite(fd, block, BLOCK, i * BLOCK) == BLOCK);
        lanes[i % LANES].model[i / LANES] = backed(i);
    }
    backing = bt_file_new(dp, 4, fd, BACKED_BLOCKS * BLOCK, 0, BT_ENGINE_THREADS, 1, 1);
    CHECK(backing);
    close(fd);
}

static void start_lanes(unsigned operations, uint32_t seed)
{
    for (unsigned i = 0; i < LANES; i++) {
        lanes[i].number = i;
        lanes[i].random = seed * 2654435761u + i + 1;
        lanes[i].left = operations;
        lanes[i].message.fn = step_message;
        bt_thread_post(bt_thread_get(dp, (int)(i % 2)), &lanes[i].message);
    }
}

static void release_all(bt_object *child)
{
    bt_object_unref(gate);
    bt_object_unref(map);
    bt_object_unref(child);
    if (backing) {
        bt_object_unref(backing);
        bt_object_unref(cor);
    }
    for (int released = 0; released < (backing ? 5 : 3);) {
        struct bt_event event;
        if (bt_events(dp, &event, 1) && event.type == BT_EVENT_RELEASED)
            released++;
    }
    bt_datapath_free(dp);
}

int main(int argc, char **argv)
{
    CHECK(argc > 1);
    unsigned operations = argc > 2 ? (unsigned)atoi(argv[2]) : 500;
    uint32_t seed = argc > 3 ? (uint32_t)atoi(argv[3]) : 1;
    int fd = open(argv[1], O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    CHECK(fd >= 0);
    for (unsigned i = 0; i < SLICES * SLICE_ENTRIES; i++)
        tables[i / SLICE_ENTRIES][i % SLICE_ENTRIES] = BT_ENTRY_UNALLOCATED | BT_ENTRY_ALLOC;
    dp = bt_datapath_new();
    CHECK(bt_thread_new(dp, 0) == 0 && bt_thread_new(dp, 20000) == 1);
    bt_object *child = bt_file_new(dp, 1, fd, 0, 0, seed % 2 ? BT_ENGINE_IO_URING : BT_ENGINE_THREADS, 1, 1);
    close(fd);
    if (argc > 4)
        make_backing(argv[4]);
    map = bt_map_new(dp, 2, GRANULE_BITS, SLICE_BITS, SIZE, child, backing);
    cor = backing ? bt_cor_new(dp, 5, map, NULL) : NULL;
    gate = bt_gate_new(dp, 3, cor ? cor : map, true);
    CHECK(child && map && gate);
    start_lanes(operations, seed);
    for (unsigned turn = 0; atomic_load(&running); turn++) {
        handle_events(0);
        disturb(turn);
    }
    struct bt_counters counters;
    bt_object_counters(map, &counters);
    printf("loads %lu flushes %lu grants %lu\n", loads, flushes, counters.grants);
    CHECK(loads > SLICES && flushes > 0 && counters.grants > 0);
    if (backing) { /* all that was populated is there */
        bt_object_counters(cor, &counters);
        CHECK(counters.requests[BT_READ] > 0 && counters.requests[BT_CACHE] > 0);
    }
    release_all(child);
    puts("ok");
    return 0;
}
