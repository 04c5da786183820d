/* SPDX-License-Identifier: Apache-2.0 */
/* Requests: walk the range, start I/O part by part, park on faults and claims, finish when all parts are done.
 *
 * pending counts the parts under way plus one for the walk itself; a parked request keeps the walk's one. So a
 * request whose parts complete while it is being walked, or parked, is not finished under the walker's feet. */
#include "fence.h"
#include "request.h"

#define INLINE_IOV 64

static void walk(struct bt_request *request);
static void count_flush(struct bt_thread *thread, struct bt_object *object);

static bool is_change(int op) { return op == BT_WRITE || op == BT_ZEROES || op == BT_DISCARD; }

/* ---- finishing ---- */

static void request_failed(struct bt_request *request)
{
    bt_count_failure(request->object, request->thread, request->op, request->length);
    if (request->gated)
        bt_gate_failed((struct bt_gate *)request->object, request);
}

static void finish(struct bt_request *request)
{
    if (request->ret == 0 && request->flush_after && !request->flushing) {
        request->flushing = true;
        request->pos = 0;
        request->pending = 1;
        count_flush(request->thread, request->object);
        walk(request);
        return;
    }
    if (BT_UNLIKELY(request->readings))
        bt_readings_end(request);
    if (request->gated)
        bt_gate_leave((struct bt_gate *)request->object, request->thread);
    if (request->ret < 0)
        request_failed(request);
    request->done(request);
}

void bt_request_part_done(struct bt_request *request, int result)
{
    if (result < 0 && request->ret == 0)
        request->ret = result;
    if (--request->pending == 0)
        finish(request);
}

/* ---- going on ---- */

void bt_request_run_queue(struct bt_thread *thread)
{
    while (thread->run_head) {
        struct bt_request *request = thread->run_head;
        thread->run_head = request->next;
        if (!thread->run_head)
            thread->run_tail = &thread->run_head;
        thread->did_work = true;
        walk(request);
    }
}

void bt_request_populated(struct bt_request *request, uint64_t length, int result)
{
    if (result < 0 && request->ret == 0)
        request->ret = result;
    request->pos += length;
    bt_request_enqueue(request);
}

/* ---- STATUS ---- */

static void end_status(struct bt_request *request) { request->length = request->pos; }

static void advance_status(struct bt_request *request, uint64_t length, uint32_t flags)
{
    if (bt_request_add_extent(request, length, flags))
        request->pos += length;
    else
        end_status(request);
}

static void status_io_done(struct bt_io *io, int result)
{
    struct bt_request *request = io->owner;
    if (result < 0)
        request->ret = result;
    else
        advance_status(request, io->status_length, io->status_flags);
    bt_request_enqueue(request);
}

/* ---- I/O of one segment ---- */

static void io_done(struct bt_io *io, int result) { bt_request_part_done(io->owner, result); }

static struct bt_io *io_for(struct bt_request *request, struct bt_device *device, const struct bt_segment *segment,
                            int iovcnt)
{
    struct bt_io *io = bt_io_get(request->thread, iovcnt);
    io->device = device;
    io->owner = request;
    io->done = io_done;
    io->op = segment->op;
    io->flags = segment->flags;
    io->offset = segment->offset;
    io->length = segment->length;
    return io;
}

static int iovs_in(const struct bt_request *request, uint64_t offset, uint64_t length)
{
    int n = 0;
    uint64_t end = offset + length, at = 0;
    for (int i = 0; i < request->iovcnt && at < end; i++) {
        uint64_t next = at + request->iov[i].iov_len;
        if (next > offset && next > at)
            n++;
        at = next;
    }
    return n;
}

/* Whether the request's whole vector is what a segment of this length needs: a request's may be longer. */
static bool is_whole(const struct bt_request *request, uint64_t length)
{
    uint64_t total = 0;
    for (int i = 0; i < request->iovcnt; i++)
        total += request->iov[i].iov_len;
    return total == length;
}

static void data_io(struct bt_request *request, struct bt_device *device, const struct bt_segment *segment)
{
    struct iovec local[INLINE_IOV];
    const struct iovec *iov = request->iov;
    int iovcnt = request->iovcnt;
    if (request->pos != 0 || iovcnt > INLINE_IOV || !is_whole(request, segment->length)) {
        iovcnt = iovs_in(request, request->pos, segment->length);
        iov = local;
        if (iovcnt <= INLINE_IOV)
            bt_iov_slice(request->iov, request->iovcnt, request->pos, segment->length, local, INLINE_IOV);
    }
    if (device->ops->try_inline && iovcnt <= INLINE_IOV) {
        int ret = device->ops->try_inline(device, request->thread, segment->op, segment->flags, segment->offset, iov,
                                          iovcnt, segment->length);
        if (ret != -EAGAIN) {
            if (ret < 0 && request->ret == 0)
                request->ret = ret;
            return;
        }
    }
    struct bt_io *io = io_for(request, device, segment, iovcnt);
    io->iovcnt = bt_iov_slice(request->iov, request->iovcnt, request->pos, segment->length, io->iov, iovcnt);
    request->pending++;
    bt_io_submit(io);
}

/* A write in place may carry FUA itself; whatever touched a table needs a flush in the proper order. */
static void decide_fua(struct bt_request *request, struct bt_segment *segment)
{
    if (!(request->flags & BT_FUA) || !is_change(segment->op) || segment->kind == BT_SEG_SAVE)
        return;
    bool leaf = segment->kind == BT_SEG_IO || (segment->kind == BT_SEG_FAULT && segment->reason == BT_FAULT_UPCALL);
    if (leaf && segment->object->takes_fua && !segment->met_metadata)
        return;
    if (segment->kind != BT_SEG_IO || segment->op != BT_WRITE || segment->met_metadata) {
        request->flush_after = true;
        segment->flags &= (uint8_t)~BT_FUA;
    }
}

static bool start_status(struct bt_request *request, const struct bt_segment *segment)
{
    if (segment->through_data) {
        advance_status(request, segment->length, 0);
        return true;
    }
    struct bt_io *io = io_for(request, (struct bt_device *)segment->object, segment, 0);
    io->done = status_io_done;
    bt_io_submit(io);
    return false;
}

/* False when the request is parked until the I/O is done. */
static bool start_io(struct bt_request *request, const struct bt_segment *segment)
{
    struct bt_device *device = (struct bt_device *)segment->object;
    if (segment->op == BT_STATUS)
        return start_status(request, segment);
    if (segment->op == BT_READ || segment->op == BT_WRITE) {
        data_io(request, device, segment);
    } else {
        struct bt_io *io = io_for(request, device, segment, 0);
        request->pending++;
        bt_io_submit(io);
    }
    request->pos += segment->length;
    return true;
}

static bool start_zero(struct bt_request *request, const struct bt_segment *segment)
{
    if (request->op == BT_STATUS) {
        advance_status(request, segment->length, segment->extent_flags);
        return true;
    }
    if (segment->op == BT_READ)
        bt_iov_zero(request->iov, request->iovcnt, request->pos, segment->length);
    request->pos += segment->length;
    return true;
}

static bool start_alloc(struct bt_request *request, struct bt_segment *segment)
{
    int64_t taken = bt_claim_start(request, segment);
    if (taken == -EAGAIN) {
        segment->kind = BT_SEG_FAULT;
        segment->reason = BT_FAULT_GRANT;
        bt_request_park(request, segment->object, segment);
        return false;
    }
    if (taken < 0) {
        request->ret = (int)taken;
        return true;
    }
    if (!is_change(segment->op))
        return !taken; /* parked until the copy is made */
    request->pos += (uint64_t)taken;
    return true;
}

static void start_set(struct bt_request *request, const struct bt_segment *segment)
{
    struct bt_map *map = bt_as_map(segment->object);
    uint64_t granules = bt_map_replace(map, segment);
    request->pos += bt_min(segment->length, granules << map->granule_bits);
}

static bool start_segment(struct bt_request *request, struct bt_segment *segment)
{
    decide_fua(request, segment);
    switch (segment->kind) {
    case BT_SEG_IO:
        return start_io(request, segment);
    case BT_SEG_ZERO:
        return start_zero(request, segment);
    case BT_SEG_SKIP:
        request->pos += segment->length;
        return true;
    case BT_SEG_FAULT:
        bt_request_park(request, segment->object, segment);
        return false;
    case BT_SEG_ALLOC:
        return start_alloc(request, segment);
    case BT_SEG_SET:
        start_set(request, segment);
        return true;
    case BT_SEG_BUSY:
        return !bt_claim_wait(request, segment);
    case BT_SEG_SAVE:
        return bt_save_start(request, segment);
    case BT_SEG_PARKED:
        return false;
    case BT_SEG_ERROR:
        request->ret = segment->error;
        return true;
    }
    return true;
}

/* detect-zeroes: a write of nothing but zeros becomes a ZEROES, from the top, so that maps can drop clusters. */
static void detect_zeroes(struct bt_request *request, struct bt_segment *segment)
{
    if (!bt_iov_is_zero(request->iov, request->iovcnt, request->pos, segment->length))
        return;
    uint32_t flags = request->flags | (segment->detect_zeroes == 2 ? BT_UNMAP : 0u);
    bt_resolve(request, BT_ZEROES, flags, request->offset + request->pos, segment->length, segment);
}

/* ---- flush ---- */

/* The index-th thing that a flush of object has to reach: a device, an upcall, or a map with metadata. */
static struct bt_object *flush_target(struct bt_object *object, uint64_t *index)
{
    struct bt_object *found;
    switch (object->type) {
    case BT_OBJ_GATE:
        return flush_target(bt_child_get(&((struct bt_gate *)object)->child), index);
    case BT_OBJ_WINDOW:
        return flush_target(bt_child_get(&((struct bt_window *)object)->child), index);
    case BT_OBJ_CONCAT:
        for (int i = 0; i < ((struct bt_concat *)object)->count; i++)
            if ((found = flush_target(bt_child_get(&((struct bt_concat *)object)->children[i]), index)))
                return found;
        return NULL;
    case BT_OBJ_THROTTLE:
    case BT_OBJ_COR:
    case BT_OBJ_FENCE: /* not what it saves: its node flushes that when it has to last */
        return flush_target(bt_child_get(&object->children[0]), index);
    case BT_OBJ_VIEW:
        return NULL;
    case BT_OBJ_MAP:
        if (!atomic_load(&bt_as_map(object)->dirty_slices) && !atomic_load(&bt_as_map(object)->hold_flush))
            return flush_target(bt_child_get(&bt_as_map(object)->child), index);
        break;
    case BT_OBJ_DEVICE:
    case BT_OBJ_UPCALL:
        break;
    }
    return (*index)-- == 0 ? object : NULL;
}

/* Devices and gates count for themselves. */
static void count_flush(struct bt_thread *thread, struct bt_object *object)
{
    if (object->type == BT_OBJ_GATE) {
        count_flush(thread, bt_child_get(&((struct bt_gate *)object)->child));
        return;
    }
    if (object->type == BT_OBJ_DEVICE || object->type == BT_OBJ_UPCALL)
        return;
    bt_count(&bt_counters_of(object, thread)->requests[BT_FLUSH], 1);
    if (object->type == BT_OBJ_VIEW)
        return;
    if (object->type == BT_OBJ_FENCE || object->type == BT_OBJ_THROTTLE || object->type == BT_OBJ_COR)
        count_flush(thread, bt_child_get(&object->children[0]));
    else if (object->type == BT_OBJ_MAP)
        count_flush(thread, bt_child_get(&bt_as_map(object)->child));
    else if (object->type == BT_OBJ_WINDOW)
        count_flush(thread, bt_child_get(&((struct bt_window *)object)->child));
    else
        for (int i = 0; i < ((struct bt_concat *)object)->count; i++)
            count_flush(thread, bt_child_get(&((struct bt_concat *)object)->children[i]));
}

static void walk_flush(struct bt_request *request)
{
    while (request->ret == 0) {
        uint64_t index = request->pos;
        struct bt_segment segment = {.op = BT_FLUSH};
        struct bt_object *target = flush_target(request->object, &index);
        if (!target)
            break;
        if (target->type != BT_OBJ_DEVICE) {
            segment.reason = target->type == BT_OBJ_MAP ? BT_FAULT_FLUSH : BT_FAULT_UPCALL;
            bt_request_park(request, target, &segment);
            return;
        }
        struct bt_io *io = io_for(request, (struct bt_device *)target, &segment, 0);
        request->pending++;
        request->pos++;
        bt_io_submit(io);
    }
    bt_request_part_done(request, 0);
}

/* ---- the walk ---- */

static bool waits(enum bt_segment_kind kind)
{
    return kind == BT_SEG_FAULT || kind == BT_SEG_SAVE || kind == BT_SEG_PARKED;
}

static void walk(struct bt_request *request)
{
    if (request->flushing) {
        walk_flush(request);
        return;
    }
    while (request->pos < request->length && request->ret == 0) {
        struct bt_segment segment;
        bt_resolve(request, request->op, request->flags, request->offset + request->pos,
                   request->length - request->pos, &segment);
        if (segment.detect_zeroes && !waits(segment.kind))
            detect_zeroes(request, &segment);
        if (!start_segment(request, &segment))
            return;
    }
    bt_request_part_done(request, 0);
}

void bt_request_start(struct bt_request *request)
{
    request->ret = 0;
    request->pos = 0;
    request->pending = 1;
    request->fault_io = NULL;
    request->readings = NULL;
    request->deadline_ns = 0;
    request->flush_after = false;
    request->flushing = request->op == BT_FLUSH;
    request->gated = request->object->type == BT_OBJ_GATE;
    request->extents_count = 0;
    request->payments = 0;
    if (request->gated) {
        struct bt_gate *gate = (struct bt_gate *)request->object;
        if (!bt_gate_enter(gate, request))
            return;
        if (is_change(request->op) && !gate->writable)
            request->ret = -EPERM;
        else if (BT_UNLIKELY(!bt_range_ok(request->offset, request->length, bt_object_size(&gate->base))))
            request->ret = is_change(request->op) ? -ENOSPC : -EINVAL; /* it was held, and the node has shrunk */
    }
    if (request->flushing)
        count_flush(request->thread, request->object);
    walk(request);
}
