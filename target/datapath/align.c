/* SPDX-License-Identifier: Apache-2.0 */
/* A device in front of an object that only takes whole blocks: a request becomes up to three parts, the aligned
 * middle, which goes through as it is, and a first and a last block of which it wants only some bytes. Such a block
 * is read, changed and written with its range held, so that nothing overlaps it meanwhile. */
#include "ranges.h"

#define MAX_BLOCK (64u << 10)

enum { MIDDLE, HEAD, TAIL, PARTS };

struct align_op;

/* Some whole blocks for the child. */
struct part {
    struct align_op *op;
    struct bt_request request;
    struct iovec iov;      /* HEAD, TAIL: the block in `buffer` */
    uint64_t at;           /* HEAD, TAIL: where in the block the wanted bytes start... */
    uint64_t length;       /* ...and how many; 0: there is no such part */
    uint64_t io_at;        /* where they are in the io */
};

struct align_op {
    struct align_op *next; /* in the thread's list of free ones */
    struct align *align;
    struct bt_io *io;
    struct bt_range range;
    struct part parts[PARTS];
    int pending;
    int result;
    unsigned char *buffer; /* two blocks */
    struct iovec *iov;     /* of the middle, when it is not all of the io */
    int iov_capacity;
    struct bt_extent extent;
};

struct align {
    struct bt_device device;
    bt_child child;
    uint64_t block;
    struct bt_ranges ranges;
    struct align_op *free_ops[BT_MAX_THREADS];
};

static uint64_t round_down(const struct align *align, uint64_t n) { return n & ~(align->block - 1); }

static bool is_change(int op) { return op == BT_WRITE || op == BT_ZEROES || op == BT_DISCARD; }

/* ---- ops ---- */

static void range_granted(struct bt_range *range);

static struct align_op *op_get(struct align *align, struct bt_io *io)
{
    struct align_op **list = &align->free_ops[io->thread->index], *op = *list;
    if (op)
        *list = op->next;
    else if (!(op = calloc(1, sizeof *op)))
        return NULL;
    op->align = align;
    op->io = io;
    op->range.held = false;
    op->range.thread = io->thread;
    op->range.granted = range_granted;
    op->pending = 0;
    op->result = 0;
    for (int i = 0; i < PARTS; i++) {
        op->parts[i].op = op;
        op->parts[i].length = 0;
    }
    return op;
}

static void op_free(struct align_op *op)
{
    free(op->buffer);
    free(op->iov);
    free(op);
}

static void op_finish(struct align_op *op)
{
    struct align *align = op->align;
    struct bt_io *io = op->io;
    int result = op->result;
    bt_range_release(&align->ranges, &op->range);
    if (result < 0)
        bt_count_failure(&align->device.base, io->thread, io->op, io->length);
    else
        bt_count(&bt_counters_of(&align->device.base, io->thread)->engine_done, 1);
    op->next = align->free_ops[io->thread->index];
    align->free_ops[io->thread->index] = op;
    bt_io_finish(io, result);
}

static void part_over(struct align_op *op, int result)
{
    if (result < 0 && op->result == 0)
        op->result = result;
    if (--op->pending == 0)
        op_finish(op);
}

/* ---- requests to the child ---- */

static void start_request(struct part *part, int op, uint32_t flags, uint64_t offset, uint64_t length,
                          void (*done)(struct bt_request *request))
{
    struct bt_request *request = &part->request;
    request->thread = part->op->io->thread;
    request->object = bt_child_get(&part->op->align->child);
    request->done = done;
    request->op = (uint8_t)op;
    request->flags = (uint8_t)flags;
    request->offset = offset;
    request->length = length;
    bt_request_start(request);
}

static struct part *part_of(struct bt_request *request) { return BT_CONTAINER(request, struct part, request); }

static void start_edges(struct align_op *op);

static void middle_done(struct bt_request *request)
{
    struct align_op *op = part_of(request)->op;
    if (request->ret == 0 && (op->io->flags & BT_FAST_ZERO))
        start_edges(op); /* only now is it known that zeroes are fast */
    part_over(op, request->ret);
}

static int middle_iov(struct align_op *op, uint64_t at, uint64_t length)
{
    struct bt_io *io = op->io;
    struct bt_request *request = &op->parts[MIDDLE].request;
    request->iov = io->iov;
    request->iovcnt = io->iovcnt;
    if (length == io->length)
        return 0;
    if (op->iov_capacity < io->iovcnt) {
        struct iovec *iov = realloc(op->iov, (size_t)io->iovcnt * sizeof *iov);
        if (!iov)
            return -ENOMEM;
        op->iov = iov;
        op->iov_capacity = io->iovcnt;
    }
    request->iov = op->iov;
    request->iovcnt = bt_iov_slice(io->iov, io->iovcnt, at, length, op->iov, io->iovcnt);
    return 0;
}

static void start_middle(struct align_op *op)
{
    struct part *part = &op->parts[MIDDLE];
    struct bt_io *io = op->io;
    part->request.iov = NULL;
    part->request.iovcnt = 0;
    if (io->op == BT_READ || io->op == BT_WRITE) {
        int ret = middle_iov(op, part->io_at, part->length);
        if (ret < 0) {
            part_over(op, ret);
            return;
        }
    }
    start_request(part, io->op, io->flags, io->offset + part->io_at, part->length, middle_done);
}

/* ---- a block of which some bytes are wanted ---- */

static uint64_t block_offset(const struct part *part) { return part->op->io->offset + part->io_at - part->at; }

static void block_written(struct bt_request *request) { part_over(part_of(request)->op, request->ret); }

static void block_read(struct bt_request *request)
{
    struct part *part = part_of(request);
    struct align_op *op = part->op;
    struct bt_io *io = op->io;
    unsigned char *wanted = (unsigned char *)part->iov.iov_base + part->at;
    if (request->ret < 0) {
        part_over(op, request->ret);
        return;
    }
    if (io->op == BT_READ) {
        bt_iov_from_buffer(io->iov, io->iovcnt, part->io_at, wanted, part->length);
        part_over(op, 0);
        return;
    }
    if (io->op == BT_WRITE)
        bt_iov_to_buffer(io->iov, io->iovcnt, part->io_at, wanted, part->length);
    else
        memset(wanted, 0, part->length);
    start_request(part, BT_WRITE, io->flags & BT_FUA, block_offset(part), op->align->block, block_written);
}

static void start_block(struct part *part)
{
    struct align_op *op = part->op;
    part->request.iov = &part->iov;
    part->request.iovcnt = 1;
    start_request(part, BT_READ, 0, block_offset(part), op->align->block, block_read);
}

static void start_edges(struct align_op *op)
{
    for (int i = HEAD; i <= TAIL; i++)
        if (op->parts[i].length) {
            op->pending++;
            start_block(&op->parts[i]);
        }
}

/* ---- all of it ---- */

static int get_buffer(struct align_op *op)
{
    void *memory;
    uint64_t block = op->align->block;
    if (!op->buffer) {
        if (posix_memalign(&memory, 4096, 2 * block))
            return -ENOMEM;
        op->buffer = memory;
    }
    op->parts[HEAD].iov = (struct iovec){op->buffer, block};
    op->parts[TAIL].iov = (struct iovec){op->buffer + block, block};
    return 0;
}

/* Splits the io at the edges of blocks. */
static void find_parts(struct align_op *op)
{
    struct align *align = op->align;
    struct bt_io *io = op->io;
    uint64_t end = io->offset + io->length, first = round_down(align, io->offset + align->block - 1);
    uint64_t last = round_down(align, end);
    struct part *head = &op->parts[HEAD], *middle = &op->parts[MIDDLE], *tail = &op->parts[TAIL];
    if (io->offset < first) {
        head->at = io->offset & (align->block - 1);
        head->io_at = 0;
        head->length = bt_min(first, end) - io->offset;
    }
    if (first < last) {
        middle->io_at = first - io->offset;
        middle->length = last - first;
    }
    if (end > last && last >= first) {
        tail->at = 0;
        tail->io_at = last - io->offset;
        tail->length = end - last;
    }
}

static void start_parts(struct align_op *op)
{
    bool wait = (op->io->flags & BT_FAST_ZERO) && op->parts[MIDDLE].length;
    op->pending = 1;
    if (op->parts[MIDDLE].length) {
        op->pending++;
        start_middle(op);
    }
    if (!wait)
        start_edges(op);
    part_over(op, 0);
}

static void range_granted(struct bt_range *range) { start_parts(BT_CONTAINER(range, struct align_op, range)); }

static void start_data(struct align_op *op)
{
    struct align *align = op->align;
    struct bt_io *io = op->io;
    find_parts(op);
    if (io->op == BT_DISCARD) /* a hint: only whole blocks */
        op->parts[HEAD].length = op->parts[TAIL].length = 0;
    bool edges = op->parts[HEAD].length || op->parts[TAIL].length;
    if (edges) {
        bt_count(&bt_counters_of(&align->device.base, io->thread)->bounced, 1);
        if ((op->result = get_buffer(op)) < 0) {
            op_finish(op);
            return;
        }
    }
    if (is_change(io->op)) {
        op->range.exclusive = edges;
        op->range.start = round_down(align, io->offset);
        op->range.end = round_down(align, io->offset + io->length + align->block - 1);
        if (!bt_range_acquire(&align->ranges, &op->range))
            return;
    }
    start_parts(op);
}

static void outward_done(struct bt_request *request)
{
    struct align_op *op = part_of(request)->op;
    struct bt_io *io = op->io;
    if (io->op == BT_STATUS && request->ret == 0) {
        uint64_t head = io->offset - round_down(op->align, io->offset);
        bool known = request->extents_count && op->extent.length > head;
        io->status_length = bt_min(known ? op->extent.length - head : op->align->block - head, io->length);
        io->status_flags = known ? op->extent.flags : 0; /* not by whole blocks: data is always a right answer */
    }
    part_over(op, request->ret);
}

/* FLUSH, and what may be asked about the blocks around: STATUS, CACHE. */
static void start_outward(struct align_op *op)
{
    struct bt_io *io = op->io;
    struct bt_request *request = &op->parts[MIDDLE].request;
    uint64_t start = round_down(op->align, io->offset);
    uint64_t end = round_down(op->align, io->offset + io->length + op->align->block - 1);
    request->iov = NULL;
    request->iovcnt = 0;
    request->extents = &op->extent;
    request->extents_max = 1;
    op->pending = 1;
    start_request(&op->parts[MIDDLE], io->op, io->flags, start, end - start, outward_done);
}

static void submit(struct bt_io *io)
{
    struct align *align = (struct align *)io->device;
    bool beyond = io->offset > INT64_MAX || io->length > INT64_MAX - io->offset;
    struct align_op *op = op_get(align, io);
    bt_count_request(&align->device.base, io->thread, io->op, io->offset, io->length);
    if (!op) {
        bt_io_finish(io, -ENOMEM);
    } else if (beyond) {
        op->result = -EFBIG;
        op_finish(op);
    } else if (io->op == BT_FLUSH || io->op == BT_STATUS || io->op == BT_CACHE) {
        start_outward(op);
    } else {
        start_data(op);
    }
}

static void destroy(struct bt_object *object)
{
    struct align *align = (struct align *)object;
    for (int i = 0; i < BT_MAX_THREADS; i++)
        while (align->free_ops[i]) {
            struct align_op *op = align->free_ops[i];
            align->free_ops[i] = op->next;
            op_free(op);
        }
    bt_ranges_destroy(&align->ranges);
    free(align);
}

static const struct bt_device_ops ops = {.submit = submit};

struct bt_object *bt_align_child(struct bt_object *object, uint64_t *block, struct bt_ranges **ranges)
{
    struct align *align = (struct align *)object;
    if (object->type != BT_OBJ_DEVICE || align->device.ops != &ops)
        return NULL;
    *block = align->block;
    *ranges = &align->ranges;
    return bt_child_get(&align->child);
}
static const struct bt_object_ops object_ops = {.destroy = destroy};

bt_object *bt_align_new(bt_datapath *dp, uint64_t tag, bt_object *child, uint32_t block)
{
    bool valid = block && !(block & (block - 1)) && block <= MAX_BLOCK && bt_object_size(child) % block == 0;
    struct align *align = valid ? calloc(1, sizeof *align) : NULL;
    if (!align) {
        errno = valid ? ENOMEM : EINVAL;
        return NULL;
    }
    bt_device_init(&align->device, dp, &ops, &object_ops, tag, bt_object_size(child));
    bt_ranges_init(&align->ranges);
    bt_child_init(&align->child, child);
    align->device.base.children = &align->child;
    align->device.base.child_count = 1;
    align->block = block;
    align->device.base.takes_fua = true; /* the child's own requests decide what becomes of it */
    return &align->device.base;
}
