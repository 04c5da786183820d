/* SPDX-License-Identifier: Apache-2.0 */
/* One virtqueue on its I/O thread: takes what is available, publishes what is done, paces notifications.
 * Nothing here knows the requests' meaning (vhost_blk.c) or the ring's layout (vhost_ring.c). */
#define _GNU_SOURCE
#include <signal.h>
#include <unistd.h>

#include "vhost.h"

/* A turn of the loop publishes at its end. While it lasts, every so many completions are published, so that the driver
 * works on them meanwhile: it then stays awake, which makes notifications cheap. They get half of the time at most. */
#define NOTIFY_EVERY 4
/* Large requests take long: after one, what waits is published when it has waited for this long. */
#define NOTIFY_LARGE (64u << 10)
#define NOTIFY_MAX_NS 50000
/* How often a queue without a kick descriptor is looked at while its thread has nothing else to do. */
#define UNKICKED_NS 1000000

/* ---- memory ---- */

int vhost_queue_alloc(struct vhost_queue *queue)
{
    size_t size = queue->size;
    queue->requests = calloc(size, sizeof *queue->requests);
    queue->free = calloc(size, sizeof *queue->free);
    queue->iovs = calloc(size, VHOST_IOV * sizeof *queue->iovs);
    queue->segments = calloc(size, BT_VHOST_MAX_SEGMENTS * sizeof *queue->segments);
    queue->ring.scratch = calloc(BT_VHOST_MAX_CHAIN, sizeof *queue->ring.scratch);
    if (!queue->requests || !queue->free || !queue->iovs || !queue->segments || !queue->ring.scratch) {
        vhost_queue_release(queue);
        return -ENOMEM;
    }
    for (size_t i = 0; i < size; i++)
        queue->free[i] = (uint16_t)(size - 1 - i);
    queue->free_count = (uint16_t)size;
    return 0;
}

void vhost_queue_release(struct vhost_queue *queue)
{
    free(queue->requests);
    free(queue->free);
    free(queue->iovs);
    free(queue->segments);
    free(queue->ring.scratch);
    queue->requests = NULL;
    queue->free = NULL;
    queue->iovs = NULL;
    queue->segments = NULL;
    queue->ring.scratch = NULL;
}

/* ---- trouble ---- */

/* Full: the front end has a notification to read. Closed at the other end: nobody listens. Blocked: the front end
 * has taken O_NONBLOCK from it and filled it; then bt_vhost_interrupt gets us out, and the result is false. */
static bool signal_descriptor(struct vhost_queue *queue, int fd, uint64_t now)
{
    uint64_t one = 1;
    bool blocked = false;
    if (fd < 0)
        return true;
    atomic_store_explicit(&queue->signalling_ns, now, memory_order_release);
    while (write(fd, &one, sizeof one) < 0 && errno == EINTR && !blocked)
        blocked = atomic_exchange(&queue->interrupted, false);
    atomic_store_explicit(&queue->signalling_ns, 0, memory_order_relaxed);
    return !blocked;
}

/* The thread does not look at the queue any more. */
static void detach(struct vhost_queue *queue)
{
    bt_poller_remove(queue->thread, &queue->poller);
    if (queue->kick_fd >= 0)
        bt_watch_remove(queue->thread, &queue->watch);
    if (queue->timed)
        bt_timer_cancel(queue->thread, &queue->timer);
    queue->timed = false;
}

void vhost_queue_break(struct vhost_queue *queue, enum bt_vhost_trouble why)
{
    if (queue->broken)
        return;
    queue->broken = true;
    if (queue->state == VHOST_RUNNING)
        detach(queue);
    /* Zero pages where the ring was look like any other nonsense. */
    if (atomic_load_explicit(&queue->session->memory.broken, memory_order_relaxed))
        why = BT_VHOST_MEMORY_LOST;
    signal_descriptor(queue, queue->err_fd, bt_now_ns());
    struct bt_event event = {.type = BT_EVENT_SESSION,
                             .tag = queue->session->tag,
                             .result = (int64_t)why | (int64_t)queue->index << 8};
    bt_event_send(queue->session->dp, &event);
}

static void check_memory(struct vhost_queue *queue)
{
    if (BT_UNLIKELY(atomic_load_explicit(&queue->session->memory.broken, memory_order_relaxed)))
        vhost_queue_break(queue, BT_VHOST_MEMORY_LOST);
}

/* ---- completion ---- */

static void publish(struct vhost_queue *queue)
{
    if (!queue->unpublished)
        return;
    queue->unpublished = 0;
    if (!vhost_ring_publish(&queue->ring) || queue->mute)
        return;
    uint64_t before = bt_now_ns();
    queue->mute = !signal_descriptor(queue, atomic_load_explicit(&queue->call_fd, memory_order_acquire), before);
    if (BT_UNLIKELY(queue->mute))
        vhost_queue_break(queue, BT_VHOST_BAD_DESCRIPTOR);
    uint64_t cost = bt_now_ns() - before;
    queue->notify_cost_ns += cost / 8 - queue->notify_cost_ns / 8;
    bt_count(&queue->counters.notifications, 1);
}

void vhost_queue_complete(struct vhost_request *request, uint32_t written)
{
    struct vhost_queue *queue = request->queue;
    if (BT_UNLIKELY(request->iov_allocated != NULL)) {
        free(request->iov_allocated);
        request->iov_allocated = NULL;
    }
    vhost_ring_push(&queue->ring, request->head, written);
    queue->free[queue->free_count++] = (uint16_t)(request - queue->requests);
    queue->unpublished++;
    bt_defer(queue->thread, &queue->deferred);
    if (queue->free_count == queue->size) {
        publish(queue); /* the last one: the sooner the driver wakes up, the better */
        return;
    }
    if (queue->unpublished == 1) {
        queue->first_ns = bt_now_ns();
        return;
    }
    bool enough = queue->unpublished % NOTIFY_EVERY == 0;
    if (!enough && request->base.length < NOTIFY_LARGE)
        return;
    if (bt_now_ns() - queue->first_ns >= (enough ? queue->notify_cost_ns : NOTIFY_MAX_NS))
        publish(queue);
}

static void turn_ends(struct bt_deferred *deferred, struct bt_thread *thread)
{
    struct vhost_queue *queue = BT_CONTAINER(deferred, struct vhost_queue, deferred);
    publish(queue);
    check_memory(queue);
    if (queue->state == VHOST_STOPPING && queue->free_count == queue->size) {
        queue->state = VHOST_STOPPED;
        bt_event_done(thread->dp, queue->stop_cookie, queue->ring.last_avail); /* the queue is not ours after it */
    }
}

/* ---- taking requests ---- */

static struct vhost_request *take(struct vhost_queue *queue)
{
    int head = vhost_ring_take(&queue->ring);
    if (BT_UNLIKELY(head < 0)) {
        vhost_queue_break(queue, BT_VHOST_BAD_INDEX);
        return NULL;
    }
    uint16_t index = queue->free[queue->free_count - 1];
    struct vhost_request *request = &queue->requests[index];
    request->queue = queue;
    request->iov = queue->iovs + (size_t)index * VHOST_IOV;
    request->segments = queue->segments + (size_t)index * BT_VHOST_MAX_SEGMENTS;
    int ret = vhost_request_parse(request, (uint16_t)head);
    if (BT_UNLIKELY(ret < 0)) {
        free(request->iov_allocated);
        request->iov_allocated = NULL;
        vhost_queue_break(queue, ret == -EFAULT ? BT_VHOST_BAD_ADDRESS : BT_VHOST_BAD_CHAIN);
        return NULL;
    }
    queue->free_count--;
    return request;
}

/* All that is available is read before the first of it starts, so that their notifications are collected. */
static bool poll_ring(struct bt_poller *poller, struct bt_thread *thread)
{
    struct vhost_queue *queue = BT_CONTAINER(poller, struct vhost_queue, poller);
    (void)thread;
    int count = vhost_ring_available(&queue->ring);
    if (BT_LIKELY(count == 0)) {
        check_memory(queue); /* lost memory is zeros, which may look like an empty ring */
        return false;
    }
    if (count < 0 || count > queue->free_count) {
        vhost_queue_break(queue, count < 0 ? BT_VHOST_BAD_INDEX : BT_VHOST_TOO_MANY);
        return true;
    }
    struct vhost_request *first = NULL, **tail = &first;
    for (int i = 0; i < count; i++) {
        struct vhost_request *request = take(queue);
        if (!request)
            break;
        *tail = request;
        tail = &request->next;
    }
    *tail = NULL;
    while (first) {
        struct vhost_request *request = first;
        first = request->next;
        vhost_request_start(request);
    }
    check_memory(queue);
    return true;
}

static void unkicked(struct bt_timer *timer, struct bt_thread *thread)
{
    (void)thread; /* being awake is all: the pollers run next */
    BT_CONTAINER(timer, struct vhost_queue, timer)->timed = false;
}

static bool arm_ring(struct bt_poller *poller, struct bt_thread *thread)
{
    struct vhost_queue *queue = BT_CONTAINER(poller, struct vhost_queue, poller);
    if (queue->kick_fd < 0 && !queue->timed) {
        queue->timed = true;
        queue->timer.at_ns = bt_now_ns() + UNKICKED_NS;
        bt_timer_add(thread, &queue->timer);
    }
    return vhost_ring_arm(&queue->ring);
}

static void disarm_ring(struct bt_poller *poller, struct bt_thread *thread)
{
    (void)thread;
    vhost_ring_disarm(&BT_CONTAINER(poller, struct vhost_queue, poller)->ring);
}

static void kicked(struct bt_watch *watch, struct bt_thread *thread, uint32_t events)
{
    struct vhost_queue *queue = BT_CONTAINER(watch, struct vhost_queue, watch);
    uint64_t counts[32]; /* an eventfd gives one number, a pipe what it holds */
    struct iovec iov = {counts, sizeof counts};
    (void)thread, (void)events;
    /* Whatever the front end does with O_NONBLOCK, and though it may have read it first, this must not wait. */
    ssize_t n = preadv2(watch->fd, &iov, 1, -1, RWF_NOWAIT);
    if (n < 0 && errno == EOPNOTSUPP)
        n = read(watch->fd, counts, sizeof counts);
    if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR))
        vhost_queue_break(queue, BT_VHOST_BAD_DESCRIPTOR);
    bt_count(&queue->counters.kicks, 1);
}

/* ---- start and stop ---- */

static void allow_interrupt(void)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, VHOST_INTERRUPT);
    pthread_sigmask(SIG_UNBLOCK, &set, NULL);
}

static void attach(struct vhost_queue *queue)
{
    bt_poller_add(queue->thread, &queue->poller);
    if (queue->kick_fd >= 0 && bt_watch_add(queue->thread, &queue->watch, EPOLLIN) < 0)
        vhost_queue_break(queue, BT_VHOST_BAD_DESCRIPTOR);
}

void vhost_queue_run(struct bt_message *message, struct bt_thread *thread)
{
    (void)thread;
    struct vhost_queue *queue = BT_CONTAINER(message, struct vhost_queue, start);
    queue->state = VHOST_RUNNING;
    queue->broken = false;
    queue->timed = false;
    queue->unpublished = 0;
    queue->mute = false;
    allow_interrupt();
    queue->poller = (struct bt_poller){.poll = poll_ring, .arm = arm_ring, .disarm = disarm_ring};
    queue->deferred = (struct bt_deferred){.fn = turn_ends};
    queue->timer = (struct bt_timer){.fn = unkicked};
    queue->watch = (struct bt_watch){.fd = queue->kick_fd, .ready = kicked};
    vhost_ring_disarm(&queue->ring);
    /* A ring that was used before: its last notification may have got lost with the back end that sent it, and the
     * driver, whose used_event is behind then, would be sent no other. */
    if (queue->ring.published)
        signal_descriptor(queue, atomic_load_explicit(&queue->call_fd, memory_order_acquire), bt_now_ns());
    attach(queue);
}

void vhost_queue_halt(struct bt_message *message, struct bt_thread *thread)
{
    struct vhost_queue *queue = BT_CONTAINER(message, struct vhost_queue, stop);
    if (!queue->broken)
        detach(queue);
    queue->state = VHOST_STOPPING;
    bt_defer(thread, &queue->deferred);
}

void vhost_queue_unhalt(struct bt_message *message, struct bt_thread *thread)
{
    struct vhost_queue *queue = BT_CONTAINER(message, struct vhost_queue, unstop);
    uint64_t cookie = queue->unstop_cookie;
    if (queue->state == VHOST_STOPPING) {
        queue->state = VHOST_RUNNING;
        if (!queue->broken)
            attach(queue);
        bt_event_done(thread->dp, queue->stop_cookie, -ECANCELED);
    }
    bt_event_done(thread->dp, cookie, 0);
}
