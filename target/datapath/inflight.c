/* SPDX-License-Identifier: Apache-2.0 */
/* What is in flight on devices, and synchronize, which waits for all of it that began before. */
#include "request.h"

/* ---- devices and what is in flight on them ---- */

void bt_device_init(struct bt_device *device, bt_datapath *dp, const struct bt_device_ops *ops,
                    const struct bt_object_ops *object_ops, uint64_t tag, uint64_t size)
{
    bt_object_init(&device->base, dp, BT_OBJ_DEVICE, object_ops, tag, size);
    device->ops = ops;
    for (int i = 0; i < BT_MAX_THREADS; i++)
        device->inflight[i].tail = &device->inflight[i].head;
}

struct bt_io *bt_io_get(struct bt_thread *thread, int iovcnt)
{
    struct bt_io *io = thread->free_ios;
    if (io)
        thread->free_ios = io->next;
    else if (!(io = malloc(sizeof *io)))
        abort();
    memset(io, 0, offsetof(struct bt_io, iov_inline));
    io->iov_allocated = NULL;
    io->bounce = NULL;
    io->thread = thread;
    io->iov = io->iov_inline;
    io->iovcnt = iovcnt;
    if (iovcnt > (int)(sizeof io->iov_inline / sizeof *io->iov_inline)) {
        io->iov_allocated = malloc((size_t)iovcnt * sizeof *io->iov);
        if (!io->iov_allocated)
            abort();
        io->iov = io->iov_allocated;
    }
    return io;
}

void bt_io_enter(struct bt_io *io)
{
    struct bt_inflight *inflight = &io->device->inflight[io->thread->index];
    io->seq = ++inflight->seq;
    io->next = NULL;
    io->pprev = inflight->tail;
    *inflight->tail = io;
    inflight->tail = &io->next;
}

void bt_io_submit(struct bt_io *io)
{
    bt_io_enter(io);
    io->device->ops->submit(io);
}

void bt_io_finish(struct bt_io *io, int result)
{
    struct bt_inflight *inflight = &io->device->inflight[io->thread->index];
    *io->pprev = io->next;
    if (io->next)
        io->next->pprev = io->pprev;
    else
        inflight->tail = io->pprev;
    io->done(io, result);
    free(io->iov_allocated);
    io->next = io->thread->free_ios;
    io->thread->free_ios = io;
}

void bt_io_pool_free(struct bt_thread *thread)
{
    bt_claim_pool_free(thread);
    while (thread->free_ios) {
        struct bt_io *io = thread->free_ios;
        thread->free_ios = io->next;
        free(io);
    }
}

/* ---- synchronize ---- */

struct sync {
    bt_datapath *dp;
    uint64_t cookie;
    struct bt_thread *thread; /* gets this message, instead of an event */
    struct bt_message *then;
    _Atomic int remaining;
    int device_count;
    struct bt_device **devices;
    struct bt_sync *parts;
};

/* One thread's share: for each device, the newest I/O that must finish. */
struct bt_sync {
    struct bt_message message;
    struct bt_sync *next;
    struct sync *sync;
    uint64_t *until;
};

static int collect_devices(struct bt_object *object, struct bt_device **out)
{
    struct bt_object *backing;
    int n = 0;
    switch (object->type) {
    case BT_OBJ_DEVICE:
    case BT_OBJ_UPCALL:
        if (out)
            out[0] = (struct bt_device *)object;
        return 1;
    case BT_OBJ_GATE:
        return collect_devices(bt_child_get(&((struct bt_gate *)object)->child), out);
    case BT_OBJ_WINDOW:
        return collect_devices(bt_child_get(&((struct bt_window *)object)->child), out);
    case BT_OBJ_CONCAT:
        for (int i = 0; i < ((struct bt_concat *)object)->count; i++)
            n += collect_devices(bt_child_get(&((struct bt_concat *)object)->children[i]), out ? out + n : NULL);
        return n;
    case BT_OBJ_FENCE:
    case BT_OBJ_THROTTLE:
    case BT_OBJ_COR:
        return collect_devices(bt_child_get(&object->children[0]), out);
    case BT_OBJ_VIEW: /* all that the fence has below it */
        object = bt_child_get(&object->children[0]);
        for (int i = 0; i < object->child_count; i++)
            n += collect_devices(bt_child_get(&object->children[i]), out ? out + n : NULL);
        return n;
    case BT_OBJ_MAP:
        n = collect_devices(bt_child_get(&bt_as_map(object)->child), out);
        if ((backing = bt_child_get(&bt_as_map(object)->backing)))
            n += collect_devices(backing, out ? out + n : NULL);
        return n;
    }
    return 0;
}

static void sync_release(struct sync *sync)
{
    if (atomic_fetch_sub(&sync->remaining, 1) != 1)
        return;
    for (int i = 0; i < sync->device_count; i++)
        bt_object_unref(&sync->devices[i]->base);
    if (sync->then)
        bt_thread_post(sync->thread, sync->then);
    else
        bt_event_done(sync->dp, sync->cookie, 0);
    if (sync->parts)
        free(sync->parts[0].until);
    free(sync->parts);
    free(sync->devices);
    free(sync);
}

static bool sync_passed(struct bt_sync *part, struct bt_thread *thread)
{
    for (int i = 0; i < part->sync->device_count; i++) {
        struct bt_io *oldest = part->sync->devices[i]->inflight[thread->index].head;
        if (oldest && oldest->seq <= part->until[i])
            return false;
    }
    return true;
}

void bt_sync_check(struct bt_thread *thread)
{
    struct bt_sync **p = &thread->syncs;
    while (*p) {
        struct bt_sync *part = *p;
        if (sync_passed(part, thread)) {
            *p = part->next;
            sync_release(part->sync);
        } else {
            p = &part->next;
        }
    }
}

static void sync_begin(struct bt_message *message, struct bt_thread *thread)
{
    struct bt_sync *part = BT_CONTAINER(message, struct bt_sync, message);
    for (int i = 0; i < part->sync->device_count; i++)
        part->until[i] = part->sync->devices[i]->inflight[thread->index].seq;
    part->next = thread->syncs;
    thread->syncs = part;
}

static struct sync *sync_alloc(bt_object *object, int threads)
{
    struct sync *sync = calloc(1, sizeof *sync);
    if (!sync)
        abort();
    sync->dp = object->dp;
    sync->device_count = collect_devices(object, NULL);
    sync->devices = calloc((size_t)sync->device_count + 1, sizeof *sync->devices);
    sync->parts = calloc((size_t)threads + 1, sizeof *sync->parts);
    uint64_t *until = calloc((size_t)threads * (size_t)sync->device_count + 1, sizeof *until);
    if (!sync->devices || !sync->parts || !until)
        abort();
    collect_devices(object, sync->devices);
    for (int i = 0; i < sync->device_count; i++)
        bt_object_ref(&sync->devices[i]->base);
    for (int i = 0; i <= threads; i++) {
        sync->parts[i].sync = sync;
        sync->parts[i].until = until + i * sync->device_count;
        sync->parts[i].message.fn = sync_begin;
    }
    return sync;
}

static void sync_run(struct sync *sync, int threads)
{
    atomic_store(&sync->remaining, threads + 1);
    for (int i = 0; i < threads; i++)
        bt_thread_post(sync->dp->threads[i], &sync->parts[i].message);
    sync_release(sync);
}

void bt_synchronize(bt_object *object, uint64_t cookie)
{
    int threads = atomic_load(&object->dp->thread_count);
    struct sync *sync = sync_alloc(object, threads);
    sync->cookie = cookie;
    sync_run(sync, threads);
}

void bt_synchronize_then(struct bt_object *object, struct bt_thread *thread, struct bt_message *then)
{
    int threads = atomic_load(&object->dp->thread_count);
    struct sync *sync = sync_alloc(object, threads);
    sync->thread = thread;
    sync->then = then;
    sync_run(sync, threads);
}
