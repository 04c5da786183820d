/* SPDX-License-Identifier: Apache-2.0 */
/* What the parts of the datapath share: threads, objects, requests, devices.
 *
 * Ownership: a request and an io belong to one I/O thread from start to done; nothing but their owner touches
 * them, except a parked request that Python answers (bt_fault_*), which comes back through the mailbox.
 * Completion callbacks may run before the function that started the work returns.
 */
#ifndef BT_CORE_H
#define BT_CORE_H

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/uio.h>
#include <time.h>

#include "datapath.h"
#include "throttle.h"

#define BT_MAX_THREADS 16
#define BT_CONTAINER(ptr, type, member) ((type *)((char *)(ptr) - offsetof(type, member)))
#define BT_LIKELY(x) __builtin_expect(!!(x), 1)
#define BT_UNLIKELY(x) __builtin_expect(!!(x), 0)

static inline uint64_t bt_min(uint64_t a, uint64_t b) { return a < b ? a : b; }
static inline uint64_t bt_max(uint64_t a, uint64_t b) { return a > b ? a : b; }
static inline uint64_t bt_now_ns(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}
/* True when [offset, offset + length) lies inside [0, size), without overflow. */
static inline bool bt_range_ok(uint64_t offset, uint64_t length, uint64_t size)
{
    return offset <= size && length <= size - offset;
}

/* ---- I/O threads (thread.c) ---- */

struct bt_thread;

/* Work for a thread, from any thread. The sender owns the memory until fn runs. */
struct bt_message {
    struct bt_message *next;
    void (*fn)(struct bt_message *message, struct bt_thread *thread);
};

/* A file descriptor that the thread waits on (level-triggered epoll). */
struct bt_watch {
    int fd;
    void (*ready)(struct bt_watch *watch, struct bt_thread *thread, uint32_t events);
};

/* A source of work that lies in memory (a virtqueue, a completion ring). */
struct bt_poller {
    struct bt_poller *next;
    /* Takes what is there. True when it did anything. */
    bool (*poll)(struct bt_poller *poller, struct bt_thread *thread);
    /* Before the thread sleeps: ask for wake-ups. True when work has come meanwhile (then no sleep). */
    bool (*arm)(struct bt_poller *poller, struct bt_thread *thread);
    /* After the sleep, or a refused one: wake-ups are not needed now. */
    void (*disarm)(struct bt_poller *poller, struct bt_thread *thread);
};

/* Something to do once at the end of this turn of the loop: send collected replies, notify a guest. */
struct bt_deferred {
    struct bt_deferred *next;
    bool queued;
    void (*fn)(struct bt_deferred *deferred, struct bt_thread *thread);
};

/* A point in time at which fn runs on its thread, for null's latency and for bounded waits. */
struct bt_timer {
    struct bt_timer *next;
    uint64_t at_ns; /* CLOCK_MONOTONIC */
    void (*fn)(struct bt_timer *timer, struct bt_thread *thread);
};

struct bt_request;
struct bt_io;
struct bt_uring;
struct bt_aio;
struct bt_claim;

struct bt_thread {
    bt_datapath *dp;
    unsigned index;
    pthread_t pthread;
    int epoll_fd;
    int wake_fd;
    bool stop;
    _Atomic(struct bt_message *) mailbox;
    _Atomic bool sleeping;
    _Atomic uint64_t poll_max_ns, poll_grow, poll_shrink; /* see bt_thread_set_poll */
    uint64_t poll_ns; /* how long to spin now; adapts between 0 and poll_max_ns */
    struct bt_poller *pollers;
    struct bt_deferred *deferred;
    struct bt_timer *timers; /* sorted */
    struct bt_request *run_head, **run_tail; /* requests to go on with */
    struct bt_io *free_ios;
    struct bt_claim *free_claims;
    struct bt_sync *syncs;
    /* engines, made on first use; owned by their files */
    struct bt_uring *uring;
    struct bt_aio *aio;
    bool did_work; /* in this turn */
    bool from_afar; /* what ended the sleep was an answer over a network: polling would not have been quicker */
    bool coarse_waits; /* the kernel waits in milliseconds only */
    unsigned watches; /* descriptors besides wake_fd */
    struct bt_watch wake;
    struct bt_poller *poller_next; /* the one after that which runs now */
    struct epoll_event fetched_events[32];
    int fetched;
};

void bt_thread_post(struct bt_thread *thread, struct bt_message *message);
/* What has been posted to it; on the thread, or when it has stopped. */
void bt_thread_run_mailbox(struct bt_thread *thread);
int bt_watch_add(struct bt_thread *thread, struct bt_watch *watch, uint32_t events);
int bt_watch_modify(struct bt_thread *thread, struct bt_watch *watch, uint32_t events);
/* After it, ready is not called again, not even for events already fetched. */
void bt_watch_remove(struct bt_thread *thread, struct bt_watch *watch);
void bt_poller_add(struct bt_thread *thread, struct bt_poller *poller);
void bt_poller_remove(struct bt_thread *thread, struct bt_poller *poller);
void bt_defer(struct bt_thread *thread, struct bt_deferred *deferred);
void bt_timer_add(struct bt_thread *thread, struct bt_timer *timer);
void bt_timer_cancel(struct bt_thread *thread, struct bt_timer *timer);
struct bt_thread *bt_thread_get(bt_datapath *dp, int index); /* NULL when there is none */

/* Runs fn(arg) when every I/O thread has passed between two turns of its loop; on one of them, or at once
 * when there is none. */
void bt_grace(bt_datapath *dp, void (*fn)(void *arg), void *arg);

/* ---- events to Python (event.c) ---- */

struct bt_event_node {
    struct bt_event_node *next;
    struct bt_event event;
    bool allocated; /* free it once it is read */
};
/* Queues the event; the node stays valid until Python has read it. */
void bt_event_push(bt_datapath *dp, struct bt_event_node *node);
/* Queues a copy. */
void bt_event_send(bt_datapath *dp, const struct bt_event *event);
/* DONE with cookie and result. */
void bt_event_done(bt_datapath *dp, uint64_t cookie, int64_t result);

/* ---- objects (object.c) ---- */

enum bt_object_type {
    BT_OBJ_DEVICE,
    BT_OBJ_UPCALL,
    BT_OBJ_WINDOW,
    BT_OBJ_CONCAT,
    BT_OBJ_MAP,
    BT_OBJ_GATE,
    BT_OBJ_FENCE,
    BT_OBJ_VIEW,
    BT_OBJ_THROTTLE,
    BT_OBJ_COR, /* copy-on-read */
};

typedef _Atomic(struct bt_object *) bt_child;

struct bt_object_ops {
    /* Frees what the object owns, after the grace period; its children have been unreferenced. */
    void (*destroy)(struct bt_object *object);
};

struct bt_object {
    enum bt_object_type type;
    const struct bt_object_ops *ops;
    bt_datapath *dp;
    uint64_t tag;
    _Atomic uint64_t size;
    _Atomic int refs;
    bool discard_unmap;
    bool takes_fua; /* a leaf that serves BT_FUA itself with every change; else: devices with WRITE only */
    uint8_t detect_zeroes;
    struct bt_counters *counters; /* BT_MAX_THREADS of them, each written by its thread alone */
    /* What it holds references on; a slot may be empty. Slots change under drain (bt_object_set_child). */
    int child_count;
    bt_child *children;
    _Atomic uint64_t write_threshold; /* a change that ends behind it is told once; UINT64_MAX: none */
};

static inline struct bt_object *bt_child_get(bt_child *slot)
{
    return atomic_load_explicit(slot, memory_order_acquire);
}
/* For a new object's slot: takes a reference. child may be NULL. */
void bt_child_init(bt_child *slot, struct bt_object *child);

void bt_object_init(struct bt_object *object, bt_datapath *dp, enum bt_object_type type,
                    const struct bt_object_ops *ops, uint64_t tag, uint64_t size);
/* Adds to a counter of this thread; readers on other threads see whole values. */
static inline void bt_count(uint64_t *counter, uint64_t n)
{
    __atomic_store_n(counter, __atomic_load_n(counter, __ATOMIC_RELAXED) + n, __ATOMIC_RELAXED);
}
static inline struct bt_counters *bt_counters_of(struct bt_object *object, struct bt_thread *thread)
{
    return &object->counters[thread->index];
}
/* A request, or a part of one, enters the object. */
static inline void bt_count_request(struct bt_object *object, struct bt_thread *thread, int op, uint64_t offset,
                                    uint64_t length)
{
    struct bt_counters *counters = bt_counters_of(object, thread);
    bt_count(&counters->requests[op], 1);
    bt_count(&counters->bytes[op], length);
    if (op == BT_WRITE && offset + length > counters->written_end)
        __atomic_store_n(&counters->written_end, offset + length, __ATOMIC_RELAXED);
}
/* It has failed. */
static inline void bt_count_failure(struct bt_object *object, struct bt_thread *thread, int op, uint64_t length)
{
    struct bt_counters *counters = bt_counters_of(object, thread);
    bt_count(&counters->failed[op], 1);
    bt_count(&counters->failed_bytes[op], length);
}

/* ---- requests (request.c): what exports and the control plane start ---- */

struct bt_request {
    struct bt_request *next; /* in whatever queue it is */
    struct bt_thread *thread;
    struct bt_object *object; /* where it starts: a gate for exports */
    void (*done)(struct bt_request *request); /* on its thread; request->ret is 0 or -errno */
    uint8_t op;
    uint8_t flags;
    /* The caller has checked the range against the export's size (a gate does so again), and write permission. */
    uint64_t offset;
    uint64_t length;
    const struct iovec *iov; /* READ, WRITE: at least length bytes; valid until done */
    int iovcnt;
    struct bt_extent *extents; /* STATUS: the answer, neighbours of equal flags merged */
    uint32_t extents_max;
    uint32_t extents_count;
    _Atomic bool *hurried; /* of the session that it belongs to, or NULL: see bt_hurry */
    int ret;

    /* below: request.c's own */
    uint64_t pos;     /* how far the walk has come, from offset; a flush counts its targets here */
    uint32_t pending; /* parts under way, plus one for the walk */
    bool flush_after; /* FUA that met metadata */
    bool flushing;
    bool gated;
    uint8_t payments; /* throttles that it has been charged by */
    struct bt_payment {
        const struct bt_object *throttle;
        uint64_t start, end; /* in the throttle's space */
    } paid[BT_THROTTLE_MAX_NESTED];
    struct bt_message message;
    struct bt_event_node event;
    struct bt_object *fault_object;
    struct bt_io *fault_io; /* asked of an upcall object: in flight there */
    struct bt_reading *readings; /* what it reads of views, until it is done (view.c) */
    uint64_t deadline_ns;        /* until when it waits for what it changes to be saved; 0: for ever (save.c) */
    uint64_t fault_length; /* the part that Python was asked about, or that waits to be let go; it starts at pos */
    uint64_t fault_put;    /* STATUS: bytes answered so far */
    int fault_result;
};

/* Somebody waits for all requests that this flag, or that of their gate, belongs to: throttles let them go, and what
 * formats do for them, until unhurry. Twice does no harm. */
void bt_hurry(bt_datapath *dp, _Atomic bool *flag);
void bt_unhurry(bt_datapath *dp, _Atomic bool *flag);

/* Starts a request whose public fields are set (the rest is reset here). Must run on request->thread. */
void bt_request_start(struct bt_request *request);

/* ---- devices (null.c, file.c): leaves that do I/O ---- */

/* One I/O on one device. Reads past the end give zeros; a result is 0 or -errno, never a short count. */
struct bt_io {
    struct bt_io *next, **pprev; /* the device's list of what is in flight on this thread, oldest first */
    uint64_t seq;
    struct bt_thread *thread;
    struct bt_device *device;
    void (*done)(struct bt_io *io, int result); /* on io->thread; may be called from inside submit */
    void *owner;
    uint8_t op;    /* bt_op */
    uint8_t flags; /* bt_request_flags */
    uint64_t offset;
    uint64_t length;
    struct iovec *iov; /* READ, WRITE: exactly length bytes; the device may change the array */
    int iovcnt;
    struct iovec iov_inline[4];
    struct iovec *iov_allocated;
    /* STATUS: the first run at offset, at most length long */
    uint64_t status_length;
    uint32_t status_flags;
    /* the engine's own */
    struct bt_message message;
    void *bounce;
    uint64_t scratch[4];
    uint64_t started_ns;
};

struct bt_device_ops {
    /* Starts io and calls io->done exactly once, on io->thread, now or later. All ops must be handled. */
    void (*submit)(struct bt_io *io);
    /* READ or WRITE without waiting, of exactly length bytes. 0, -errno, or -EAGAIN when it would wait (then
     * nothing is lost: submit does it again). NULL: never. flags as bt_request_flags. */
    int (*try_inline)(struct bt_device *device, struct bt_thread *thread, int op, uint32_t flags, uint64_t offset,
                      const struct iovec *iov, int iovcnt, uint64_t length);
    /* Both or none: whether what source holds can come to destination without passing through here; and that it does,
     * as a WRITE without a vector: io->offset of the device is to hold what source has at source_offset. It may fail
     * and have copied a part. */
    bool (*can_copy)(struct bt_device *destination, struct bt_device *source);
    void (*copy)(struct bt_io *io, struct bt_device *source, uint64_t source_offset);
};

struct bt_inflight { /* of one device on one thread */
    struct bt_io *head, **tail;
    uint64_t seq;
    char pad[40];
};

struct bt_device { /* an upcall object, too, but without ops */
    struct bt_object base;
    const struct bt_device_ops *ops;
    struct bt_inflight inflight[BT_MAX_THREADS];
};

void bt_device_init(struct bt_device *device, bt_datapath *dp, const struct bt_device_ops *ops,
                    const struct bt_object_ops *object_ops, uint64_t tag, uint64_t size);
/* Takes an io from the thread's pool, with iov_inline as its array when iovcnt fits, else an allocated one. */
struct bt_io *bt_io_get(struct bt_thread *thread, int iovcnt);
/* Enters io into the in-flight list. */
void bt_io_enter(struct bt_io *io);
/* The same, and calls the device's submit. */
void bt_io_submit(struct bt_io *io);
/* What a device calls when io is finished: leaves the list, counts, calls done, returns io to the pool. */
void bt_io_finish(struct bt_io *io, int result);

/* ---- I/O vectors (iov.c) ---- */

/* Fills out (max entries) with [offset, offset + length) of the vector; returns the entries used, or -E2BIG. */
int bt_iov_slice(const struct iovec *iov, int iovcnt, uint64_t offset, uint64_t length, struct iovec *out, int max);
void bt_iov_zero(const struct iovec *iov, int iovcnt, uint64_t offset, uint64_t length);
void bt_iov_to_buffer(const struct iovec *iov, int iovcnt, uint64_t offset, void *out, uint64_t length);
void bt_iov_from_buffer(const struct iovec *iov, int iovcnt, uint64_t offset, const void *data, uint64_t length);
bool bt_iov_is_zero(const struct iovec *iov, int iovcnt, uint64_t offset, uint64_t length);

/* ---- engines (engine_uring.c, engine_aio.c, engine_pool.c) ---- */

/* Blocking work: run() on a worker thread, then done() on work->thread. */
struct bt_work {
    struct bt_message message;
    struct bt_work *next;
    struct bt_thread *thread;
    void (*run)(struct bt_work *work);
    void (*done)(struct bt_work *work);
};
void bt_pool_submit(bt_datapath *dp, struct bt_work *work);
/* Sees to it that bt_pool_submit never has to run work on its caller's thread. -errno when it cannot. */
int bt_pool_ready(bt_datapath *dp);
struct bt_pool *bt_pool_new(unsigned max_workers);
void bt_pool_free(struct bt_pool *pool); /* waits for what runs */

/* The thread's ring: called once in each turn of the loop. True when something was reaped. */
bool bt_uring_turn(struct bt_thread *thread);
/* Cheap look, for polling: are there completions? */
bool bt_uring_ready(struct bt_thread *thread);
void bt_uring_free(struct bt_thread *thread);
bool bt_aio_turn(struct bt_thread *thread);
void bt_aio_free(struct bt_thread *thread);

struct bt_datapath {
    pthread_mutex_t lock; /* threads[] while it grows, and rare things */
    struct bt_thread *threads[BT_MAX_THREADS];
    _Atomic int thread_count;
    int event_fd;
    _Atomic(struct bt_event_node *) events; /* newest first */
    struct bt_event_node *event_backlog;    /* oldest first; the control thread's */
    struct bt_pool *pool;
    struct bt_memory *memory; /* see memory.h */
    struct bt_throttle_group *throttle_groups; /* under the lock */
    _Atomic uint32_t hurries; /* how many flags of bt_hurry are set */
};

#endif
