/* SPDX-License-Identifier: Apache-2.0 */
/* bt_copy: moves a range from one object to another without Python. A few lanes each ask for the status of the
 * next chunk, then read and write it, or write zeroes. The first error stops all lanes. Where both ends are devices
 * that can copy between them, chunks are larger and the data stay where they are; a chunk that they refuse, and all
 * after it, is read and written. */
#include "ranges.h"
#include "request.h"

#define CHUNK (1u << 20)
#define OFFLOADED_CHUNK (16u << 20)
#define LANES 4

struct copy;

struct lane {
    struct copy *copy;
    struct bt_request request;
    struct bt_deferred deferred;
    struct bt_extent extent;
    struct iovec iov;
    uint64_t at, length; /* what is moved now, from the copy's start */
    uint64_t end;        /* of the chunk */
    /* while devices do it */
    struct bt_io *io;
    struct bt_io *cover; /* the same on the align device, for who waits for what is under way there */
    struct bt_device *source;
    uint64_t source_offset;
    struct bt_ranges *ranges;
    struct bt_range range;
};

/* Where a part of an object lies: on one device, behind at most one align device. */
struct place {
    struct bt_device *device;
    uint64_t offset;
    struct bt_device *align;
    struct bt_ranges *ranges; /* of the align device */
    uint64_t range_offset;    /* in its space */
};

struct copy {
    struct bt_message message;
    bt_datapath *dp;
    struct bt_object *source, *destination;
    uint64_t source_offset, destination_offset, length;
    uint64_t next; /* where the next chunk starts */
    bool offload;  /* no device has refused yet */
    uint64_t cookie;
    void (*done)(void *arg, int result); /* instead of an event with the cookie */
    void *arg;
    int result;
    int running;
    int lane_count; /* no more than there are chunks to read and write */
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
    if (copy->done)
        copy->done(copy->arg, copy->result);
    else
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

static void moved(struct lane *lane, int result)
{
    if (result < 0) {
        lane_end(lane, result);
        return;
    }
    lane->at += lane->length;
    bt_defer(lane->copy->thread, &lane->deferred); /* zeros complete at once: no recursion */
}

static void written(struct bt_request *request) { moved(lane_of(request), request->ret); }

static void has_data(struct bt_request *request)
{
    struct lane *lane = lane_of(request);
    if (request->ret < 0)
        lane_end(lane, request->ret);
    else
        start(lane, lane->copy->destination, BT_WRITE, lane->copy->destination_offset + lane->at, written);
}

static void read_and_write(struct lane *lane)
{
    lane->length = bt_min(CHUNK, lane->end - lane->at);
    start(lane, lane->copy->source, BT_READ, lane->copy->source_offset + lane->at, has_data);
}

/* ---- by the devices themselves ---- */

static bool find_place(struct bt_object *object, uint64_t offset, uint64_t length, struct place *place)
{
    uint64_t block;
    struct bt_object *below;
    memset(place, 0, sizeof *place);
    while (bt_range_ok(offset, length, bt_object_size(object))) {
        if (object->type == BT_OBJ_WINDOW) {
            offset += ((struct bt_window *)object)->offset;
            object = bt_child_get(&((struct bt_window *)object)->child);
        } else if (object->type != BT_OBJ_DEVICE) {
            return false;
        } else if (!(below = bt_align_child(object, &block, &place->ranges))) {
            place->device = (struct bt_device *)object;
            place->offset = offset;
            return true;
        } else if ((offset | length) & (block - 1)) {
            return false;
        } else {
            place->align = (struct bt_device *)object;
            place->range_offset = offset;
            object = below;
        }
    }
    return false;
}

static void cover_over(struct bt_io *io, int result) { (void)io, (void)result; }

/* Data that change behind the align device are under way on it, too. */
static struct bt_io *enter_cover(struct lane *lane, const struct place *place)
{
    if (!place->align)
        return NULL;
    struct bt_io *io = bt_io_get(lane->copy->thread, 0);
    io->device = place->align;
    io->op = BT_WRITE;
    io->offset = place->range_offset;
    io->length = lane->length;
    io->done = cover_over;
    bt_io_enter(io);
    return io;
}

static void offloaded(struct bt_io *io, int result)
{
    struct lane *lane = io->owner;
    if (lane->ranges)
        bt_range_release(lane->ranges, &lane->range);
    if (lane->cover)
        bt_io_finish(lane->cover, result);
    if (result < 0) { /* whatever it was, reading and writing will tell */
        lane->copy->offload = false;
        read_and_write(lane);
        return;
    }
    moved(lane, 0);
}

static void offload_go(struct bt_range *range)
{
    struct lane *lane = BT_CONTAINER(range, struct lane, range);
    bt_io_enter(lane->io);
    lane->io->device->ops->copy(lane->io, lane->source, lane->source_offset);
}

/* False when there is no way. */
static bool try_offload(struct lane *lane)
{
    struct copy *copy = lane->copy;
    struct place from, to;
    if (!copy->offload || !find_place(copy->source, copy->source_offset + lane->at, lane->length, &from) ||
        !find_place(copy->destination, copy->destination_offset + lane->at, lane->length, &to) ||
        !to.device->ops->can_copy || !to.device->ops->can_copy(to.device, from.device))
        return false;
    lane->source = from.device;
    lane->source_offset = from.offset;
    lane->io = bt_io_get(copy->thread, 0);
    lane->io->device = to.device;
    lane->io->op = BT_WRITE;
    lane->io->offset = to.offset;
    lane->io->length = lane->length;
    lane->io->owner = lane;
    lane->io->done = offloaded;
    lane->cover = enter_cover(lane, &to);
    lane->ranges = to.ranges;
    lane->range = (struct bt_range){.start = to.range_offset,
                                    .end = to.range_offset + lane->length,
                                    .thread = copy->thread,
                                    .granted = offload_go};
    if (!to.ranges || bt_range_acquire(to.ranges, &lane->range))
        offload_go(&lane->range);
    return true;
}

static bool can_offload(const struct copy *copy)
{
    struct place from, to;
    return find_place(copy->source, copy->source_offset, copy->length, &from) &&
           find_place(copy->destination, copy->destination_offset, copy->length, &to) && to.device->ops->can_copy &&
           to.device->ops->can_copy(to.device, from.device);
}

/* ---- chunks ---- */

/* The chunk is not alike all through: only what the first extent says is known; the rest is copied. */
static void has_status(struct bt_request *request)
{
    struct lane *lane = lane_of(request);
    struct copy *copy = lane->copy;
    if (request->ret < 0)
        lane_end(lane, request->ret);
    else if ((lane->extent.flags & BT_EXTENT_ZERO) && lane->extent.length >= lane->length)
        start(lane, copy->destination, BT_ZEROES, copy->destination_offset + lane->at, written);
    else if (!try_offload(lane))
        read_and_write(lane);
}

static void next_chunk(struct lane *lane)
{
    struct copy *copy = lane->copy;
    if (copy->result < 0 || (lane->at >= lane->end && copy->next >= copy->length)) {
        lane_end(lane, 0);
        return;
    }
    if (lane->at < lane->end) { /* a chunk that was refused goes on in pieces */
        read_and_write(lane);
        return;
    }
    lane->at = copy->next;
    lane->length = bt_min(copy->offload ? OFFLOADED_CHUNK : CHUNK, copy->length - copy->next);
    copy->next = lane->end = lane->at + lane->length;
    start(lane, copy->source, BT_STATUS, copy->source_offset + lane->at, has_status);
}

static void copy_begin(struct bt_message *message, struct bt_thread *thread)
{
    struct copy *copy = BT_CONTAINER(message, struct copy, message);
    copy->thread = thread;
    copy->running = copy->lane_count + 1;
    for (int i = 0; i < copy->lane_count; i++)
        next_chunk(&copy->lanes[i]);
    if (--copy->running == 0)
        copy_end(copy);
}

static struct copy *copy_new(bt_object *source, bt_object *destination, uint64_t source_offset,
                             uint64_t destination_offset, uint64_t length)
{
    struct copy *copy = calloc(1, sizeof *copy);
    if (!copy)
        return NULL;
    copy->lane_count = (int)bt_min(LANES, length / CHUNK + 1);
    for (int i = 0; i < copy->lane_count; i++) {
        copy->lanes[i].copy = copy;
        copy->lanes[i].deferred.fn = go_on;
        if (posix_memalign(&copy->lanes[i].iov.iov_base, 4096, bt_min(CHUNK, bt_max(length, 1))))
            abort();
    }
    bt_object_ref(source);
    bt_object_ref(destination);
    copy->dp = source->dp;
    copy->source = source;
    copy->destination = destination;
    copy->source_offset = source_offset;
    copy->destination_offset = destination_offset;
    copy->length = length;
    copy->offload = can_offload(copy);
    copy->message.fn = copy_begin;
    return copy;
}

int bt_copy(bt_datapath *dp, int thread, bt_object *source, bt_object *destination, uint64_t source_offset,
            uint64_t destination_offset, uint64_t length, uint64_t cookie)
{
    struct bt_thread *on = bt_thread_get(dp, thread);
    if (!on || !bt_range_ok(source_offset, length, bt_object_size(source)))
        return -EINVAL;
    struct copy *copy = copy_new(source, destination, source_offset, destination_offset, length);
    if (!copy)
        return -ENOMEM;
    copy->cookie = cookie;
    bt_thread_post(on, &copy->message);
    return 0;
}

int bt_copy_then(struct bt_thread *thread, struct bt_object *source, struct bt_object *destination, uint64_t offset,
                 uint64_t length, void (*done)(void *arg, int result), void *arg)
{
    if (!bt_range_ok(offset, length, bt_object_size(source)))
        return -EINVAL;
    struct copy *copy = copy_new(source, destination, offset, offset, length);
    if (!copy)
        return -ENOMEM;
    copy->done = done;
    copy->arg = arg;
    bt_thread_post(thread, &copy->message);
    return 0;
}
