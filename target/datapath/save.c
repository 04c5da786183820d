/* SPDX-License-Identifier: Apache-2.0 */
/* Saving what a fence holds back: copy before write, without asking. The first request that wants to change
 * granules that are not open begins a save of them, and others that want the same wait for it: the granules are
 * copied from the fence's child to where views read what was saved, marked SAVED, and, when nobody reads them where
 * they were any more, marked OPEN. Those who wait then look again. When it fails, or a request has waited too long,
 * Python is asked: what that means is policy.
 *
 * A save belongs to the thread of the request that began it. The fence's saver has them all, under its lock, with
 * those who wait; no request is started under the lock. */
#include "save.h"

#define PIECE (256u << 10)         /* bytes that are read and written at once, in a buffer that is kept */
#define LARGE_CHANGE (1u << 20)    /* a request for more than this has it copied by copy.c */
#define LARGE_PIECE (16u << 20)
#define LARGE_MEMORY (4u << 20)    /* what copy.c takes for one */
#define MEMORY (64u << 20)         /* for all saves of a fence */
#define MAX_SAVES 64
#define AHEAD 8                    /* saves that one request begins */
#define FREE_SAVES 16              /* that are kept, with their buffers */
#define LET_IN 4                   /* of those who wait for room, when a save has ended */

void bt_saver_init(struct bt_saver *saver)
{
    pthread_mutex_init(&saver->lock, NULL);
    saver->queue_tail = &saver->queue;
}

void bt_saver_destroy(struct bt_saver *saver)
{
    while (saver->free) {
        struct bt_save *save = saver->free;
        saver->free = save->next;
        free(save->buffer);
        free(save);
    }
    while (saver->free_readings) {
        struct bt_reading *reading = saver->free_readings;
        saver->free_readings = reading->next;
        free(reading);
    }
    pthread_mutex_destroy(&saver->lock);
}

void bt_fence_set_saving(bt_object *object, uint64_t size, bool read_through)
{
    struct bt_saver *saver = &bt_as_fence(object)->saver;
    saver->size = size;
    saver->read_through = read_through;
}

void bt_fence_set_timeout(bt_object *object, uint64_t timeout_ns)
{
    atomic_store(&bt_as_fence(object)->saver.timeout_ns, timeout_ns);
}

uint64_t bt_fence_saved(bt_object *object) { return atomic_load(&bt_as_fence(object)->saver.saved); }

/* ---- the end of a save ---- */

/* Under the lock. */
static void put_back(struct bt_saver *saver, struct bt_save *save)
{
    if (saver->free_count == FREE_SAVES) {
        free(save->buffer);
        free(save);
        return;
    }
    save->next = saver->free;
    saver->free = save;
    saver->free_count++;
}

/* Under the lock. */
static void leave(struct bt_saver *saver, struct bt_save *save)
{
    *save->pprev = save->next;
    if (save->next)
        save->next->pprev = save->pprev;
    saver->count--;
    saver->in_use -= save->memory;
}

static void save_end(struct bt_save *save, int result)
{
    struct bt_fence *fence = save->fence;
    struct bt_saver *saver = &fence->saver;
    struct bt_thread *thread = save->thread;
    struct bt_object *source = save->source, *target = save->target;
    if (save->timed)
        bt_timer_cancel(thread, &save->timer);
    pthread_mutex_lock(&saver->lock);
    if (result == 0)
        bt_fence_mark(&fence->base, BT_FENCE_OPEN, save->first, save->end - save->first);
    leave(saver, save);
    struct bt_request *waiters = save->waiters;
    struct bt_request *let_in = bt_wait_take(&saver->queue, &saver->queue_tail, saver->count ? LET_IN : UINT32_MAX);
    put_back(saver, save);
    bt_wait_check(fence);
    pthread_mutex_unlock(&saver->lock);
    if (result < 0)
        bt_wait_fail(fence, thread, waiters, result);
    else
        bt_wait_wake(waiters);
    bt_wait_wake(let_in);
    bt_object_unref(source);
    bt_object_unref(target);
    bt_object_unref(&fence->base);
}

static void nobody_reads(struct bt_message *message, struct bt_thread *thread)
{
    (void)thread;
    save_end(BT_CONTAINER(message, struct bt_save, message), 0);
}

/* No view's reader is left; others may read through the target. */
static void no_reader(struct bt_save *save)
{
    if (!save->fence->saver.read_through) {
        save_end(save, 0);
        return;
    }
    save->message.fn = nobody_reads;
    bt_synchronize_then(save->target, save->thread, &save->message);
}

static void readers_gone(struct bt_message *message, struct bt_thread *thread)
{
    (void)thread;
    no_reader(BT_CONTAINER(message, struct bt_save, message));
}

void bt_saver_reading_ended(struct bt_fence *fence)
{
    struct bt_saver *saver = &fence->saver;
    for (struct bt_save *save = saver->settling ? saver->saves : NULL; save; save = save->next) {
        if (!save->settling || bt_is_read(saver, save->first, save->end, save->seq))
            continue;
        save->settling = false;
        saver->settling--;
        save->message.fn = readers_gone;
        bt_thread_post(save->thread, &save->message);
    }
    if (saver->waits)
        bt_wait_check(fence);
}

static void copied(struct bt_save *save, int result)
{
    struct bt_fence *fence = save->fence;
    struct bt_saver *saver = &fence->saver;
    uint64_t count = save->end - save->first;
    if (result < 0) {
        save_end(save, result);
        return;
    }
    pthread_mutex_lock(&saver->lock);
    if (save->how != BT_SAVE_HIDDEN) {
        bt_fence_mark(&fence->base, BT_FENCE_SAVED, save->first, count);
        atomic_fetch_add(&saver->saved, count);
    }
    save->seq = saver->seq;
    bool settling = bt_is_read(saver, save->first, save->end, save->seq);
    save->settling = settling;
    saver->settling += settling;
    pthread_mutex_unlock(&saver->lock);
    if (!settling)
        no_reader(save);
}

/* ---- copying ---- */

static void start(struct bt_save *save, struct bt_object *object, int op, void (*done)(struct bt_request *))
{
    struct bt_request *request = &save->request;
    request->thread = save->thread;
    request->object = object;
    request->done = done;
    request->op = (uint8_t)op;
    request->flags = op == BT_ZEROES ? BT_UNMAP : 0;
    request->iov = op == BT_ZEROES ? NULL : &save->iov;
    request->iovcnt = op == BT_ZEROES ? 0 : 1;
    bt_request_start(request);
}

static struct bt_save *save_of(struct bt_request *request) { return BT_CONTAINER(request, struct bt_save, request); }

static void written(struct bt_request *request) { copied(save_of(request), request->ret); }

/* What is that small is read in less time than it takes to ask whether it is a hole. */
static void has_data(struct bt_request *request)
{
    struct bt_save *save = save_of(request);
    if (request->ret < 0) {
        save_end(save, request->ret);
        return;
    }
    bool zeros = bt_iov_is_zero(&save->iov, 1, 0, save->iov.iov_len);
    start(save, save->target, zeros ? BT_ZEROES : BT_WRITE, written);
}

static void large_copied(void *arg, int result) { copied(arg, result); }

static void run(struct bt_save *save)
{
    struct bt_fence *fence = save->fence;
    uint64_t offset = save->first << fence->granule_bits;
    uint64_t length = bt_min(save->end << fence->granule_bits, fence->saver.size) - offset;
    if (save->timed)
        bt_timer_add(save->thread, &save->timer);
    if (save->how == BT_SAVE_HIDDEN) {
        copied(save, 0);
    } else if (save->how == BT_SAVE_LARGE) {
        int ret = bt_copy_then(save->thread, save->source, save->target, offset, length, large_copied, save);
        if (ret < 0)
            save_end(save, ret);
    } else if (!save->buffer && posix_memalign(&save->buffer, 4096, PIECE)) {
        save->buffer = NULL;
        save_end(save, -ENOMEM);
    } else {
        save->iov = (struct iovec){.iov_base = save->buffer, .iov_len = length};
        save->request.offset = offset;
        save->request.length = length;
        start(save, save->source, BT_READ, has_data);
    }
}

/* ---- the beginning: all under the lock ---- */

static bool has_room(const struct bt_saver *saver, uint64_t memory)
{
    return !saver->count || (saver->count < MAX_SAVES && saver->in_use + memory <= MEMORY);
}

/* The save of that granule, or NULL; where the next begins, if that is before *end. */
static struct bt_save *find_save(const struct bt_saver *saver, uint64_t granule, uint64_t *end)
{
    for (struct bt_save *save = saver->saves; save; save = save->next) {
        if (save->first <= granule && granule < save->end)
            return save;
        if (save->first > granule)
            *end = bt_min(*end, save->first);
    }
    return NULL;
}

static struct bt_save *save_get(struct bt_saver *saver)
{
    struct bt_save *save = saver->free;
    if (save) {
        saver->free = save->next;
        saver->free_count--;
    } else if (!(save = calloc(1, sizeof *save))) {
        abort();
    }
    return save;
}

static void set_timer(struct bt_save *save)
{
    uint64_t timeout = atomic_load(&save->fence->saver.timeout_ns);
    save->timed = timeout != 0;
    save->timer.fn = bt_wait_late;
    save->timer.at_ns = save->timed ? bt_now_ns() + timeout : 0;
}

static struct bt_save *save_new(struct bt_fence *fence, struct bt_thread *thread, uint64_t first, uint64_t end,
                                enum bt_save_how how)
{
    struct bt_saver *saver = &fence->saver;
    struct bt_save *save = save_get(saver);
    save->fence = fence;
    save->thread = thread;
    save->first = first;
    save->end = end;
    save->how = how;
    save->memory = how == BT_SAVE_LARGE ? LARGE_MEMORY : PIECE;
    save->source = bt_child_get(&fence->children[0]);
    save->target = bt_child_get(&fence->children[1]);
    bt_object_ref(&fence->base);
    bt_object_ref(save->source);
    bt_object_ref(save->target);
    save->waiters = NULL;
    save->waiters_tail = &save->waiters;
    save->settling = false;
    set_timer(save);
    save->next = saver->saves;
    save->pprev = &saver->saves;
    if (save->next)
        save->next->pprev = &save->next;
    saver->saves = save;
    saver->count++;
    saver->in_use += save->memory;
    return save;
}

/* A save of granules from at on, no further than end. NULL: there is no room. */
static struct bt_save *begin(struct bt_fence *fence, struct bt_thread *thread, uint64_t at, uint64_t end, bool large)
{
    uint64_t step = bt_max((large ? LARGE_PIECE : PIECE) >> fence->granule_bits, 1);
    bool hidden = bt_is_marked(fence, BT_FENCE_HIDDEN, at);
    end = bt_mark_run(fence, BT_FENCE_OPEN, at, end, false);
    end = bt_mark_run(fence, BT_FENCE_HIDDEN, at, end, hidden);
    if (!hidden)
        end = bt_min(end, at + step);
    enum bt_save_how how = hidden ? BT_SAVE_HIDDEN : large ? BT_SAVE_LARGE : BT_SAVE_PIECE;
    if (!has_room(&fence->saver, large ? LARGE_MEMORY : PIECE))
        return NULL;
    return save_new(fence, thread, at, end, how);
}

/* Saves for what is not open of the granules from at on, up to AHEAD of them; the request waits for the first save,
 * or for room. Returns how many were begun. */
static int begin_all(struct bt_request *request, const struct bt_segment *segment, struct bt_save *begun[AHEAD])
{
    struct bt_fence *fence = bt_as_fence(segment->object);
    struct bt_saver *saver = &fence->saver;
    uint64_t at = segment->granule, last = at + segment->granules;
    uint64_t bytes = segment->granules << fence->granule_bits;
    bool large = bytes > LARGE_CHANGE || 1ull << fence->granule_bits > PIECE, waiting = false;
    int count = 0;
    while (count < AHEAD && (at = bt_find_mark(fence, BT_FENCE_OPEN, at, last, false)) < last) {
        uint64_t end = last;
        struct bt_save *save = find_save(saver, at, &end);
        if (!save && !(save = begun[count] = begin(fence, request->thread, at, end, large)))
            break;
        count += save == begun[count];
        if (!waiting)
            bt_wait_append(&save->waiters_tail, request);
        waiting = true;
        at = save->end;
    }
    if (!waiting)
        bt_wait_append(&saver->queue_tail, request);
    return count;
}

bool bt_save_start(struct bt_request *request, const struct bt_segment *segment)
{
    struct bt_fence *fence = bt_as_fence(segment->object);
    struct bt_saver *saver = &fence->saver;
    struct bt_save *begun[AHEAD] = {NULL};
    struct bt_segment fault = *segment;
    uint64_t timeout = atomic_load_explicit(&saver->timeout_ns, memory_order_relaxed);
    fault.reason = BT_FAULT_SAVE;
    bt_request_prepare_fault(request, segment->object, &fault);
    if (timeout && !request->deadline_ns)
        request->deadline_ns = bt_now_ns() + timeout;
    pthread_mutex_lock(&saver->lock);
    bool open = bt_is_marked(fence, BT_FENCE_OPEN, segment->granule);
    int count = open ? 0 : begin_all(request, segment, begun);
    pthread_mutex_unlock(&saver->lock);
    for (int i = 0; i < count; i++)
        run(begun[i]);
    return open;
}
