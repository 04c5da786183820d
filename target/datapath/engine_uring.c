/* SPDX-License-Identifier: Apache-2.0 */
/* io_uring: one ring for each I/O thread, made on its first use. Entries are collected while a turn of the loop
 * runs and submitted at its end (those for a disk in small batches before); the ring's descriptor wakes the thread
 * when it sleeps. */
#define _GNU_SOURCE
#include <liburing.h>

#include "engine.h"

#define RING_ENTRIES 256
#define RING_COMPLETIONS 2048 /* more than is normally in flight; beyond it the kernel keeps a list */
#define REAP_BATCH 64

struct bt_uring {
    struct io_uring ring;
    struct bt_watch watch;
    struct bt_transfer *waiting, **waiting_tail; /* found no free entry */
};

/* Without COOP_TASKRUN every completion would interrupt the thread. Kernels before 5.19 refuse the flags. */
static int ring_init(struct io_uring *ring, unsigned entries)
{
    static const unsigned wanted[] = {IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG, 0};
    int ret = -ENOSYS;
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        struct io_uring_params params = {.flags = wanted[i] | IORING_SETUP_CQSIZE | IORING_SETUP_CLAMP,
                                         .cq_entries = RING_COMPLETIONS};
        ret = io_uring_queue_init_params(entries, ring, &params);
        if (ret != -EINVAL)
            break;
    }
    return ret;
}

int bt_probe_io_uring(void)
{
    static const int needed[] = {IORING_OP_READV, IORING_OP_WRITEV,    IORING_OP_READ,
                                 IORING_OP_WRITE, IORING_OP_FALLOCATE, IORING_OP_FSYNC};
    struct io_uring ring;
    if (ring_init(&ring, 4) < 0)
        return 0;
    struct io_uring_probe *probe = io_uring_get_probe_ring(&ring);
    int usable = probe != NULL;
    for (size_t i = 0; usable && i < sizeof needed / sizeof *needed; i++)
        usable = io_uring_opcode_supported(probe, needed[i]) != 0;
    io_uring_free_probe(probe);
    io_uring_queue_exit(&ring);
    return usable;
}

/* Only there to wake the thread: the next turn of the loop reaps. */
static void ring_ready(struct bt_watch *watch, struct bt_thread *thread, uint32_t events)
{
    (void)watch, (void)thread, (void)events;
}

static int uring_new(struct bt_thread *thread)
{
    struct bt_uring *uring = calloc(1, sizeof *uring);
    if (!uring)
        return -ENOMEM;
    int ret = ring_init(&uring->ring, RING_ENTRIES);
    if (ret < 0) {
        free(uring);
        return ret;
    }
    /* Saves a look-up of the descriptor in each system call; it works without as well. */
    (void)io_uring_register_ring_fd(&uring->ring);
    uring->waiting_tail = &uring->waiting;
    uring->watch = (struct bt_watch){.fd = uring->ring.ring_fd, .ready = ring_ready};
    ret = bt_watch_add(thread, &uring->watch, EPOLLIN);
    if (ret < 0) {
        io_uring_queue_exit(&uring->ring);
        free(uring);
        return ret;
    }
    thread->uring = uring;
    return 0;
}

void bt_uring_free(struct bt_thread *thread)
{
    if (!thread->uring)
        return;
    io_uring_queue_exit(&thread->uring->ring); /* leaves the epoll set by itself */
    free(thread->uring);
    thread->uring = NULL;
}

static void fill_rw(struct io_uring_sqe *sqe, const struct bt_transfer *t)
{
    bool read = t->kind == BT_TRANSFER_READ;
    if (t->iovcnt == 1 && t->iov->iov_len <= INT32_MAX)
        io_uring_prep_rw(read ? IORING_OP_READ : IORING_OP_WRITE, sqe, t->fd, t->iov->iov_base,
                         (unsigned)t->iov->iov_len, t->offset);
    else
        io_uring_prep_rw(read ? IORING_OP_READV : IORING_OP_WRITEV, sqe, t->fd, t->iov, (unsigned)t->iovcnt,
                         t->offset);
    sqe->rw_flags = t->flags;
}

static bool queue_entry(struct bt_uring *uring, struct bt_transfer *t)
{
    struct io_uring_sqe *sqe = io_uring_get_sqe(&uring->ring);
    if (!sqe) {
        (void)io_uring_submit(&uring->ring); /* what it could not take stays queued */
        sqe = io_uring_get_sqe(&uring->ring);
        if (!sqe)
            return false;
    }
    switch ((enum bt_transfer_kind)t->kind) {
    case BT_TRANSFER_READ:
    case BT_TRANSFER_WRITE:
        fill_rw(sqe, t);
        break;
    case BT_TRANSFER_DATASYNC:
        io_uring_prep_fsync(sqe, t->fd, IORING_FSYNC_DATASYNC);
        break;
    case BT_TRANSFER_FALLOCATE:
        io_uring_prep_rw(IORING_OP_FALLOCATE, sqe, t->fd, NULL, (unsigned)t->flags, t->offset);
        sqe->addr = t->length;
        break;
    }
    io_uring_sqe_set_data(sqe, t);
    return true;
}

int bt_uring_start(struct bt_thread *thread, struct bt_transfer *transfer)
{
    int ret = thread->uring ? 0 : uring_new(thread);
    if (ret < 0)
        return ret;
    struct bt_uring *uring = thread->uring;
    if (!uring->waiting && queue_entry(uring, transfer)) {
        if (transfer->disk && io_uring_sq_ready(&uring->ring) >= BT_DISK_BATCH)
            (void)io_uring_submit(&uring->ring);
        return 0;
    }
    transfer->next = NULL;
    *uring->waiting_tail = transfer;
    uring->waiting_tail = &transfer->next;
    return 0;
}

static void queue_waiting(struct bt_uring *uring)
{
    while (uring->waiting) {
        struct bt_transfer *next = uring->waiting->next;
        if (!queue_entry(uring, uring->waiting))
            return;
        uring->waiting = next;
        if (!next)
            uring->waiting_tail = &uring->waiting;
    }
}

/* Entries are given back before the callbacks run, as these may queue and submit more. */
static unsigned reap_batch(struct bt_uring *uring)
{
    struct io_uring_cqe *cqes[REAP_BATCH];
    struct {
        struct bt_transfer *transfer;
        int result;
    } reaped[REAP_BATCH];
    unsigned n = io_uring_peek_batch_cqe(&uring->ring, cqes, REAP_BATCH);
    for (unsigned i = 0; i < n; i++) {
        reaped[i].transfer = io_uring_cqe_get_data(cqes[i]);
        reaped[i].result = cqes[i]->res;
    }
    io_uring_cq_advance(&uring->ring, n);
    for (unsigned i = 0; i < n; i++)
        reaped[i].transfer->done(reaped[i].transfer, reaped[i].result);
    return n;
}

bool bt_uring_turn(struct bt_thread *thread)
{
    struct bt_uring *uring = thread->uring;
    if (!uring)
        return false;
    queue_waiting(uring);
    /* A refusal (EAGAIN, EBUSY, EINTR) leaves the entries queued: bt_uring_ready says so, the loop comes back. */
    if (io_uring_sq_ready(&uring->ring))
        (void)io_uring_submit(&uring->ring);
    bool any = false;
    while (reap_batch(uring) > 0)
        any = true;
    return any;
}

bool bt_uring_ready(struct bt_thread *thread)
{
    struct bt_uring *uring = thread->uring;
    if (!uring)
        return false;
    unsigned flags = __atomic_load_n(uring->ring.sq.kflags, __ATOMIC_RELAXED);
    return io_uring_cq_ready(&uring->ring) || (flags & (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW)) ||
           io_uring_sq_ready(&uring->ring) || uring->waiting;
}
