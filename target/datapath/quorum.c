/* SPDX-License-Identifier: Apache-2.0 */
/* The quorum device: a request becomes one on each child, in rounds of a piece each, and the outcome of a round is put
 * to the vote.
 *
 * Data that is compared, or that has to be the same for all children, lies in buffers of our own: the requester's
 * memory may be a guest's, which changes while it is looked at. A read that races with a write may see it on some
 * children only; so one that meets a difference looks again with the range held, and believes what it sees then. */
#include "quorum_internal.h"

/* ---- rounds ---- */

void bt_quorum_run(struct bt_quorum_op *op)
{
    do
        op->pending = 1;
    while (op->step(op) && --op->pending == 0);
}

static void part_over(struct bt_quorum_op *op)
{
    if (--op->pending == 0)
        bt_quorum_run(op);
}

static void part_done(struct bt_request *request)
{
    struct bt_quorum_part *part = BT_CONTAINER(request, struct bt_quorum_part, request);
    part->result = request->ret;
    part_over(part->op);
}

static void start_part(struct bt_quorum_part *part, int op, uint32_t flags, const struct iovec *iov, int iovcnt)
{
    struct bt_quorum_op *all = part->op;
    struct bt_request *request = &part->request;
    request->thread = all->io->thread;
    request->done = part_done;
    request->op = (uint8_t)op;
    request->flags = (uint8_t)flags;
    request->offset = all->io->offset + all->at;
    request->length = all->length;
    request->iov = iov;
    request->iovcnt = iovcnt;
    request->extents = &part->extent;
    request->extents_max = 1;
    all->pending++;
    bt_request_start(request);
}

static void start_all(struct bt_quorum_op *op, int count)
{
    for (int i = 0; i < count; i++)
        start_part(&op->parts[i], op->io->op, op->io->flags, NULL, 0);
}

/* The piece of the io that this round is about: of data in buffers, only as much as has room there. */
static void begin_round(struct bt_quorum_op *op)
{
    uint64_t left = op->io->length - op->at;
    op->length = op->need ? bt_min(left, BT_QUORUM_CHUNK) : left;
}

/* The outcome of a round; reports what has failed. */
static int count_round(struct bt_quorum_op *op, bool failure)
{
    for (int i = 0; i < op->count; i++)
        if (op->parts[i].result < 0)
            bt_quorum_report_bad(op, &op->parts[i]);
    int result = bt_quorum_count(op);
    if (result < 0 && failure)
        bt_quorum_report_failure(op);
    return result;
}

static bool results_differ(const struct bt_quorum_op *op)
{
    return bt_quorum_is(op->quorum, BT_QUORUM_BLKVERIFY) && op->parts[0].result != op->parts[1].result;
}

/* ---- ranges ---- */

static void range_granted(struct bt_range *range) { part_over(BT_CONTAINER(range, struct bt_quorum_op, range)); }

/* The next step comes with [at, at + length) held. */
static void hold_range(struct bt_quorum_op *op, uint64_t length, bool exclusive)
{
    op->range.granted = range_granted;
    op->range.exclusive = exclusive;
    op->range.start = op->io->offset + op->at;
    op->range.end = op->range.start + length;
    op->pending++;
    if (bt_range_acquire(&op->quorum->ranges, &op->range))
        op->pending--;
}

/* ---- reads ---- */

static bool read_votes(struct bt_quorum_op *op);

static bool read_round(struct bt_quorum_op *op)
{
    uint64_t stride = bt_quorum_pages(op->length);
    for (int i = 0; i < op->count; i++) {
        struct bt_quorum_part *part = &op->parts[i];
        part->iov = (struct iovec){op->buffer + (uint64_t)i * stride, op->length};
        start_part(part, BT_READ, 0, &part->iov, 1);
    }
    op->step = read_votes;
    return true;
}

static bool read_next(struct bt_quorum_op *op)
{
    bt_range_release(&op->quorum->ranges, &op->range);
    op->at += op->length;
    if (op->at == op->io->length)
        return bt_quorum_finish(op, 0);
    begin_round(op);
    return read_round(op);
}

/* Gives the outvoted children what the others have. What comes of it is theirs. */
static void rewrite(struct bt_quorum_op *op, int winner)
{
    for (int i = 0; i < op->count; i++)
        if (op->parts[i].bad)
            start_part(&op->parts[i], BT_WRITE, 0, &op->parts[winner].iov, 1);
    op->step = read_next;
}

static int settle(struct bt_quorum_op *op)
{
    if (bt_quorum_is(op->quorum, BT_QUORUM_VERIFY | BT_QUORUM_BLKVERIFY))
        return bt_quorum_stop(op, BT_QUORUM_DATA, bt_quorum_difference(op));
    int winner = bt_quorum_elect(op);
    if (winner < 0)
        bt_quorum_report_failure(op);
    for (int i = 0; winner >= 0 && i < op->count; i++)
        if (op->parts[i].bad)
            bt_quorum_report_bad(op, &op->parts[i]);
    return winner;
}

static bool read_votes(struct bt_quorum_op *op)
{
    struct bt_io *io = op->io;
    int winner = bt_quorum_first(op);
    bool agree = bt_quorum_unanimous(op) && !results_differ(op);
    if (!agree && !op->range.held) {
        op->step = read_round;
        hold_range(op, op->length, true);
        return true;
    }
    if (results_differ(op))
        return bt_quorum_finish(op, bt_quorum_stop(op, BT_QUORUM_RESULT, 0));
    int result = count_round(op, true);
    if (result < 0)
        return bt_quorum_finish(op, result);
    if (!agree && (winner = settle(op)) < 0)
        return bt_quorum_finish(op, winner);
    bt_iov_from_buffer(io->iov, io->iovcnt, op->at, op->parts[winner].iov.iov_base, op->length);
    if (agree || !bt_quorum_is(op->quorum, BT_QUORUM_REWRITE))
        return read_next(op);
    rewrite(op, winner);
    return true;
}

/* ---- reads without a vote ---- */

static bool fifo_answered(struct bt_quorum_op *op)
{
    struct bt_quorum_part *part = &op->parts[op->turn];
    if (part->result == 0)
        return bt_quorum_finish(op, 0);
    bt_quorum_report_bad(op, part);
    if (++op->turn < op->count) {
        start_part(part + 1, BT_READ, 0, op->io->iov, op->io->iovcnt);
        return true;
    }
    if (!bt_quorum_is(op->quorum, BT_QUORUM_FIFO))
        bt_quorum_report_failure(op);
    return bt_quorum_finish(op, part->result);
}

static bool fifo_start(struct bt_quorum_op *op)
{
    begin_round(op);
    start_part(&op->parts[0], BT_READ, 0, op->io->iov, op->io->iovcnt);
    op->step = fifo_answered;
    return true;
}

/* ---- changes ---- */

static bool change_round(struct bt_quorum_op *op);

/* Zeroes that are not fast everywhere are fast nowhere: the requester writes them as data then. */
static bool not_fast(const struct bt_quorum_op *op)
{
    for (int i = 0; (op->io->flags & BT_FAST_ZERO) && i < op->count; i++)
        if (op->parts[i].result == -ENOTSUP || op->parts[i].result == -EOPNOTSUPP)
            return true;
    return false;
}

static bool changed(struct bt_quorum_op *op)
{
    if (not_fast(op))
        return bt_quorum_finish(op, -ENOTSUP);
    if (results_differ(op))
        return bt_quorum_finish(op, bt_quorum_stop(op, BT_QUORUM_RESULT, 0));
    int result = count_round(op, true);
    op->at += op->length;
    if (result < 0 || op->at == op->io->length)
        return bt_quorum_finish(op, result);
    return change_round(op);
}

static bool change_round(struct bt_quorum_op *op)
{
    struct bt_io *io = op->io;
    begin_round(op);
    op->step = changed;
    if (io->op == BT_ZEROES) {
        start_all(op, op->count);
    } else if (!op->need) {
        start_part(&op->parts[0], BT_WRITE, io->flags, io->iov, io->iovcnt);
    } else {
        bt_iov_to_buffer(io->iov, io->iovcnt, op->at, op->buffer, op->length);
        op->parts[0].iov = (struct iovec){op->buffer, op->length};
        for (int i = 0; i < op->count; i++)
            start_part(&op->parts[i], BT_WRITE, io->flags, &op->parts[0].iov, 1);
    }
    return true;
}

static bool change_start(struct bt_quorum_op *op)
{
    op->step = change_round;
    hold_range(op, op->io->length, false);
    return true;
}

/* ---- what carries no data ---- */

static bool flushed(struct bt_quorum_op *op) { return bt_quorum_finish(op, count_round(op, false)); }

static bool flush_start(struct bt_quorum_op *op)
{
    if (bt_quorum_is(op->quorum, BT_QUORUM_BLKVERIFY))
        op->count = 1; /* the other one is a copy to compare with */
    start_all(op, op->count);
    op->step = flushed;
    return true;
}

static bool cached(struct bt_quorum_op *op) { return bt_quorum_finish(op, bt_quorum_count(op)); }

static bool cache_start(struct bt_quorum_op *op)
{
    if (bt_quorum_is(op->quorum, BT_QUORUM_FIFO))
        op->count = 1;
    begin_round(op);
    start_all(op, op->count);
    op->step = cached;
    return true;
}

/* Zeros only where all children say so; data is always a right answer. A hole is what is one in all of them. */
static bool status_known(struct bt_quorum_op *op)
{
    uint64_t zeros = op->length, data = 0;
    uint32_t flags = BT_EXTENT_ZERO | BT_EXTENT_HOLE;
    for (int i = 0; i < op->count; i++) {
        struct bt_quorum_part *part = &op->parts[i];
        bool known = part->result == 0 && part->request.extents_count;
        if (part->result < 0)
            bt_quorum_report_bad(op, part);
        flags &= known ? part->extent.flags : 0;
        if (known && (part->extent.flags & BT_EXTENT_ZERO))
            zeros = bt_min(zeros, part->extent.length);
        else
            data = bt_max(data, known ? bt_min(part->extent.length, op->length) : op->length);
    }
    op->io->status_length = data ? data : zeros;
    op->io->status_flags = data ? 0 : flags;
    return bt_quorum_finish(op, 0);
}

static bool status_start(struct bt_quorum_op *op)
{
    begin_round(op);
    start_all(op, op->count);
    op->step = status_known;
    return true;
}

/* ---- the device ---- */

/* How an op begins, and the memory that it needs. */
static void plan(struct bt_quorum_op *op)
{
    struct bt_io *io = op->io;
    uint64_t piece = bt_quorum_pages(bt_min(io->length, BT_QUORUM_CHUNK));
    switch (io->op) {
    case BT_READ:
        if (op->count == 1 || bt_quorum_is(op->quorum, BT_QUORUM_FIFO)) {
            op->step = fifo_start;
        } else {
            op->need = piece * (uint64_t)op->count;
            op->step = read_round;
            begin_round(op);
        }
        break;
    case BT_WRITE:
        op->need = op->count == 1 ? 0 : piece;
        op->step = change_start;
        break;
    case BT_ZEROES:
        op->step = change_start;
        break;
    case BT_FLUSH:
        op->step = flush_start;
        break;
    case BT_CACHE:
        op->step = cache_start;
        break;
    default:
        op->step = status_start;
        break;
    }
}

/* The result of what no child is asked for; 1: it goes on. */
static int answer_alone(const struct bt_quorum *quorum, const struct bt_io *io)
{
    if (io->offset > INT64_MAX || io->length > INT64_MAX - io->offset)
        return -EFBIG;
    if (atomic_load_explicit(&quorum->stopped, memory_order_relaxed))
        return -EIO;
    if (io->op == BT_ZEROES && (io->flags & BT_FAST_ZERO) && bt_quorum_is(quorum, BT_QUORUM_BLKVERIFY))
        return -ENOTSUP;
    if (io->op == BT_DISCARD) /* a hint, after which children that take it otherwise would differ */
        return 0;
    return io->length || io->op == BT_FLUSH ? 1 : 0;
}

static void submit(struct bt_io *io)
{
    struct bt_quorum *quorum = (struct bt_quorum *)io->device;
    struct bt_quorum_op *op = NULL;
    int result = answer_alone(quorum, io);
    bt_count_request(&quorum->device.base, io->thread, io->op, io->offset, io->length);
    if (result == 1 && !(op = bt_quorum_op_get(quorum, io)))
        result = -ENOMEM;
    if (op) {
        plan(op);
        bt_quorum_begin(op);
        return;
    }
    if (result < 0)
        bt_count_failure(&quorum->device.base, io->thread, io->op, io->length);
    bt_io_finish(io, result);
}

static void destroy(struct bt_object *object)
{
    struct bt_quorum *quorum = (struct bt_quorum *)object;
    bt_quorum_lanes_destroy(quorum);
    bt_ranges_destroy(&quorum->ranges);
    pthread_mutex_destroy(&quorum->lock);
    free(quorum);
}

static const struct bt_device_ops ops = {.submit = submit};
static const struct bt_object_ops object_ops = {.destroy = destroy};

bt_object *bt_quorum_new(bt_datapath *dp, uint64_t tag, uint64_t session_tag, uint64_t size, bt_object **children,
                         int count, int threshold, uint32_t flags)
{
    bool pair = flags & (BT_QUORUM_VERIFY | BT_QUORUM_BLKVERIFY);
    bool valid = count >= 1 && count <= BT_QUORUM_MAX_CHILDREN && threshold >= 1 && threshold <= count &&
                 (!pair || (count == 2 && threshold == 2));
    struct bt_quorum *quorum = valid ? calloc(1, sizeof *quorum) : NULL;
    if (!quorum) {
        errno = valid ? ENOMEM : EINVAL;
        return NULL;
    }
    bt_device_init(&quorum->device, dp, &ops, &object_ops, tag, size);
    bt_ranges_init(&quorum->ranges);
    pthread_mutex_init(&quorum->lock, NULL);
    for (int i = 0; i < BT_QUORUM_MAX_CHILDREN; i++)
        bt_child_init(&quorum->children[i], i < count ? children[i] : NULL);
    quorum->device.base.children = quorum->children;
    quorum->device.base.child_count = BT_QUORUM_MAX_CHILDREN;
    quorum->device.base.takes_fua = true; /* the children's own requests decide what becomes of it */
    quorum->threshold = threshold;
    quorum->flags = flags;
    quorum->session_tag = session_tag;
    bt_quorum_lanes_init(quorum);
    return &quorum->device.base;
}
