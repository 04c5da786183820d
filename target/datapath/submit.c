/* SPDX-License-Identifier: Apache-2.0 */
/* Requests of the control plane: single ones, on the thread that it names. */
#include "request.h"

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
