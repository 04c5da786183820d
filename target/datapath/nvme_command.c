/* SPDX-License-Identifier: Apache-2.0 */
/* Requests become commands of the NVM command set (section 6), split at the controller's limits; those for which
 * there is no room wait in order. What an error means is decided here. */
#include "nvme_queue.h"

#define ERROR_TOLD_NS 1000000000ull /* from one report of an error to the next */

static struct nvme *nvme_of(const struct nvme_queue *queue) { return queue->nvme; }

/* ---- the end of a request ---- */

static void handed_back(struct bt_message *message, struct bt_thread *thread)
{
    struct bt_io *io = BT_CONTAINER(message, struct bt_io, message);
    (void)thread;
    bt_io_finish(io, nvme_io(io)->error);
}

void nvme_io_finish(struct nvme_queue *queue, struct bt_io *io, int result)
{
    if (result < 0)
        bt_count_failure(&io->device->base, queue->thread, io->op, io->length);
    if (io->thread == queue->thread) {
        bt_io_finish(io, result);
        return;
    }
    nvme_io(io)->error = (int16_t)result;
    io->message.fn = handed_back;
    bt_thread_post(io->thread, &io->message);
}

/* ---- waiting ---- */

static void wait(struct nvme_queue *queue, struct bt_io *io)
{
    nvme_io(io)->waiting = true;
    io->bounce = NULL;
    *queue->waiting_tail = io;
    queue->waiting_tail = (struct bt_io **)&io->bounce;
}

static struct bt_io *unwait(struct nvme_queue *queue)
{
    struct bt_io *io = queue->waiting;
    queue->waiting = io->bounce;
    if (!queue->waiting)
        queue->waiting_tail = &queue->waiting;
    io->bounce = NULL;
    nvme_io(io)->waiting = false;
    return io;
}

/* ---- what a request still needs ---- */

static bool wants_fua(const struct nvme *nvme, const struct bt_io *io)
{
    uint32_t flags = nvme->options.flags;
    return io->flags & BT_FUA && flags & BT_NVME_VOLATILE_CACHE && !(flags & BT_NVME_NO_FLUSH);
}

/* Dataset Management knows no FUA. */
static bool wants_flush(const struct nvme *nvme, const struct bt_io *io)
{
    bool bit = (io->op == BT_WRITE || io->op == BT_ZEROES) && !(nvme->options.flags & BT_NVME_NO_FUA);
    return wants_fua(nvme, io) && !bit && io->op != BT_READ;
}

static bool has_more(const struct nvme_io *state)
{
    if (state->error || state->again)
        return false;
    return state->stage == NVME_BODY ? state->pos < state->end : state->stage == NVME_BEFORE_FLUSH;
}

/* Nothing of it is in flight, and nothing more is to be issued in this stage. */
static void stage_done(struct nvme_queue *queue, struct bt_io *io)
{
    struct nvme_io *state = nvme_io(io);
    if (!state->error && state->again) {
        state->again = false;
        state->as_data = true;
        state->pos = 0;
        wait(queue, io);
    } else if (!state->error && state->stage == NVME_BODY && wants_flush(nvme_of(queue), io)) {
        state->stage = NVME_BEFORE_FLUSH;
        wait(queue, io);
    } else {
        nvme_io_finish(queue, io, state->error);
    }
}

static void part_done(struct nvme_queue *queue, struct nvme_slot *slot, int error)
{
    struct bt_io *io = slot->io;
    struct nvme_io *state = nvme_io(io);
    nvme_slot_put(queue, slot);
    if (error && !state->error)
        state->error = (int16_t)error;
    if (--state->pending == 0 && !state->waiting)
        stage_done(queue, io);
}

void nvme_give_up(struct nvme_queue *queue, struct nvme_slot *slot, int error) { part_done(queue, slot, error); }

/* ---- building commands ---- */

static void set_blocks(const struct nvme *nvme, struct nvme_sqe *sqe, uint64_t offset, uint64_t length)
{
    uint64_t start = offset >> nvme->block_bits;
    sqe->cdw10 = (uint32_t)start;
    sqe->cdw11 = (uint32_t)(start >> 32);
    sqe->cdw12 = (uint32_t)((length >> nvme->block_bits) - 1); /* 0's based */
}

static uint64_t build_transfer(struct nvme_queue *queue, struct nvme_slot *slot, uint64_t left)
{
    struct nvme *nvme = nvme_of(queue);
    struct bt_io *io = slot->io;
    uint64_t max = bt_min(left, nvme->max_transfer);
    uint64_t length = io->op == BT_ZEROES ? nvme_map_zeros(queue, slot, max) : nvme_map_data(queue, slot, max);
    if (!length)
        return 0;
    slot->sqe.opcode = io->op == BT_READ ? NVME_READ : NVME_WRITE;
    set_blocks(nvme, &slot->sqe, io->offset + slot->offset, length);
    if (io->op != BT_READ && wants_fua(nvme, io) && !(nvme->options.flags & BT_NVME_NO_FUA))
        slot->sqe.cdw12 |= NVME_CDW12_FUA;
    return length;
}

static uint64_t at_most(uint64_t length, uint64_t limit) { return limit ? bt_min(length, limit) : length; }

static uint64_t build_zeroes(struct nvme_queue *queue, struct nvme_slot *slot, uint64_t left)
{
    struct nvme *nvme = nvme_of(queue);
    struct bt_io *io = slot->io;
    uint64_t length = bt_min(left, (uint64_t)NVME_MAX_BLOCKS << nvme->block_bits);
    length = at_most(length, nvme->options.zeroes_bytes);
    slot->sqe.opcode = NVME_WRITE_ZEROES;
    set_blocks(nvme, &slot->sqe, io->offset + slot->offset, length);
    if (io->flags & BT_UNMAP && nvme->options.flags & BT_NVME_DEALLOCATE)
        slot->sqe.cdw12 |= NVME_CDW12_DEAC;
    if (wants_fua(nvme, io) && !(nvme->options.flags & BT_NVME_NO_FUA))
        slot->sqe.cdw12 |= NVME_CDW12_FUA;
    return length;
}

static uint64_t build_discard(struct nvme_queue *queue, struct nvme_slot *slot, uint64_t left)
{
    struct nvme *nvme = nvme_of(queue);
    const struct bt_nvme_options *options = &nvme->options;
    struct nvme_range *ranges = nvme_map_page(queue, slot);
    uint64_t offset = slot->io->offset + slot->offset, total = 0;
    uint64_t most = at_most((uint64_t)UINT32_MAX << nvme->block_bits, options->discard_range_bytes);
    uint32_t count = 0;
    if (!ranges)
        return 0;
    left = at_most(left, options->discard_bytes);
    for (; total < left && count < options->discard_ranges; count++) {
        uint64_t length = bt_min(left - total, most);
        ranges[count] = (struct nvme_range){
            .blocks = (uint32_t)(length >> nvme->block_bits),
            .start = (offset + total) >> nvme->block_bits,
        };
        total += length;
    }
    slot->sqe.opcode = NVME_DATASET;
    slot->sqe.cdw10 = count - 1;
    slot->sqe.cdw11 = NVME_DSM_DEALLOCATE;
    return total;
}

/* The bytes that the slot's command covers; 0 when pages are short. */
static uint64_t build(struct nvme_queue *queue, struct nvme_slot *slot)
{
    const struct nvme_io *state = nvme_io(slot->io);
    uint64_t left = state->end - state->pos;
    switch (slot->io->op) {
    case BT_DISCARD:
        return build_discard(queue, slot, left);
    case BT_ZEROES:
        return state->as_data ? build_transfer(queue, slot, left) : build_zeroes(queue, slot, left);
    default:
        return build_transfer(queue, slot, left);
    }
}

/* Issues the next command of io. False when there is no room. */
static bool issue(struct nvme_queue *queue, struct bt_io *io)
{
    struct nvme_io *state = nvme_io(io);
    struct nvme_slot *slot = nvme_slot_get(queue);
    if (!slot)
        return false;
    slot->io = io;
    slot->offset = state->pos;
    memset(&slot->sqe, 0, sizeof slot->sqe);
    slot->sqe.nsid = nvme_of(queue)->options.nsid;
    if (state->stage == NVME_BEFORE_FLUSH) {
        slot->sqe.opcode = NVME_FLUSH;
        state->stage = NVME_FLUSHING;
    } else {
        uint64_t length = build(queue, slot);
        if (!length) {
            nvme_slot_put(queue, slot);
            return false;
        }
        state->pos += length;
    }
    state->pending++;
    nvme_send(queue, slot);
    return true;
}

void nvme_pump(struct nvme_queue *queue)
{
    while (queue->running && queue->waiting) {
        struct bt_io *io = queue->waiting;
        struct nvme_io *state = nvme_io(io);
        if (has_more(state) && !issue(queue, io)) {
            bt_count(&queue->counters.waits, 1);
            return;
        }
        if (has_more(state))
            continue;
        unwait(queue);
        if (!state->pending)
            stage_done(queue, io);
    }
}

void nvme_fail_waiting(struct nvme_queue *queue, int error)
{
    while (queue->waiting) {
        struct bt_io *io = unwait(queue);
        struct nvme_io *state = nvme_io(io);
        if (!state->error)
            state->error = (int16_t)error;
        if (!state->pending)
            nvme_io_finish(queue, io, state->error);
    }
}

/* ---- completions ---- */

int nvme_error_of(uint16_t status)
{
    switch (status & NVME_STATUS_CODE) { /* figures 126 to 130 */
    case 0:
        return 0;
    case NVME_INVALID_OPCODE:
        return -ENOTSUP;
    case 0x002: /* invalid field */
    case 0x013: /* PRP offset invalid */
    case 0x180: /* conflicting attributes */
        return -EINVAL;
    case NVME_ABORTED:
        return -ETIMEDOUT;
    case 0x00B: /* invalid namespace or format */
        return -ENODEV;
    case 0x015: /* operation denied */
    case 0x286: /* access denied */
        return -EACCES;
    case 0x020: /* namespace is write protected */
    case 0x182: /* attempted write to read only range */
        return -EROFS;
    case 0x081: /* capacity exceeded */
        return -ENOSPC;
    case 0x083: /* reservation conflict */
        return -EBADE;
    default:
        return -EIO;
    }
}

/* Some errors stay what they are, even where the controller does not say so. */
static bool is_temporary(uint16_t status)
{
    int error = nvme_error_of(status);
    return !(status & NVME_STATUS_DNR) && (error == -EIO || error == -ETIMEDOUT) &&
           (status & NVME_STATUS_CODE) != 0x080; /* LBA out of range */
}

static bool tries_again(struct nvme_queue *queue, struct nvme_slot *slot, uint16_t status)
{
    if ((status & NVME_STATUS_CODE) == NVME_ABORTED && slot->reported) {
        bt_count(&queue->counters.aborted, 1);
        return slot->aborts++ < NVME_MAX_ABORTS;
    }
    return is_temporary(status) && slot->retries++ < NVME_MAX_RETRIES;
}

/* What the controller does not know is done otherwise. */
static int do_without(struct nvme *nvme, struct bt_io *io, uint8_t opcode)
{
    if (opcode == NVME_DATASET) {
        atomic_store(&nvme->no_discard, true);
        return 0;
    }
    if (opcode != NVME_WRITE_ZEROES)
        return -ENOTSUP;
    atomic_store(&nvme->no_zeroes, true);
    if (io->flags & BT_FAST_ZERO)
        return -ENOTSUP;
    nvme_io(io)->again = true;
    return 0;
}

/* So that Python reads the controller's error log; a drive that fails everything makes no flood of it. */
static void tell_error(struct nvme_queue *queue, uint16_t status)
{
    uint64_t now = nvme_now(queue);
    if (queue->error_told_ns && now - queue->error_told_ns < ERROR_TOLD_NS)
        return;
    queue->error_told_ns = now;
    nvme_tell(queue, BT_NVME_ERROR, status & NVME_STATUS_CODE);
}

void nvme_completed(struct nvme_queue *queue, struct nvme_slot *slot, uint16_t status)
{
    struct bt_io *io = slot->io;
    int error = nvme_error_of(status);
    if (error) {
        bt_count(&queue->counters.completion_errors, 1);
        __atomic_store_n(&queue->counters.last_status, status & NVME_STATUS_CODE, __ATOMIC_RELAXED);
        if (tries_again(queue, slot, status)) {
            nvme_retry(queue, slot);
            return;
        }
        tell_error(queue, status);
    }
    if (error == -ENOTSUP)
        error = do_without(nvme_of(queue), io, slot->sqe.opcode);
    else if (!error && slot->bounced && io->op == BT_READ)
        nvme_unbounce(queue, slot);
    part_done(queue, slot, error);
}

/* ---- submission ---- */

/* Reads past the end of the namespace give zeros. 1: done; 0: go on; or -errno. */
static int clip(struct bt_io *io)
{
    struct nvme *nvme = (struct nvme *)io->device;
    struct nvme_io *state = nvme_io(io);
    uint64_t size = bt_object_size(&io->device->base), mask = (1ull << nvme->block_bits) - 1;
    if ((io->offset | io->length) & mask)
        return -EINVAL;
    if (!bt_range_ok(io->offset, io->length, size)) {
        if (io->op != BT_READ)
            return -ENOSPC;
        state->end = io->offset < size ? size - io->offset : 0;
        bt_iov_zero(io->iov, io->iovcnt, state->end, io->length - state->end);
    }
    return state->end == 0;
}

/* The same, with all that can be answered without the controller. */
static int prepare(struct bt_io *io)
{
    struct nvme *nvme = (struct nvme *)io->device;
    struct nvme_io *state = nvme_io(io);
    uint32_t flags = nvme->options.flags;
    state->end = io->length;
    switch (io->op) {
    case BT_STATUS:
        io->status_length = io->length;
        io->status_flags = 0;
        return 1;
    case BT_FLUSH:
        state->stage = NVME_BEFORE_FLUSH;
        return !(flags & BT_NVME_VOLATILE_CACHE) || flags & BT_NVME_NO_FLUSH;
    case BT_ZEROES:
        state->as_data = !(flags & BT_NVME_WRITE_ZEROES) || atomic_load(&nvme->no_zeroes);
        return state->as_data && io->flags & BT_FAST_ZERO ? -ENOTSUP : clip(io);
    case BT_DISCARD:
        return !(flags & BT_NVME_DISCARD) || atomic_load(&nvme->no_discard) ? 1 : clip(io);
    case BT_READ:
    case BT_WRITE:
        return clip(io);
    default: /* CACHE */
        return 1;
    }
}

static void begin(struct nvme_queue *queue, struct bt_io *io)
{
    bt_count_request(&io->device->base, queue->thread, io->op, io->offset, io->length);
    int ret = queue->dead ? queue->dead : prepare(io);
    if (ret) {
        bt_count(&bt_counters_of(&io->device->base, queue->thread)->inline_done, 1);
        nvme_io_finish(queue, io, ret < 0 ? ret : 0);
        return;
    }
    bt_count(&bt_counters_of(&io->device->base, queue->thread)->engine_done, 1);
    wait(queue, io);
    nvme_pump(queue);
}

static void handed_over(struct bt_message *message, struct bt_thread *thread)
{
    struct bt_io *io = BT_CONTAINER(message, struct bt_io, message);
    (void)thread;
    bt_count(&nvme_io(io)->queue->counters.handed_over, 1);
    begin(nvme_io(io)->queue, io);
}

void nvme_submit(struct bt_io *io)
{
    struct nvme_queue *queue = ((struct nvme *)io->device)->by_thread[io->thread->index];
    memset(io->scratch, 0, sizeof io->scratch);
    nvme_io(io)->queue = queue;
    if (queue->thread == io->thread) {
        begin(queue, io);
        return;
    }
    io->message.fn = handed_over;
    bt_thread_post(queue->thread, &io->message);
}
