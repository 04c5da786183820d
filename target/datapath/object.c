/* SPDX-License-Identifier: Apache-2.0 */
/* Objects: reference counts, counters, windows, gates, the in-flight lists of devices, and synchronize. */
#include "request.h"

void bt_object_init(struct bt_object *object, bt_datapath *dp, enum bt_object_type type,
                    const struct bt_object_ops *ops, uint64_t tag, uint64_t size)
{
    object->type = type;
    object->ops = ops;
    object->dp = dp;
    object->tag = tag;
    object->size = size;
    object->refs = 1;
    object->discard_unmap = true;
    object->counters = calloc(BT_MAX_THREADS, sizeof *object->counters);
    if (!object->counters)
        abort();
}

void bt_object_ref(bt_object *object) { atomic_fetch_add_explicit(&object->refs, 1, memory_order_relaxed); }

static void destroy_object(void *arg)
{
    struct bt_object *object = arg;
    struct bt_event event = {.type = BT_EVENT_RELEASED, .tag = object->tag};
    bt_datapath *dp = object->dp;
    free(object->counters);
    object->ops->destroy(object);
    bt_event_send(dp, &event);
}

void bt_object_unref(bt_object *object)
{
    if (atomic_fetch_sub_explicit(&object->refs, 1, memory_order_acq_rel) == 1)
        bt_grace(object->dp, destroy_object, object);
}

void bt_object_set_policy(bt_object *object, bool discard_unmap, int detect_zeroes)
{
    object->discard_unmap = discard_unmap;
    object->detect_zeroes = (uint8_t)detect_zeroes;
}

void bt_object_set_fua(bt_object *object, bool takes_fua) { object->takes_fua = takes_fua; }

/* Acquire: who sees a map's new size sees the directory that was made for it. */
uint64_t bt_object_size(bt_object *object) { return atomic_load_explicit(&object->size, memory_order_acquire); }
void bt_object_set_size(bt_object *object, uint64_t size) { atomic_store(&object->size, size); }

void bt_object_counters(bt_object *object, struct bt_counters *out)
{
    memset(out, 0, sizeof *out);
    uint64_t *sum = (uint64_t *)out;
    for (int t = 0; t < BT_MAX_THREADS; t++) {
        uint64_t *part = (uint64_t *)&object->counters[t];
        for (size_t i = 0; i < sizeof *out / sizeof *sum; i++)
            sum[i] += __atomic_load_n(&part[i], __ATOMIC_RELAXED);
    }
}

/* ---- windows and concatenations ---- */

static void window_destroy(struct bt_object *object)
{
    bt_object_unref(((struct bt_window *)object)->child);
    free(object);
}
static const struct bt_object_ops window_ops = {.destroy = window_destroy};

bt_object *bt_window_new(bt_datapath *dp, uint64_t tag, bt_object *child, uint64_t offset, uint64_t size)
{
    struct bt_window *window = calloc(1, sizeof *window);
    uint64_t end;
    if (!window || __builtin_add_overflow(offset, size, &end)) {
        free(window);
        errno = EINVAL;
        return NULL;
    }
    bt_object_init(&window->base, dp, BT_OBJ_WINDOW, &window_ops, tag, size);
    bt_object_ref(child);
    window->child = child;
    window->offset = offset;
    return &window->base;
}

static void concat_destroy(struct bt_object *object)
{
    struct bt_concat *concat = (struct bt_concat *)object;
    for (int i = 0; i < concat->count; i++)
        bt_object_unref(concat->children[i]);
    free(concat);
}
static const struct bt_object_ops concat_ops = {.destroy = concat_destroy};

bt_object *bt_concat_new(bt_datapath *dp, uint64_t tag, bt_object **children, int count)
{
    struct bt_concat *concat = calloc(1, sizeof *concat + (size_t)count * sizeof *children);
    uint64_t size = 0;
    for (int i = 0; concat && i < count; i++)
        if (__builtin_add_overflow(size, bt_object_size(children[i]), &size)) {
            free(concat);
            concat = NULL;
            errno = EINVAL;
        }
    if (!concat)
        return NULL;
    bt_object_init(&concat->base, dp, BT_OBJ_CONCAT, &concat_ops, tag, size);
    for (concat->count = 0; concat->count < count; concat->count++) {
        bt_object_ref(children[concat->count]);
        concat->children[concat->count] = children[concat->count];
    }
    return &concat->base;
}

static void upcall_destroy(struct bt_object *object) { free(object); }
static const struct bt_object_ops upcall_ops = {.destroy = upcall_destroy};

bt_object *bt_upcall_new(bt_datapath *dp, uint64_t tag, uint64_t size)
{
    struct bt_device *device = calloc(1, sizeof *device);
    if (!device)
        return NULL;
    bt_device_init(device, dp, NULL, &upcall_ops, tag, size);
    device->base.type = BT_OBJ_UPCALL;
    return &device->base;
}

/* ---- gates ---- */

static void gate_destroy(struct bt_object *object)
{
    bt_object_unref(((struct bt_gate *)object)->child);
    free(object);
}
static const struct bt_object_ops gate_ops = {.destroy = gate_destroy};

bt_object *bt_gate_new(bt_datapath *dp, uint64_t tag, bt_object *child, bool writable)
{
    struct bt_gate *gate = calloc(1, sizeof *gate);
    if (!gate)
        return NULL;
    bt_object_init(&gate->base, dp, BT_OBJ_GATE, &gate_ops, tag, bt_object_size(child));
    bt_object_ref(child);
    gate->child = child;
    gate->writable = writable;
    for (int i = 0; i < BT_MAX_THREADS; i++) {
        gate->parts[i].gate = &gate->base;
        gate->parts[i].held_tail = &gate->parts[i].held;
    }
    return &gate->base;
}

bool bt_gate_enter(struct bt_gate *gate, struct bt_request *request)
{
    struct bt_gate_part *part = &gate->parts[request->thread->index];
    if (part->closed) {
        request->next = NULL;
        *part->held_tail = request;
        part->held_tail = &request->next;
        return false;
    }
    part->inside++;
    struct bt_counters *counters = bt_counters_of(&gate->base, request->thread);
    bt_count(&counters->requests[request->op], 1);
    bt_count(&counters->bytes[request->op], request->length);
    return true;
}

static void part_drained(struct bt_gate *gate)
{
    if (atomic_fetch_sub(&gate->waiting, 1) == 1)
        bt_event_done(gate->base.dp, gate->cookie, 0);
}

void bt_gate_leave(struct bt_gate *gate, struct bt_thread *thread)
{
    struct bt_gate_part *part = &gate->parts[thread->index];
    if (--part->inside == 0 && part->closed)
        part_drained(gate);
}

static void close_part(struct bt_message *message, struct bt_thread *thread)
{
    struct bt_gate_part *part = BT_CONTAINER(message, struct bt_gate_part, close);
    (void)thread;
    part->closed = true;
    if (part->inside == 0)
        part_drained((struct bt_gate *)part->gate);
}

void bt_gate_drain(bt_object *object, uint64_t cookie)
{
    struct bt_gate *gate = (struct bt_gate *)object;
    int count = atomic_load(&object->dp->thread_count);
    gate->cookie = cookie;
    atomic_store(&gate->waiting, count + 1);
    for (int i = 0; i < count; i++) {
        gate->parts[i].close.fn = close_part;
        bt_thread_post(object->dp->threads[i], &gate->parts[i].close);
    }
    part_drained(gate);
}

static void open_part(struct bt_message *message, struct bt_thread *thread)
{
    struct bt_gate_part *part = BT_CONTAINER(message, struct bt_gate_part, open);
    (void)thread;
    struct bt_request *request = part->held;
    part->held = NULL;
    part->held_tail = &part->held;
    part->closed = false;
    while (request) {
        struct bt_request *next = request->next;
        bt_request_start(request);
        request = next;
    }
    bt_object_unref(part->gate);
}

void bt_gate_resume(bt_object *object, bt_object *child)
{
    struct bt_gate *gate = (struct bt_gate *)object;
    if (child) {
        bt_object_ref(child);
        bt_object_unref(atomic_exchange(&gate->child, child));
    }
    for (int i = 0; i < atomic_load(&object->dp->thread_count); i++) {
        bt_object_ref(object);
        gate->parts[i].open.fn = open_part;
        bt_thread_post(object->dp->threads[i], &gate->parts[i].open);
    }
}

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
    int n = 0;
    switch (object->type) {
    case BT_OBJ_DEVICE:
    case BT_OBJ_UPCALL:
        if (out)
            out[0] = (struct bt_device *)object;
        return 1;
    case BT_OBJ_GATE:
        return collect_devices(atomic_load(&((struct bt_gate *)object)->child), out);
    case BT_OBJ_WINDOW:
        return collect_devices(((struct bt_window *)object)->child, out);
    case BT_OBJ_CONCAT:
        for (int i = 0; i < ((struct bt_concat *)object)->count; i++)
            n += collect_devices(((struct bt_concat *)object)->children[i], out ? out + n : NULL);
        return n;
    case BT_OBJ_MAP:
        n = collect_devices(bt_as_map(object)->child, out);
        if (bt_as_map(object)->backing)
            n += collect_devices(bt_as_map(object)->backing, out ? out + n : NULL);
        return n;
    }
    return 0;
}

static void sync_release(struct sync *sync)
{
    if (atomic_fetch_sub(&sync->remaining, 1) != 1)
        return;
    bt_event_done(sync->dp, sync->cookie, 0);
    for (int i = 0; i < sync->device_count; i++)
        bt_object_unref(&sync->devices[i]->base);
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

void bt_synchronize(bt_object *object, uint64_t cookie)
{
    int threads = atomic_load(&object->dp->thread_count);
    struct sync *sync = sync_alloc(object, threads);
    sync->dp = object->dp;
    sync->cookie = cookie;
    atomic_store(&sync->remaining, threads + 1);
    for (int i = 0; i < threads; i++)
        bt_thread_post(object->dp->threads[i], &sync->parts[i].message);
    sync_release(sync);
}
