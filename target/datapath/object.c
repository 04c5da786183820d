/* SPDX-License-Identifier: Apache-2.0 */
/* Objects: reference counts, counters, windows, gates, the in-flight lists of devices, and synchronize. */
#include <limits.h>

#include "request.h"
#include "throttle.h"

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
    object->write_threshold = UINT64_MAX;
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
    for (int i = 0; i < object->child_count; i++)
        if (bt_child_get(&object->children[i]))
            bt_object_unref(bt_child_get(&object->children[i]));
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
    uint64_t *sum = (uint64_t *)out, written_end = 0;
    for (int t = 0; t < BT_MAX_THREADS; t++) {
        uint64_t *part = (uint64_t *)&object->counters[t];
        for (size_t i = 0; i < sizeof *out / sizeof *sum; i++)
            sum[i] += __atomic_load_n(&part[i], __ATOMIC_RELAXED);
        uint64_t end = __atomic_load_n(&object->counters[t].written_end, __ATOMIC_RELAXED);
        written_end = bt_max(written_end, end);
    }
    out->written_end = written_end;
}

void bt_object_succeed(bt_object *object, bt_object *old)
{
    memcpy(object->counters, old->counters, BT_MAX_THREADS * sizeof *object->counters);
    atomic_store(&object->write_threshold, atomic_load(&old->write_threshold));
}

void bt_child_init(bt_child *slot, struct bt_object *child)
{
    if (child)
        bt_object_ref(child);
    atomic_init(slot, child);
}

void bt_object_set_child(bt_object *object, int index, bt_object *child)
{
    if (child)
        bt_object_ref(child);
    struct bt_object *old = atomic_exchange(&object->children[index], child);
    if (old)
        bt_object_unref(old);
}

int bt_object_replace_child(bt_object *object, bt_object *old, bt_object *child)
{
    int n = 0;
    for (int i = 0; i < object->child_count; i++)
        if (bt_child_get(&object->children[i]) == old) {
            bt_object_set_child(object, i, child);
            n++;
        }
    return n;
}

void bt_object_set_write_threshold(bt_object *object, uint64_t offset)
{
    atomic_store(&object->write_threshold, offset);
}
uint64_t bt_object_write_threshold(bt_object *object) { return atomic_load(&object->write_threshold); }

/* ---- windows and concatenations ---- */

static void plain_destroy(struct bt_object *object) { free(object); }
static const struct bt_object_ops window_ops = {.destroy = plain_destroy};

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
    bt_child_init(&window->child, child);
    window->base.children = &window->child;
    window->base.child_count = 1;
    window->offset = offset;
    return &window->base;
}

static const struct bt_object_ops concat_ops = {.destroy = plain_destroy};

struct cor {
    struct bt_object base;
    bt_child children[2]; /* what it passes requests on to, and the lowest map whose data are copied */
};
static const struct bt_object_ops cor_ops = {.destroy = plain_destroy};

bt_object *bt_cor_new(bt_datapath *dp, uint64_t tag, bt_object *child, bt_object *bottom)
{
    struct cor *cor = calloc(1, sizeof *cor);
    if (!cor)
        return NULL;
    bt_object_init(&cor->base, dp, BT_OBJ_COR, &cor_ops, tag, bt_object_size(child));
    bt_child_init(&cor->children[0], child);
    bt_child_init(&cor->children[1], bottom);
    cor->base.children = cor->children;
    cor->base.child_count = 2;
    return &cor->base;
}

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
    for (int i = 0; i < count; i++)
        bt_child_init(&concat->children[i], children[i]);
    concat->count = concat->base.child_count = count;
    concat->base.children = concat->children;
    return &concat->base;
}

static const struct bt_object_ops upcall_ops = {.destroy = plain_destroy};

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

static void set_drained(struct bt_gate *gate, bool drained)
{
    if (drained)
        bt_hurry(gate->base.dp, &gate->hurried);
    else
        bt_unhurry(gate->base.dp, &gate->hurried);
}

static void gate_destroy(struct bt_object *object)
{
    set_drained((struct bt_gate *)object, false);
    free(object);
}
static const struct bt_object_ops gate_ops = {.destroy = gate_destroy};

bt_object *bt_gate_new(bt_datapath *dp, uint64_t tag, bt_object *child, bool writable)
{
    struct bt_gate *gate = calloc(1, sizeof *gate);
    if (!gate)
        return NULL;
    bt_object_init(&gate->base, dp, BT_OBJ_GATE, &gate_ops, tag, bt_object_size(child));
    bt_child_init(&gate->child, child);
    gate->base.children = &gate->child;
    gate->base.child_count = 1;
    gate->writable = writable;
    gate->closed_from = UINT_MAX;
    for (int i = 0; i < BT_MAX_THREADS; i++)
        gate->parts[i].held_tail = &gate->parts[i].held;
    return &gate->base;
}

bool bt_gate_enter(struct bt_gate *gate, struct bt_request *request)
{
    struct bt_gate_part *part = &gate->parts[request->thread->index];
    unsigned closed_from = atomic_load_explicit(&gate->closed_from, memory_order_relaxed);
    if (BT_UNLIKELY(part->closed || request->thread->index >= closed_from)) {
        request->next = NULL;
        *part->held_tail = request;
        part->held_tail = &request->next;
        return false;
    }
    part->inside++;
    bt_count_request(&gate->base, request->thread, request->op, request->offset, request->length);
    return true;
}

#define DRAIN_SHIFT 32

/* One thread less to wait for; a drain that was given up meanwhile waits for none. */
static void part_drained(struct bt_gate *gate, uint32_t drain)
{
    uint64_t waiting = atomic_load(&gate->waiting), cookie;
    do {
        if (waiting >> DRAIN_SHIFT != drain || !(uint32_t)waiting)
            return;
        cookie = atomic_load(&gate->cookie); /* another drain's only when waiting is, too */
    } while (!atomic_compare_exchange_weak(&gate->waiting, &waiting, waiting - 1));
    if ((uint32_t)waiting == 1)
        bt_event_done(gate->base.dp, cookie, 0);
}

void bt_gate_leave(struct bt_gate *gate, struct bt_thread *thread)
{
    struct bt_gate_part *part = &gate->parts[thread->index];
    if (--part->inside == 0 && part->closed)
        part_drained(gate, part->drain);
}

/* To one thread: close the gate, or open it. Allocated, because a drain may be given up, and another begin, before a
 * thread that hangs in a system call has read of the first. */
struct gate_message {
    struct bt_message message;
    struct bt_gate *gate;
    uint32_t drain;
};

void bt_gate_tell_failure(bt_object *gate) { atomic_store(&((struct bt_gate *)gate)->tell_failure, true); }

/* What a client may not do is its own fault, and no failure of what is below. */
void bt_gate_failed(struct bt_gate *gate, const struct bt_request *request)
{
    if (!atomic_load_explicit(&gate->tell_failure, memory_order_relaxed) || request->ret == -EPERM)
        return;
    if (!atomic_exchange(&gate->tell_failure, false))
        return;
    struct bt_event event = {
        .type = BT_EVENT_FAILED,
        .tag = gate->base.tag,
        .op = request->op,
        .offset = request->offset,
        .length = request->length,
        .result = request->ret,
    };
    bt_event_send(gate->base.dp, &event);
}

static void close_part(struct bt_message *message, struct bt_thread *thread)
{
    struct gate_message *closing = BT_CONTAINER(message, struct gate_message, message);
    struct bt_gate *gate = closing->gate;
    struct bt_gate_part *part = &gate->parts[thread->index];
    part->closed = true;
    part->drain = closing->drain;
    if (part->inside == 0)
        part_drained(gate, part->drain);
    free(closing);
    bt_object_unref(&gate->base);
}

static void open_part(struct bt_message *message, struct bt_thread *thread)
{
    struct gate_message *opening = BT_CONTAINER(message, struct gate_message, message);
    struct bt_gate *gate = opening->gate;
    struct bt_gate_part *part = &gate->parts[thread->index];
    struct bt_request *request = part->held;
    free(opening);
    part->held = NULL;
    part->held_tail = &part->held;
    part->closed = false;
    while (request) {
        struct bt_request *next = request->next;
        bt_request_start(request);
        request = next;
    }
    bt_object_unref(&gate->base);
}

static void post_all(struct bt_gate *gate, int count, uint32_t drain,
                     void (*fn)(struct bt_message *message, struct bt_thread *thread))
{
    for (int i = 0; i < count; i++) {
        struct gate_message *message = malloc(sizeof *message);
        if (!message)
            abort();
        bt_object_ref(&gate->base);
        *message = (struct gate_message){.message.fn = fn, .gate = gate, .drain = drain};
        bt_thread_post(gate->base.dp->threads[i], &message->message);
    }
}

void bt_gate_drain(bt_object *object, uint64_t cookie)
{
    struct bt_gate *gate = (struct bt_gate *)object;
    int count = atomic_load(&object->dp->thread_count);
    uint32_t drain = (uint32_t)(atomic_load(&gate->waiting) >> DRAIN_SHIFT) + 1;
    atomic_store(&gate->waiting, (uint64_t)drain << DRAIN_SHIFT | ((uint64_t)count + 1));
    atomic_store(&gate->cookie, cookie);
    atomic_store(&gate->closed_from, (unsigned)count);
    post_all(gate, count, drain, close_part);
    set_drained(gate, true);
    part_drained(gate, drain);
}

void bt_gate_resume(bt_object *object, bt_object *child)
{
    struct bt_gate *gate = (struct bt_gate *)object;
    if (child)
        bt_object_set_child(object, 0, child);
    set_drained(gate, false);
    atomic_store(&gate->closed_from, UINT_MAX);
    post_all(gate, atomic_load(&object->dp->thread_count), 0, open_part);
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
