/* SPDX-License-Identifier: Apache-2.0 */
/* What the tests of the NVMe device share: a datapath, a mock controller, and the part of Python that answers the
 * device's events: aborts and resets. */
#ifndef NVME_WORLD_H
#define NVME_WORLD_H

#include "nvme_mock.h"

#include <poll.h>

#define WORLD_TAG 1u
#define WORLD_SESSION 2u
#define WORLD_COOKIES 8192u
#define WORLD_PATIENCE_NS 30000000000ull /* a test that waits longer has failed */

struct world {
    bt_datapath *dp;
    struct mock mock;
    bt_dma *dma;
    bt_object *device;
    struct bt_nvme_options options;
    struct bt_nvme_queue queues[MOCK_QUEUES];
    int queue_count;
    unsigned timeouts, stuck, breaches, errors; /* events seen */
    unsigned breach;                            /* of the newest: how */
    bool needs_reset;
    void (*session_ended)(uint64_t tag); /* another one than the device's */
    bool released;
    uint64_t cookie;             /* the newest one */
    bool done[WORLD_COOKIES];    /* by cookie */
    int64_t result[WORLD_COOKIES];
};

static inline void world_session_event(struct world *world, uint64_t result)
{
    unsigned what = result & 0xFF, id = result >> 8 & 0xFFFF, detail = result >> 24 & 0xFFFF;
    world->timeouts += what == BT_NVME_TIMEOUT;
    world->stuck += what == BT_NVME_STUCK;
    if (what == BT_NVME_PROTOCOL) {
        world->breaches++;
        world->breach = detail;
    }
    world->errors += what == BT_NVME_ERROR;
    if (what == BT_NVME_TIMEOUT)
        mock_abort(&world->mock, id, (uint16_t)detail);
    world->needs_reset |= what == BT_NVME_STUCK || what == BT_NVME_PROTOCOL;
}

/* Takes events, waiting a little for them. */
static inline void world_events(struct world *world, int milliseconds)
{
    struct bt_event events[16];
    struct pollfd pollfd = {bt_datapath_eventfd(world->dp), POLLIN, 0};
    poll(&pollfd, 1, milliseconds);
    int count = bt_events(world->dp, events, 16);
    for (int i = 0; i < count; i++) {
        if (events[i].type == BT_EVENT_SESSION && events[i].tag == WORLD_SESSION) {
            world_session_event(world, (uint64_t)events[i].result);
        } else if (events[i].type == BT_EVENT_SESSION) {
            CHECK(world->session_ended);
            world->session_ended(events[i].tag);
        } else if (events[i].type == BT_EVENT_RELEASED) {
            world->released |= events[i].tag == WORLD_TAG;
        } else if (events[i].type == BT_EVENT_DONE) {
            CHECK(events[i].tag < WORLD_COOKIES && !world->done[events[i].tag]);
            world->done[events[i].tag] = true;
            world->result[events[i].tag] = events[i].result;
        }
    }
}

static inline uint64_t world_cookie(struct world *world)
{
    CHECK(world->cookie + 1 < WORLD_COOKIES);
    return ++world->cookie;
}

/* Waits for the DONE of cookie; its result. */
static inline int64_t world_wait(struct world *world, uint64_t cookie)
{
    uint64_t until = bt_now_ns() + WORLD_PATIENCE_NS;
    while (!world->done[cookie]) {
        world_events(world, 100);
        CHECK(bt_now_ns() < until);
    }
    return world->result[cookie];
}

/* As Python resets a controller that is stuck. */
static inline void world_reset(struct world *world, int error)
{
    uint64_t cookie = world_cookie(world);
    bt_nvme_quiesce(world->device, cookie);
    world_wait(world, cookie);
    mock_reset(&world->mock);
    bt_nvme_resume(world->device, error);
    world->needs_reset = false;
}

static inline void world_open(struct world *world, const struct bt_dma_limits *limits)
{
    struct bt_dma_ops ops = {.map = mock_map, .unmap = mock_unmap};
    world->options.nsid = world->mock.nsid;
    world->options.block_size = world->mock.block;
    world->options.size = world->mock.size;
    world->options.max_transfer = world->mock.max_transfer;
    world->options.registers = world->mock.registers;
    world->options.registers_length = MOCK_REGISTERS;
    world->options.stride = 4;
    if (limits) {
        world->dma = bt_dma_new(world->dp, &ops, &world->mock, limits);
        CHECK(world->dma);
    }
    world->device = bt_nvme_new(world->dp, WORLD_TAG, WORLD_SESSION, world->dma, &world->options, world->queues,
                                world->queue_count);
    CHECK(world->device);
}

static inline void world_close(struct world *world)
{
    uint64_t until = bt_now_ns() + WORLD_PATIENCE_NS, cookie = world_cookie(world);
    bt_nvme_stop(world->device, cookie);
    world_wait(world, cookie);
    bt_object_unref(world->device);
    while (!world->released) {
        world_events(world, 100);
        CHECK(bt_now_ns() < until);
    }
    if (world->dma) {
        cookie = world_cookie(world);
        bt_dma_free(world->dma, cookie);
        world_wait(world, cookie);
    }
    for (int i = 0; i < world->queue_count; i++)
        mock_queue_free(&world->mock, &world->queues[i]);
    CHECK(world->mock.span_count == 0); /* nothing stays mapped */
    bt_datapath_free(world->dp);
    mock_free(&world->mock);
}

/* ---- for tests of single cases: one I/O thread, one queue pair ---- */

#define CASE_SIZE (8u << 20)
#define CASE_TIMEOUT_NS 100000000ull

static uint64_t case_timeout_ns = WORLD_PATIENCE_NS; /* for those that want to see none */

static inline void case_start(struct world *world, uint32_t block, uint32_t depth, uint32_t flags,
                              const struct bt_dma_limits *limits, uint32_t max_transfer)
{
    world->dp = bt_datapath_new();
    CHECK(bt_thread_new(world->dp, 0) == 0);
    mock_init(&world->mock, CASE_SIZE, block, max_transfer, 1);
    world->queues[world->queue_count++] = mock_queue_new(&world->mock, 1, depth, 64, 0);
    world->options.timeout_ns = case_timeout_ns;
    world->options.flags = flags;
    world_open(world, limits);
    for (uint32_t i = 0; i < CASE_SIZE; i += 4)
        memcpy(world->mock.disk + i, &i, 4);
}

static inline struct world *case_begin(uint32_t block, uint32_t depth, uint32_t flags,
                                       const struct bt_dma_limits *limits)
{
    struct world *world = calloc(1, sizeof *world);
    CHECK(world);
    case_start(world, block, depth, flags, limits, BT_NVME_MAX_TRANSFER);
    return world;
}

static inline void case_end(struct world *world)
{
    world_close(world);
    free(world);
}

static inline uint64_t case_submit(struct world *world, int op, uint32_t flags, uint64_t offset, uint64_t length,
                                   void *buffer)
{
    uint64_t cookie = world_cookie(world);
    CHECK(bt_submit(world->dp, 0, world->device, op, flags, offset, length, buffer, cookie) == 0);
    return cookie;
}

/* One request; its result. */
static inline int64_t case_do(struct world *world, int op, uint32_t flags, uint64_t offset, uint64_t length,
                              void *buffer)
{
    return world_wait(world, case_submit(world, op, flags, offset, length, buffer));
}

static inline struct bt_nvme_counters case_counters(struct world *world)
{
    struct bt_nvme_counters counters;
    bt_nvme_get_counters(world->device, &counters);
    return counters;
}

/* ---- shared memory ---- */

#define MIB (1u << 20)

/* Aligned as pieces are, so that a test knows how many there will be. */
static inline unsigned char *map_memory(size_t length)
{
    size_t most = length + 2 * MIB;
    unsigned char *memory = mmap(NULL, most, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(memory != MAP_FAILED);
    size_t skip = -(uintptr_t)memory & (2 * MIB - 1), rest = 2 * MIB - skip;
    if (skip)
        CHECK(munmap(memory, skip) == 0);
    if (rest)
        CHECK(munmap(memory + skip + length, rest) == 0);
    return memory + skip;
}

static inline unsigned char *share(struct world *world, size_t length)
{
    unsigned char *memory = map_memory(length);
    bt_memory_add(world->dp, memory, length);
    return memory;
}

static inline struct bt_dma_counters dma_counters(struct world *world)
{
    struct bt_dma_counters counters;
    bt_dma_get_counters(world->dma, &counters);
    return counters;
}

/* Until the worker has mapped so much. */
static inline void await_mapped(struct world *world, uint64_t bytes)
{
    uint64_t until = bt_now_ns() + WORLD_PATIENCE_NS;
    while (dma_counters(world).mapped_bytes != bytes) {
        world_events(world, 1);
        CHECK(bt_now_ns() < until);
    }
}

/* Events until one of these came: as it was before, more. */
static inline void case_await(struct world *world, const unsigned *events, unsigned before)
{
    uint64_t until = bt_now_ns() + WORLD_PATIENCE_NS;
    while (*events == before) {
        world_events(world, 100);
        CHECK(bt_now_ns() < until);
    }
}

#endif
