/* SPDX-License-Identifier: Apache-2.0 */
/* Fences. A fence passes requests on, but for a change that something has to come before: that the old data is saved
 * (copy before write: save.c), or that Python, which is asked by a fault, makes the file longer (preallocate). */
#define _GNU_SOURCE
#include "fence.h"

#include <sys/mman.h>

#define WORD_BITS 64

static uint64_t mark_bytes(const struct bt_fence *fence)
{
    return (fence->granules + WORD_BITS - 1) / WORD_BITS * sizeof(bt_word);
}

/* ---- marks ---- */

bool bt_is_marked(struct bt_fence *fence, enum bt_fence_mark mark, uint64_t granule)
{
    if (atomic_load_explicit(&fence->all[mark], memory_order_acquire))
        return true;
    uint64_t word = atomic_load_explicit(&fence->marks[mark][granule / WORD_BITS], memory_order_acquire);
    return word >> granule % WORD_BITS & 1;
}

/* The first granule of [first, end) that is marked, or is not; end when there is none. */
uint64_t bt_find_mark(struct bt_fence *fence, enum bt_fence_mark mark, uint64_t first, uint64_t end, bool marked)
{
    if (atomic_load_explicit(&fence->all[mark], memory_order_acquire))
        return marked ? first : end;
    while (first < end) {
        uint64_t word = atomic_load_explicit(&fence->marks[mark][first / WORD_BITS], memory_order_acquire);
        uint64_t found = (marked ? word : ~word) >> first % WORD_BITS;
        if (found)
            return bt_min(first + (uint64_t)__builtin_ctzll(found), end);
        first = (first | (WORD_BITS - 1)) + 1;
    }
    return end;
}

/* The end of the run of granules from first on that have this mark, or have it not. */
uint64_t bt_mark_run(struct bt_fence *fence, enum bt_fence_mark mark, uint64_t first, uint64_t end, bool marked)
{
    /* It may have changed since it was looked at. */
    return bt_max(bt_find_mark(fence, mark, first, end, !marked), first + 1);
}

void bt_fence_mark(bt_object *object, int mark, uint64_t first, uint64_t count)
{
    struct bt_fence *fence = bt_as_fence(object);
    uint64_t end = bt_min(first + count, fence->granules);
    while (first < end) {
        uint64_t stop = bt_min((first | (WORD_BITS - 1)) + 1, end), n = stop - first;
        uint64_t bits = n == WORD_BITS ? UINT64_MAX : ((1ull << n) - 1) << first % WORD_BITS;
        atomic_fetch_or(&fence->marks[mark][first / WORD_BITS], bits);
        first = stop;
    }
}

void bt_fence_mark_all(bt_object *object, int mark)
{
    atomic_store(&bt_as_fence(object)->all[mark], true);
    if (mark == BT_FENCE_OPEN)
        bt_saver_let_go(bt_as_fence(object));
}

uint64_t bt_fence_find(bt_object *object, int mark, uint64_t first, uint64_t end, bool marked)
{
    struct bt_fence *fence = bt_as_fence(object);
    end = bt_min(end, fence->granules);
    return first < end ? bt_find_mark(fence, mark, first, end, marked) : end;
}

void bt_fence_set_limit(bt_object *object, uint64_t limit) { atomic_store(&bt_as_fence(object)->limit, limit); }
uint64_t bt_fence_reached(bt_object *object) { return atomic_load(&bt_as_fence(object)->reached); }
void bt_fence_reach(bt_object *object, uint64_t end)
{
    struct bt_fence *fence = bt_as_fence(object);
    uint64_t reached = atomic_load_explicit(&fence->reached, memory_order_relaxed);
    while (end > reached && !atomic_compare_exchange_weak(&fence->reached, &reached, end))
        ;
}
void bt_fence_set_reached(bt_object *object, uint64_t end) { atomic_store(&bt_as_fence(object)->reached, end); }

/* ---- resolving ---- */

bool bt_hold(struct bt_segment *segment, enum bt_fault_reason reason)
{
    segment->kind = BT_SEG_FAULT;
    segment->reason = reason;
    return false;
}

/* Whether the beginning of a change is within the limit; then the segment is cut to it. */
static bool within_limit(struct bt_fence *fence, struct bt_segment *segment)
{
    uint64_t limit = atomic_load_explicit(&fence->limit, memory_order_acquire);
    if (limit == UINT64_MAX || segment->op == BT_DISCARD)
        return true;
    if (segment->offset >= limit)
        return false;
    segment->length = bt_min(segment->length, limit - segment->offset);
    bt_fence_reach(&fence->base, segment->offset + segment->length);
    return true;
}

/* Whether the beginning of a change is open; the segment is cut to what is alike. */
static bool is_open(struct bt_fence *fence, struct bt_segment *segment)
{
    uint64_t first = bt_granule_of(fence, segment->offset);
    if (first >= fence->granules)
        return true;
    bool open = bt_is_marked(fence, BT_FENCE_OPEN, first);
    bt_narrow(fence, segment, bt_mark_run(fence, BT_FENCE_OPEN, first, bt_last_granule(fence, segment), open));
    return open;
}

/* What the beginning of a change has to wait for, which is not open. */
static bool not_open(struct bt_fence *fence, struct bt_segment *segment)
{
    segment->kind = BT_SEG_SAVE;
    segment->granule = bt_granule_of(fence, segment->offset);
    segment->granules = bt_last_granule(fence, segment) - segment->granule;
    return false;
}

bool bt_fence_resolve(struct bt_thread *thread, struct bt_object *object, struct bt_segment *segment)
{
    struct bt_fence *fence = bt_as_fence(object);
    bool change = segment->op == BT_WRITE || segment->op == BT_ZEROES || segment->op == BT_DISCARD;
    bool save = segment->op == BT_CACHE && (segment->flags & BT_SAVE);
    if ((change || save) && !is_open(fence, segment))
        return not_open(fence, segment);
    if (save) {
        segment->kind = BT_SEG_SKIP;
        return false;
    }
    if (change && !within_limit(fence, segment))
        return bt_hold(segment, BT_FAULT_WRITE);
    bt_count_request(object, thread, segment->op, segment->offset, segment->length);
    segment->object = bt_child_get(&fence->children[0]);
    return true;
}

/* ---- coming and going ---- */

static void unmap_marks(struct bt_fence *fence)
{
    for (int i = 0; i < BT_FENCE_MARKS; i++)
        if (fence->marks[i])
            munmap((void *)fence->marks[i], mark_bytes(fence));
}

static void fence_destroy(struct bt_object *object)
{
    bt_saver_destroy(&bt_as_fence(object)->saver);
    unmap_marks(bt_as_fence(object));
    free(object);
}
static const struct bt_object_ops fence_ops = {.destroy = fence_destroy};

static bool map_marks(struct bt_fence *fence)
{
    for (int i = 0; fence->granules && i < BT_FENCE_MARKS; i++) {
        void *memory = mmap(NULL, mark_bytes(fence), PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED)
            return false;
        fence->marks[i] = memory;
    }
    return true;
}

bt_object *bt_fence_new(bt_datapath *dp, uint64_t tag, bt_object *child, bt_object *saved, uint32_t granule_bits,
                        uint64_t granules)
{
    struct bt_fence *fence = granule_bits <= 62 ? calloc(1, sizeof *fence) : NULL;
    if (!fence)
        return NULL;
    fence->granule_bits = granule_bits;
    fence->granules = granules;
    fence->limit = UINT64_MAX;
    if (!map_marks(fence)) {
        unmap_marks(fence);
        free(fence);
        errno = ENOMEM;
        return NULL;
    }
    bt_object_init(&fence->base, dp, BT_OBJ_FENCE, &fence_ops, tag, bt_object_size(child));
    bt_child_init(&fence->children[0], child);
    bt_child_init(&fence->children[1], saved);
    bt_saver_init(&fence->saver);
    fence->base.children = fence->children;
    fence->base.child_count = 2;
    return &fence->base;
}
