/* SPDX-License-Identifier: Apache-2.0 */
/* I/O threads: one epoll set, one mailbox, pollers that spin for a bounded time before the thread sleeps.
 * A turn of the loop: messages, requests to go on with, engines, deferred work; then poll, then sleep. */
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "core.h"
#include "request.h"

#define EVENTS_PER_WAIT 32
/* While pollers keep the thread busy, descriptors are looked at this often, spinning in between or not. */
#define BUSY_TURNS_PER_WAIT 16
#define POLL_MIN_NS 4000
#define MAX_SLEEP_NS 60000000000
/* While the thread spins for long, descriptors are looked at this often. */
#define SPIN_PER_LOOK_NS 50000

void bt_thread_run_mailbox(struct bt_thread *thread)
{
    if (!atomic_load_explicit(&thread->mailbox, memory_order_relaxed))
        return;
    struct bt_message *message = atomic_exchange_explicit(&thread->mailbox, NULL, memory_order_acquire);
    struct bt_message *oldest = NULL;
    while (message) {
        struct bt_message *next = message->next;
        message->next = oldest;
        oldest = message;
        message = next;
    }
    while (oldest) {
        struct bt_message *next = oldest->next;
        oldest->fn(oldest, thread);
        oldest = next;
        thread->did_work = true;
    }
}

void bt_thread_post(struct bt_thread *thread, struct bt_message *message)
{
    struct bt_message *head = atomic_load_explicit(&thread->mailbox, memory_order_relaxed);
    do {
        message->next = head;
    } while (!atomic_compare_exchange_weak_explicit(&thread->mailbox, &head, message, memory_order_seq_cst,
                                                    memory_order_relaxed));
    if (atomic_load_explicit(&thread->sleeping, memory_order_seq_cst)) {
        uint64_t one = 1;
        ssize_t n = write(thread->wake_fd, &one, sizeof one);
        (void)n;
    }
}

int bt_watch_add(struct bt_thread *thread, struct bt_watch *watch, uint32_t events)
{
    struct epoll_event ev = {.events = events, .data.ptr = watch};
    if (epoll_ctl(thread->epoll_fd, EPOLL_CTL_ADD, watch->fd, &ev) < 0)
        return -errno;
    thread->watches++;
    return 0;
}

int bt_watch_modify(struct bt_thread *thread, struct bt_watch *watch, uint32_t events)
{
    struct epoll_event ev = {.events = events, .data.ptr = watch};
    return epoll_ctl(thread->epoll_fd, EPOLL_CTL_MOD, watch->fd, &ev) < 0 ? -errno : 0;
}

void bt_watch_remove(struct bt_thread *thread, struct bt_watch *watch)
{
    if (epoll_ctl(thread->epoll_fd, EPOLL_CTL_DEL, watch->fd, NULL) == 0)
        thread->watches--;
    for (int i = 0; i < thread->fetched; i++)
        if (thread->fetched_events[i].data.ptr == watch)
            thread->fetched_events[i].data.ptr = NULL;
}

void bt_poller_add(struct bt_thread *thread, struct bt_poller *poller)
{
    poller->next = thread->pollers;
    thread->pollers = poller;
}

void bt_poller_remove(struct bt_thread *thread, struct bt_poller *poller)
{
    for (struct bt_poller **p = &thread->pollers; *p; p = &(*p)->next)
        if (*p == poller) {
            if (thread->poller_next == poller)
                thread->poller_next = poller->next;
            *p = poller->next;
            return;
        }
}

void bt_defer(struct bt_thread *thread, struct bt_deferred *deferred)
{
    if (deferred->queued)
        return;
    deferred->queued = true;
    deferred->next = thread->deferred;
    thread->deferred = deferred;
}

void bt_timer_add(struct bt_thread *thread, struct bt_timer *timer)
{
    struct bt_timer **p = &thread->timers;
    while (*p && (*p)->at_ns <= timer->at_ns)
        p = &(*p)->next;
    timer->next = *p;
    *p = timer;
}

void bt_timer_cancel(struct bt_thread *thread, struct bt_timer *timer)
{
    for (struct bt_timer **p = &thread->timers; *p; p = &(*p)->next)
        if (*p == timer) {
            *p = timer->next;
            return;
        }
}

static void run_timers(struct bt_thread *thread)
{
    if (!thread->timers)
        return;
    uint64_t now = bt_now_ns();
    while (thread->timers && thread->timers->at_ns <= now) {
        struct bt_timer *timer = thread->timers;
        thread->timers = timer->next;
        timer->fn(timer, thread);
        thread->did_work = true;
    }
}

/* What defers itself again is for the next turn. */
static void run_deferred(struct bt_thread *thread)
{
    struct bt_deferred *list = thread->deferred;
    thread->deferred = NULL;
    while (list) {
        struct bt_deferred *deferred = list;
        list = deferred->next;
        deferred->queued = false;
        deferred->fn(deferred, thread);
        thread->did_work = true;
    }
}

static bool run_pollers(struct bt_thread *thread)
{
    bool any = false;
    for (struct bt_poller *poller = thread->pollers; poller; poller = thread->poller_next) {
        thread->poller_next = poller->next;
        any |= poller->poll(poller, thread);
    }
    return any;
}

/* To the nanosecond where the kernel can (5.11): throttled requests come at odd times. */
static int wait_for_events(struct bt_thread *thread, int64_t timeout_ns)
{
    if (timeout_ns > 0 && !thread->coarse_waits) {
        struct timespec timeout = {.tv_sec = timeout_ns / 1000000000, .tv_nsec = timeout_ns % 1000000000};
        long n = syscall(SYS_epoll_pwait2, thread->epoll_fd, thread->fetched_events, EVENTS_PER_WAIT, &timeout, NULL, 0);
        if (n >= 0 || errno == EINTR)
            return (int)n;
        thread->coarse_waits = true;
    }
    int timeout_ms = timeout_ns < 0 ? -1 : (int)((timeout_ns + 999999) / 1000000);
    return epoll_wait(thread->epoll_fd, thread->fetched_events, EVENTS_PER_WAIT, timeout_ms);
}

/* Descriptors that are ready, waiting at most timeout_ns (-1: for ever). */
static void run_watches(struct bt_thread *thread, int64_t timeout_ns)
{
    int n = wait_for_events(thread, timeout_ns);
    thread->fetched = n > 0 ? n : 0;
    for (int i = 0; i < thread->fetched; i++) {
        struct bt_watch *watch = thread->fetched_events[i].data.ptr;
        if (!watch)
            continue;
        thread->did_work = true;
        watch->ready(watch, thread, thread->fetched_events[i].events);
    }
    thread->fetched = 0;
}

static void run_engines(struct bt_thread *thread)
{
    if (thread->uring && bt_uring_turn(thread))
        thread->did_work = true;
    if (thread->aio && bt_aio_turn(thread))
        thread->did_work = true;
}

static void run_turn(struct bt_thread *thread)
{
    bt_thread_run_mailbox(thread);
    run_timers(thread);
    bt_request_run_queue(thread);
    run_engines(thread);
    bt_request_run_queue(thread);
    run_deferred(thread);
    bt_sync_check(thread);
}

static bool has_message(struct bt_thread *thread)
{
    return atomic_load_explicit(&thread->mailbox, memory_order_relaxed) ||
           (thread->uring && bt_uring_ready(thread));
}

/* Spins until something comes or the time is over. True when there is work. */
static bool spin(struct bt_thread *thread)
{
    if (!thread->poll_ns)
        return false;
    uint64_t now = bt_now_ns(), until = now + thread->poll_ns, look = now + SPIN_PER_LOOK_NS;
    do {
        for (int i = 0; i < 16; i++) {
            if (run_pollers(thread) || has_message(thread))
                return true;
            __builtin_ia32_pause();
        }
        now = bt_now_ns();
        if (thread->timers && thread->timers->at_ns <= now)
            return true;
        if (now >= look && thread->watches) {
            look = now + SPIN_PER_LOOK_NS;
            run_watches(thread, 0); /* not all that is watched is polled */
        }
    } while (now < until && !thread->did_work);
    return thread->did_work;
}

static uint64_t saturating_product(uint64_t a, uint64_t b)
{
    uint64_t product;
    return __builtin_mul_overflow(a, b, &product) ? UINT64_MAX : product;
}

/* Sleeps that were short would have been saved by polling a little longer; long ones make polling a waste. */
static void adapt_poll(struct bt_thread *thread, uint64_t slept_ns)
{
    uint64_t max = atomic_load_explicit(&thread->poll_max_ns, memory_order_relaxed);
    uint64_t grow = atomic_load_explicit(&thread->poll_grow, memory_order_relaxed);
    uint64_t shrink = atomic_load_explicit(&thread->poll_shrink, memory_order_relaxed);
    if (thread->from_afar)
        thread->poll_ns = 0;
    else if (slept_ns <= max)
        thread->poll_ns = bt_min(max, bt_max(saturating_product(thread->poll_ns, grow ? grow : 2), POLL_MIN_NS));
    else if (slept_ns > 8 * max)
        thread->poll_ns = thread->poll_ns > POLL_MIN_NS ? thread->poll_ns / (shrink ? shrink : 2) : 0;
    if (thread->poll_ns > max)
        thread->poll_ns = max;
    thread->from_afar = false;
}

static bool arm_pollers(struct bt_thread *thread)
{
    bool work = false;
    for (struct bt_poller *poller = thread->pollers; poller; poller = poller->next)
        work |= poller->arm(poller, thread);
    return work;
}

static void disarm_pollers(struct bt_thread *thread)
{
    for (struct bt_poller *poller = thread->pollers; poller; poller = poller->next)
        poller->disarm(poller, thread);
}

static int64_t sleep_timeout_ns(struct bt_thread *thread)
{
    if (!thread->timers)
        return -1;
    uint64_t now = bt_now_ns();
    if (thread->timers->at_ns <= now)
        return 0;
    return (int64_t)bt_min(thread->timers->at_ns - now, MAX_SLEEP_NS);
}

static void sleep_until_work(struct bt_thread *thread)
{
    bool work = arm_pollers(thread);
    atomic_store_explicit(&thread->sleeping, true, memory_order_seq_cst);
    work |= has_message(thread) || atomic_load_explicit(&thread->mailbox, memory_order_seq_cst);
    uint64_t before = bt_now_ns();
    if (!work) {
        run_watches(thread, sleep_timeout_ns(thread));
        adapt_poll(thread, bt_now_ns() - before);
    }
    atomic_store_explicit(&thread->sleeping, false, memory_order_seq_cst);
    disarm_pollers(thread);
}

static void *thread_main(void *arg)
{
    struct bt_thread *thread = arg;
    unsigned busy_turns = 0;
    while (!thread->stop) {
        thread->did_work = false;
        if (run_pollers(thread))
            thread->did_work = true;
        run_turn(thread);
        if (!thread->did_work && !spin(thread))
            sleep_until_work(thread);
        else if (++busy_turns % BUSY_TURNS_PER_WAIT == 0 && thread->watches)
            run_watches(thread, 0);
    }
    return NULL;
}

static void woken(struct bt_watch *watch, struct bt_thread *thread, uint32_t events)
{
    uint64_t count;
    ssize_t n = read(watch->fd, &count, sizeof count);
    (void)n, (void)thread, (void)events;
}

static struct bt_thread *thread_alloc(bt_datapath *dp, unsigned index, uint64_t poll_max_ns)
{
    struct bt_thread *thread = calloc(1, sizeof *thread);
    if (!thread)
        return NULL;
    thread->dp = dp;
    thread->index = index;
    thread->poll_max_ns = poll_max_ns;
    thread->poll_ns = poll_max_ns;
    thread->run_tail = &thread->run_head;
    thread->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    thread->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    thread->wake.fd = thread->wake_fd;
    thread->wake.ready = woken;
    if (thread->epoll_fd < 0 || thread->wake_fd < 0 || bt_watch_add(thread, &thread->wake, EPOLLIN) < 0) {
        close(thread->epoll_fd);
        close(thread->wake_fd);
        free(thread);
        return NULL;
    }
    thread->watches = 0;
    return thread;
}

static int thread_start(struct bt_thread *thread)
{
    sigset_t all, old;
    sigfillset(&all);
    sigdelset(&all, SIGBUS); /* a guest may truncate its memory under us */
    sigdelset(&all, SIGSEGV);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int err = pthread_create(&thread->pthread, NULL, thread_main, thread);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (err)
        return -err;
    char name[16];
    snprintf(name, sizeof name, "bt-io%u", thread->index);
    pthread_setname_np(thread->pthread, name);
    return 0;
}

int bt_thread_new(bt_datapath *dp, uint64_t poll_max_ns)
{
    int index = atomic_load(&dp->thread_count);
    if (index >= BT_MAX_THREADS)
        return -EMFILE;
    struct bt_thread *thread = thread_alloc(dp, (unsigned)index, poll_max_ns);
    if (!thread)
        return -ENOMEM;
    dp->threads[index] = thread;
    int ret = thread_start(thread);
    if (ret < 0) {
        dp->threads[index] = NULL;
        close(thread->epoll_fd);
        close(thread->wake_fd);
        free(thread);
        return ret;
    }
    atomic_store(&dp->thread_count, index + 1);
    return index;
}

struct bt_thread *bt_thread_get(bt_datapath *dp, int index)
{
    return index >= 0 && index < atomic_load(&dp->thread_count) ? dp->threads[index] : NULL;
}

int bt_thread_set_poll(bt_datapath *dp, int index, uint64_t max_ns, uint64_t grow, uint64_t shrink)
{
    struct bt_thread *thread = bt_thread_get(dp, index);
    if (!thread)
        return -EINVAL;
    atomic_store(&thread->poll_max_ns, max_ns);
    atomic_store(&thread->poll_grow, grow);
    atomic_store(&thread->poll_shrink, shrink);
    return 0;
}
