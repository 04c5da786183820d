/* SPDX-License-Identifier: Apache-2.0 */
/* Between fence.c, save.c and view.c: a fence, its marks, what is being saved, and who reads its views.
 *
 * Marks are read without a lock. What ties them together is the saver's: a view's reader is known before it looks at
 * SAVED; a granule is marked SAVED before it is looked who reads it; so whoever found it not saved is waited for
 * before it is marked OPEN. */
#ifndef BT_FENCE_H
#define BT_FENCE_H

#include "request.h"

typedef _Atomic uint64_t bt_word;

struct bt_save;
struct bt_wait;

/* What a request reads of a view: as long as the request lasts. */
struct bt_reading {
    struct bt_reading *of_request;    /* the next view that the same request reads */
    struct bt_reading *next, **pprev; /* of the same fence */
    struct bt_fence *fence;
    uint64_t first, end; /* granules */
    uint64_t seq;
};

struct bt_saver {
    bool read_through;
    uint64_t size; /* bytes that are worth saving */
    _Atomic uint64_t timeout_ns;
    _Atomic uint64_t saved; /* granules */
    pthread_mutex_t lock;   /* all below */
    struct bt_save *saves;  /* under way */
    unsigned count, settling; /* saves; those that are copied and wait for readers */
    uint64_t in_use; /* bytes of memory that they need */
    struct bt_save *free;
    unsigned free_count;
    struct bt_request *queue, **queue_tail; /* that wait for room */
    struct bt_reading *readings, *free_readings;
    uint64_t seq;          /* of the newest reading */
    struct bt_wait *waits; /* of the control thread */
};

struct bt_fence {
    struct bt_object base;
    bt_child children[2]; /* what it passes requests on to, and where views find what was saved, if anywhere */
    uint32_t granule_bits;
    uint64_t granules; /* what lies past them is open, and is in no view */
    _Atomic uint64_t limit;
    _Atomic uint64_t reached; /* the end of what was written up to the limit */
    bt_word *marks[BT_FENCE_MARKS]; /* a bit for each granule, in lazily backed memory */
    _Atomic bool all[BT_FENCE_MARKS];
    struct bt_saver saver;
};

static inline struct bt_fence *bt_as_fence(struct bt_object *object) { return (struct bt_fence *)object; }

/* ---- marks and granules (fence.c) ---- */

bool bt_is_marked(struct bt_fence *fence, enum bt_fence_mark mark, uint64_t granule);
/* The first granule of [first, end) that is marked, or is not; end when there is none. */
uint64_t bt_find_mark(struct bt_fence *fence, enum bt_fence_mark mark, uint64_t first, uint64_t end, bool marked);
/* The end of the run of granules from first on that have this mark, or have it not. */
uint64_t bt_mark_run(struct bt_fence *fence, enum bt_fence_mark mark, uint64_t first, uint64_t end, bool marked);
/* Makes the segment a fault. */
bool bt_hold(struct bt_segment *segment, enum bt_fault_reason reason);

static inline uint64_t bt_granule_of(const struct bt_fence *fence, uint64_t offset)
{
    return offset >> fence->granule_bits;
}
/* Up to which granule the segment reaches, of those that there are. */
static inline uint64_t bt_last_granule(const struct bt_fence *fence, const struct bt_segment *segment)
{
    return bt_min(bt_granule_of(fence, segment->offset + segment->length - 1) + 1, fence->granules);
}
static inline void bt_narrow(const struct bt_fence *fence, struct bt_segment *segment, uint64_t end)
{
    segment->length = bt_min(segment->length, (end << fence->granule_bits) - segment->offset);
}

/* ---- saving (save.c) ---- */

void bt_saver_init(struct bt_saver *saver);
void bt_saver_destroy(struct bt_saver *saver);
/* Has the segment's granules saved; parks the request until its first ones are. True: they are open, walk again. */
bool bt_save_start(struct bt_request *request, const struct bt_segment *segment);
/* Whoever waits looks again. */
void bt_saver_let_go(struct bt_fence *fence);
/* Under the lock: a reading has ended. */
void bt_saver_reading_ended(struct bt_fence *fence);

/* ---- reading views (view.c) ---- */

/* The request is done: it reads no view any more. */
void bt_readings_end(struct bt_request *request);
/* Under the lock: whether anybody still reads some of these granules who began up to seq. */
bool bt_is_read(const struct bt_saver *saver, uint64_t first, uint64_t end, uint64_t seq);

#endif
