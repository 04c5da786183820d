/* SPDX-License-Identifier: Apache-2.0 */
/* Exclusive and shared ranges of a device; see ranges.h. Nobody blocks: who has to wait is
 * told by a message to its thread. First come, first served among those that overlap.
 *
 * Shared changes that are only counted, and exclusive ones, find each other as in Dekker's algorithm: each first
 * announces itself, then (after a full fence) looks for the other. */
#define _GNU_SOURCE
#include "ranges.h"

void bt_ranges_init(struct bt_ranges *ranges)
{
    pthread_mutex_init(&ranges->lock, NULL);
    ranges->tail = &ranges->head;
}

void bt_ranges_destroy(struct bt_ranges *ranges) { pthread_mutex_destroy(&ranges->lock); }

static bool any_counted(struct bt_ranges *ranges)
{
    for (int i = 0; i < BT_MAX_THREADS; i++)
        if (atomic_load(&ranges->shared[i].held))
            return true;
    return false;
}

static bool conflict(const struct bt_range *a, const struct bt_range *b)
{
    return (a->exclusive || b->exclusive) && a->start < b->end && b->start < a->end;
}

/* Under the lock. Whoever came earlier goes first, even if it waits itself: nobody starves. */
static bool may_go(struct bt_ranges *ranges, const struct bt_range *range)
{
    for (const struct bt_range *r = ranges->head; r != range; r = r->next)
        if (conflict(r, range))
            return false;
    return !range->exclusive || !any_counted(ranges);
}

static void tell(struct bt_message *message, struct bt_thread *thread)
{
    struct bt_range *range = BT_CONTAINER(message, struct bt_range, message);
    (void)thread;
    range->granted(range);
}

/* Under the lock. */
static void grant_waiting(struct bt_ranges *ranges)
{
    for (struct bt_range *r = ranges->head; r; r = r->next)
        if (r->waiting && may_go(ranges, r)) {
            r->waiting = false;
            r->message.fn = tell;
            bt_thread_post(r->thread, &r->message);
        }
}

static void count_one_less(struct bt_ranges *ranges, unsigned thread)
{
    atomic_fetch_sub(&ranges->shared[thread].held, 1);
    if (BT_LIKELY(!atomic_load(&ranges->exclusive)))
        return;
    pthread_mutex_lock(&ranges->lock);
    grant_waiting(ranges);
    pthread_mutex_unlock(&ranges->lock);
}

bool bt_range_acquire(struct bt_ranges *ranges, struct bt_range *range)
{
    range->held = true;
    range->counted = false;
    if (!range->exclusive) {
        atomic_fetch_add(&ranges->shared[range->thread->index].held, 1);
        if (BT_LIKELY(!atomic_load(&ranges->exclusive))) {
            range->counted = true;
            return true;
        }
        count_one_less(ranges, range->thread->index);
    }
    pthread_mutex_lock(&ranges->lock);
    if (range->exclusive)
        atomic_fetch_add(&ranges->exclusive, 1);
    range->next = NULL;
    *ranges->tail = range;
    ranges->tail = &range->next;
    bool now = may_go(ranges, range);
    range->waiting = !now;
    pthread_mutex_unlock(&ranges->lock);
    return now;
}

static void unlink_range(struct bt_ranges *ranges, struct bt_range *range)
{
    struct bt_range **p = &ranges->head;
    while (*p != range)
        p = &(*p)->next;
    *p = range->next;
    if (!range->next)
        ranges->tail = p;
}

void bt_range_release(struct bt_ranges *ranges, struct bt_range *range)
{
    if (!range->held)
        return;
    range->held = false;
    if (range->counted) {
        count_one_less(ranges, range->thread->index);
        return;
    }
    pthread_mutex_lock(&ranges->lock);
    unlink_range(ranges, range);
    if (range->exclusive)
        atomic_fetch_sub(&ranges->exclusive, 1);
    grant_waiting(ranges);
    pthread_mutex_unlock(&ranges->lock);
}
