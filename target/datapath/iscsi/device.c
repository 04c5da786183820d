/* SPDX-License-Identifier: Apache-2.0 */
/* Requests of the datapath as SCSI commands. An io is split into parts, each one command; what comes here is made of
 * whole blocks (see align.c). It is served on its session's thread, and finished on its own. */
#include "internal.h"

#define MAX_PARTS 8
#define MAX_SAME_BYTES (1u << 30)
#define ZEROS_BYTES (1u << 20) /* written as data at a time */
#define STATUS_DESCRIPTORS 3
#define COPY_LIST 108 /* header, two CSCD descriptors, a segment descriptor */

enum stage { DATA, DURABLE };

struct io_state { /* in the io's scratch */
    uint64_t pos, end; /* how far it has been started; how far the LUN goes */
    int32_t result;
    uint16_t pending;
    uint8_t session, stage;
    uint64_t source_offset; /* of a copy: the source is the io's `bounce` */
};
_Static_assert(sizeof(struct io_state) <= sizeof(((struct bt_io *)0)->scratch), "the state lies in scratch");

static const unsigned char zeros[BT_ISCSI_MAX_BLOCK];

static struct io_state *state_of(struct bt_io *io) { return (struct io_state *)io->scratch; }
static struct node *node_of(struct bt_io *io) { return (struct node *)io->device; }
static struct session *session_of(struct bt_io *io) { return &node_of(io)->sessions[state_of(io)->session]; }

/* ---- the end of an io ---- */

static void count_end(struct bt_io *io, int result)
{
    struct bt_counters *counters = bt_counters_of(&io->device->base, io->thread);
    bt_count(result < 0 ? &counters->failed : &counters->engine_done, 1);
}

static void io_returns(struct bt_message *message, struct bt_thread *thread)
{
    struct bt_io *io = BT_CONTAINER(message, struct bt_io, message);
    (void)thread;
    count_end(io, state_of(io)->result);
    node_of(io)->api->io_finish(io, state_of(io)->result);
}

static void io_end(struct bt_io *io, int result)
{
    const struct bt_device_api *api = node_of(io)->api;
    if (io->thread == session_of(io)->thread) {
        count_end(io, result);
        api->io_finish(io, result);
        return;
    }
    state_of(io)->result = result;
    io->message.fn = io_returns;
    api->thread_post(io->thread, &io->message);
}

static void io_go_on(struct bt_io *io);

static void part_over(struct bt_io *io, int result)
{
    struct io_state *state = state_of(io);
    if (result < 0 && state->result == 0)
        state->result = result;
    state->pending--;
    io_go_on(io);
}

static void part_done(struct command *command, int result)
{
    struct bt_io *io = command->io;
    command_free(command);
    part_over(io, result);
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
        part_over(io, -ENOMEM);
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
    if (command->bounce && io->op == BT_READ)
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

static bool may_unmap(const struct node *node)
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
    set_cdb(command, only10 ? WRITE_SAME_10 : 0, WRITE_SAME_16, unmap ? 0x08 : 0, lba_of(command), blocks_of(command));
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
    bool unmap = (io->flags & BT_UNMAP) && may_unmap(node);
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
    if (is_not_known(result)) {
        node_of(command->io)->no_sync = true; /* no cache to write back */
        result = 0;
    }
    part_done(command, result);
}

static void start_flush(struct bt_io *io)
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

static bool can_copy(struct bt_device *destination, struct bt_device *source)
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

/* ---- all of an io ---- */

static void start_some(struct bt_io *io)
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

/* A WRITE with FUA that the LUN would not have taken. */
static bool needs_flush(struct bt_io *io)
{
    struct node *node = node_of(io);
    return io->op == BT_WRITE && (io->flags & BT_FUA) && !node->no_flush && !node->no_sync &&
           !node_has(node, BT_ISCSI_DPOFUA) && state_of(io)->stage == DATA && state_of(io)->result == 0;
}

/* Starts what may be started, and ends the io when nothing is left. Parts may end while they are started. */
static void io_go_on(struct bt_io *io)
{
    struct io_state *state = state_of(io);
    unsigned most = (io->op == BT_READ || io->op == BT_WRITE) && !io->bounce ? MAX_PARTS : 1;
    state->pending++; /* this, so that it does not end meanwhile */
    while (state->result == 0 && state->pos < state->end && state->pending <= most)
        start_some(io);
    if (state->pending == 1 && needs_flush(io)) {
        state->stage = DURABLE;
        start_flush(io);
    }
    if (--state->pending == 0)
        io_end(io, state->result);
}

/* What needs no command. 1: nothing of that kind. */
static int answer_here(struct bt_io *io)
{
    struct node *node = node_of(io);
    switch (io->op) {
    case BT_FLUSH:
        return node->no_flush || node->no_sync ? 0 : 1;
    case BT_CACHE:
        return 0;
    case BT_STATUS:
        io->status_length = io->length;
        io->status_flags = 0;
        return node_has(node, BT_ISCSI_PROVISIONED) && !node->no_status ? 1 : 0;
    case BT_DISCARD:
        return node_has(node, BT_ISCSI_UNMAP) && !node->no_unmap ? 1 : 0;
    case BT_ZEROES:
        return (io->flags & BT_FAST_ZERO) && !((io->flags & BT_UNMAP) && may_unmap(node)) ? -EOPNOTSUPP : 1;
    default:
        return 1;
    }
}

/* Where the LUN ends: what would be read behind it is zeros, but not where it has shrunk. */
static int clip_to_end(struct bt_io *io)
{
    struct node *node = node_of(io);
    uint64_t blocks = atomic_load(&node->blocks), size = blocks * node->lun.block_size;
    uint64_t there = io->offset < size ? bt_min(io->length, size - io->offset) : 0;
    state_of(io)->end = there;
    if (there == io->length || io->op == BT_STATUS || io->op == BT_DISCARD)
        return 0;
    if (io->op != BT_READ)
        return -ENOSPC;
    if (blocks < atomic_load(&node->most_blocks))
        return -EIO;
    node->api->iov_zero(io->iov, io->iovcnt, there, io->length - there);
    return 0;
}

static void io_start(struct bt_io *io)
{
    struct node *node = node_of(io);
    struct io_state *state = state_of(io);
    int ret = atomic_load(&node->changed) ? -EIO : answer_here(io);
    if (ret == 1 && io->op == BT_FLUSH) {
        start_flush(io);
        return;
    }
    if (ret == 1 && ((io->offset | io->length) & (node->lun.block_size - 1)))
        ret = -EINVAL;
    if (ret == 1 && (ret = clip_to_end(io)) == 0)
        ret = 1;
    if (ret <= 0) {
        io_end(io, ret);
        return;
    }
    if (io->op == BT_STATUS && !state->end)
        io->status_flags = BT_EXTENT_HOLE | BT_EXTENT_ZERO;
    io_go_on(io);
}

static void io_arrives(struct bt_message *message, struct bt_thread *thread)
{
    (void)thread;
    io_start(BT_CONTAINER(message, struct bt_io, message));
}

/* To the session that serves the io's thread. */
static void submit_from(struct bt_io *io, uint64_t source_offset)
{
    struct node *node = node_of(io);
    struct bt_counters *counters = bt_counters_of(&io->device->base, io->thread);
    struct io_state *state = state_of(io);
    bt_count(&counters->requests[io->op], 1);
    bt_count(&counters->bytes[io->op], io->length);
    *state = (struct io_state){.session = (uint8_t)(io->thread->index % node->session_count),
                               .source_offset = source_offset};
    if (io->thread == session_of(io)->thread) {
        io_start(io);
        return;
    }
    io->message.fn = io_arrives;
    node->api->thread_post(session_of(io)->thread, &io->message);
}

static void submit(struct bt_io *io) { submit_from(io, 0); }

static void copy(struct bt_io *io, struct bt_device *source, uint64_t source_offset)
{
    io->bounce = source;
    submit_from(io, source_offset);
}

const struct bt_device_ops iscsi_device_ops = {.submit = submit, .can_copy = can_copy, .copy = copy};
