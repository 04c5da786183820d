/* SPDX-License-Identifier: Apache-2.0 */
/* The datapath's whole interface, as Python sees it through cffi and as C programs link it.
 *
 * Python decides, the datapath moves data. Every call here is made by one control thread, returns at
 * once, and reports later through events (bt_events) and one eventfd. Sizes and offsets are bytes.
 * Functions that return int give 0 (or a count) or a negative errno. See docs/architecture.md.
 */
#ifndef BT_DATAPATH_H
#define BT_DATAPATH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* cffi: begin (plain declarations only from here to "cffi: end") */

typedef struct bt_datapath bt_datapath;
typedef struct bt_object bt_object;
typedef struct bt_request bt_request;

/* ---- operations ---- */

enum bt_op {
    BT_READ = 0,
    BT_WRITE = 1,
    BT_ZEROES = 2,  /* afterwards the range reads as zeros */
    BT_DISCARD = 3, /* a hint; the range may keep its content */
    BT_FLUSH = 4,
    BT_STATUS = 5, /* allocation of a range, as bt_extent */
    BT_CACHE = 6,  /* read ahead into the cache */
    BT_OPS = 7,
};

enum bt_request_flags {
    BT_FUA = 1,       /* durable before it is done */
    BT_UNMAP = 2,     /* ZEROES may deallocate */
    BT_FAST_ZERO = 4, /* ZEROES fails with ENOTSUP rather than write zeros as data */
    /* CACHE: copies what the first map has not from its backing, and does nothing else. In the event of a READ or CACHE
     * of an upcall object: that is wanted of what is below it. */
    BT_POPULATE = 16,
    BT_REQ_ONE = 8,   /* in the event of a STATUS: the requester wants one extent only */
    BT_SAVE = 32,     /* CACHE, of a fence: has saved what a change of the range would have, and does nothing else */
};

enum bt_extent_flags {
    BT_EXTENT_HOLE = 1, /* not allocated; the values are those of NBD's base:allocation */
    BT_EXTENT_ZERO = 2, /* reads as zeros */
};

struct bt_extent {
    uint64_t length;
    uint32_t flags;
    uint32_t pad;
};

/* ---- events ---- */

enum bt_event_type {
    BT_EVENT_FAULT = 1,  /* tag: the object's; request to be answered with bt_fault_* */
    BT_EVENT_DONE = 2,   /* tag: cookie of bt_submit, bt_copy, bt_synchronize, bt_drain, ...; result */
    BT_EVENT_GRANTS = 3, /* tag: the map's; its grant pool runs low; length: bytes left */
    BT_EVENT_SESSION = 4, /* tag: an export session's or a device's; result: why it ended or what it asks */
    BT_EVENT_RELEASED = 5, /* tag: the object's; it is freed, its tag will not come again */
    BT_EVENT_FAILED = 7, /* tag: the gate's; a request that entered there failed: op, offset, length, result */
    BT_EVENT_THRESHOLD = 6, /* tag: the object's; a change ended length bytes behind its threshold, offset */
};

enum bt_fault_reason {
    BT_FAULT_LOAD = 0,  /* the slice that holds the granule is not loaded */
    BT_FAULT_ENTRY = 1, /* the granule's entry is FAULT: Python serves it */
    BT_FAULT_WRITE = 2, /* the entry or slice does not permit this change */
    BT_FAULT_GRANT = 3, /* the grant pool is empty */
    BT_FAULT_FLUSH = 4, /* the map has metadata to write back first */
    BT_FAULT_UPCALL = 5, /* an upcall object: Python serves all */
    BT_FAULT_SAVE = 6,   /* a fence could not save what is to be changed; result: why, a negative errno */
    BT_FAULT_REASONS = 7,
};

struct bt_event {
    uint32_t type;
    uint32_t op;
    uint32_t flags;
    uint32_t reason;
    uint64_t tag;
    bt_request *request; /* FAULT only */
    uint64_t offset;     /* FAULT: the part of the object's space that is asked for */
    uint64_t length;
    int64_t result;      /* FAULT: the index of the request's thread, but for reason SAVE */
};

/* ---- the datapath and its I/O threads ---- */

enum bt_engine {
    BT_ENGINE_THREADS = 0,  /* aio=threads: worker pool */
    BT_ENGINE_NATIVE = 1,   /* aio=native: io_submit, needs cache.direct */
    BT_ENGINE_IO_URING = 2, /* aio=io_uring */
};

/* NULL and errno on failure. */
bt_datapath *bt_datapath_new(void);
/* Joins all threads. Every object and export must be released before. */
void bt_datapath_free(bt_datapath *dp);
/* Readable when bt_events has something. */
int bt_datapath_eventfd(bt_datapath *dp);
/* 1 when io_uring can be used here, else 0. Probed once per call. */
int bt_probe_io_uring(void);
/* Up to max events, oldest first; clears the eventfd. Returns the number. */
int bt_events(bt_datapath *dp, struct bt_event *out, int max);
/* Starts an I/O thread that polls up to poll_max_ns before it sleeps. Returns its index. */
int bt_thread_new(bt_datapath *dp, uint64_t poll_max_ns);
/* What was slept in vain or too long multiplies and divides the time of polling, by 2 where a factor is 0. */
int bt_thread_set_poll(bt_datapath *dp, int thread, uint64_t max_ns, uint64_t grow, uint64_t shrink);

/* ---- objects ----
 * tag: chosen by Python, comes back in events. Constructors take references on their children.
 * An object is freed when its last reference goes and all threads have passed a quiescent point. */

void bt_object_ref(bt_object *object);
void bt_object_unref(bt_object *object);
/* discard_unmap: false drops DISCARD and the UNMAP flag here (discard=ignore).
 * detect_zeroes: 0 off, 1 on, 2 unmap. */
void bt_object_set_policy(bt_object *object, bool discard_unmap, int detect_zeroes);
/* A leaf that serves BT_FUA itself, with ZEROES and DISCARD too. Else a change is followed by a flush, but for a
 * device's WRITE. Set before its first request. */
void bt_object_set_fua(bt_object *object, bool takes_fua);
uint64_t bt_object_size(bt_object *object);
void bt_object_set_size(bt_object *object, uint64_t size);
/* What an object holds references on, by number: a window, a gate, align: 0; a map: 0 its child, 1 its backing (may be
 * NULL); concat: in order. To be changed while nothing from above is inside (drain); the old one goes, when nothing
 * else holds it, after a grace period. replace: all slots that hold old; returns how many. */
void bt_object_set_child(bt_object *object, int index, bt_object *child);
int bt_object_replace_child(bt_object *object, bt_object *old, bt_object *child);
/* One THRESHOLD event for a write or zeroes that ends behind offset; then there is none, until set anew.
 * UINT64_MAX: none. */
void bt_object_set_write_threshold(bt_object *object, uint64_t offset);
uint64_t bt_object_write_threshold(bt_object *object);

struct bt_counters {
    uint64_t requests[7]; /* by bt_op; for a map and a gate: requests that entered */
    uint64_t bytes[7];
    uint64_t faults[7]; /* by bt_fault_reason */
    uint64_t inline_done; /* device: done without an engine */
    uint64_t engine_done; /* device: went through the engine */
    uint64_t bounced;     /* device: copied for alignment */
    uint64_t grants;      /* map: clusters taken from the pool */
    uint64_t hits;        /* map: look-ups in a loaded slice */
    uint64_t misses;      /* map: look-ups in one not loaded */
    uint64_t failed[7];   /* of the requests, by bt_op */
    uint64_t failed_bytes[7];
    uint64_t written_end; /* of all writes of data, successful or not, the highest end */
};
void bt_object_counters(bt_object *object, struct bt_counters *out);
/* A new object, that nobody uses yet, takes over the counters and the write threshold of one that it takes the place
 * of, and in which no request is. */
void bt_object_succeed(bt_object *object, bt_object *old);

bt_object *bt_null_new(bt_datapath *dp, uint64_t tag, uint64_t size, uint64_t latency_ns, bool read_zeroes);

enum bt_file_flags {
    BT_FILE_DIRECT = 1,   /* fd is O_DIRECT */
    BT_FILE_NO_FLUSH = 2, /* cache.no-flush: FLUSH and FUA are not passed on */
    BT_FILE_BLOCK = 4,    /* a block device: fixed size, BLKDISCARD and BLKZEROOUT */
};
/* Takes its own duplicate of fd. align: the device's request alignment (1 when not direct), a power of two.
 * mem_align: alignment of buffers in memory. size: now; writes below a map or a control request grow it. */
bt_object *bt_file_new(bt_datapath *dp, uint64_t tag, int fd, uint64_t size, uint32_t flags, int engine,
                       uint32_t align, uint32_t mem_align);
/* Every request becomes a fault, reason UPCALL. */
bt_object *bt_upcall_new(bt_datapath *dp, uint64_t tag, uint64_t size);
/* [0, size) here is [offset, offset + size) of child. */
bt_object *bt_window_new(bt_datapath *dp, uint64_t tag, bt_object *child, uint64_t offset, uint64_t size);
/* In front of a child that takes only whole blocks (a power of two up to 64 KiB, of which its size is a multiple):
 * what is not aligned becomes reading, changing and writing whole blocks. */
bt_object *bt_align_new(bt_datapath *dp, uint64_t tag, bt_object *child, uint32_t block);
/* Copy on read: what a READ or CACHE finds unallocated in the first map below is copied there from its backing. bottom
 * (may be NULL): a map in that backing; what lies below it is not copied. */
bt_object *bt_cor_new(bt_datapath *dp, uint64_t tag, bt_object *child, bt_object *bottom);
/* children end to end */
bt_object *bt_concat_new(bt_datapath *dp, uint64_t tag, bt_object **children, int count);
/* The top of an edge into the graph: counts what is inside, and can hold requests. */
bt_object *bt_gate_new(bt_datapath *dp, uint64_t tag, bt_object *child, bool writable);
/* One FAILED event for the next request of the gate that fails; then there is none, until asked for anew. */
void bt_gate_tell_failure(bt_object *gate);
/* Holds new requests of the gate; DONE with this cookie when none is left inside. Not reentrant. */
void bt_gate_drain(bt_object *gate, uint64_t cookie);
/* Lets the held requests go on, also when the drain is not done: then its DONE may come or not. child != NULL replaces
 * the gate's child (only while drained). */
void bt_gate_resume(bt_object *gate, bt_object *child);

/* ---- fences: pass all on to child (0), but hold back changes ----
 * A change that a fence holds back faults, reason WRITE; after a retry it looks again. Marks are for granules, and are
 * never taken back. Past its granules all is open. */

enum bt_fence_mark {
    BT_FENCE_OPEN = 0,   /* may be changed */
    BT_FENCE_SAVED = 1,  /* views read it from saved (1) */
    BT_FENCE_HIDDEN = 2, /* views cannot read it: EACCES */
    BT_FENCE_MARKS = 3,
};
/* saved may be NULL when nothing is ever marked SAVED; granules may be 0: all is open; else see
 * bt_fence_set_saving. */
bt_object *bt_fence_new(bt_datapath *dp, uint64_t tag, bt_object *child, bt_object *saved, uint32_t granule_bits,
                        uint64_t granules);
void bt_fence_mark(bt_object *fence, int mark, uint64_t first, uint64_t count);
/* OPEN: whoever waits is let go. */
void bt_fence_mark_all(bt_object *fence, int mark);
/* The first granule of [first, end) that has the mark, or has it not; end (or the number of granules) without one. */
uint64_t bt_fence_find(bt_object *fence, int mark, uint64_t first, uint64_t end, bool marked);
/* Writes and zeroes past the limit are held back. UINT64_MAX: there is none; UINT64_MAX - 1: none, but what is written
 * is noted. */
void bt_fence_set_limit(bt_object *fence, uint64_t limit);
/* Unless there is no limit: the end of what was written, or of what was told here if that is more. */
uint64_t bt_fence_reached(bt_object *fence);
void bt_fence_reach(bt_object *fence, uint64_t end);
/* Also less: what was written past it is gone. */
void bt_fence_set_reached(bt_object *fence, uint64_t end);
/* What the fence holds back of its granules is saved, without asking: copied from child to saved (as much as there is
 * up to size), marked SAVED, and marked OPEN when no view reads it any more from where it was. What is HIDDEN is not
 * copied. Faults, reason SAVE, when the copy failed, or (ETIMEDOUT) the request has waited for longer than the timeout;
 * after a retry it is tried again, or waited for. To be called before the first request. read_through: saved may be
 * read by others, and leads to child where nothing was saved: these reads are waited for, too. */
void bt_fence_set_saving(bt_object *fence, uint64_t size, bool read_through);
/* For requests from now on; 0: none. */
void bt_fence_set_timeout(bt_object *fence, uint64_t timeout_ns);
/* Granules that were copied. */
uint64_t bt_fence_saved(bt_object *fence);
/* DONE when nothing is being saved: at the end, or while no change comes. */
void bt_fence_settle(bt_object *fence, uint64_t cookie);
/* DONE when all that was being read of views of the fence, when it was called, has been read. */
void bt_fence_wait_readers(bt_object *fence, uint64_t cookie);
/* What a fence's child held before it was changed. Changes fault, reason ENTRY. synchronize waits for what reads both
 * child and saved. */
bt_object *bt_view_new(bt_datapath *dp, uint64_t tag, bt_object *fence, uint64_t size);

/* ---- maps: table of entries, one 64-bit word for each granule ----
 * bits 0-2 kind, bits 3-5 flags, bits 8-63 host offset in units of 512 bytes */

enum bt_entry_bits {
    BT_ENTRY_FAULT = 0,       /* ask: BT_FAULT_ENTRY for every operation */
    BT_ENTRY_UNALLOCATED = 1, /* falls through to backing; zeros without one or past its end */
    BT_ENTRY_ZERO = 2,
    BT_ENTRY_DATA = 3, /* at the host offset in child */
    BT_ENTRY_BUSY = 4, /* claimed; never seen or set by Python */
    BT_ENTRY_KIND = 7,
    BT_ENTRY_WRITABLE = 8, /* may be changed in place: DATA overwritten; DATA and ZERO zeroed or discarded */
    BT_ENTRY_ALLOC = 16,   /* may be replaced by a cluster of the grant pool, without asking */
    BT_ENTRY_HOST = 32,    /* a ZERO that owns the cluster at its host offset */
};

/* granule_bits 9..31; slice_bits: log2 of entries in a slice; backing may be NULL. size need not be a
 * multiple of the granule. */
bt_object *bt_map_new(bt_datapath *dp, uint64_t tag, uint32_t granule_bits, uint32_t slice_bits, uint64_t size,
                      bt_object *child, bt_object *backing);
uint64_t bt_map_slices(bt_object *map);
/* Makes room for the slices of a larger size, while requests are under way. The map's size stays as it is until
 * bt_object_set_size. 0, -EINVAL or -ENOMEM. */
int bt_map_reserve(bt_object *map, uint64_t size);
/* Installs a slice (1 << slice_bits entries). writable false: every change faults, reason WRITE.
 * -EEXIST when it is loaded already (or was in limbo and is back): nothing changed but, then, writable. */
int bt_map_load(bt_object *map, uint64_t slice, const uint64_t *entries, bool writable);
/* Changes whether the slice accepts changes by the datapath. After taking the right away, bt_synchronize. */
int bt_map_set_writable(bt_object *map, uint64_t slice, bool writable);
/* Copies count entries from granule on; a BUSY one shows its old mapping. -ENOENT when not loaded. */
int bt_map_get(bt_object *map, uint64_t granule, uint64_t count, uint64_t *out);
/* An entry that loses WRITABLE while writes may be on their way has to lose ALLOC too until bt_synchronize is done:
 * a copy taken before they land would miss them. */
/* Replaces one entry if it equals expected; -EBUSY when it is claimed, -ESTALE when it differs,
 * -ENOENT when not loaded. dirty: marks the slice dirty. */
int bt_map_set(bt_object *map, uint64_t granule, uint64_t expected, uint64_t entry, bool dirty);
/* Sets a run of entries that no request can reach, outside of the map's size; returns how many from the first on were
 * in loaded slices, and are set now. -EBUSY: one is claimed. */
int64_t bt_map_fill(bt_object *map, uint64_t granule, uint64_t count, uint64_t entry, bool dirty);
/* Lists up to max slices that are loaded, or dirty. */
int bt_map_loaded(bt_object *map, uint64_t *out, int max);
int bt_map_dirty(bt_object *map, uint64_t *out, int max);
/* Step 1 of a flush: clears the slice's dirty flag, then copies its entries. */
int bt_map_clean(bt_object *map, uint64_t slice, uint64_t *out);
/* Marks a slice dirty again (its write-back failed). */
int bt_map_redirty(bt_object *map, uint64_t slice);
/* While held, every FLUSH faults with reason FLUSH, even with no slice dirty: for metadata that is not in
 * the table (reference counts, L1) and while a write-back is under way. */
void bt_map_hold_flush(bt_object *map, bool hold);
/* Drops clean, idle slices until at most bytes are used; returns the bytes still used (dirty and busy ones
 * stay). Memory is given back after a grace period. */
uint64_t bt_map_shrink(bt_object *map, uint64_t bytes);
uint64_t bt_map_bytes(bt_object *map);
/* Adds a run of count clusters (granules) of child at host_offset to the pool. zeroed: they read as zeros. */
int bt_map_grant(bt_object *map, uint64_t host_offset, uint64_t count, bool zeroed);
struct bt_grant {
    uint64_t host_offset;
    uint64_t count; /* granules */
    uint64_t zeroed;
};
/* Takes back up to max unused runs. */
int bt_map_revoke(bt_object *map, struct bt_grant *out, int max);
/* Granules left in the pool. */
uint64_t bt_map_granted(bt_object *map);
/* How many claims are under way. With the pool revoked, 0 means: each cluster granted is in an entry, was
 * dropped from one, or is back in the pool. */
uint32_t bt_map_claims(bt_object *map);
/* Whether the format can say ZERO (qcow2 version 2 cannot): without it, zeroes and discards of whole granules make
 * them UNALLOCATED where no backing shows through, and are written as data or dropped where one does. */
void bt_map_set_zero_entries(bt_object *map, bool supported);
/* GRANTS event when fewer than this many granules are left. */
void bt_map_set_low_water(bt_object *map, uint64_t granules);

/* ---- faults: every one gets exactly one answer ---- */

/* Resolve again: the table has changed. */
void bt_fault_retry(bt_request *request);
/* The whole part [offset, offset + length) of the event is done by Python (result 0), or the request failed
 * (result negative errno). */
void bt_fault_done(bt_request *request, int result);
/* Copies the part's data, from the requester's memory (WRITE) or into it (READ). at: from the part's start. */
int bt_fault_get_data(bt_request *request, uint64_t at, void *out, size_t length);
int bt_fault_put_data(bt_request *request, uint64_t at, const void *data, size_t length);
/* STATUS: appends one extent to the answer. -ENOSPC when the requester wants no more: then answer with done. */
int bt_fault_put_extent(bt_request *request, uint64_t length, uint32_t flags);

/* ---- requests of the control plane ---- */

/* One request on an object, on an I/O thread. buffer stays valid until its DONE event (result: 0 or -errno).
 * Not held by gates above the object. */
int bt_submit(bt_datapath *dp, int thread, bt_object *object, int op, uint32_t flags, uint64_t offset,
              uint64_t length, void *buffer, uint64_t cookie);
/* As bt_submit for STATUS: DONE's result is the number of extents. */
int bt_submit_status(bt_datapath *dp, int thread, bt_object *object, uint64_t offset, uint64_t length,
                     struct bt_extent *out, int max, uint64_t cookie);
/* Copies [offset, offset+length) of source to destination, zeros as zeroes. */
int bt_copy(bt_datapath *dp, int thread, bt_object *source, bt_object *destination, uint64_t source_offset,
            uint64_t destination_offset, uint64_t length, uint64_t cookie);
/* DONE when every I/O that was in flight below object, on any thread, has finished. */
void bt_synchronize(bt_object *object, uint64_t cookie);

/* ---- vhost-user-blk ----
 * A session is one connection of a front end. Python speaks the protocol's messages and calls these; the
 * queues run on I/O threads. Descriptors are duplicated; the caller keeps its own. */

typedef struct bt_vhost bt_vhost;

enum bt_vhost_limits {
    BT_VHOST_MAX_QUEUES = 256,
    BT_VHOST_MAX_QUEUE_SIZE = 1024,
    BT_VHOST_MAX_REGIONS = 509,
    BT_VHOST_MAX_CHAIN = 1024,      /* descriptors of a request in an indirect table */
    BT_VHOST_SEG_MAX = 126,         /* seg_max of the configuration space */
    BT_VHOST_MAX_SEGMENTS = 32,     /* ranges of one DISCARD or WRITE_ZEROES */
    BT_VHOST_MAX_SECTORS = 2097152, /* of one such range */
    BT_VHOST_SERIAL = 20,
};

/* Why a queue has stopped taking requests: in the low byte of an EXPORT event's result, the queue above it. */
enum bt_vhost_trouble {
    BT_VHOST_BAD_INDEX = 1,      /* the available index jumped, or names no descriptor */
    BT_VHOST_BAD_CHAIN = 2,      /* descriptors: a loop, too long, wrong order or flags, no header or status */
    BT_VHOST_BAD_ADDRESS = 3,    /* a buffer outside of the guest's memory */
    BT_VHOST_TOO_MANY = 4,       /* more requests in flight than the ring holds */
    BT_VHOST_MEMORY_LOST = 5,    /* the front end truncated the memory it shares */
    BT_VHOST_BAD_DESCRIPTOR = 6, /* the kick or call file descriptor does not work as one */
};

struct bt_vhost_region {
    uint64_t guest_address;
    uint64_t size;
    uint64_t user_address;
    uint64_t file_offset;
};

struct bt_vhost_counters {
    uint64_t requests[7]; /* by bt_op */
    uint64_t bytes[7];
    uint64_t other;         /* GET_ID and types that are not known */
    uint64_t failed;        /* completed with another status than OK */
    uint64_t kicks;         /* notifications received */
    uint64_t notifications; /* sent */
};

/* gate: where requests enter the graph. block_size: a power of two from 512. serial: BT_VHOST_SERIAL bytes,
 * padded with zeros. capacity in bytes. NULL and errno on failure. */
bt_vhost *bt_vhost_new(bt_datapath *dp, uint64_t tag, bt_object *gate, uint32_t queues, uint64_t capacity,
                       uint32_t block_size, bool writable, const char *serial);
/* Every queue must be stopped. */
void bt_vhost_free(bt_vhost *session);
void bt_vhost_set_capacity(bt_vhost *session, uint64_t capacity);
/* Every write is durable before it is done. */
void bt_vhost_set_write_through(bt_vhost *session, bool on);
/* The feature bits that the driver took. -EBUSY while a queue runs. */
int bt_vhost_set_features(bt_vhost *session, uint64_t features);

/* -EBUSY while a queue runs; -EINVAL for an empty or misaligned region or a descriptor that is no regular file;
 * -ERANGE when it wraps or is larger than the file; -EEXIST when it overlaps another; -ENOSPC; or mmap's error. */
int bt_vhost_add_region(bt_vhost *session, const struct bt_vhost_region *region, int fd);
/* The region with the same addresses and size; -ENOENT. */
int bt_vhost_remove_region(bt_vhost *session, const struct bt_vhost_region *region);
int bt_vhost_clear_regions(bt_vhost *session);

/* All but set_call: -EBUSY while the queue runs. fd -1: none. A descriptor must be an eventfd or a pipe. */
int bt_vhost_queue_set_size(bt_vhost *session, uint32_t queue, uint32_t size);
int bt_vhost_queue_set_base(bt_vhost *session, uint32_t queue, uint32_t base);
int bt_vhost_queue_set_addresses(bt_vhost *session, uint32_t queue, uint64_t desc, uint64_t avail, uint64_t used);
int bt_vhost_queue_set_kick(bt_vhost *session, uint32_t queue, int fd);
int bt_vhost_queue_set_call(bt_vhost *session, uint32_t queue, int fd);
int bt_vhost_queue_set_error(bt_vhost *session, uint32_t queue, int fd);
/* -EFAULT or -EINVAL when the ring does not lie in the memory or is not aligned; -EINVAL before size and addresses
 * were set. */
int bt_vhost_queue_start(bt_vhost *session, uint32_t queue, int thread);
/* Takes no more requests; DONE when none is in flight, with the index of the next available entry as its result
 * (then call bt_vhost_queue_stopped). -EALREADY when it does not run. */
int bt_vhost_queue_stop(bt_vhost *session, uint32_t queue, uint64_t cookie);
/* Gives up a stop, if it is not done: then the queue goes on, and the stop's DONE has -ECANCELED. DONE of this cookie
 * comes after it in any case. */
void bt_vhost_queue_unstop(bt_vhost *session, uint32_t queue, uint64_t cookie);
/* After the DONE of a stop: the queue may be set up again. */
void bt_vhost_queue_stopped(bt_vhost *session, uint32_t queue);
/* To be called now and then: gets I/O threads out of notifications that have blocked for age_ns, because the front
 * end made their descriptors so; their queues stop. */
void bt_vhost_interrupt(bt_vhost *session, uint64_t age_ns);
uint32_t bt_vhost_queue_base(bt_vhost *session, uint32_t queue);
void bt_vhost_get_counters(bt_vhost *session, struct bt_vhost_counters *out);

/* ---- NBD transmission ----
 * A session is one connection after its handshake: it reads requests from the socket, starts them on the gate
 * and sends the replies, all on one I/O thread. */

typedef struct bt_nbd_server bt_nbd_server;
typedef struct bt_nbd_session bt_nbd_session;

/* What sessions share: a bound on the memory of their buffers. Each session may always have a little. */
bt_nbd_server *bt_nbd_server_new(bt_datapath *dp, uint64_t memory);
/* Goes with its last session. */
void bt_nbd_server_free(bt_nbd_server *server);

enum bt_nbd_mode {
    BT_NBD_STRUCTURED = 1,   /* structured replies were negotiated */
    BT_NBD_ALLOCATION = 2,   /* base:allocation was, as allocation_id */
    BT_NBD_WRITETHROUGH = 4, /* every change is FUA */
};

struct bt_nbd_options {
    int thread;    /* index of the I/O thread */
    uint32_t mode; /* bt_nbd_mode */
    uint64_t size; /* as announced */
    uint32_t allocation_id;
    uint32_t transmission_flags; /* as announced */
};

enum bt_nbd_end { /* result of the session's BT_EVENT_SESSION; else a negative errno */
    BT_NBD_END_DISCONNECT = 0, /* NBD_CMD_DISC */
    BT_NBD_END_EOF = 1,        /* the client closed without it */
    BT_NBD_END_STOPPED = 2,    /* bt_nbd_session_stop or _cut */
    BT_NBD_END_PROTOCOL = 3,   /* the client broke the protocol */
    BT_NBD_END_STUCK = 4,      /* closing, and the client did not take its replies */
};

/* Takes over fd (a connected stream socket, non-blocking) when it succeeds; NULL and errno otherwise. One EXPORT
 * event with this tag tells when it has ended: then no request is under way, and fd is closed at once. */
bt_nbd_session *bt_nbd_session_new(bt_nbd_server *server, bt_object *gate, int fd, uint64_t tag,
                                   const struct bt_nbd_options *options);
/* Starts no more requests; DONE with 0 when none is under way (then it has to be resumed before it may be paused
 * again), or with a negative errno: it is ending, or the pause was given up. */
void bt_nbd_session_pause(bt_nbd_session *session, uint64_t cookie);
/* Gives up a pause, if it is not done: then the session goes on, and the pause's DONE has -ECANCELED. DONE of this
 * cookie comes after it in any case. */
void bt_nbd_session_unpause(bt_nbd_session *session, uint64_t cookie);
/* Goes on after the DONE of a pause, on that I/O thread; -1: on the same. */
void bt_nbd_session_resume(bt_nbd_session *session, int thread);
/* Requests behind the new size fail from here on, those up to it do not. */
void bt_nbd_session_set_size(bt_nbd_session *session, uint64_t size);
/* Answers what comes with ESHUTDOWN; ends between two requests, when the client waits for nothing. */
void bt_nbd_session_shut(bt_nbd_session *session);
/* Reads no more requests; ends when those under way are answered. */
void bt_nbd_session_stop(bt_nbd_session *session);
/* Sends no more replies either; ends when the requests under way are done. */
void bt_nbd_session_cut(bt_nbd_session *session);
/* After the END event only. */
void bt_nbd_session_free(bt_nbd_session *session);

struct bt_nbd_counters {
    uint64_t requests; /* received, refused ones too */
    uint64_t errors;   /* replies with an error */
    uint64_t holes;    /* OFFSET_HOLE chunks */
    uint64_t received; /* bytes */
    uint64_t sent;
    uint64_t receives; /* system calls */
    uint64_t sends;
    uint64_t stalls; /* times that reading waited for a free request or buffer */
};
void bt_nbd_session_counters(bt_nbd_session *session, struct bt_nbd_counters *out);

/* cffi: end */

#endif
