/* SPDX-License-Identifier: Apache-2.0 */
/* The datapath as a whole: its threads, workers and memory, and grace periods, which all threads pass. */
#define _GNU_SOURCE
#include <sys/eventfd.h>
#include <unistd.h>

#include "core.h"
#include "memory.h"
#include "request.h"

#define MAX_WORKERS 16

/* ---- grace periods ---- */

struct grace {
    _Atomic int remaining;
    void (*fn)(void *arg);
    void *arg;
    struct grace_part {
        struct bt_message message;
        struct grace *grace;
    } parts[BT_MAX_THREADS];
};

static void grace_passed(struct bt_message *message, struct bt_thread *thread)
{
    struct grace *grace = BT_CONTAINER(message, struct grace_part, message)->grace;
    (void)thread;
    if (atomic_fetch_sub(&grace->remaining, 1) == 1) {
        grace->fn(grace->arg);
        free(grace);
    }
}

void bt_grace(bt_datapath *dp, void (*fn)(void *arg), void *arg)
{
    int count = atomic_load(&dp->thread_count);
    struct grace *grace = count ? calloc(1, sizeof *grace) : NULL;
    if (!count) {
        fn(arg);
        return;
    }
    if (!grace)
        abort();
    grace->remaining = count;
    grace->fn = fn;
    grace->arg = arg;
    for (int i = 0; i < count; i++) {
        grace->parts[i].grace = grace;
        grace->parts[i].message.fn = grace_passed;
    }
    for (int i = 0; i < count; i++)
        bt_thread_post(dp->threads[i], &grace->parts[i].message);
}

/* ---- the datapath ---- */

bt_datapath *bt_datapath_new(void)
{
    bt_datapath *dp = calloc(1, sizeof *dp);
    if (!dp)
        return NULL;
    pthread_mutex_init(&dp->lock, NULL);
    dp->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    dp->pool = bt_pool_new(MAX_WORKERS);
    dp->memory = bt_memory_new();
    if (dp->event_fd < 0 || !dp->pool || !dp->memory) {
        bt_datapath_free(dp);
        return NULL;
    }
    return dp;
}

static void stop_thread(struct bt_message *message, struct bt_thread *thread)
{
    (void)message;
    thread->stop = true;
}

static void thread_free(struct bt_thread *thread)
{
    bt_uring_free(thread);
    bt_aio_free(thread);
    bt_io_pool_free(thread);
    close(thread->epoll_fd);
    close(thread->wake_fd);
    free(thread);
}

/* Messages that no thread has read before it stopped: what waits for a grace period must still go. */
static void run_left_messages(bt_datapath *dp, int count)
{
    bool any = true;
    while (any) {
        any = false;
        for (int i = 0; i < count; i++) {
            any |= atomic_load(&dp->threads[i]->mailbox) != NULL;
            bt_thread_run_mailbox(dp->threads[i]);
        }
    }
}

void bt_datapath_free(bt_datapath *dp)
{
    int count = atomic_load(&dp->thread_count);
    struct bt_message stops[BT_MAX_THREADS];
    for (int i = 0; i < count; i++) {
        stops[i].fn = stop_thread;
        bt_thread_post(dp->threads[i], &stops[i]);
    }
    for (int i = 0; i < count; i++)
        pthread_join(dp->threads[i]->pthread, NULL);
    if (dp->pool)
        bt_pool_free(dp->pool);
    run_left_messages(dp, count);
    for (int i = 0; i < count; i++)
        thread_free(dp->threads[i]);
    struct bt_event events[16];
    if (dp->event_fd >= 0) {
        while (bt_events(dp, events, 16) > 0)
            ;
        close(dp->event_fd);
    }
    bt_memory_free(dp->memory);
    pthread_mutex_destroy(&dp->lock);
    free(dp);
}
