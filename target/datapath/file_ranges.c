/* SPDX-License-Identifier: Apache-2.0 */
/* Exclusive and shared ranges of a file that is opened with O_DIRECT; see file.h. Nobody blocks: who has to wait is
 * told by a message to its thread. First come, first served among those that overlap.
 *
 * Shared changes that are only counted, and exclusive ones, find each other as in Dekker's algorithm: each first
 * announces itself, then (after a full fence) looks for the other. */
#define _GNU_SOURCE
#include "file.h"

void file_ranges_init(struct file_ranges *ranges)
{
    pthread_mutex_init(&ranges->lock, NULL);
    ranges->tail = &ranges->head;
}

void file_ranges_destroy(struct file_ranges *ranges) { pthread_mutex_destroy(&ranges->lock); }

static bool any_counted(struct file_ranges *ranges)
{
    for (int i = 0; i < BT_MAX_THREADS; i++)
        if (atomic_load(&ranges->shared[i].held))
            return true;
    return false;
}

static bool conflict(const struct file_range *a, const struct file_range *b)
{
    return (a->exclusive || b->exclusive) && a->start < b->end && b->start < a->end;
}

/* Under the lock. Whoever came earlier goes first, even if it waits itself: nobody starves. */
static bool may_go(struct file_ranges *ranges, const struct file_range *range)
{
    for (const struct file_range *r = ranges->head; r != range; r = r->next)
        if (conflict(r, range))
            return false;
    return !range->exclusive || !any_counted(ranges);
}

static void tell(struct bt_message *message, struct bt_thread *thread)
{
    struct file_range *range = BT_CONTAINER(message, struct file_range, message);
    (void)thread;
    range->granted(range);
}

/* Under the lock. */
static void grant_waiting(struct file_ranges *ranges)
{
    for (struct file_range *r = ranges->head; r; r = r->next)
        if (r->waiting && may_go(ranges, r)) {
            r->waiting = false;
            r->message.fn = tell;
            bt_thread_post(r->thread, &r->message);
        }
}

static void count_one_less(struct file_ranges *ranges, unsigned thread)
{
    atomic_fetch_sub(&ranges->shared[thread].held, 1);
    if (BT_LIKELY(!atomic_load(&ranges->exclusive)))
        return;
    pthread_mutex_lock(&ranges->lock);
    grant_waiting(ranges);
    pthread_mutex_unlock(&ranges->lock);
}

bool file_range_acquire(struct file_ranges *ranges, struct file_range *range)
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

static void unlink_range(struct file_ranges *ranges, struct file_range *range)
{
    struct file_range **p = &ranges->head;
    while (*p != range)
        p = &(*p)->next;
    *p = range->next;
    if (!range->next)
        ranges->tail = p;
}

void file_range_release(struct file_ranges *ranges, struct file_range *range)
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
