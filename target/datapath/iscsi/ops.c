/* SPDX-License-Identifier: Apache-2.0 */
/* What the parts of an io are as SCSI commands, and what their answers mean for it. */
#include "ops.h"

#define MAX_SAME_BYTES (1u << 30)
#define ZEROS_BYTES (1u << 20) /* written as data at a time */
#define STATUS_DESCRIPTORS 3
#define COPY_LIST 108 /* header, two CSCD descriptors, a segment descriptor */

static const unsigned char zeros[BT_ISCSI_MAX_BLOCK];

static void part_done(struct command *command, int result)
{
    struct bt_io *io = command->io;
    command_free(command);
    io_part_over(io, result);
}

/* ---- CDBs: SBC-3 5 ---- */

static void set_cdb(struct command *command, int code10, int code16, int flags, uint64_t lba, uint32_t blocks)
{
    unsigned char *cdb = command->cdb;
    cdb[1] = (unsigned char)flags;
    if (lba + blocks <= UINT32_MAX && blocks <= UINT16_MAX && code10) {
        cdb[0] = (unsigned char)code10;
        put32(cdb + 2, (uint32_t)lba);
        put16(cdb + 7, (uint16_t)blocks);
        command->cdb_length = 10;
    } else {
        cdb[0] = (unsigned char)code16;
        put64(cdb + 2, lba);
        put32(cdb + 10, blocks);
        command->cdb_length = 16;
    }
}

/* A command for the io from pos on, over at most `most` bytes. NULL: the io has been told. */
static struct command *new_part(struct bt_io *io, uint64_t most, void (*done)(struct command *, int))
{
    struct io_state *state = state_of(io);
    struct command *command = command_new(session_of(io), done);
    state->pending++;
    if (!command) {
        io_part_over(io, -ENOMEM);
        return NULL;
    }
    command->io = io;
    command->at = state->pos;
    command->span = bt_min(most, state->end - state->pos);
    state->pos += command->span;
    return command;
}

/* Starts it, or ends it when its data could not be described. */
static void start_part(struct command *command, int ret)
{
    if (ret < 0)
        command_fail(command, ret);
    else
        command_start(command);
}

static uint64_t lba_of(const struct command *command)
{
    return (command->io->offset + command->at) / node_of(command->io)->lun.block_size;
}

static uint32_t blocks_of(const struct command *command)
{
    return (uint32_t)(command->span / node_of(command->io)->lun.block_size);
}

/* ---- READ, WRITE ---- */

static void data_moved(struct command *command, int result)
{
    struct bt_io *io = command->io;
    if (result == 0 && !command_is_whole(command))
        result = -EIO;
    if (result == 0 && command->bounce && io->op == BT_READ)
        node_of(io)->api->iov_from_buffer(io->iov, io->iovcnt, command->at, command->bounce, command->length);
    part_done(command, result);
}

static void start_transfer(struct bt_io *io)
{
    struct node *node = node_of(io);
    bool write = io->op == BT_WRITE, fua = write && (io->flags & BT_FUA) && node_has(node, BT_ISCSI_DPOFUA);
    struct command *command = new_part(io, node->max_transfer, data_moved);
    if (!command)
        return;
    set_cdb(command, write ? WRITE_10 : READ_10, write ? WRITE_16 : READ_16, fua && !node->no_flush ? 0x08 : 0,
            lba_of(command), blocks_of(command));
    start_part(command, command_vector(command, write ? SCSI_XFER_WRITE : SCSI_XFER_READ, io, command->at,
                                       (uint32_t)command->span));
}

/* ---- ZEROES: WRITE SAME, or zeros as data ---- */

static bool is_not_known(int result) { return result == -EINVAL; }

bool ops_may_unmap(const struct node *node)
{
    return node_has(node, BT_ISCSI_SAME_UNMAP | BT_ISCSI_SAME10_UNMAP) && !node->no_write_same_unmap;
}

static void same_done(struct command *command, int result)
{
    struct bt_io *io = command->io;
    struct node *node = node_of(io);
    if (is_not_known(result)) { /* once more, in another way */
        if (command->cdb[1] & 0x08)
            node->no_write_same_unmap = true;
        else
            node->no_write_same = true;
        state_of(io)->pos = command->at;
        result = io->flags & BT_FAST_ZERO ? -EOPNOTSUPP : 0;
    }
    part_done(command, result);
}

static void start_same(struct bt_io *io, bool unmap)
{
    struct node *node = node_of(io);
    uint32_t block = node->lun.block_size;
    uint64_t most = node->lun.max_write_same ? node->lun.max_write_same : UINT32_MAX;
    most = bt_min(bt_min(most, UINT32_MAX) * block, MAX_SAME_BYTES);
    bool only10 = unmap && !node_has(node, BT_ISCSI_SAME_UNMAP);
    if (only10)
        most = bt_min(most, (uint64_t)UINT16_MAX * block);
    struct command *command = new_part(io, most, same_done);
    if (!command)
        return;
    int flags = unmap ? 0x08 : 0;
    set_cdb(command, only10 ? WRITE_SAME_10 : 0, WRITE_SAME_16, flags, lba_of(command), blocks_of(command));
    command_data(command, SCSI_XFER_WRITE, (void *)(uintptr_t)zeros, block);
    command_start(command);
}

static int zero_vector(struct command *command)
{
    uint64_t count = (command->span + sizeof zeros - 1) / sizeof zeros, left = command->span;
    command->direction = SCSI_XFER_WRITE;
    command->length = (uint32_t)command->span;
    command->iov = command->iov_allocated = malloc(count * sizeof *command->iov);
    if (!command->iov)
        return -ENOMEM;
    command->iovcnt = (int)count;
    for (uint64_t i = 0; i < count; i++, left -= bt_min(left, sizeof zeros))
        command->iov[i] = (struct iovec){(void *)(uintptr_t)zeros, bt_min(left, sizeof zeros)};
    return 0;
}

static void start_zeros_as_data(struct bt_io *io)
{
    struct node *node = node_of(io);
    struct command *command = new_part(io, bt_min(node->max_transfer, ZEROS_BYTES), part_done);
    if (!command)
        return;
    set_cdb(command, WRITE_10, WRITE_16, 0, lba_of(command), blocks_of(command));
    start_part(command, zero_vector(command));
}

static void start_zeroes(struct bt_io *io)
{
    struct node *node = node_of(io);
    bool unmap = (io->flags & BT_UNMAP) && ops_may_unmap(node);
    if (!node->no_write_same && (unmap || !(io->flags & BT_FAST_ZERO)))
        start_same(io, unmap);
    else
        start_zeros_as_data(io);
}

/* ---- DISCARD ---- */

/* It is a hint, and a LUN may be particular about alignment. */
static void unmap_done(struct command *command, int result)
{
    int status = command->task.status;
    if (is_not_known(result) && command->task.sense.ascq == SCSI_SENSE_ASCQ_INVALID_OPERATION_CODE)
        node_of(command->io)->no_unmap = true;
    part_done(command, status == SCSI_STATUS_CHECK_CONDITION && result != -EROFS && result != -ENOSPC ? 0 : result);
}

/* SBC-3 5.28 */
static void start_unmap(struct bt_io *io)
{
    struct node *node = node_of(io);
    uint64_t most = node->lun.max_unmap ? node->lun.max_unmap : UINT32_MAX;
    struct command *command = new_part(io, most * node->lun.block_size, unmap_done);
    if (!command)
        return;
    unsigned char *list = command->buffer;
    memset(list, 0, 24);
    put16(list, 22);
    put16(list + 2, 16);
    put64(list + 8, lba_of(command));
    put32(list + 16, blocks_of(command));
    command->cdb[0] = UNMAP;
    put16(command->cdb + 7, 24);
    command->cdb_length = 10;
    command_data(command, SCSI_XFER_WRITE, list, 24);
    command_start(command);
}

/* ---- FLUSH ---- */

static void flushed(struct command *command, int result)
{
    if (is_not_known(result) && command->task.sense.ascq == SCSI_SENSE_ASCQ_INVALID_OPERATION_CODE) {
        node_of(command->io)->no_sync = true; /* no cache to write back */
        result = 0;
    }
    part_done(command, result);
}

void ops_start_flush(struct bt_io *io)
{
    struct command *command = new_part(io, 0, flushed);
    if (!command)
        return;
    set_cdb(command, SYNCHRONIZE_CACHE_10, SYNCHRONIZE_CACHE_16, 0, 0, 0);
    command_start(command);
}

/* ---- STATUS: GET LBA STATUS (SBC-3 5.4) ---- */

static uint32_t extent_flags(const struct node *node, const unsigned char *descriptor)
{
    int provisioning = descriptor[12] & 0x0f;
    if (provisioning != 1 && provisioning != 2) /* mapped, or not said */
        return 0;
    return BT_EXTENT_HOLE | (node_has(node, BT_ISCSI_READS_ZEROS) ? BT_EXTENT_ZERO : 0);
}

/* The first run, of descriptors that follow each other. False when they do not begin where they were asked to. */
static bool take_run(struct command *command)
{
    struct bt_io *io = command->io;
    struct node *node = node_of(io);
    const unsigned char *data = command->buffer;
    uint32_t end = (uint32_t)bt_min(command->received, (uint64_t)get32(data) + 4);
    uint64_t lba = lba_of(command), blocks = 0;
    for (uint32_t at = 8; at + 16 <= end; at += 16) {
        uint32_t flags = extent_flags(node, data + at), count = get32(data + at + 8);
        if (get64(data + at) != lba + blocks || !count || (blocks && flags != io->status_flags))
            break;
        io->status_flags = flags;
        blocks += count;
    }
    io->status_length = bt_min(blocks * node->lun.block_size, io->length);
    return blocks != 0;
}

static void status_done(struct command *command, int result)
{
    struct bt_io *io = command->io;
    if (result == 0 && !take_run(command))
        result = -EIO;
    if (is_not_known(result)) {
        node_of(io)->no_status = true;
        result = 0;
    }
    part_done(command, result);
}

static void start_status(struct bt_io *io)
{
    const uint32_t length = 8 + 16 * STATUS_DESCRIPTORS;
    struct command *command = new_part(io, UINT64_MAX, status_done);
    if (!command)
        return;
    memset(command->buffer, 0, sizeof command->buffer);
    command->cdb[0] = SERVICE_ACTION_IN_16;
    command->cdb[1] = SA_GET_LBA_STATUS;
    put64(command->cdb + 2, lba_of(command));
    put32(command->cdb + 10, length);
    command->cdb_length = 16;
    command_data(command, SCSI_XFER_READ, command->buffer, length);
    command_start(command);
}

/* ---- copying: EXTENDED COPY (SPC-4 6.4) ---- */

bool ops_can_copy(struct bt_device *destination, struct bt_device *source)
{
    struct node *to = (struct node *)destination, *from = (struct node *)source;
    return source->ops == &iscsi_device_ops && to->api == from->api && !strcmp(to->place, from->place) &&
           to->lun.block_size == from->lun.block_size && node_has(to, BT_ISCSI_COPY) && !to->no_copy &&
           to->lun.designator[3] && from->lun.designator[3];
}

/* Identification descriptor CSCD, SPC-4 6.4.6.1. */
static void put_cscd(unsigned char *out, const struct node *node)
{
    out[0] = 0xe4;
    memcpy(out + 4, node->lun.designator, sizeof node->lun.designator);
    put32(out + 28, node->lun.block_size);
}

static void copied(struct command *command, int result)
{
    struct node *node = node_of(command->io);
    if (is_not_known(result))
        node->no_copy = true;
    if (result == 0)
        atomic_fetch_add_explicit(&node->copied, command->span, memory_order_relaxed);
    part_done(command, result);
}

static void start_copy(struct bt_io *io)
{
    struct node *node = node_of(io), *source = io->bounce;
    uint64_t most = bt_min(UINT16_MAX, (node->lun.max_copy ? node->lun.max_copy : UINT32_MAX) / node->lun.block_size);
    struct command *command = new_part(io, most * node->lun.block_size, copied);
    if (!command)
        return;
    unsigned char *list = command->buffer, *segment = list + 80;
    memset(list, 0, COPY_LIST);
    list[0] = (unsigned char)atomic_fetch_add(&node->copy_id, 1);
    list[1] = 2 << 3; /* what became of it need not be kept */
    put16(list + 2, 64);
    put32(list + 8, 28);
    put_cscd(list + 16, source);
    put_cscd(list + 48, node);
    segment[0] = 0x02; /* block to block */
    put16(segment + 2, 24);
    put16(segment + 6, 1);
    put16(segment + 10, (uint16_t)blocks_of(command));
    put64(segment + 12, (state_of(io)->source_offset + command->at) / node->lun.block_size);
    put64(segment + 20, lba_of(command));
    command->cdb[0] = EXTENDED_COPY;
    put32(command->cdb + 10, COPY_LIST);
    command->cdb_length = 16;
    command_data(command, SCSI_XFER_WRITE, list, COPY_LIST);
    command_start(command);
}

/* ---- all kinds of parts ---- */

void ops_start_some(struct bt_io *io)
{
    if (io->bounce) {
        start_copy(io);
        return;
    }
    switch (io->op) {
    case BT_READ:
    case BT_WRITE:
        start_transfer(io);
        break;
    case BT_ZEROES:
        start_zeroes(io);
        break;
    case BT_DISCARD:
        start_unmap(io);
        break;
    default:
        start_status(io);
    }
}
