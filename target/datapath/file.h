/* SPDX-License-Identifier: Apache-2.0 */
/* The file device's parts: file.c starts and finishes, file_blocking.c is what runs on workers, file_ranges.c
 * keeps writes of parts of a block apart from all that overlaps them. */
#ifndef BT_FILE_H
#define BT_FILE_H

#include "engine.h"

#define FILE_BOUNCE_SIZE (256u << 10) /* unaligned I/O goes through buffers of this size, in pieces */
#define FILE_BOUNCES_KEPT 16

/* ---- ranges (file_ranges.c) ----
 * Writing a part of a block means reading the block, changing it and writing it whole: exclusive. Other changes are
 * shared: they may overlap each other, but no exclusive one. While nothing exclusive is about, a shared change is
 * two stores to a counter of its own thread, and its range is not even recorded. */

struct file_range {
    struct file_range *next;
    uint64_t start, end;
    struct bt_thread *thread;
    /* The range that had to wait is held now; on its thread. */
    void (*granted)(struct file_range *range);
    bool exclusive;
    bool held;
    bool counted; /* shared, by the counter alone */
    bool waiting;
    struct bt_message message;
};

struct file_ranges {
    _Atomic uint32_t exclusive; /* ranges held or waiting; != 0: shared ones register too */
    pthread_mutex_t lock;
    struct file_range *head, **tail; /* in order of arrival */
    struct {
        _Atomic uint32_t held;
        char pad[60]; /* a cache line for each thread */
    } shared[BT_MAX_THREADS];
};

void file_ranges_init(struct file_ranges *ranges);
void file_ranges_destroy(struct file_ranges *ranges);
/* start, end, thread, granted and exclusive are set. True when it is held; else granted is called later. */
bool file_range_acquire(struct file_ranges *ranges, struct file_range *range);
/* Does nothing when it is not held. */
void file_range_release(struct file_ranges *ranges, struct file_range *range);

/* ---- the device ---- */

struct file_syncs { /* of cached data */
    pthread_mutex_t lock;
    pthread_cond_t finish;
    uint64_t started, finished;
    _Atomic int error; /* errno of the first that failed: all later ones fail too, until the file is reopened */
};

struct file {
    struct bt_device device;
    int fd;
    int engine;
    bool direct, no_flush, block;
    bool in_memory; /* tmpfs and its like: never waits for a disk, and knows no RWF_NOWAIT */
    uint32_t align, mem_align;
    uint32_t sector; /* of a block device */
    _Atomic bool no_nowait, no_punch, no_zero_range;
    _Atomic uint64_t slow_until_ns; /* cached writes go to the engine until then */
    _Atomic int watched_writes;     /* so many of the next cached writes are looked at closely */
    _Atomic int engine_writes;      /* cached ones that the engine has now */
    struct file_ranges ranges;
    struct file_syncs syncs;
    struct file_op *free_ops[BT_MAX_THREADS];
    pthread_mutex_t bounce_lock;
    int bounces_kept;
    void *bounces[FILE_BOUNCES_KEPT];
};

/* What is still to be read or written. */
struct file_span {
    struct iovec *iov; /* changed as it shrinks */
    int iovcnt;
    uint64_t offset;
    uint64_t left;
};

/* The device's state of one io. */
struct file_op {
    struct file_op *next; /* in the thread's list of free ones */
    struct file *file;
    struct bt_io *io;
    struct file_span span;
    struct file_range range;
    int result;
    bool here;        /* done without an engine */
    bool counted;     /* in engine_writes */
    bool bounce;      /* must be */
    bool bounced;     /* was */
    bool keep_size;   /* a block's rest past the end of the file must not stay */
    struct bt_work work;
    struct bt_transfer transfer;
};

static inline uint64_t file_round_down(uint64_t n, uint64_t align) { return n & ~(align - 1); }
static inline uint64_t file_round_up(uint64_t n, uint64_t align) { return file_round_down(n + align - 1, align); }

/* Whether the kernel takes the transfer as it is. */
bool file_is_aligned(const struct file *file, const struct iovec *iov, int iovcnt, uint64_t offset, uint64_t length);
/* Takes what one system call moved (or -errno) off the span. 1: all is done; 0: go on; or -errno. */
int file_span_take(const struct file *file, struct file_span *span, bool write, int64_t result);
/* Runs op->io (what op->span has left of it) with blocking calls; sets op->result. On a worker. */
void file_run_blocking(struct bt_work *work);
/* errno of operations that this file, or its filesystem, does not know at all */
bool file_is_unsupported(int error);

#endif
