/* SPDX-License-Identifier: Apache-2.0 */
/* Fences and views. A fence passes requests on; a change that it holds back becomes a fault, so that Python can do
 * first what has to come before it: save the old data (copy before write), or make the file longer (preallocate).
 * A view of a fence reads what its child held before: from where that was saved, where it was. */
#define _GNU_SOURCE
#include <sys/mman.h>

#include "request.h"

#define WORD_BITS 64

typedef _Atomic uint64_t bt_word;

struct bt_fence {
    struct bt_object base;
    bt_child children[2]; /* what it passes requests on to, and where views find what was saved, if anywhere */
    uint32_t granule_bits;
    uint64_t granules; /* what lies past them is open, and is in no view */
    _Atomic uint64_t limit;
    _Atomic uint64_t reached; /* the end of what was written up to the limit */
    bt_word *marks[BT_FENCE_MARKS]; /* a bit for each granule, in lazily backed memory */
    _Atomic bool all[BT_FENCE_MARKS];
};

struct bt_view {
    struct bt_object base;
    bt_child fence;
};

static struct bt_fence *as_fence(struct bt_object *object) { return (struct bt_fence *)object; }

static uint64_t mark_bytes(const struct bt_fence *fence)
{
    return (fence->granules + WORD_BITS - 1) / WORD_BITS * sizeof(bt_word);
}

/* ---- marks ---- */

static bool is_marked(struct bt_fence *fence, enum bt_fence_mark mark, uint64_t granule)
{
    if (atomic_load_explicit(&fence->all[mark], memory_order_acquire))
        return true;
    uint64_t word = atomic_load_explicit(&fence->marks[mark][granule / WORD_BITS], memory_order_acquire);
    return word >> granule % WORD_BITS & 1;
}

/* The first granule of [first, end) that is marked, or is not; end when there is none. */
static uint64_t find(struct bt_fence *fence, enum bt_fence_mark mark, uint64_t first, uint64_t end, bool marked)
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
static uint64_t run_end(struct bt_fence *fence, enum bt_fence_mark mark, uint64_t first, uint64_t end, bool marked)
{
    return bt_max(find(fence, mark, first, end, !marked), first + 1); /* it may have changed since it was looked at */
}

void bt_fence_mark(bt_object *object, int mark, uint64_t first, uint64_t count)
{
    struct bt_fence *fence = as_fence(object);
    uint64_t end = bt_min(first + count, fence->granules);
    while (first < end) {
        uint64_t stop = bt_min((first | (WORD_BITS - 1)) + 1, end), n = stop - first;
        uint64_t bits = n == WORD_BITS ? UINT64_MAX : ((1ull << n) - 1) << first % WORD_BITS;
        atomic_fetch_or(&fence->marks[mark][first / WORD_BITS], bits);
        first = stop;
    }
}

void bt_fence_mark_all(bt_object *object, int mark) { atomic_store(&as_fence(object)->all[mark], true); }

uint64_t bt_fence_find(bt_object *object, int mark, uint64_t first, uint64_t end, bool marked)
{
    struct bt_fence *fence = as_fence(object);
    end = bt_min(end, fence->granules);
    return first < end ? find(fence, mark, first, end, marked) : end;
}

void bt_fence_set_limit(bt_object *object, uint64_t limit) { atomic_store(&as_fence(object)->limit, limit); }
uint64_t bt_fence_reached(bt_object *object) { return atomic_load(&as_fence(object)->reached); }
void bt_fence_reach(bt_object *object, uint64_t end)
{
    struct bt_fence *fence = as_fence(object);
    uint64_t reached = atomic_load_explicit(&fence->reached, memory_order_relaxed);
    while (end > reached && !atomic_compare_exchange_weak(&fence->reached, &reached, end))
        ;
}
void bt_fence_set_reached(bt_object *object, uint64_t end) { atomic_store(&as_fence(object)->reached, end); }

/* ---- resolving ---- */

static uint64_t granule_of(const struct bt_fence *fence, uint64_t offset) { return offset >> fence->granule_bits; }

/* Up to which granule the segment reaches, of those that there are. */
static uint64_t last_of(const struct bt_fence *fence, const struct bt_segment *segment)
{
    return bt_min(granule_of(fence, segment->offset + segment->length - 1) + 1, fence->granules);
}

static void narrow(const struct bt_fence *fence, struct bt_segment *segment, uint64_t end)
{
    segment->length = bt_min(segment->length, (end << fence->granule_bits) - segment->offset);
}

static bool hold(struct bt_segment *segment, enum bt_fault_reason reason)
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
    uint64_t first = granule_of(fence, segment->offset);
    if (first >= fence->granules)
        return true;
    bool open = is_marked(fence, BT_FENCE_OPEN, first);
    narrow(fence, segment, run_end(fence, BT_FENCE_OPEN, first, last_of(fence, segment), open));
    return open;
}

bool bt_fence_resolve(struct bt_thread *thread, struct bt_object *object, struct bt_segment *segment)
{
    struct bt_fence *fence = as_fence(object);
    bool change = segment->op == BT_WRITE || segment->op == BT_ZEROES || segment->op == BT_DISCARD;
    if (change && (!is_open(fence, segment) || !within_limit(fence, segment)))
        return hold(segment, BT_FAULT_WRITE);
    bt_count_request(object, thread, segment->op, segment->offset, segment->length);
    segment->object = bt_child_get(&fence->children[0]);
    return true;
}

bool bt_view_resolve(struct bt_thread *thread, struct bt_object *object, struct bt_segment *segment)
{
    struct bt_fence *fence = as_fence(bt_child_get(&object->children[0]));
    if (segment->op == BT_WRITE || segment->op == BT_ZEROES || segment->op == BT_DISCARD)
        return hold(segment, BT_FAULT_ENTRY);
    uint64_t first = granule_of(fence, segment->offset), last = last_of(fence, segment);
    if (is_marked(fence, BT_FENCE_HIDDEN, first)) {
        segment->kind = BT_SEG_ERROR;
        segment->error = -EACCES;
        return false;
    }
    bool saved = is_marked(fence, BT_FENCE_SAVED, first);
    last = run_end(fence, BT_FENCE_HIDDEN, first, last, false);
    narrow(fence, segment, run_end(fence, BT_FENCE_SAVED, first, last, saved));
    bt_count_request(object, thread, segment->op, segment->offset, segment->length);
    segment->object = bt_child_get(&fence->children[saved]);
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
    unmap_marks(as_fence(object));
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
    fence->base.children = fence->children;
    fence->base.child_count = 2;
    return &fence->base;
}

static void view_destroy(struct bt_object *object) { free(object); }
static const struct bt_object_ops view_ops = {.destroy = view_destroy};

bt_object *bt_view_new(bt_datapath *dp, uint64_t tag, bt_object *fence, uint64_t size)
{
    struct bt_view *view = bt_child_get(&fence->children[1]) ? calloc(1, sizeof *view) : NULL;
    if (!view)
        return NULL;
    bt_object_init(&view->base, dp, BT_OBJ_VIEW, &view_ops, tag, size);
    bt_child_init(&view->fence, fence);
    view->base.children = &view->fence;
    view->base.child_count = 1;
    return &view->base;
}
