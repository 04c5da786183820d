/* SPDX-License-Identifier: Apache-2.0 */
/* Cached data here and now: read as far as it is in the cache, written as long as writes are seen not to wait. */
#define _GNU_SOURCE
#include <limits.h>
#include <sys/resource.h>
#include <unistd.h>

#include "file.h"

#define SLOW_NS 200000 /* a cached write that takes longer has waited for something */
#define SLOW_PENALTY_NS 100000000
#define WATCHED_WRITES 8

int64_t file_read_now(struct file *file, const struct iovec *iov, int iovcnt, uint64_t offset)
{
    if (atomic_load_explicit(&file->no_nowait, memory_order_relaxed))
        return -EAGAIN;
    ssize_t n = preadv2(file->fd, iov, iovcnt, (off_t)offset, file->in_memory ? 0 : RWF_NOWAIT);
    if (BT_LIKELY(n >= 0))
        return n;
    if (errno == EOPNOTSUPP) {
        atomic_store(&file->no_nowait, true);
        return -EAGAIN;
    }
    return errno == EINTR ? -EAGAIN : -errno;
}

/* Whether a cached write is made by the thread itself or by the engine. Alone it is several times cheaper here; with
 * many queued the ring can be faster, for more CPU time a request (thread's in-flight list would tell). So: here,
 * until a write shows that writing waits now (dirty pages over the limit, a slow journal). */
static bool write_is_for_now(const struct file *file, const struct bt_thread *thread, uint64_t now)
{
    (void)thread;
    return now >= atomic_load_explicit(&file->slow_until_ns, memory_order_relaxed);
}

static long waits_of_thread(void)
{
    struct rusage usage;
    getrusage(RUSAGE_THREAD, &usage);
    return usage.ru_nvcsw;
}

/* A cached write took long. On a busy machine the thread may just have lost its CPU meanwhile; whether it waited can
 * be told only of a write that was watched, so after a first one the next few are. */
static void write_was_slow(struct file *file, uint64_t now, bool waited)
{
    atomic_store_explicit(&file->watched_writes, WATCHED_WRITES, memory_order_relaxed);
    if (waited)
        atomic_store_explicit(&file->slow_until_ns, now + SLOW_PENALTY_NS, memory_order_relaxed);
}

int64_t file_write_now(struct file *file, struct bt_thread *thread, const struct iovec *iov, int iovcnt,
                       uint64_t offset, uint64_t length)
{
    uint64_t start = bt_now_ns();
    if (!write_is_for_now(file, thread, start))
        return -EAGAIN;
    int watched = atomic_load_explicit(&file->watched_writes, memory_order_relaxed);
    long waits = BT_UNLIKELY(watched > 0) ? waits_of_thread() : 0;
    /* While the engine writes, this write may just wait for the inode's lock: that shows nothing, and taking it for
     * slowness would keep all writes with the engine for ever. */
    bool others = atomic_load_explicit(&file->engine_writes, memory_order_relaxed) != 0;
    ssize_t n = pwritev(file->fd, iov, iovcnt, (off_t)offset);
    if (BT_UNLIKELY(n < 0))
        return errno == EINTR ? -EAGAIN : -errno;
    if (BT_UNLIKELY(watched > 0))
        atomic_store_explicit(&file->watched_writes, watched - 1, memory_order_relaxed);
    uint64_t now = bt_now_ns();
    if (BT_UNLIKELY(now - start > SLOW_NS + length / 2) && !others) /* half a ns a byte: copying is not waiting */
        write_was_slow(file, now, watched > 0 && waits_of_thread() != waits);
    return n;
}

void file_grow(struct file *file, uint64_t end)
{
    uint64_t size = atomic_load_explicit(&file->device.base.size, memory_order_relaxed);
    while (BT_UNLIKELY(size < end) && !file->block)
        if (atomic_compare_exchange_weak(&file->device.base.size, &size, end))
            return;
}

int file_try_inline(struct bt_device *device, struct bt_thread *thread, int op, uint32_t flags, uint64_t offset,
                    const struct iovec *iov, int iovcnt, uint64_t length)
{
    struct file *file = (struct file *)device;
    if (length > FILE_NOW_MAX || iovcnt > IOV_MAX || (op == BT_WRITE && (flags & BT_FUA) && !file->no_flush))
        return -EAGAIN;
    int64_t n = op == BT_READ ? file_read_now(file, iov, iovcnt, offset)
                              : file_write_now(file, thread, iov, iovcnt, offset, length);
    if (n >= 0 && BT_UNLIKELY((uint64_t)n != length)) {
        if (n > 0 || op != BT_READ)
            return -EAGAIN; /* in part: not in the cache, or the file ends there; submit finds out */
        bt_iov_zero(iov, iovcnt, 0, length);
    }
    if (n == -EAGAIN)
        return -EAGAIN;
    bt_count_request(&device->base, thread, op, offset, length);
    if (n < 0) {
        bt_count_failure(&device->base, thread, op, length);
        return (int)n;
    }
    bt_count(&bt_counters_of(&device->base, thread)->inline_done, 1);
    if (op == BT_WRITE)
        file_grow(file, offset + length);
    return 0;
}
