/* SPDX-License-Identifier: Apache-2.0 */
/* What the tests of the NVMe device share: a datapath, a mock controller, and the part of Python that answers the
 * device's events: aborts and resets. */
#ifndef NVME_WORLD_H
#define NVME_WORLD_H

#include "nvme_mock.h"

#include <poll.h>

#define WORLD_TAG 1u
#define WORLD_SESSION 2u
#define WORLD_PATIENCE_NS 30000000000ull /* a test that waits longer has failed */

struct world {
    bt_datapath *dp;
    struct mock mock;
    bt_dma *dma;
    bt_object *device;
    struct bt_nvme_options options;
    struct bt_nvme_queue queues[MOCK_QUEUES];
    int queue_count;
    unsigned timeouts, stuck, breaches; /* events seen */
    bool needs_reset;
    bool released;
    uint64_t cookie, done; /* the newest ones */
    int64_t result;        /* of the newest DONE */
};

static inline void world_session_event(struct world *world, uint64_t result)
{
    unsigned what = result & 0xFF, id = result >> 8 & 0xFFFF, detail = result >> 24 & 0xFFFF;
    world->timeouts += what == BT_NVME_TIMEOUT;
    world->stuck += what == BT_NVME_STUCK;
    world->breaches += what == BT_NVME_PROTOCOL;
    if (what == BT_NVME_TIMEOUT)
        mock_abort(&world->mock, id, (uint16_t)detail);
    else
        world->needs_reset = true;
}

/* Takes events, waiting a little for them. */
static inline void world_events(struct world *world, int milliseconds)
{
    struct bt_event events[16];
    struct pollfd pollfd = {bt_datapath_eventfd(world->dp), POLLIN, 0};
    poll(&pollfd, 1, milliseconds);
    int count = bt_events(world->dp, events, 16);
    for (int i = 0; i < count; i++) {
        if (events[i].type == BT_EVENT_SESSION) {
            CHECK(events[i].tag == WORLD_SESSION);
            world_session_event(world, (uint64_t)events[i].result);
        } else if (events[i].type == BT_EVENT_RELEASED) {
            CHECK(events[i].tag == WORLD_TAG);
            world->released = true;
        } else if (events[i].type == BT_EVENT_DONE) {
            world->done = events[i].tag;
            world->result = events[i].result;
        }
    }
}

/* Waits for the DONE of world->cookie; its result. */
static inline int64_t world_wait(struct world *world)
{
    uint64_t until = bt_now_ns() + WORLD_PATIENCE_NS;
    while (world->done != world->cookie) {
        world_events(world, 100);
        CHECK(bt_now_ns() < until);
    }
    return world->result;
}

/* As Python resets a controller that is stuck. */
static inline void world_reset(struct world *world, int error)
{
    bt_nvme_quiesce(world->device, ++world->cookie);
    world_wait(world);
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
    uint64_t until = bt_now_ns() + WORLD_PATIENCE_NS;
    bt_nvme_stop(world->device, ++world->cookie);
    world_wait(world);
    bt_object_unref(world->device);
    while (!world->released) {
        world_events(world, 100);
        CHECK(bt_now_ns() < until);
    }
    if (world->dma) {
        bt_dma_free(world->dma, ++world->cookie);
        world_wait(world);
    }
    for (int i = 0; i < world->queue_count; i++)
        mock_queue_free(&world->mock, &world->queues[i]);
    CHECK(world->mock.span_count == 0); /* nothing stays mapped */
    bt_datapath_free(world->dp);
    mock_free(&world->mock);
}

#endif
