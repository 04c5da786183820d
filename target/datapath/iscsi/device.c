/* SPDX-License-Identifier: Apache-2.0 */
/* Requests of the datapath: where they are served, in which parts, and their end. What comes here is made of whole
 * blocks (see align.c). An io is served on its session's thread, and finished on its own. */
#include "ops.h"

#define MAX_PARTS 8

/* ---- the end of an io ---- */

static void count_end(struct bt_io *io, int result)
{
    if (result < 0)
        bt_count_failure(&io->device->base, io->thread, io->op, io->length);
    else
        bt_count(&bt_counters_of(&io->device->base, io->thread)->engine_done, 1);
}

static void io_returns(struct bt_message *message, struct bt_thread *thread)
{
    struct bt_io *io = BT_CONTAINER(message, struct bt_io, message);
    (void)thread;
    count_end(io, state_of(io)->result);
    node_of(io)->api->io_finish(io, state_of(io)->result);
}

static void io_end(struct bt_io *io, int result)
{
    const struct bt_device_api *api = node_of(io)->api;
    if (io->thread == session_of(io)->thread) {
        count_end(io, result);
        api->io_finish(io, result);
        return;
    }
    state_of(io)->result = result;
    io->message.fn = io_returns;
    api->thread_post(io->thread, &io->message);
}

static void io_go_on(struct bt_io *io);

void io_part_over(struct bt_io *io, int result)
{
    struct io_state *state = state_of(io);
    if (result < 0 && state->result == 0)
        state->result = result;
    state->pending--;
    io_go_on(io);
}

/* ---- all of an io ---- */

/* A WRITE with FUA that the LUN would not have taken. */
static bool needs_flush(struct bt_io *io)
{
    struct node *node = node_of(io);
    return io->op == BT_WRITE && (io->flags & BT_FUA) && !node->no_flush && !node->no_sync &&
           !node_has(node, BT_ISCSI_DPOFUA) && state_of(io)->stage == DATA && state_of(io)->result == 0;
}

/* Starts what may be started, and ends the io when nothing is left. Parts may end while they are started. */
static void io_go_on(struct bt_io *io)
{
    struct io_state *state = state_of(io);
    unsigned most = (io->op == BT_READ || io->op == BT_WRITE) && !io->bounce ? MAX_PARTS : 1;
    state->pending++; /* this, so that it does not end meanwhile */
    while (state->result == 0 && state->pos < state->end && state->pending <= most)
        ops_start_some(io);
    if (state->pending == 1 && needs_flush(io)) {
        state->stage = DURABLE;
        ops_start_flush(io);
    }
    if (--state->pending == 0)
        io_end(io, state->result);
}

/* What needs no command. 1: nothing of that kind. */
static int answer_here(struct bt_io *io)
{
    struct node *node = node_of(io);
    switch (io->op) {
    case BT_FLUSH:
        return node->no_flush || node->no_sync ? 0 : 1;
    case BT_CACHE:
        return 0;
    case BT_STATUS:
        io->status_length = io->length;
        io->status_flags = 0;
        return node_has(node, BT_ISCSI_PROVISIONED) && !node->no_status ? 1 : 0;
    case BT_DISCARD:
        return node_has(node, BT_ISCSI_UNMAP) && !node->no_unmap ? 1 : 0;
    case BT_ZEROES:
        return (io->flags & BT_FAST_ZERO) && !((io->flags & BT_UNMAP) && ops_may_unmap(node)) ? -EOPNOTSUPP : 1;
    default:
        return 1;
    }
}

/* Where the LUN ends: what would be read behind it is zeros, but not where it has shrunk. */
static int clip_to_end(struct bt_io *io)
{
    struct node *node = node_of(io);
    uint64_t blocks = atomic_load(&node->blocks), size = blocks * node->lun.block_size;
    uint64_t there = io->offset < size ? bt_min(io->length, size - io->offset) : 0;
    state_of(io)->end = there;
    if (there == io->length || io->op == BT_STATUS || io->op == BT_DISCARD)
        return 0;
    if (io->op != BT_READ)
        return -ENOSPC;
    if (blocks < atomic_load(&node->most_blocks))
        return -EIO;
    node->api->iov_zero(io->iov, io->iovcnt, there, io->length - there);
    return 0;
}

static void io_start(struct bt_io *io)
{
    struct node *node = node_of(io);
    struct io_state *state = state_of(io);
    int ret = atomic_load(&node->changed) ? -EIO : answer_here(io);
    if (ret == 1 && io->op == BT_FLUSH) {
        ops_start_flush(io);
        return;
    }
    if (ret == 1 && ((io->offset | io->length) & (node->lun.block_size - 1)))
        ret = -EINVAL;
    if (ret == 1 && (ret = clip_to_end(io)) == 0)
        ret = 1;
    if (ret <= 0) {
        io_end(io, ret);
        return;
    }
    if (io->op == BT_STATUS && !state->end)
        io->status_flags = BT_EXTENT_HOLE | BT_EXTENT_ZERO;
    io_go_on(io);
}

static void io_arrives(struct bt_message *message, struct bt_thread *thread)
{
    (void)thread;
    io_start(BT_CONTAINER(message, struct bt_io, message));
}

/* To the session that serves the io's thread. */
static void submit_from(struct bt_io *io, uint64_t source_offset)
{
    struct node *node = node_of(io);
    struct io_state *state = state_of(io);
    bt_count_request(&io->device->base, io->thread, io->op, io->offset, io->length);
    *state = (struct io_state){.session = (uint8_t)(io->thread->index % node->session_count),
                               .source_offset = source_offset};
    if (io->thread == session_of(io)->thread) {
        io_start(io);
        return;
    }
    io->message.fn = io_arrives;
    node->api->thread_post(session_of(io)->thread, &io->message);
}

static void submit(struct bt_io *io) { submit_from(io, 0); }

static void copy(struct bt_io *io, struct bt_device *source, uint64_t source_offset)
{
    io->bounce = source;
    submit_from(io, source_offset);
}

const struct bt_device_ops iscsi_device_ops = {.submit = submit, .can_copy = ops_can_copy, .copy = copy};
