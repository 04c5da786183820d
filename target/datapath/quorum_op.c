/* SPDX-License-Identifier: Apache-2.0 */
/* The quorum's ops: taken from and given back to the lane of their thread, with the buffers for what they compare. A
 * thread's buffers are bounded; ops that find no room wait for those before them. An op waits for memory before it
 * waits for a range: never the other way around. */
#include "quorum_internal.h"

#define SMALLEST (16u << 10) /* of buffers */

/* ---- memory ---- */

static struct bt_quorum_lane *lane_of(const struct bt_quorum_op *op)
{
    return &op->quorum->lanes[op->io->thread->index];
}

static void drop_buffer(struct bt_quorum_op *op)
{
    free(op->buffer);
    op->buffer = NULL;
    op->buffer_size = 0;
}

static int grow_buffer(struct bt_quorum_op *op)
{
    void *memory;
    uint64_t size = SMALLEST;
    if (op->need <= op->buffer_size)
        return 0;
    while (size < op->need)
        size *= 2;
    drop_buffer(op);
    if (posix_memalign(&memory, BT_QUORUM_PAGE, size))
        return -ENOMEM;
    op->buffer = memory;
    op->buffer_size = size;
    return 0;
}

/* Begins an op for which there is memory. */
static void begin(struct bt_quorum_op *op)
{
    int result = grow_buffer(op);
    lane_of(op)->used += op->buffer_size;
    if (result < 0)
        bt_quorum_finish(op, result);
    else
        bt_quorum_run(op);
}

static bool has_room(const struct bt_quorum_lane *lane, uint64_t need)
{
    return !lane->used || lane->used + need <= BT_QUORUM_MEMORY;
}

static void resume_waiting(struct bt_deferred *deferred, struct bt_thread *thread)
{
    struct bt_quorum_lane *lane = BT_CONTAINER(deferred, struct bt_quorum_lane, resume);
    (void)thread;
    while (lane->waiting && has_room(lane, lane->waiting->need)) {
        struct bt_quorum_op *op = lane->waiting;
        lane->waiting = op->next;
        if (!lane->waiting)
            lane->waiting_tail = &lane->waiting;
        begin(op);
    }
}

void bt_quorum_begin(struct bt_quorum_op *op)
{
    struct bt_quorum_lane *lane = lane_of(op);
    if (BT_LIKELY(!op->need || (!lane->waiting && has_room(lane, op->need)))) {
        begin(op);
        return;
    }
    drop_buffer(op);
    op->next = NULL;
    *lane->waiting_tail = op;
    lane->waiting_tail = &op->next;
}

/* ---- ops ---- */

static int count_children(const struct bt_quorum *quorum)
{
    int count = 0;
    while (count < BT_QUORUM_MAX_CHILDREN && bt_child_get((bt_child *)&quorum->children[count]))
        count++;
    return count;
}

static struct bt_quorum_op *op_alloc(struct bt_quorum *quorum, int count)
{
    struct bt_quorum_op *op = calloc(1, sizeof *op + (size_t)count * sizeof op->parts[0]);
    if (!op)
        return NULL;
    op->quorum = quorum;
    op->capacity = count;
    for (int i = 0; i < count; i++)
        op->parts[i].op = op;
    return op;
}

static void op_free(struct bt_quorum_op *op)
{
    drop_buffer(op);
    free(op);
}

struct bt_quorum_op *bt_quorum_op_get(struct bt_quorum *quorum, struct bt_io *io)
{
    struct bt_quorum_lane *lane = &quorum->lanes[io->thread->index];
    struct bt_quorum_op *op = lane->free;
    int count = count_children(quorum);
    if (op) {
        lane->free = op->next;
        lane->idle -= op->buffer_size;
    }
    if (op && op->capacity < count) {
        op_free(op);
        op = NULL;
    }
    if (!op && !(op = op_alloc(quorum, count)))
        return NULL;
    op->io = io;
    op->at = op->length = op->need = 0;
    op->turn = 0;
    op->count = count;
    op->range.thread = io->thread;
    for (int i = 0; i < count; i++) {
        op->parts[i].request.object = bt_child_get(&quorum->children[i]);
        op->parts[i].bad = false;
    }
    return op;
}

bool bt_quorum_finish(struct bt_quorum_op *op, int result)
{
    struct bt_quorum *quorum = op->quorum;
    struct bt_quorum_lane *lane = lane_of(op);
    struct bt_io *io = op->io;
    bt_range_release(&quorum->ranges, &op->range);
    if (atomic_load_explicit(&quorum->stopped, memory_order_relaxed))
        result = -EIO; /* nothing is served any more, not even what was under way */
    if (result < 0)
        bt_count_failure(&quorum->device.base, io->thread, io->op, io->length);
    else
        bt_count(&bt_counters_of(&quorum->device.base, io->thread)->engine_done, 1);
    lane->used -= op->buffer_size;
    if (lane->idle + op->buffer_size > BT_QUORUM_IDLE)
        drop_buffer(op);
    lane->idle += op->buffer_size;
    op->next = lane->free;
    lane->free = op;
    if (BT_UNLIKELY(lane->waiting != NULL))
        bt_defer(io->thread, &lane->resume);
    bt_io_finish(io, result);
    return false;
}

/* ---- lanes ---- */

void bt_quorum_lanes_init(struct bt_quorum *quorum)
{
    for (int i = 0; i < BT_MAX_THREADS; i++) {
        quorum->lanes[i].waiting_tail = &quorum->lanes[i].waiting;
        quorum->lanes[i].resume.fn = resume_waiting;
    }
}

void bt_quorum_lanes_destroy(struct bt_quorum *quorum)
{
    for (int i = 0; i < BT_MAX_THREADS; i++)
        while (quorum->lanes[i].free) {
            struct bt_quorum_op *op = quorum->lanes[i].free;
            quorum->lanes[i].free = op->next;
            op_free(op);
        }
}
