/* SPDX-License-Identifier: Apache-2.0 */
/* Between request.c, park.c, resolve.c, map.c and alloc.c: how a request finds out where its next part lives. */
#ifndef BT_REQUEST_H
#define BT_REQUEST_H

#include "core.h"

/* ---- maps ---- */

#define BT_HOST_SHIFT 8
#define BT_SECTOR_BITS 9

typedef _Atomic uint64_t bt_entry;

struct bt_slice {
    uint64_t index;
    uint64_t eviction; /* which one it is in limbo for */
    struct bt_slice *next; /* in the map's list of loaded slices, or in limbo */
    _Atomic bool writable;
    _Atomic bool dirty;
    _Atomic bool referenced; /* since the clock hand last came by */
    _Atomic uint32_t pins;   /* claims under way */
    bt_entry entries[];
};

typedef _Atomic(struct bt_slice *) bt_slot;

struct bt_map {
    struct bt_object base;
    uint32_t granule_bits;
    uint32_t slice_bits;
    uint64_t slices;
    bt_child child, backing; /* the two slots of base.children; backing may be empty */
    _Atomic(bt_slot *) directory; /* lazily backed memory, slices long; replaced by a longer one */
    _Atomic uint32_t dirty_slices;
    _Atomic bool hold_flush;
    _Atomic bool no_zero_entries;
    _Atomic uint32_t claims; /* under way; counted before a grant is taken */
    struct bt_slice *loaded; /* the control thread's, clock order */
    struct bt_slice **clock_hand;
    uint64_t loaded_count;
    pthread_mutex_t lock; /* below: grants, limbo, waiters of claims, publishing */
    struct bt_slice *limbo;
    uint64_t evictions;
    struct bt_grant *grants;
    int grants_count, grants_capacity;
    uint64_t granted; /* granules in the pool */
    uint64_t low_water;
    bool low_reported;
};

static inline uint64_t bt_entry_host(uint64_t entry)
{
    return (entry >> BT_HOST_SHIFT) << BT_SECTOR_BITS;
}
static inline uint64_t bt_entry_make(uint64_t host, uint64_t bits)
{
    return ((host >> BT_SECTOR_BITS) << BT_HOST_SHIFT) | bits;
}
static inline uint64_t bt_entry_kind(uint64_t entry) { return entry & BT_ENTRY_KIND; }
static inline struct bt_map *bt_as_map(struct bt_object *object) { return (struct bt_map *)object; }

static inline uint64_t bt_slice_entries(const struct bt_map *map) { return 1ull << map->slice_bits; }
static inline struct bt_slice *bt_slice_at(struct bt_map *map, uint64_t index)
{
    bt_slot *directory = atomic_load_explicit(&map->directory, memory_order_acquire);
    return atomic_load_explicit(&directory[index], memory_order_acquire);
}
/* The entry, with a claim looked through when only reading. */
uint64_t bt_entry_read(bt_entry *entry);

/* Empty, and without memory until it is used; NULL when there is none. */
bt_slot *bt_directory_new(uint64_t slots);
void bt_directory_free(bt_slot *directory, uint64_t slots);
/* How many the map needs for a size. */
uint64_t bt_directory_slots(const struct bt_map *map, uint64_t size);
void bt_slice_mark_dirty(struct bt_map *map, struct bt_slice *slice);

/* ---- resolving ---- */

enum bt_segment_kind {
    BT_SEG_IO,    /* op on device at offset */
    BT_SEG_ZERO,  /* reads as zeros; a read is answered, a change is not needed */
    BT_SEG_SKIP,  /* nothing to do */
    BT_SEG_FAULT, /* Python has to be asked about object */
    BT_SEG_ALLOC, /* write: claim the run of granules in map; read: copy them there from its backing */
    BT_SEG_SET,   /* zeroes, discard: replace the run of entries */
    BT_SEG_BUSY,  /* wait for the claim */
    BT_SEG_SAVE,  /* wait until the run of granules that the fence holds back is saved */
    BT_SEG_PARKED, /* it waits already, and will be woken */
    BT_SEG_ERROR,
};

struct bt_segment {
    enum bt_segment_kind kind;
    struct bt_request *request;
    uint8_t op, flags;
    struct bt_object *object; /* the device, map or upcall where it ended */
    uint64_t offset;          /* in object */
    uint64_t length;
    enum bt_fault_reason reason;
    int error;
    uint32_t extent_flags;   /* ZERO, SKIP: for STATUS */
    uint8_t detect_zeroes;   /* strongest policy on the way */
    bool through_data;       /* reached its device by a DATA entry */
    bool met_metadata;       /* a map on the way has metadata that is not on disk */
    bool populate;           /* the next map is to get what is read of its backing */
    bool only_populate;      /* nothing else is wanted */
    struct bt_object *bottom; /* of what is populated: data from below this map stay there */
    struct bt_map *into;      /* populating: the map that may get it, if it is not from below bottom */
    uint64_t into_offset;
    struct bt_slice *slice;  /* ALLOC, SET, BUSY */
    uint64_t entry;          /* ALLOC, SET, BUSY: the entry as it was read */
    uint64_t new_entry;      /* SET */
    uint64_t granule, granules;
};

/* Where [offset, offset + length) of the request's object lives, or as much of it as is alike: segment->length. */
void bt_resolve(struct bt_request *request, int op, uint32_t flags, uint64_t offset, uint64_t length,
                struct bt_segment *segment);
/* map.c's part of it. True: go on in segment->object at segment->offset. */
bool bt_map_resolve(struct bt_thread *thread, struct bt_map *map, struct bt_segment *segment);
/* Makes the segment one that copies what it has found to segment->into. False when that has changed: walk again. */
bool bt_map_populate(struct bt_segment *segment);
/* SET: replaces what still equals segment->entry; returns the granules replaced. */
uint64_t bt_map_replace(struct bt_map *map, const struct bt_segment *segment);

/* ---- the grant pool (grants.c) ---- */

/* Takes up to wanted contiguous granules. False when the pool is empty. */
bool bt_grant_take(struct bt_map *map, uint64_t wanted, struct bt_grant *out);
/* Back to the pool, from which it came; front: what is left of the run there. */
void bt_grant_give_back(struct bt_map *map, struct bt_grant grant, bool front);

/* ---- claims (alloc.c) ---- */

struct bt_claim;
/* Claims the segment's granules for a write of the request's data at request->pos; counts as pending of the
 * request until the data is in place. Returns the bytes taken, 0 when the entries changed meanwhile (resolve
 * again), -EAGAIN when the grant pool is empty.
 * For a READ or CACHE it copies the granules from the backing, and gives a READ the data: until then the request is
 * parked, then bt_request_populated. */
int64_t bt_claim_start(struct bt_request *request, const struct bt_segment *segment);
/* Waits for the claim that segment->entry names. False when it is gone already. */
bool bt_claim_wait(struct bt_request *request, const struct bt_segment *segment);
/* The mapping that a BUSY entry hides; re-read the entry afterwards. */
uint64_t bt_claim_old(uint64_t busy_entry);
void bt_claim_pool_free(struct bt_thread *thread);

/* ---- going on (request.c, park.c) ---- */

/* One part of the request, that was counted in pending, is finished. */
void bt_request_part_done(struct bt_request *request, int result);
/* The parked request has got length bytes more, or failed; on its thread. */
void bt_request_populated(struct bt_request *request, uint64_t length, int result);
/* Puts a parked request into the run queue of its thread, from any thread. */
void bt_request_wake(struct bt_request *request);
/* What a fault tells of the request, which is parked by it; bt_request_ask then asks, from any thread. */
void bt_request_prepare_fault(struct bt_request *request, struct bt_object *object, const struct bt_segment *segment);
static inline void bt_request_ask(struct bt_request *request)
{
    bt_event_push(request->fault_object->dp, &request->event);
}
void bt_request_run_queue(struct bt_thread *thread);
/* Asks Python about the segment's part of object; the request goes on when it has answered. */
void bt_request_park(struct bt_request *request, struct bt_object *object, const struct bt_segment *segment);
/* Into the run queue of its thread, on that thread. */
static inline void bt_request_enqueue(struct bt_request *request)
{
    struct bt_thread *thread = request->thread;
    request->next = NULL;
    *thread->run_tail = request;
    thread->run_tail = &request->next;
}
/* False when the answer to a STATUS takes no more. */
bool bt_request_add_extent(struct bt_request *request, uint64_t length, uint32_t flags);

/* ---- gates (gate.c), synchronize (inflight.c) ---- */

struct bt_gate_part {
    uint64_t inside;
    bool closed;
    uint32_t drain; /* the number of the one that closed it */
    struct bt_request *held, **held_tail;
    char pad[64];
};
struct bt_gate {
    struct bt_object base;
    bt_child child;
    bool writable;
    _Atomic bool hurried; /* it is being drained */
    _Atomic bool tell_failure; /* of the next request that fails */
    _Atomic unsigned closed_from; /* threads from this one on, made after the drain began, hold requests, too */
    _Atomic uint64_t cookie;
    /* Threads that are not drained yet, and above them the number of the drain: one that was given up does not
     * count for the next. */
    _Atomic uint64_t waiting;
    struct bt_gate_part parts[BT_MAX_THREADS];
};
/* False when the request is held. */
bool bt_gate_enter(struct bt_gate *gate, struct bt_request *request);
void bt_gate_leave(struct bt_gate *gate, struct bt_thread *thread);
void bt_gate_failed(struct bt_gate *gate, const struct bt_request *request);

struct bt_window {
    struct bt_object base;
    bt_child child;
    uint64_t offset;
};
struct bt_concat {
    struct bt_object base;
    int count;
    bt_child children[];
};

/* As bt_synchronize, but then posts the message to the thread. */
void bt_synchronize_then(struct bt_object *object, struct bt_thread *thread, struct bt_message *then);

/* ---- copying (copy.c) ---- */

/* As bt_copy, on this thread, but then calls done there. -errno: not at all. */
int bt_copy_then(struct bt_thread *thread, struct bt_object *source, struct bt_object *destination, uint64_t offset,
                 uint64_t length, void (*done)(void *arg, int result), void *arg);

/* ---- fences and views (fence.c, view.c): one step of the walk. True: go on in segment->object. ---- */

bool bt_fence_resolve(struct bt_thread *thread, struct bt_object *object, struct bt_segment *segment);
bool bt_view_resolve(struct bt_thread *thread, struct bt_object *object, struct bt_segment *segment);

void bt_sync_check(struct bt_thread *thread);
void bt_io_pool_free(struct bt_thread *thread);

#endif
