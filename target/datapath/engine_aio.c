/* SPDX-License-Identifier: Apache-2.0 */
/* Linux AIO (aio=native), by its system calls: one context for each I/O thread, made on first use. Transfers are
 * collected and submitted in batches, at the latest at the end of a turn of the loop. The completion ring lies in
 * our memory, so a look at it while polling costs no system call; an eventfd wakes the thread when it sleeps. */
#define _GNU_SOURCE
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "engine.h"

#define AIO_EVENTS 256 /* in flight; more waits in the queue */
#define AIO_BATCH 64
#define AIO_RING_MAGIC 0xa10a10a1u

/* fs/aio.c; the first page of the mapping whose address is the context's id. */
struct aio_ring {
    uint32_t id, nr, head, tail;
    uint32_t magic, compat_features, incompat_features, header_length;
};

struct bt_aio {
    aio_context_t context;
    struct bt_thread *thread;
    struct bt_watch watch;
    struct bt_poller poller;
    struct bt_deferred submit;
    struct bt_transfer *queue, **queue_tail;
    unsigned queued, in_flight;
};

static int context_new(aio_context_t *context, unsigned events)
{
    *context = 0;
    return syscall(SYS_io_setup, events, context) < 0 ? -errno : 0;
}

int bt_aio_probe(void)
{
    aio_context_t context;
    int ret = context_new(&context, 1);
    if (ret == 0)
        syscall(SYS_io_destroy, context);
    return ret;
}

/* Whether a look into the ring shows completions; a ring of an unknown kind always might have some. */
static bool ring_has_events(const struct bt_aio *aio)
{
    const struct aio_ring *ring = (const struct aio_ring *)aio->context;
    if (ring->magic != AIO_RING_MAGIC || ring->incompat_features)
        return true;
    return __atomic_load_n(&ring->head, __ATOMIC_RELAXED) != __atomic_load_n(&ring->tail, __ATOMIC_ACQUIRE);
}

/* ---- submitting ---- */

static void fill_iocb(struct bt_aio *aio, struct bt_transfer *t)
{
    t->iocb = (struct iocb){
        .aio_data = (uintptr_t)t,
        .aio_lio_opcode = t->kind == BT_TRANSFER_READ ? IOCB_CMD_PREADV : IOCB_CMD_PWRITEV,
        .aio_rw_flags = t->flags,
        .aio_fildes = (uint32_t)t->fd,
        .aio_buf = (uintptr_t)t->iov,
        .aio_nbytes = (uint64_t)t->iovcnt,
        .aio_offset = (int64_t)t->offset,
        .aio_flags = IOCB_FLAG_RESFD,
        .aio_resfd = (uint32_t)aio->watch.fd,
    };
}

static struct bt_transfer *dequeue(struct bt_aio *aio)
{
    struct bt_transfer *t = aio->queue;
    aio->queue = t->next;
    if (!aio->queue)
        aio->queue_tail = &aio->queue;
    aio->queued--;
    return t;
}

/* Submits up to a batch of the queue; false when nothing more can be done now. */
static bool submit_batch(struct bt_aio *aio)
{
    struct iocb *iocbs[AIO_BATCH];
    long count = 0;
    struct bt_transfer *t = aio->queue;
    for (; t && count < AIO_BATCH && aio->in_flight + count < AIO_EVENTS; t = t->next)
        iocbs[count++] = &t->iocb;
    if (!count)
        return false;
    long taken = syscall(SYS_io_submit, aio->context, count, iocbs);
    if (taken < 0) {
        int error = errno;
        if (error == EINTR)
            return true;
        if (error == EAGAIN && aio->in_flight)
            return false; /* the next completion tries again */
        t = dequeue(aio); /* the error is that of the first */
        t->done(t, -error);
        return true;
    }
    aio->in_flight += (unsigned)taken;
    for (; taken > 0; taken--)
        dequeue(aio);
    return true;
}

static void submit_queue(struct bt_deferred *deferred, struct bt_thread *thread)
{
    struct bt_aio *aio = BT_CONTAINER(deferred, struct bt_aio, submit);
    (void)thread;
    while (submit_batch(aio))
        ;
}

/* ---- completions ---- */

static bool reap(struct bt_aio *aio)
{
    struct io_event events[AIO_BATCH];
    struct timespec now = {0};
    bool any = false;
    while (aio->in_flight && ring_has_events(aio)) {
        long n = syscall(SYS_io_getevents, aio->context, 0L, (long)AIO_BATCH, events, &now);
        if (n <= 0)
            break; /* EINTR: the eventfd, or the next look, brings us back */
        aio->in_flight -= (unsigned)n;
        for (long i = 0; i < n; i++) {
            struct bt_transfer *t = (struct bt_transfer *)(uintptr_t)events[i].data;
            t->done(t, events[i].res);
        }
        any = true;
    }
    if (any && aio->queue)
        bt_defer(aio->thread, &aio->submit);
    return any;
}

static void eventfd_ready(struct bt_watch *watch, struct bt_thread *thread, uint32_t events)
{
    uint64_t count;
    ssize_t n = read(watch->fd, &count, sizeof count);
    (void)n, (void)events; /* not readable any more is as good */
    reap(thread->aio);
}

static bool poll_ring(struct bt_poller *poller, struct bt_thread *thread)
{
    (void)thread;
    return reap(BT_CONTAINER(poller, struct bt_aio, poller));
}

static bool arm(struct bt_poller *poller, struct bt_thread *thread)
{
    struct bt_aio *aio = BT_CONTAINER(poller, struct bt_aio, poller);
    (void)thread;
    return aio->in_flight && ring_has_events(aio);
}

static void disarm(struct bt_poller *poller, struct bt_thread *thread) { (void)poller, (void)thread; }

bool bt_aio_turn(struct bt_thread *thread) { return thread->aio && reap(thread->aio); }

/* ---- the context ---- */

static int aio_attach(struct bt_thread *thread, struct bt_aio *aio)
{
    aio->watch = (struct bt_watch){.fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), .ready = eventfd_ready};
    if (aio->watch.fd < 0)
        return -errno;
    int ret = bt_watch_add(thread, &aio->watch, EPOLLIN);
    if (ret < 0)
        close(aio->watch.fd);
    return ret;
}

static int aio_new(struct bt_thread *thread)
{
    struct bt_aio *aio = calloc(1, sizeof *aio);
    if (!aio)
        return -ENOMEM;
    aio->thread = thread;
    aio->queue_tail = &aio->queue;
    aio->submit.fn = submit_queue;
    aio->poller = (struct bt_poller){.poll = poll_ring, .arm = arm, .disarm = disarm};
    int ret = context_new(&aio->context, AIO_EVENTS);
    if (ret == 0 && (ret = aio_attach(thread, aio)) < 0)
        syscall(SYS_io_destroy, aio->context);
    if (ret < 0) {
        free(aio);
        return ret;
    }
    bt_poller_add(thread, &aio->poller);
    thread->aio = aio;
    return 0;
}

int bt_aio_start(struct bt_thread *thread, struct bt_transfer *transfer)
{
    int ret = thread->aio ? 0 : aio_new(thread);
    if (ret < 0)
        return ret;
    struct bt_aio *aio = thread->aio;
    fill_iocb(aio, transfer);
    transfer->next = NULL;
    *aio->queue_tail = transfer;
    aio->queue_tail = &transfer->next;
    if (++aio->queued >= BT_DISK_BATCH)
        (void)submit_batch(aio);
    bt_defer(thread, &aio->submit);
    return 0;
}

void bt_aio_free(struct bt_thread *thread)
{
    if (!thread->aio)
        return;
    syscall(SYS_io_destroy, thread->aio->context);
    close(thread->aio->watch.fd);
    free(thread->aio);
    thread->aio = NULL;
}
