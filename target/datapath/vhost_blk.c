/* SPDX-License-Identifier: Apache-2.0 */
/* Requests of a virtio block device (virtio 1.2, section 5.2.6): from a chain of buffers to requests of the graph. */
#include <endian.h>

#include "vhost.h"

enum {
    TYPE_IN = 0,
    TYPE_OUT = 1,
    TYPE_FLUSH = 4,
    TYPE_GET_ID = 8,
    TYPE_DISCARD = 11,
    TYPE_WRITE_ZEROES = 13,
};
enum { STATUS_OK = 0, STATUS_IOERR = 1, STATUS_UNSUPP = 2 };
#define FEATURE_DISCARD (1ull << 13)
#define FEATURE_WRITE_ZEROES (1ull << 14)
#define SEGMENT_UNMAP 1u
#define HEADER_SIZE 16
#define SECTOR_BITS 9
/* What the kernel moves in one call; longer requests are refused. */
#define MAX_BYTES 0x7ffff000u

struct blk_header {
    uint32_t type;
    uint32_t reserved;
    uint64_t sector;
};

/* ---- completion ---- */

static void finish(struct vhost_request *request, unsigned char status)
{
    if (status != STATUS_OK)
        bt_count(&request->queue->counters.failed, 1);
    __atomic_store_n(request->status, status, __ATOMIC_RELAXED);
    /* A failed read may have filled nothing: what is not known to be written is not reported as written. The
     * status byte lies behind the data and cannot be counted alone. */
    vhost_queue_complete(request, status == STATUS_OK ? request->written : request->written == 1);
}

static unsigned char status_of(int ret)
{
    return ret == 0 ? STATUS_OK : ret == -ENOTSUP ? STATUS_UNSUPP : STATUS_IOERR;
}

static void request_done(struct bt_request *base)
{
    finish(BT_CONTAINER(base, struct vhost_request, base), status_of(base->ret));
}

/* ---- starting ---- */

static void start(struct vhost_request *request, int op, unsigned flags, uint64_t offset, uint64_t length)
{
    struct vhost_queue *queue = request->queue;
    struct bt_request *base = &request->base;
    bt_count(&queue->counters.requests[op], 1);
    bt_count(&queue->counters.bytes[op], length);
    base->thread = queue->thread;
    base->object = queue->session->gate;
    base->hurried = &queue->hurried;
    base->op = (uint8_t)op;
    base->flags = (uint8_t)flags;
    base->offset = offset;
    base->length = length;
    bt_request_start(base);
}

static unsigned write_flags(const struct vhost_queue *queue)
{
    return atomic_load_explicit(&queue->session->write_through, memory_order_relaxed) ? BT_FUA : 0;
}

/* The one check of a guest's range: whole blocks, inside the device. */
static bool range_ok(const struct bt_vhost *session, uint64_t sector, uint64_t bytes)
{
    uint64_t capacity = atomic_load_explicit(&session->capacity, memory_order_relaxed);
    uint64_t mask = session->block_size - 1;
    if (sector > capacity >> SECTOR_BITS)
        return false;
    uint64_t offset = sector << SECTOR_BITS;
    return !(offset & mask) && !(bytes & mask) && bt_range_ok(offset, bytes, capacity);
}

static void start_transfer(struct vhost_request *request, uint64_t sector)
{
    const struct bt_vhost *session = request->queue->session;
    uint64_t bytes = request->base.length;
    bool write = request->type == TYPE_OUT;
    if (bytes > MAX_BYTES || !range_ok(session, sector, bytes) || (write && !session->writable)) {
        finish(request, STATUS_IOERR);
    } else if (!bytes) {
        finish(request, STATUS_OK);
    } else {
        request->base.done = request_done;
        start(request, write ? BT_WRITE : BT_READ, write ? write_flags(request->queue) : 0, sector << SECTOR_BITS,
              bytes);
    }
}

static void start_flush(struct vhost_request *request)
{
    request->base.done = request_done;
    request->base.iov = NULL;
    request->base.iovcnt = 0;
    start(request, BT_FLUSH, 0, 0, 0);
}

static void get_id(struct vhost_request *request)
{
    const struct bt_request *base = &request->base;
    uint64_t bytes = bt_min(base->length, BT_VHOST_SERIAL);
    bt_iov_from_buffer(base->iov, base->iovcnt, 0, request->queue->session->serial, bytes);
    request->written = bytes == base->length ? (uint32_t)bytes + 1 : (uint32_t)bytes;
    finish(request, STATUS_OK);
}

/* ---- discard and write zeroes: several ranges, one after the other ---- */

static void segment_done(struct bt_request *base);

static void next_segment(struct vhost_request *request)
{
    while (request->segment < request->segment_count && !request->segments[request->segment].sectors)
        request->segment++;
    if (request->segment == request->segment_count) {
        finish(request, STATUS_OK);
        return;
    }
    const struct vhost_segment *segment = &request->segments[request->segment++];
    bool zeroes = request->type == TYPE_WRITE_ZEROES;
    unsigned flags = zeroes ? write_flags(request->queue) : 0;
    if (zeroes && segment->flags & SEGMENT_UNMAP)
        flags |= BT_UNMAP;
    request->base.done = segment_done;
    start(request, zeroes ? BT_ZEROES : BT_DISCARD, flags, segment->sector << SECTOR_BITS,
          (uint64_t)segment->sectors << SECTOR_BITS);
}

static void segment_done(struct bt_request *base)
{
    struct vhost_request *request = BT_CONTAINER(base, struct vhost_request, base);
    if (base->ret < 0)
        finish(request, status_of(base->ret));
    else
        next_segment(request);
}

static unsigned char check_segment(const struct vhost_request *request, struct vhost_segment *segment)
{
    uint32_t known = request->type == TYPE_WRITE_ZEROES ? SEGMENT_UNMAP : 0;
    segment->sector = le64toh(segment->sector);
    segment->sectors = le32toh(segment->sectors);
    segment->flags = le32toh(segment->flags);
    if (segment->flags & ~known)
        return STATUS_UNSUPP;
    if (segment->sectors > BT_VHOST_MAX_SECTORS)
        return STATUS_IOERR;
    return range_ok(request->queue->session, segment->sector, (uint64_t)segment->sectors << SECTOR_BITS)
               ? STATUS_OK
               : STATUS_IOERR;
}

static void start_segments(struct vhost_request *request)
{
    const struct bt_vhost *session = request->queue->session;
    uint64_t feature = request->type == TYPE_DISCARD ? FEATURE_DISCARD : FEATURE_WRITE_ZEROES;
    uint64_t bytes = request->base.length, count = bytes / sizeof *request->segments;
    unsigned char status = STATUS_OK;
    if (!(session->features & feature))
        status = STATUS_UNSUPP;
    else if (!session->writable || !count || bytes % sizeof *request->segments || count > BT_VHOST_MAX_SEGMENTS)
        status = STATUS_IOERR;
    if (status == STATUS_OK)
        bt_iov_to_buffer(request->base.iov, request->base.iovcnt, 0, request->segments, bytes);
    for (uint64_t i = 0; i < count && status == STATUS_OK; i++)
        status = check_segment(request, &request->segments[i]);
    if (status != STATUS_OK) {
        finish(request, status);
        return;
    }
    request->segment = 0;
    request->segment_count = (uint16_t)count;
    request->base.iov = NULL;
    request->base.iovcnt = 0;
    next_segment(request);
}

void vhost_request_start(struct vhost_request *request)
{
    switch (request->type) {
    case TYPE_IN:
    case TYPE_OUT:
        start_transfer(request, request->base.offset);
        return;
    case TYPE_FLUSH:
        start_flush(request);
        return;
    case TYPE_DISCARD:
    case TYPE_WRITE_ZEROES:
        start_segments(request);
        return;
    default:
        bt_count(&request->queue->counters.other, 1);
        if (request->type == TYPE_GET_ID)
            get_id(request);
        else
            finish(request, STATUS_UNSUPP);
    }
}

/* ---- parsing ---- */

static int walk_chain(struct vhost_request *request, uint16_t head, struct vhost_chain *chain)
{
    const struct vhost_queue *queue = request->queue;
    const struct vhost_memory *memory = &queue->session->memory;
    *chain = (struct vhost_chain){.iov = request->iov, .max = VHOST_IOV};
    int ret = vhost_ring_chain(&queue->ring, memory, head, chain);
    if (ret != -E2BIG)
        return ret;
    /* Longer than seg_max allows: legal where the header is in pieces or a buffer spans regions, but rare. */
    chain->max = BT_VHOST_MAX_CHAIN + 2;
    chain->iov = request->iov_allocated = calloc((size_t)chain->max, sizeof *chain->iov);
    return chain->iov ? vhost_ring_chain(&queue->ring, memory, head, chain) : -ENOMEM;
}

/* Reads the header and leaves in chain's readable part what follows it. */
static void take_header(struct vhost_chain *chain, struct blk_header *header)
{
    bt_iov_to_buffer(chain->iov, chain->readable, 0, header, HEADER_SIZE);
    size_t left = HEADER_SIZE;
    while (left && left >= chain->iov->iov_len) {
        left -= chain->iov->iov_len;
        chain->iov++;
        chain->readable--;
    }
    if (left) {
        chain->iov->iov_base = (char *)chain->iov->iov_base + left;
        chain->iov->iov_len -= left;
    }
    chain->readable_bytes -= HEADER_SIZE;
}

/* The graph's vector is exactly as long as its request: the status byte goes. Returns the entries left. */
static int without_status(struct iovec *iov, int iovcnt)
{
    iov[iovcnt - 1].iov_len--;
    return iov[iovcnt - 1].iov_len ? iovcnt : iovcnt - 1;
}

int vhost_request_parse(struct vhost_request *request, uint16_t head)
{
    struct vhost_chain chain;
    struct blk_header header;
    int ret = walk_chain(request, head, &chain);
    if (ret < 0)
        return ret;
    if (chain.readable_bytes < HEADER_SIZE || !chain.writable_bytes)
        return -EPROTO;
    const struct iovec *last = &chain.iov[chain.readable + chain.writable - 1];
    request->status = (unsigned char *)last->iov_base + last->iov_len - 1;
    take_header(&chain, &header);
    request->head = head;
    request->type = le32toh(header.type);
    bool from_device = request->type == TYPE_IN || request->type == TYPE_GET_ID;
    request->base.offset = le64toh(header.sector);
    struct iovec *data = from_device ? chain.iov + chain.readable : chain.iov;
    request->base.iov = data;
    request->base.iovcnt = from_device ? without_status(data, chain.writable) : chain.readable;
    request->base.length = from_device ? chain.writable_bytes - 1 : chain.readable_bytes;
    /* A request that is refused for its length never reports this value. */
    request->written = from_device ? (uint32_t)bt_min(chain.writable_bytes, UINT32_MAX) : chain.writable_bytes == 1;
    return 0;
}
