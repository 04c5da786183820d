/* SPDX-License-Identifier: Apache-2.0 */
/* The file device's work that blocks, on worker threads: reads and writes through bounce buffers, zeroes, discards,
 * syncs, and where the file has holes. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <limits.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "file.h"

#define ZERO_PIECE (64u << 10)
#define ZERO_PIECES 16

static const _Alignas(4096) unsigned char zero_piece[ZERO_PIECE];

bool file_is_unsupported(int error)
{
    return error == EOPNOTSUPP || error == ENOSYS || error == ENOTTY || error == ENODEV;
}

static int fdatasync_retried(int fd)
{
    while (fdatasync(fd) < 0)
        if (errno != EINTR)
            return -errno;
    return 0;
}

/* The kernel reports a failed write-back to one sync and then calls the pages clean. So cached data has one sync at
 * a time, whose failure stays with the file; those who ask while one runs share the next. */
static int sync_cached(struct file *file)
{
    struct file_syncs *syncs = &file->syncs;
    pthread_mutex_lock(&syncs->lock);
    for (uint64_t wanted = syncs->started + 1; syncs->finished < wanted;) {
        if (syncs->started != syncs->finished) {
            pthread_cond_wait(&syncs->finish, &syncs->lock);
            continue;
        }
        syncs->started++;
        pthread_mutex_unlock(&syncs->lock);
        int ret = fdatasync_retried(file->fd);
        pthread_mutex_lock(&syncs->lock);
        if (ret < 0 && !atomic_load(&syncs->error))
            atomic_store(&syncs->error, -ret);
        syncs->finished = syncs->started;
        pthread_cond_broadcast(&syncs->finish);
    }
    pthread_mutex_unlock(&syncs->lock);
    return -atomic_load(&syncs->error);
}

static int sync_data(struct file *file) { return file->direct ? fdatasync_retried(file->fd) : sync_cached(file); }

/* ---- reads and writes ---- */

static int run_span(const struct file *file, struct file_span *span, bool write, int rw_flags)
{
    for (int state = 0; !state;) {
        int count = span->iovcnt < IOV_MAX ? span->iovcnt : IOV_MAX;
        ssize_t n = write ? pwritev2(file->fd, span->iov, count, (off_t)span->offset, rw_flags)
                          : preadv(file->fd, span->iov, count, (off_t)span->offset);
        if (n < 0 && errno == EINTR)
            continue;
        state = file_span_take(file, span, write, n < 0 ? -errno : n);
        if (state < 0)
            return state;
    }
    return 0;
}

/* One run of whole blocks from or to aligned memory. */
static int run_blocks(const struct file *file, void *buffer, uint64_t offset, uint64_t length, bool write,
                      int rw_flags)
{
    struct iovec iov = {.iov_base = buffer, .iov_len = length};
    struct file_span span = {.iov = &iov, .iovcnt = 1, .offset = offset, .left = length};
    return run_span(file, &span, write, rw_flags);
}

static void *bounce_get(struct file *file)
{
    void *buffer = NULL;
    pthread_mutex_lock(&file->bounce_lock);
    if (file->bounces_kept)
        buffer = file->bounces[--file->bounces_kept];
    pthread_mutex_unlock(&file->bounce_lock);
    if (!buffer && posix_memalign(&buffer, bt_max(4096, bt_max(file->align, file->mem_align)), FILE_BOUNCE_SIZE))
        return NULL;
    return buffer;
}

static void bounce_put(struct file *file, void *buffer)
{
    pthread_mutex_lock(&file->bounce_lock);
    if (file->bounces_kept < FILE_BOUNCES_KEPT) {
        file->bounces[file->bounces_kept++] = buffer;
        buffer = NULL;
    }
    pthread_mutex_unlock(&file->bounce_lock);
    free(buffer);
}

/* The blocks [start, end) that the part [from, to) of the request lies in. */
struct piece {
    uint64_t start, end, from, to;
};

static struct piece next_piece(const struct file *file, uint64_t pos, uint64_t request_end)
{
    struct piece piece = {.start = file_round_down(pos, file->align), .from = pos};
    piece.end = bt_min(file_round_up(request_end, file->align), piece.start + FILE_BOUNCE_SIZE);
    piece.to = bt_min(request_end, piece.end);
    return piece;
}

/* Reads the blocks that the piece covers only in part. */
static int read_edges(const struct file *file, unsigned char *buffer, const struct piece *piece)
{
    uint64_t last = piece->end - file->align;
    bool head = piece->from != piece->start, tail = piece->to != piece->end;
    int ret = 0;
    if (head || (tail && last == piece->start))
        ret = run_blocks(file, buffer, piece->start, file->align, false, 0);
    if (ret == 0 && tail && last != piece->start)
        ret = run_blocks(file, buffer + (last - piece->start), last, file->align, false, 0);
    return ret;
}

static int bounce_pieces(const struct file *file, unsigned char *buffer, const struct iovec *iov, int iovcnt,
                         uint64_t offset, uint64_t length, bool write, int rw_flags)
{
    for (uint64_t pos = offset, end = offset + length; pos < end;) {
        struct piece piece = next_piece(file, pos, end);
        unsigned char *part = buffer + (piece.from - piece.start);
        int ret = 0;
        if (write) {
            ret = read_edges(file, buffer, &piece);
            bt_iov_to_buffer(iov, iovcnt, pos - offset, part, piece.to - piece.from);
        }
        if (ret == 0)
            ret = run_blocks(file, buffer, piece.start, piece.end - piece.start, write, rw_flags);
        if (ret < 0)
            return ret;
        if (!write)
            bt_iov_from_buffer(iov, iovcnt, pos - offset, part, piece.to - piece.from);
        pos = piece.to;
    }
    return 0;
}

/* Whole blocks were written up to end's: cuts off what lies past both the old end of the file and end. Nothing else
 * extends the file meanwhile: the range held reaches to infinity. */
static int cut_padding(const struct file *file, off_t old_size, uint64_t end)
{
    off_t size = (off_t)bt_max((uint64_t)old_size, end);
    if ((uint64_t)size >= file_round_up(end, file->align))
        return 0;
    return ftruncate(file->fd, size) < 0 ? -errno : 0;
}

static int bounce(struct file *file, const struct iovec *iov, int iovcnt, uint64_t offset, uint64_t length,
                  bool write, int rw_flags, bool keep_size)
{
    struct stat st = {0};
    if (keep_size && fstat(file->fd, &st) < 0)
        return -errno;
    unsigned char *buffer = bounce_get(file);
    if (!buffer)
        return -ENOMEM;
    int ret = bounce_pieces(file, buffer, iov, iovcnt, offset, length, write, rw_flags);
    bounce_put(file, buffer);
    if (keep_size) {
        int cut = cut_padding(file, st.st_size, offset + length);
        ret = ret < 0 ? ret : cut;
    }
    return ret;
}

static int read_data(struct file_op *op)
{
    struct file_span *span = &op->span;
    if (!op->bounce)
        return run_span(op->file, span, false, 0);
    op->bounced = true;
    return bounce(op->file, span->iov, span->iovcnt, span->offset, span->left, false, 0, false);
}

/* With cached data the sync is a call of its own, so that an error of the write alone (ENOSPC) is told apart from
 * one that means that data is lost. */
static int write_data(struct file_op *op)
{
    struct file *file = op->file;
    struct file_span *span = &op->span;
    bool fua = (op->io->flags & BT_FUA) && !file->no_flush;
    int rw_flags = fua && file->direct ? RWF_DSYNC : 0;
    int ret;
    if (op->bounce) {
        op->bounced = true;
        ret = bounce(file, span->iov, span->iovcnt, span->offset, span->left, true, rw_flags, op->keep_size);
    } else {
        ret = run_span(file, span, true, rw_flags);
    }
    return ret == 0 && fua && !file->direct ? sync_data(file) : ret;
}

/* ---- zeroes ---- */

static int write_zeroes(struct file_op *op, uint64_t offset, uint64_t end)
{
    struct file *file = op->file;
    while (offset < end) {
        /* After an unaligned start go on with whole blocks. */
        uint64_t length = bt_min(end - offset, file_round_up(offset + 1, ZERO_PIECE) - offset);
        struct iovec iov[ZERO_PIECES];
        int count = 0;
        uint64_t total = 0;
        for (; length && count < ZERO_PIECES; length = bt_min(end - offset - total, ZERO_PIECE)) {
            iov[count++] = (struct iovec){.iov_base = (void *)(uintptr_t)zero_piece, .iov_len = length};
            total += length;
        }
        struct file_span span = {.iov = iov, .iovcnt = count, .offset = offset, .left = total};
        bool aligned = file_is_aligned(file, iov, count, offset, total);
        int ret = aligned ? run_span(file, &span, true, 0)
                          : bounce(file, iov, count, offset, total, true, 0, op->keep_size && offset + total == end);
        if (ret < 0)
            return ret;
        offset += total;
    }
    return 0;
}

/* 0, -ENOTSUP when the file does not know this mode, or another -errno. */
static int allocate(const struct file *file, int mode, uint64_t offset, uint64_t length)
{
    while (fallocate(file->fd, mode, (off_t)offset, (off_t)length) < 0)
        if (errno != EINTR)
            return file_is_unsupported(errno) ? -ENOTSUP : -errno;
    return 0;
}

/* Makes the file at least end long. ftruncate could cut off what another thread has appended meanwhile; allocating
 * the last byte cannot. */
static int extend(const struct file *file, uint64_t end)
{
    struct stat st;
    if (fstat(file->fd, &st) < 0)
        return -errno;
    return (uint64_t)st.st_size >= end ? 0 : allocate(file, 0, end - 1, 1);
}

static int punch(struct file *file, uint64_t offset, uint64_t length)
{
    if (atomic_load(&file->no_punch))
        return -ENOTSUP;
    int ret = allocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length);
    if (ret == -ENOTSUP)
        atomic_store(&file->no_punch, true);
    return ret;
}

static int zero_range(struct file *file, uint64_t offset, uint64_t length)
{
    if (atomic_load(&file->no_zero_range))
        return -ENOTSUP;
    int ret = allocate(file, FALLOC_FL_ZERO_RANGE, offset, length);
    if (ret == -ENOTSUP)
        atomic_store(&file->no_zero_range, true);
    return ret;
}

static int zero_file(struct file_op *op)
{
    struct file *file = op->file;
    uint64_t offset = op->io->offset, length = op->io->length;
    int ret = -ENOTSUP;
    if (op->io->flags & BT_UNMAP) {
        ret = atomic_load(&file->no_punch) ? -ENOTSUP : extend(file, offset + length);
        if (ret == 0)
            ret = punch(file, offset, length);
    }
    if (ret == -ENOTSUP)
        ret = zero_range(file, offset, length);
    if (ret == -ENOTSUP) { /* tmpfs: drop the old content, then allocate afresh, which extends as well */
        ret = punch(file, offset, length);
        if (ret == 0)
            ret = allocate(file, 0, offset, length);
    }
    if (ret == -ENOTSUP && !(op->io->flags & BT_FAST_ZERO))
        ret = write_zeroes(op, offset, offset + length);
    return ret;
}

/* BLKDISCARD promises nothing about what is read afterwards; a hole punched in a block device does, or fails.
 * BLKZEROOUT may end up writing, so it is never fast. */
static int zero_whole_sectors(struct file *file, uint32_t flags, uint64_t offset, uint64_t length)
{
    int ret = flags & BT_UNMAP ? punch(file, offset, length) : -ENOTSUP;
    if (ret != -ENOTSUP || (flags & BT_FAST_ZERO))
        return ret;
    uint64_t range[2] = {offset, length};
    if (ioctl(file->fd, BLKZEROOUT, range) == 0)
        return 0;
    return file_is_unsupported(errno) ? -ENOTSUP : -errno;
}

static int zero_block_device(struct file_op *op)
{
    struct file *file = op->file;
    uint64_t offset = op->io->offset, end = offset + op->io->length;
    uint64_t first = file_round_up(offset, file->sector), last = file_round_down(end, file->sector);
    if (first >= last)
        return op->io->flags & BT_FAST_ZERO ? -ENOTSUP : write_zeroes(op, offset, end);
    int ret = zero_whole_sectors(file, op->io->flags, first, last - first);
    if (ret == -ENOTSUP && !(op->io->flags & BT_FAST_ZERO))
        return write_zeroes(op, offset, end);
    if (ret == 0)
        ret = write_zeroes(op, offset, first);
    return ret == 0 ? write_zeroes(op, last, end) : ret;
}

static int zeroes(struct file_op *op)
{
    struct file *file = op->file;
    int ret = file->block ? zero_block_device(op) : zero_file(op);
    return ret == 0 && (op->io->flags & BT_FUA) && !file->no_flush ? sync_data(file) : ret;
}

/* ---- the rest ---- */

/* A hint: where it is unknown, or a part of a sector, nothing is done. */
static int discard(struct file_op *op)
{
    struct file *file = op->file;
    uint64_t offset = op->io->offset, length = op->io->length;
    int ret;
    if (file->block) {
        uint64_t first = file_round_up(offset, file->sector);
        uint64_t last = file_round_down(offset + length, file->sector);
        uint64_t range[2] = {first, last - first};
        ret = first >= last || ioctl(file->fd, BLKDISCARD, range) == 0 ? 0 : -errno;
    } else {
        ret = punch(file, offset, length);
    }
    if (ret < 0 && (ret == -ENOTSUP || file_is_unsupported(-ret)))
        ret = 0;
    return ret == 0 && (op->io->flags & BT_FUA) && !file->no_flush ? sync_data(file) : ret;
}

/* Runs end at block boundaries, holes rounded to be smaller. Whatever is not known counts as data. */
static int status(struct file_op *op)
{
    struct bt_io *io = op->io;
    const struct file *file = op->file;
    uint64_t offset = io->offset, run = io->length;
    bool hole = false;
    off_t data = lseek(file->fd, (off_t)offset, SEEK_DATA);
    if (data < 0) {
        hole = errno == ENXIO; /* no data from here to the end */
    } else if (file_round_down((uint64_t)data, file->align) > offset) {
        hole = true;
        run = file_round_down((uint64_t)data, file->align) - offset;
    } else {
        off_t end = lseek(file->fd, data, SEEK_HOLE);
        if (end > data && file_round_up((uint64_t)end, file->align) > offset)
            run = file_round_up((uint64_t)end, file->align) - offset;
    }
    io->status_length = bt_min(run, io->length);
    io->status_flags = hole ? BT_EXTENT_HOLE | BT_EXTENT_ZERO : 0;
    return 0;
}

void file_run_blocking(struct bt_work *work)
{
    struct file_op *op = BT_CONTAINER(work, struct file_op, work);
    switch (op->io->op) {
    case BT_READ:
        op->result = read_data(op);
        break;
    case BT_WRITE:
        op->result = write_data(op);
        break;
    case BT_ZEROES:
        op->result = zeroes(op);
        break;
    case BT_DISCARD:
        op->result = discard(op);
        break;
    case BT_FLUSH:
        op->result = sync_data(op->file);
        break;
    case BT_STATUS:
        op->result = status(op);
        break;
    case BT_CACHE: /* advice: whether it is taken changes nothing for the requester */
        posix_fadvise(op->file->fd, (off_t)op->io->offset, (off_t)op->io->length, POSIX_FADV_WILLNEED);
        op->result = 0;
        break;
    }
}
