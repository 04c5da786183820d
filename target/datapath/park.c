/* SPDX-License-Identifier: Apache-2.0 */
/* Requests that are parked: on a fault, until Python has answered it, or on a claim, until they are woken. */
#include "request.h"

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
    bt_request_enqueue(request);
}

void bt_request_wake(struct bt_request *request)
{
    request->message.fn = wake_message;
    bt_thread_post(request->thread, &request->message);
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

void bt_request_park(struct bt_request *request, struct bt_object *object, const struct bt_segment *segment)
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
    bt_request_enqueue(request);
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

bool bt_request_add_extent(struct bt_request *request, uint64_t length, uint32_t flags)
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
    if (!bt_request_add_extent(request, length, flags))
        return -ENOSPC;
    request->fault_put += length;
    return 0;
}
