/* SPDX-License-Identifier: Apache-2.0 */
/* Those who wait for saves: requests, up to their deadlines, and the control thread. */
#include "save.h"

/* What the control thread waits for. */
struct bt_wait {
    struct bt_wait *next;
    uint64_t cookie;
    bool settle; /* the end of all saves; else of all readings up to seq */
    uint64_t seq;
};

void bt_wait_append(struct bt_request ***tail, struct bt_request *request)
{
    request->next = NULL;
    **tail = request;
    *tail = &request->next;
}

/* Takes up to max from the front of a list. */
struct bt_request *bt_wait_take(struct bt_request **list, struct bt_request ***tail, unsigned max)
{
    struct bt_request *taken = *list, **end = list;
    while (*end && max--)
        end = &(*end)->next;
    *list = *end;
    *end = NULL;
    if (!*list)
        *tail = list;
    return end == list ? NULL : taken;
}

void bt_wait_wake(struct bt_request *request)
{
    while (request) {
        struct bt_request *next = request->next;
        bt_request_wake(request);
        request = next;
    }
}

/* Python says what the failure means for each of them. thread: the one that this is called on. */
void bt_wait_fail(struct bt_fence *fence, struct bt_thread *thread, struct bt_request *request, int result)
{
    while (request) {
        struct bt_request *next = request->next;
        bt_count(&bt_counters_of(&fence->base, thread)->faults[BT_FAULT_SAVE], 1);
        request->event.event.result = result;
        bt_request_ask(request);
        request = next;
    }
}

void bt_saver_let_go(struct bt_fence *fence)
{
    struct bt_saver *saver = &fence->saver;
    pthread_mutex_lock(&saver->lock);
    struct bt_request *first = bt_wait_take(&saver->queue, &saver->queue_tail, UINT32_MAX), **end = &first;
    for (struct bt_save *save = saver->saves; save; save = save->next) {
        while (*end)
            end = &(*end)->next;
        *end = bt_wait_take(&save->waiters, &save->waiters_tail, UINT32_MAX);
    }
    pthread_mutex_unlock(&saver->lock);
    bt_wait_wake(first);
}

/* Under the lock: takes out of a list who has waited for too long; the earliest deadline of the others. */
static uint64_t take_late(struct bt_request **list, struct bt_request ***list_tail, uint64_t now,
                          struct bt_request ***late_tail)
{
    uint64_t earliest = UINT64_MAX;
    struct bt_request **at = list;
    while (*at) {
        struct bt_request *request = *at;
        if (request->deadline_ns && request->deadline_ns <= now) {
            *at = request->next;
            bt_wait_append(late_tail, request);
        } else {
            earliest = bt_min(earliest, request->deadline_ns ? request->deadline_ns : UINT64_MAX);
            at = &request->next;
        }
    }
    *list_tail = at;
    return earliest;
}

/* Who comes later has a later deadline: the timer runs once in each timeout, if not for somebody. */
void bt_wait_late(struct bt_timer *timer, struct bt_thread *thread)
{
    struct bt_save *save = BT_CONTAINER(timer, struct bt_save, timer);
    struct bt_saver *saver = &save->fence->saver;
    uint64_t now = bt_now_ns();
    struct bt_request *late = NULL, **tail = &late;
    pthread_mutex_lock(&saver->lock);
    uint64_t next = take_late(&save->waiters, &save->waiters_tail, now, &tail);
    next = bt_min(next, take_late(&saver->queue, &saver->queue_tail, now, &tail));
    pthread_mutex_unlock(&saver->lock);
    bt_wait_fail(save->fence, thread, late, -ETIMEDOUT);
    timer->at_ns = bt_min(next, now + bt_max(atomic_load(&saver->timeout_ns), 1000000));
    bt_timer_add(thread, timer);
}

/* ---- the control thread's waiting ---- */

/* Under the lock. */
static bool is_over(const struct bt_saver *saver, const struct bt_wait *wait)
{
    return wait->settle ? !saver->count : !bt_is_read(saver, 0, UINT64_MAX, wait->seq);
}

void bt_wait_check(struct bt_fence *fence)
{
    struct bt_wait **at = &fence->saver.waits;
    while (*at) {
        struct bt_wait *wait = *at;
        if (!is_over(&fence->saver, wait)) {
            at = &wait->next;
            continue;
        }
        *at = wait->next;
        bt_event_done(fence->base.dp, wait->cookie, 0);
        free(wait);
    }
}

static void add_wait(struct bt_fence *fence, bool settle, uint64_t cookie)
{
    struct bt_saver *saver = &fence->saver;
    struct bt_wait *wait = malloc(sizeof *wait);
    if (!wait)
        abort();
    pthread_mutex_lock(&saver->lock);
    *wait = (struct bt_wait){.next = saver->waits, .cookie = cookie, .settle = settle, .seq = saver->seq};
    saver->waits = wait;
    bt_wait_check(fence);
    pthread_mutex_unlock(&saver->lock);
}

void bt_fence_settle(bt_object *object, uint64_t cookie) { add_wait(bt_as_fence(object), true, cookie); }
void bt_fence_wait_readers(bt_object *object, uint64_t cookie) { add_wait(bt_as_fence(object), false, cookie); }
