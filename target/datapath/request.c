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

/* ---- parking and waking ---- */

static void enqueue(struct bt_request *request)
{
    struct bt_thread *thread = request->thread;
    request->next = NULL;
    *thread->run_tail = request;
    thread->run_tail = &request->next;
}

static void left_upcall(struct bt_io *io, int result)
{
    (void)io, (void)result;
}

/* Python may take its time with what it was asked, on an offset that a map gave: synchronize waits for it. */
static void enter_upcall(struct bt_request *request, struct bt_object *object)
{
    struct bt_io *io = bt_io_get(request->thread, 0);
    io->device = (struct bt_device *)object;
    io->done = left_upcall;
    bt_io_enter(io);
    request->fault_io = io;
}

static void leave_upcall(struct bt_request *request)
{
    if (request->fault_io)
        bt_io_finish(request->fault_io, 0);
    request->fault_io = NULL;
}

static void wake_message(struct bt_message *message, struct bt_thread *thread)
{
    struct bt_request *request = BT_CONTAINER(message, struct bt_request, message);
    (void)thread;
    leave_upcall(request);
    enqueue(request);
}

void bt_request_wake(struct bt_request *request)
{
    request->message.fn = wake_message;
    bt_thread_post(request->thread, &request->message);
}

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
    enqueue(request);
}

void bt_request_prepare_fault(struct bt_request *request, struct bt_object *object, const struct bt_segment *segment)
{
    request->fault_object = object;
    request->fault_length = segment->length;
    request->fault_put = 0;
    bool one = segment->op == BT_STATUS && request->extents_max == 1;
    request->event.allocated = false;
    request->event.event = (struct bt_event){
        .type = BT_EVENT_FAULT,
        .op = segment->op,
        .flags = segment->flags | (one ? BT_REQ_ONE : 0u) | (segment->populate && !segment->bottom ? BT_POPULATE : 0u),
        .reason = segment->reason,
        .tag = object->tag,
        .request = request,
        .offset = segment->offset,
        .length = segment->length,
        .result = request->thread->index,
    };
}

static void park_on_fault(struct bt_request *request, struct bt_object *object, const struct bt_segment *segment)
{
    bt_count(&bt_counters_of(object, request->thread)->faults[segment->reason], 1);
    bt_request_prepare_fault(request, object, segment);
    if (object->type == BT_OBJ_UPCALL)
        enter_upcall(request, object);
    bt_request_ask(request);
}

/* A short answer is in order only when there is no room for more. */
static void status_answered(struct bt_request *request)
{
    request->pos += request->fault_put;
    if (request->fault_put == request->fault_length)
        return;
    if (request->extents_count == request->extents_max)
        request->length = request->pos;
    else if (!request->fault_put)
        request->ret = -EIO;
}

static void answered(struct bt_message *message, struct bt_thread *thread)
{
    struct bt_request *request = BT_CONTAINER(message, struct bt_request, message);
    (void)thread;
    leave_upcall(request);
    if (request->fault_result < 0 && request->op == BT_STATUS && request->extents_count) {
        request->length = request->pos; /* what is known by now is an answer */
    } else if (request->fault_result < 0) {
        if (request->ret == 0)
            request->ret = request->fault_result;
    } else if (request->flushing) {
        request->pos++;
    } else if (request->op == BT_STATUS) {
        status_answered(request);
    } else {
        request->pos += request->fault_length;
    }
    enqueue(request);
}

void bt_fault_retry(bt_request *request) { bt_request_wake(request); }

void bt_fault_done(bt_request *request, int result)
{
    request->fault_result = result;
    request->message.fn = answered;
    bt_thread_post(request->thread, &request->message);
}

static bool fault_range_ok(bt_request *request, uint64_t at, size_t length)
{
    return request->iov && bt_range_ok(at, length, request->fault_length);
}

int bt_fault_get_data(bt_request *request, uint64_t at, void *out, size_t length)
{
    if (!fault_range_ok(request, at, length))
        return -EINVAL;
    bt_iov_to_buffer(request->iov, request->iovcnt, request->pos + at, out, length);
    return 0;
}

int bt_fault_put_data(bt_request *request, uint64_t at, const void *data, size_t length)
{
    if (!fault_range_ok(request, at, length))
        return -EINVAL;
    bt_iov_from_buffer(request->iov, request->iovcnt, request->pos + at, data, length);
    return 0;
}

/* ---- STATUS ---- */

static bool add_extent(struct bt_request *request, uint64_t length, uint32_t flags)
{
    struct bt_extent *last = request->extents_count ? &request->extents[request->extents_count - 1] : NULL;
    if (last && last->flags == flags) {
        last->length += length;
        return true;
    }
    if (request->extents_count == request->extents_max)
        return false;
    request->extents[request->extents_count++] = (struct bt_extent){.length = length, .flags = flags};
    return true;
}

int bt_fault_put_extent(bt_request *request, uint64_t length, uint32_t flags)
{
    length = bt_min(length, request->fault_length - request->fault_put);
    if (request->op != BT_STATUS || !length)
        return -EINVAL;
    if (!add_extent(request, length, flags))
        return -ENOSPC;
    request->fault_put += length;
    return 0;
}

static void end_status(struct bt_request *request) { request->length = request->pos; }

static void advance_status(struct bt_request *request, uint64_t length, uint32_t flags)
{
    if (add_extent(request, length, flags))
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
    enqueue(request);
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
        park_on_fault(request, segment->object, segment);
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
        park_on_fault(request, segment->object, segment);
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
            park_on_fault(request, target, &segment);
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

/* ---- requests of the control plane ---- */

struct control_request {
    struct bt_request request;
    struct bt_message message;
    struct iovec iov;
    uint64_t cookie;
};

static void control_done(struct bt_request *request)
{
    struct control_request *control = BT_CONTAINER(request, struct control_request, request);
    int64_t result = request->ret;
    if (result == 0 && request->op == BT_STATUS)
        result = request->extents_count;
    bt_event_done(request->object->dp, control->cookie, result);
    bt_object_unref(request->object);
    free(control);
}

static void control_start(struct bt_message *message, struct bt_thread *thread)
{
    struct control_request *control = BT_CONTAINER(message, struct control_request, message);
    control->request.thread = thread;
    bt_request_start(&control->request);
}

static struct control_request *control_new(bt_object *object, int op, uint64_t offset, uint64_t length,
                                           uint64_t cookie)
{
    struct control_request *control = calloc(1, sizeof *control);
    if (!control)
        abort();
    bt_object_ref(object);
    control->request.object = object;
    control->request.op = (uint8_t)op;
    control->request.offset = offset;
    control->request.length = length;
    control->request.done = control_done;
    control->message.fn = control_start;
    control->cookie = cookie;
    return control;
}

int bt_submit(bt_datapath *dp, int thread, bt_object *object, int op, uint32_t flags, uint64_t offset,
              uint64_t length, void *buffer, uint64_t cookie)
{
    struct bt_thread *on = bt_thread_get(dp, thread);
    if (!on || op < 0 || op >= BT_OPS || op == BT_STATUS)
        return -EINVAL;
    struct control_request *control = control_new(object, op, offset, length, cookie);
    control->request.flags = (uint8_t)flags;
    control->iov = (struct iovec){.iov_base = buffer, .iov_len = length};
    control->request.iov = buffer ? &control->iov : NULL;
    control->request.iovcnt = buffer ? 1 : 0;
    bt_thread_post(on, &control->message);
    return 0;
}

int bt_submit_status(bt_datapath *dp, int thread, bt_object *object, uint64_t offset, uint64_t length,
                     struct bt_extent *out, int max, uint64_t cookie)
{
    struct bt_thread *on = bt_thread_get(dp, thread);
    if (!on || max <= 0)
        return -EINVAL;
    struct control_request *control = control_new(object, BT_STATUS, offset, length, cookie);
    control->request.extents = out;
    control->request.extents_max = (uint32_t)max;
    bt_thread_post(on, &control->message);
    return 0;
}
