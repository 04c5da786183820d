/* SPDX-License-Identifier: Apache-2.0 */
/* Ranges of a device that requests hold, so that writing a part of a block is kept apart from all that overlaps it.
 *
 * Writing a part of a block means reading the block, changing it and writing it whole: exclusive. Other changes are
 * shared: they may overlap each other, but no exclusive one. While nothing exclusive is about, a shared change is
 * two stores to a counter of its own thread, and its range is not even recorded. */
#ifndef BT_RANGES_H
#define BT_RANGES_H

#include "core.h"

struct bt_range {
    struct bt_range *next;
    uint64_t start, end;
    struct bt_thread *thread;
    /* The range that had to wait is held now; on its thread. */
    void (*granted)(struct bt_range *range);
    bool exclusive;
    bool held;
    bool counted; /* shared, by the counter alone */
    bool waiting;
    struct bt_message message;
};

struct bt_ranges {
    _Atomic uint32_t exclusive; /* ranges held or waiting; != 0: shared ones register too */
    pthread_mutex_t lock;
    struct bt_range *head, **tail; /* in order of arrival */
    struct {
        _Atomic uint32_t held;
        char pad[60]; /* a cache line for each thread */
    } shared[BT_MAX_THREADS];
};

void bt_ranges_init(struct bt_ranges *ranges);
void bt_ranges_destroy(struct bt_ranges *ranges);
/* start, end, thread, granted and exclusive are set. True when it is held; else granted is called later. */
bool bt_range_acquire(struct bt_ranges *ranges, struct bt_range *range);
/* Does nothing when it is not held. */
void bt_range_release(struct bt_ranges *ranges, struct bt_range *range);

/* What an align device stands in front of, its block, and the ranges that hold changes below it apart; NULL for
 * another object (align.c). */
struct bt_object *bt_align_child(struct bt_object *object, uint64_t *block, struct bt_ranges **ranges);

#endif
