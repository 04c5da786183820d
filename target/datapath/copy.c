/* SPDX-License-Identifier: Apache-2.0 */
/* bt_copy: moves a range from one object to another without Python. A few lanes each ask for the status of the
 * next chunk, then read and write it, or write zeroes. The first error stops all lanes. */
#include "core.h"

#define CHUNK (1u << 20)
#define LANES 4

struct copy;

struct lane {
    struct copy *copy;
    struct bt_request request;
    struct bt_deferred deferred;
    struct bt_extent extent;
    struct iovec iov;
    uint64_t at, length; /* from the copy's start */
};

struct copy {
    struct bt_message message;
    bt_datapath *dp;
    struct bt_object *source, *destination;
    uint64_t source_offset, destination_offset, length;
    uint64_t next; /* where the next chunk starts */
    uint64_t cookie;
    int result;
    int running;
    struct bt_thread *thread;
    struct lane lanes[LANES];
};

static void next_chunk(struct lane *lane);

static void start(struct lane *lane, struct bt_object *object, int op, uint64_t offset,
                  void (*done)(struct bt_request *))
{
    struct bt_request *request = &lane->request;
    request->thread = lane->copy->thread;
    request->object = object;
    request->op = (uint8_t)op;
    request->flags = op == BT_ZEROES ? BT_UNMAP : 0;
    request->offset = offset;
    request->length = lane->length;
    lane->iov.iov_len = lane->length;
    request->iov = op == BT_READ || op == BT_WRITE ? &lane->iov : NULL;
    request->iovcnt = request->iov ? 1 : 0;
    request->extents = op == BT_STATUS ? &lane->extent : NULL;
    request->extents_max = op == BT_STATUS ? 1 : 0;
    request->done = done;
    bt_request_start(request);
}

static void copy_end(struct copy *copy)
{
    bt_event_done(copy->dp, copy->cookie, copy->result);
    bt_object_unref(copy->source);
    bt_object_unref(copy->destination);
    for (int i = 0; i < LANES; i++)
        free(copy->lanes[i].iov.iov_base);
    free(copy);
}

static void lane_end(struct lane *lane, int result)
{
    struct copy *copy = lane->copy;
    if (result < 0 && copy->result == 0)
        copy->result = result;
    if (--copy->running == 0)
        copy_end(copy);
}

static void go_on(struct bt_deferred *deferred, struct bt_thread *thread)
{
    (void)thread;
    next_chunk(BT_CONTAINER(deferred, struct lane, deferred));
}

static struct lane *lane_of(struct bt_request *request) { return BT_CONTAINER(request, struct lane, request); }

static void written(struct bt_request *request)
{
    if (request->ret < 0)
        lane_end(lane_of(request), request->ret);
    else
        bt_defer(request->thread, &lane_of(request)->deferred); /* zeros complete at once: no recursion */
}

static void has_data(struct bt_request *request)
{
    struct lane *lane = lane_of(request);
    if (request->ret < 0)
        lane_end(lane, request->ret);
    else
        start(lane, lane->copy->destination, BT_WRITE, lane->copy->destination_offset + lane->at, written);
}

/* The chunk is not alike all through: only what the first extent says is known; the rest is read. */
static void has_status(struct bt_request *request)
{
    struct lane *lane = lane_of(request);
    struct copy *copy = lane->copy;
    if (request->ret < 0)
        lane_end(lane, request->ret);
    else if ((lane->extent.flags & BT_EXTENT_ZERO) && lane->extent.length >= lane->length)
        start(lane, copy->destination, BT_ZEROES, copy->destination_offset + lane->at, written);
    else
        start(lane, copy->source, BT_READ, copy->source_offset + lane->at, has_data);
}

static void next_chunk(struct lane *lane)
{
    struct copy *copy = lane->copy;
    if (copy->result < 0 || copy->next >= copy->length) {
        lane_end(lane, 0);
        return;
    }
    lane->at = copy->next;
    lane->length = bt_min(CHUNK, copy->length - copy->next);
    copy->next += lane->length;
    start(lane, copy->source, BT_STATUS, copy->source_offset + lane->at, has_status);
}

static void copy_begin(struct bt_message *message, struct bt_thread *thread)
{
    struct copy *copy = BT_CONTAINER(message, struct copy, message);
    copy->thread = thread;
    copy->running = LANES + 1;
    for (int i = 0; i < LANES; i++)
        next_chunk(&copy->lanes[i]);
    if (--copy->running == 0)
        copy_end(copy);
}

int bt_copy(bt_datapath *dp, int thread, bt_object *source, bt_object *destination, uint64_t source_offset,
            uint64_t destination_offset, uint64_t length, uint64_t cookie)
{
    struct bt_thread *on = bt_thread_get(dp, thread);
    if (!on || !bt_range_ok(source_offset, length, bt_object_size(source)))
        return -EINVAL;
    struct copy *copy = calloc(1, sizeof *copy);
    if (!copy)
        return -ENOMEM;
    for (int i = 0; i < LANES; i++) {
        copy->lanes[i].copy = copy;
        copy->lanes[i].deferred.fn = go_on;
        if (posix_memalign(&copy->lanes[i].iov.iov_base, 4096, CHUNK))
            abort();
    }
    bt_object_ref(source);
    bt_object_ref(destination);
    copy->dp = dp;
    copy->source = source;
    copy->destination = destination;
    copy->source_offset = source_offset;
    copy->destination_offset = destination_offset;
    copy->length = length;
    copy->cookie = cookie;
    copy->message.fn = copy_begin;
    bt_thread_post(on, &copy->message);
    return 0;
}
