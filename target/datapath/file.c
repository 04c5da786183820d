/* SPDX-License-Identifier: Apache-2.0 */
/* The file device: a regular file or a block device. Cached data is read and written here and now as long as that
 * does not wait; the rest goes to an engine (ring, AIO, workers), O_DIRECT always. What the kernel would not take as
 * it is (O_DIRECT, alignment) and what has no asynchronous form goes to the workers: file_blocking.c. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <limits.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "file.h"

#define MAX_ALIGN (64u << 10)

/* ---- spans and alignment ---- */

bool file_is_aligned(const struct file *file, const struct iovec *iov, int iovcnt, uint64_t offset, uint64_t length)
{
    uint64_t bits = (offset | length) & (file->align - 1);
    for (int i = 0; i < iovcnt && !bits; i++)
        bits = ((uintptr_t)iov[i].iov_base & (file->mem_align - 1)) | (iov[i].iov_len & (file->align - 1));
    return !bits;
}

static void span_skip(struct file_span *span, uint64_t n)
{
    span->offset += n;
    span->left -= n;
    while (span->iovcnt && n >= span->iov->iov_len) {
        n -= span->iov->iov_len;
        span->iov++;
        span->iovcnt--;
    }
    if (n) {
        span->iov->iov_base = (char *)span->iov->iov_base + n;
        span->iov->iov_len -= n;
    }
}

int file_span_take(const struct file *file, struct file_span *span, bool write, int64_t result)
{
    if (result < 0)
        return (int)result;
    uint64_t n = bt_min((uint64_t)result, span->left);
    /* Part of a block with O_DIRECT: for a read the file ends there; a write goes on from the block's start. */
    bool part = n < span->left && (n & (file->align - 1));
    if (part && write)
        n = file_round_down(n, file->align);
    span_skip(span, n);
    if (!span->left)
        return 1;
    if (!write && (part || !n)) {
        bt_iov_zero(span->iov, span->iovcnt, 0, span->left);
        return 1;
    }
    return n ? 0 : -EIO;
}

/* ---- the state of an io ---- */

static void work_done(struct bt_work *work);
static void transfer_done(struct bt_transfer *transfer, int64_t result);
static void change_go(struct file_op *op);

static void range_granted(struct bt_range *range) { change_go(BT_CONTAINER(range, struct file_op, range)); }

static struct file_op *op_get(struct file *file, struct bt_io *io)
{
    struct file_op **list = &file->free_ops[io->thread->index];
    struct file_op *op = *list;
    if (op)
        *list = op->next;
    else if (!(op = malloc(sizeof *op)))
        return NULL;
    op->file = file;
    op->io = io;
    op->span = (struct file_span){.iov = io->iov, .iovcnt = io->iovcnt, .offset = io->offset, .left = io->length};
    op->range.held = false;
    op->here = op->counted = op->bounce = op->bounced = op->keep_size = false;
    op->work.thread = io->thread;
    op->work.run = file_run_blocking;
    op->work.done = work_done;
    op->transfer.done = transfer_done;
    op->transfer.fd = file->fd;
    return op;
}

static void op_finish(struct file_op *op, int result)
{
    struct file *file = op->file;
    struct bt_io *io = op->io;
    struct bt_counters *counters = bt_counters_of(&file->device.base, io->thread);
    if (result == 0 && (io->op == BT_WRITE || io->op == BT_ZEROES))
        file_grow(file, io->offset + io->length);
    bt_range_release(&file->ranges, &op->range);
    if (result < 0)
        bt_count_failure(&file->device.base, io->thread, io->op, io->length);
    else
        bt_count(op->here ? &counters->inline_done : &counters->engine_done, 1);
    if (op->bounced)
        bt_count(&counters->bounced, 1);
    if (op->counted)
        atomic_fetch_sub_explicit(&file->engine_writes, 1, memory_order_relaxed);
    op->next = file->free_ops[io->thread->index];
    file->free_ops[io->thread->index] = op;
    bt_io_finish(io, result);
}

static void op_finish_here(struct file_op *op, int result)
{
    op->here = true;
    op_finish(op, result);
}

/* ---- engines ---- */

static void to_workers(struct file_op *op) { bt_pool_submit(op->file->device.base.dp, &op->work); }

static void work_done(struct bt_work *work)
{
    struct file_op *op = BT_CONTAINER(work, struct file_op, work);
    op_finish(op, op->result);
}

static bool is_fua(const struct file_op *op) { return (op->io->flags & BT_FUA) && !op->file->no_flush; }

/* A thread that can have no ring or context (limits of the system) makes do with the workers. */
static void start_transfer(struct file_op *op)
{
    int ret = op->file->engine == BT_ENGINE_IO_URING ? bt_uring_start(op->io->thread, &op->transfer)
                                                     : bt_aio_start(op->io->thread, &op->transfer);
    if (ret < 0)
        to_workers(op);
}

/* What op->span has left, by the engine. */
static void to_engine(struct file_op *op)
{
    bool write = op->io->op == BT_WRITE;
    if (write && !op->file->direct && !op->counted) {
        op->counted = true;
        atomic_fetch_add_explicit(&op->file->engine_writes, 1, memory_order_relaxed);
    }
    if (op->file->engine == BT_ENGINE_THREADS || (write && is_fua(op) && !op->file->direct)) {
        to_workers(op);
        return;
    }
    struct bt_transfer *transfer = &op->transfer;
    transfer->kind = write ? BT_TRANSFER_WRITE : BT_TRANSFER_READ;
    transfer->disk = op->file->direct;
    transfer->flags = write && is_fua(op) ? RWF_DSYNC : 0;
    transfer->iov = op->span.iov;
    transfer->iovcnt = op->span.iovcnt < IOV_MAX ? op->span.iovcnt : IOV_MAX;
    transfer->offset = op->span.offset;
    start_transfer(op);
}

static void data_moved(struct file_op *op, int64_t result)
{
    if (result == -EINTR || result == -EAGAIN) {
        to_workers(op); /* blocking calls need no asking again */
        return;
    }
    if (result == -EINVAL && op->file->direct) {
        op->bounce = true; /* stricter about memory than was known; if it is not that, it fails again */
        to_workers(op);
        return;
    }
    int state = file_span_take(op->file, &op->span, op->io->op == BT_WRITE, result);
    if (state == 0)
        to_engine(op);
    else
        op_finish(op, state < 0 ? state : 0);
}

static void transfer_done(struct bt_transfer *transfer, int64_t result)
{
    struct file_op *op = BT_CONTAINER(transfer, struct file_op, transfer);
    switch (transfer->kind) {
    case BT_TRANSFER_READ:
    case BT_TRANSFER_WRITE:
        data_moved(op, result);
        break;
    case BT_TRANSFER_FALLOCATE: /* the workers know what else to try */
        if (result < 0 && (file_is_unsupported((int)-result) || result == -EINTR || result == -EAGAIN))
            to_workers(op);
        else
            op_finish(op, (int)result);
        break;
    default:
        if (result == -EINTR || result == -EAGAIN)
            to_workers(op);
        else
            op_finish(op, (int)result);
    }
}

/* ---- operations ---- */

static void start_read(struct file_op *op)
{
    struct file *file = op->file;
    struct file_span *span = &op->span;
    if (file->direct) {
        op->bounce = !file_is_aligned(file, span->iov, span->iovcnt, span->offset, span->left);
        if (op->bounce)
            to_workers(op);
        else
            to_engine(op);
        return;
    }
    /* The ring looks into the cache by itself. */
    bool now = file->in_memory || file->engine != BT_ENGINE_IO_URING;
    while (now && span->left <= FILE_NOW_MAX && span->iovcnt <= IOV_MAX) {
        int64_t n = file_read_now(file, span->iov, span->iovcnt, span->offset);
        if (n == -EAGAIN)
            break;
        int state = file_span_take(file, span, false, n);
        if (state) {
            op_finish_here(op, state < 0 ? state : 0);
            return;
        }
    }
    to_engine(op);
}

static void start_write(struct file_op *op)
{
    struct file *file = op->file;
    struct file_span *span = &op->span;
    if (op->bounce) {
        to_workers(op);
        return;
    }
    while (!file->direct && !is_fua(op) && span->left <= FILE_NOW_MAX && span->iovcnt <= IOV_MAX) {
        int64_t n = file_write_now(file, op->io->thread, span->iov, span->iovcnt, span->offset, span->left);
        if (n == -EAGAIN)
            break;
        int state = file_span_take(file, span, true, n);
        if (state) {
            op_finish_here(op, state < 0 ? state : 0);
            return;
        }
    }
    to_engine(op);
}

/* The first thing to try, if it is one call that can be all: by the ring. */
static bool start_fallocate(struct file_op *op)
{
    struct file *file = op->file;
    bool zeroes = op->io->op == BT_ZEROES, unmap = !zeroes || (op->io->flags & BT_UNMAP);
    uint64_t end = op->io->offset + op->io->length;
    if (file->engine != BT_ENGINE_IO_URING || file->block || is_fua(op) ||
        atomic_load(unmap ? &file->no_punch : &file->no_zero_range) ||
        (zeroes && unmap && end > atomic_load(&file->device.base.size)))
        return false;
    op->transfer.kind = BT_TRANSFER_FALLOCATE;
    op->transfer.disk = false;
    op->transfer.flags = unmap ? FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE : FALLOC_FL_ZERO_RANGE;
    op->transfer.offset = op->io->offset;
    op->transfer.length = op->io->length;
    start_transfer(op);
    return true;
}

/* A change whose range, if it needs one, is held. */
static void change_go(struct file_op *op)
{
    if (op->io->op == BT_WRITE)
        start_write(op);
    else if (!start_fallocate(op))
        to_workers(op);
}

static void start_change(struct file_op *op)
{
    struct file *file = op->file;
    struct bt_io *io = op->io;
    if (file->align > 1) {
        uint64_t end = io->offset + io->length, block_end = file_round_up(end, file->align);
        struct bt_range *range = &op->range;
        range->exclusive = ((io->offset | io->length) & (file->align - 1)) != 0;
        op->keep_size = !file->block && end != block_end && block_end > atomic_load(&file->device.base.size);
        range->start = file_round_down(io->offset, file->align);
        range->end = op->keep_size ? UINT64_MAX : block_end;
        range->thread = io->thread;
        range->granted = range_granted;
        op->bounce = !file_is_aligned(file, io->iov, io->op == BT_WRITE ? io->iovcnt : 0, io->offset, io->length);
        if (!bt_range_acquire(&file->ranges, range))
            return;
    }
    change_go(op);
}

static void start_flush(struct file_op *op)
{
    struct file *file = op->file;
    int error = atomic_load(&file->syncs.error);
    if (file->no_flush || error) {
        op_finish_here(op, file->no_flush ? 0 : -error);
        return;
    }
    if (file->engine != BT_ENGINE_IO_URING || !file->direct) {
        to_workers(op);
        return;
    }
    op->transfer.kind = BT_TRANSFER_DATASYNC;
    op->transfer.disk = false;
    start_transfer(op);
}

static void submit(struct bt_io *io)
{
    struct file *file = (struct file *)io->device;
    bool beyond = io->offset > INT64_MAX || io->length > INT64_MAX - io->offset;
    struct file_op *op = op_get(file, io);
    bt_count_request(&file->device.base, io->thread, io->op, io->offset, io->length);
    if (!op)
        bt_io_finish(io, -ENOMEM);
    else if (beyond)
        op_finish_here(op, -EFBIG);
    else if (io->op == BT_FLUSH)
        start_flush(op);
    else if (!io->length || (io->op == BT_CACHE && (file->direct || file->in_memory)))
        op_finish_here(op, 0);
    else if (io->op == BT_READ)
        start_read(op);
    else if (io->op == BT_WRITE || io->op == BT_ZEROES || io->op == BT_DISCARD)
        start_change(op);
    else
        to_workers(op);
}

/* ---- the object ---- */

static void destroy(struct bt_object *object)
{
    struct file *file = (struct file *)object;
    close(file->fd);
    for (int i = 0; i < BT_MAX_THREADS; i++)
        while (file->free_ops[i]) {
            struct file_op *op = file->free_ops[i];
            file->free_ops[i] = op->next;
            free(op);
        }
    while (file->bounces_kept)
        free(file->bounces[--file->bounces_kept]);
    pthread_mutex_destroy(&file->bounce_lock);
    pthread_cond_destroy(&file->syncs.finish);
    pthread_mutex_destroy(&file->syncs.lock);
    bt_ranges_destroy(&file->ranges);
    free(file);
}

static const struct bt_device_ops cached_ops = {.submit = submit, .try_inline = file_try_inline};
static const struct bt_device_ops direct_ops = {.submit = submit};
static const struct bt_object_ops object_ops = {.destroy = destroy};

static int check_options(uint32_t flags, int engine, uint32_t align, uint32_t mem_align)
{
    bool direct = flags & BT_FILE_DIRECT;
    if ((flags & ~(uint32_t)(BT_FILE_DIRECT | BT_FILE_NO_FLUSH | BT_FILE_BLOCK)) || !align || !mem_align ||
        (align & (align - 1)) || (mem_align & (mem_align - 1)) || align > MAX_ALIGN || mem_align > MAX_ALIGN ||
        (!direct && align != 1))
        return -EINVAL;
    switch (engine) {
    case BT_ENGINE_THREADS:
        return 0;
    case BT_ENGINE_NATIVE:
        return direct ? bt_aio_probe() : -EINVAL;
    case BT_ENGINE_IO_URING:
        return bt_probe_io_uring() ? 0 : -ENOSYS;
    default:
        return -EINVAL;
    }
}

/* The descriptor, and what is to be known about what lies behind it. */
static int open_descriptor(struct file *file, int fd)
{
    struct statfs fs;
    int sector = 512;
    file->fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    if (file->fd < 0)
        return -errno;
    if (fstatfs(file->fd, &fs) < 0 || (file->block && ioctl(file->fd, BLKSSZGET, &sector) < 0)) {
        int error = errno;
        close(file->fd);
        return -error;
    }
    file->in_memory = !file->block && (fs.f_type == TMPFS_MAGIC || fs.f_type == RAMFS_MAGIC);
    file->sector = (uint32_t)sector;
    return 0;
}

bt_object *bt_file_new(bt_datapath *dp, uint64_t tag, int fd, uint64_t size, uint32_t flags, int engine,
                       uint32_t align, uint32_t mem_align)
{
    struct file *file = NULL;
    int ret = check_options(flags, engine, align, mem_align);
    if (ret == 0 && !(file = calloc(1, sizeof *file)))
        ret = -ENOMEM;
    if (ret == 0) {
        file->direct = flags & BT_FILE_DIRECT;
        file->no_flush = flags & BT_FILE_NO_FLUSH;
        file->block = flags & BT_FILE_BLOCK;
        ret = open_descriptor(file, fd);
    }
    if (ret < 0) {
        free(file);
        errno = -ret;
        return NULL;
    }
    file->engine = engine;
    file->align = align;
    file->mem_align = mem_align;
    bt_ranges_init(&file->ranges);
    pthread_mutex_init(&file->bounce_lock, NULL);
    pthread_mutex_init(&file->syncs.lock, NULL);
    pthread_cond_init(&file->syncs.finish, NULL);
    bt_device_init(&file->device, dp, file->direct ? &direct_ops : &cached_ops, &object_ops, tag, size);
    return &file->device.base;
}
