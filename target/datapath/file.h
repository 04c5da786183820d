/* SPDX-License-Identifier: Apache-2.0 */
/* The file device's parts: file.c starts and finishes, file_blocking.c is what runs on workers. */
#ifndef BT_FILE_H
#define BT_FILE_H

#include "engine.h"
#include "ranges.h"

#define FILE_BOUNCE_SIZE (256u << 10) /* unaligned I/O goes through buffers of this size, in pieces */
#define FILE_BOUNCES_KEPT 16

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
    struct bt_ranges ranges;
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
    struct bt_range range;
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

/* ---- here and now (file_now.c); -EAGAIN: not without waiting, or not at all ---- */

#define FILE_NOW_MAX (1u << 20) /* bytes; more would hold up the thread's other requests */

int64_t file_read_now(struct file *file, const struct iovec *iov, int iovcnt, uint64_t offset);
int64_t file_write_now(struct file *file, struct bt_thread *thread, const struct iovec *iov, int iovcnt,
                       uint64_t offset, uint64_t length);
/* A write reached end: the file may be larger now. */
void file_grow(struct file *file, uint64_t end);
/* The whole of a request, for bt_device_ops. */
int file_try_inline(struct bt_device *device, struct bt_thread *thread, int op, uint32_t flags, uint64_t offset,
                    const struct iovec *iov, int iovcnt, uint64_t length);

/* ---- on a worker (file_blocking.c) ---- */

/* Runs op->io (what op->span has left of it) with blocking calls; sets op->result. On a worker. */
void file_run_blocking(struct bt_work *work);
/* errno of operations that this file, or its filesystem, does not know at all */
bool file_is_unsupported(int error);

#endif
