/* SPDX-License-Identifier: Apache-2.0 */
/* From the socket to replies. Everything that the server says is checked here, once, against the request that it
 * answers; the first thing that does not fit loses the connection. */
#define _GNU_SOURCE
#include <sys/socket.h>

#include "nbdc_internal.h"

#define RECEIVES_PER_TURN 16
#define RECEIVE_VECTORS 64

/* A chunk of a structured or extended reply. */
struct chunk {
    struct nbdc_slot *slot;
    const uint8_t *payload;
    uint64_t length; /* of the payload */
    uint32_t head;   /* bytes before it */
    uint16_t type;
    bool done;
};

static int errno_of(uint32_t error)
{
    switch (error) {
    case NBD_EPERM:
        return -EPERM;
    case NBD_EIO:
        return -EIO;
    case NBD_ENOMEM:
        return -ENOMEM;
    case NBD_ENOSPC:
        return -ENOSPC;
    case NBD_EOVERFLOW:
        return -EOVERFLOW;
    case NBD_ENOTSUP:
        return -EOPNOTSUPP;
    case NBD_ESHUTDOWN:
        return -EIO;
    default:
        return -EINVAL;
    }
}

static uint32_t available(const struct nbdc_conn *conn) { return conn->rx_tail - conn->rx_head; }

/* Each check of this file ends with this: false, and the connection is lost. */
static bool bad(struct nbdc_conn *conn, int loss)
{
    nbdc_lose(conn, loss);
    return false;
}

/* ---- which parts of a read have come ---- */

static int insert_piece(struct nbdc_pieces *pieces, uint32_t i, uint32_t start, uint32_t end)
{
    if (pieces->count == NBDC_PIECES)
        return -E2BIG;
    if (pieces->count == pieces->capacity) {
        uint32_t capacity = pieces->capacity ? 2 * pieces->capacity : 16;
        struct nbdc_piece *list = realloc(pieces->list, capacity * sizeof *list);
        if (!list)
            return -ENOMEM;
        pieces->list = list;
        pieces->capacity = capacity;
    }
    memmove(&pieces->list[i + 1], &pieces->list[i], (pieces->count - i) * sizeof *pieces->list);
    pieces->list[i] = (struct nbdc_piece){start, end};
    pieces->count++;
    return 0;
}

static void remove_pieces(struct nbdc_pieces *pieces, uint32_t from, uint32_t to)
{
    memmove(&pieces->list[from], &pieces->list[to], (pieces->count - to) * sizeof *pieces->list);
    pieces->count -= to - from;
}

/* Merges [start, end) with those that it touches. 0, or why the connection is lost. */
static int add_piece(struct nbdc_pieces *pieces, uint32_t start, uint32_t end)
{
    uint32_t from = 0;
    while (from < pieces->count && pieces->list[from].end <= start)
        from++;
    if (from < pieces->count && pieces->list[from].start < end)
        return BT_NBDC_BAD_RANGE;
    bool after = from && pieces->list[from - 1].end == start;
    bool before = from < pieces->count && pieces->list[from].start == end;
    if (!after && !before)
        return insert_piece(pieces, from, start, end) ? BT_NBDC_TOO_MANY : 0;
    if (!after) {
        pieces->list[from].start = start;
        return 0;
    }
    pieces->list[from - 1].end = before ? pieces->list[from].end : end;
    if (before)
        remove_pieces(pieces, from, from + 1);
    return 0;
}

/* Content that comes twice is a breach; content that never came must not pass for data. 0, or why the connection is
 * lost. */
static int cover(struct nbdc_slot *slot, uint32_t start, uint32_t length)
{
    struct nbdc_pieces *pieces = &slot->pieces;
    uint32_t end = start + length;
    if (BT_UNLIKELY(start > slot->covered))
        return add_piece(pieces, start, end);
    if (start < slot->covered || (pieces->count && pieces->list[0].start < end))
        return BT_NBDC_BAD_RANGE;
    slot->covered = end;
    if (pieces->count && pieces->list[0].start == end) {
        slot->covered = pieces->list[0].end;
        remove_pieces(pieces, 0, 1);
    }
    return 0;
}

/* ---- the end of a reply ---- */

static bool reply_done(struct nbdc_conn *conn, struct nbdc_slot *slot)
{
    bool whole = slot->type == NBD_CMD_READ           ? slot->covered == slot->length
                 : slot->type == NBD_CMD_BLOCK_STATUS ? slot->status
                                                      : true;
    if (!slot->error && !whole)
        return bad(conn, BT_NBDC_INCOMPLETE);
    if (slot->type != NBD_CMD_READ)
        conn->rx_want = NBDC_RX_BYTES;
    nbdc_answered(conn, slot);
    return true;
}

static bool chunk_done(struct nbdc_conn *conn, const struct chunk *chunk)
{
    return !chunk->done || reply_done(conn, chunk->slot);
}

static bool fail(struct nbdc_conn *conn, struct nbdc_slot *slot, uint32_t error)
{
    /* Its requests are for the next server, when they may wait for one. */
    if (error == NBD_ESHUTDOWN && nbdc_reconnect_ns(conn->client))
        return bad(conn, BT_NBDC_SHUTDOWN);
    if (!slot->error)
        slot->error = errno_of(error);
    return true;
}

/* ---- data ---- */

/* From here on `length` bytes of the stream are for the io of slot, from `at` bytes of the io on. */
static void expect_data(struct nbdc_conn *conn, struct nbdc_slot *slot, uint64_t at, uint64_t length, bool done)
{
    conn->rx_slot = slot;
    conn->rx_at = at;
    conn->rx_left = length;
    conn->rx_done = done;
    conn->rx_want = length < NBDC_LARGE || slot->gone         ? NBDC_RX_BYTES
                    : conn->link.mode == BT_NBDC_EXTENDED     ? NBD_EXTENDED_BYTES + 8
                    : conn->link.mode == BT_NBDC_STRUCTURED ? NBD_CHUNK_BYTES + 8
                                                              : NBD_SIMPLE_BYTES;
}

static bool data_done(struct nbdc_conn *conn)
{
    struct nbdc_slot *slot = conn->rx_slot;
    conn->rx_slot = NULL;
    return !conn->rx_done || reply_done(conn, slot);
}

/* False when more has to come first. */
static bool parse_data(struct nbdc_conn *conn)
{
    struct bt_io *io = conn->rx_slot->io;
    uint64_t n = bt_min(conn->rx_left, available(conn));
    if (!conn->rx_slot->gone)
        bt_iov_from_buffer(io->iov, io->iovcnt, conn->rx_at, conn->rx + conn->rx_head, n);
    conn->rx_head += (uint32_t)n;
    conn->rx_at += n;
    conn->rx_left -= n;
    return !conn->rx_left && data_done(conn);
}

static bool content_range(struct nbdc_conn *conn, const struct chunk *chunk, uint64_t length, uint64_t *at)
{
    const struct nbdc_slot *slot = chunk->slot;
    uint64_t offset = nbd_get64(chunk->payload);
    if (offset < slot->offset || !bt_range_ok(offset - slot->offset, length, slot->length))
        return bad(conn, BT_NBDC_BAD_RANGE);
    *at = offset - slot->offset;
    int loss = cover(chunk->slot, (uint32_t)*at, (uint32_t)length);
    return !loss || bad(conn, loss);
}

static bool offset_data(struct nbdc_conn *conn, const struct chunk *chunk)
{
    uint64_t at, length = chunk->length - 8;
    if (!content_range(conn, chunk, length, &at))
        return false;
    conn->rx_head += chunk->head + 8;
    expect_data(conn, chunk->slot, chunk->slot->at + at, length, chunk->done);
    return true;
}

static bool offset_hole(struct nbdc_conn *conn, const struct chunk *chunk)
{
    struct bt_io *io = chunk->slot->io;
    uint32_t length = nbd_get32(chunk->payload + 8);
    uint64_t at;
    if (!length)
        return bad(conn, BT_NBDC_BAD_LENGTH);
    if (!content_range(conn, chunk, length, &at))
        return false;
    if (!chunk->slot->gone)
        bt_iov_zero(io->iov, io->iovcnt, chunk->slot->at + at, length);
    return true;
}

/* ---- block status ---- */

/* An extent that does not end on a block is cut to one; below a block only "data" is sure. */
static void take_extent(const struct nbdc_conn *conn, const struct nbdc_slot *slot, uint64_t length, uint64_t flags)
{
    struct bt_io *io = slot->io;
    uint64_t block = conn->link.block;
    length = bt_min(length, slot->length);
    if (length < slot->length && length % block) {
        flags = length < block ? 0 : flags;
        length = length < block ? bt_min(block, slot->length) : length - length % block;
    }
    if (conn->link.depth && flags > BT_EXTENT_ZERO)
        flags = BT_EXTENT_ZERO;
    io->status_length = length;
    io->status_flags = (uint32_t)flags & (BT_EXTENT_HOLE | BT_EXTENT_ZERO);
}

static bool block_status(struct nbdc_conn *conn, const struct chunk *chunk)
{
    bool wide = conn->link.mode == BT_NBDC_EXTENDED;
    uint32_t head = wide ? 8 : 4, extent = wide ? 16 : 8;
    const uint8_t *p = chunk->payload;
    if (chunk->length < head + extent || (chunk->length - head) % extent)
        return bad(conn, BT_NBDC_BAD_LENGTH);
    bool counted = !wide || nbd_get32(p + 4) == (chunk->length - head) / extent;
    uint64_t length = wide ? nbd_get64(p + head) : nbd_get32(p + head);
    uint64_t flags = wide ? nbd_get64(p + head + 8) : nbd_get32(p + head + 4);
    if (chunk->slot->status || !counted || !length || nbd_get32(p) != conn->link.context_id)
        return bad(conn, BT_NBDC_BAD_STATUS);
    chunk->slot->status = true;
    take_extent(conn, chunk->slot, length, flags);
    return true;
}

/* ---- chunks ---- */

static bool error_chunk(struct nbdc_conn *conn, const struct chunk *chunk)
{
    const struct nbdc_slot *slot = chunk->slot;
    uint32_t fixed = chunk->type == NBD_REPLY_TYPE_ERROR_OFFSET ? 14 : 6;
    if (chunk->length < fixed)
        return bad(conn, BT_NBDC_BAD_LENGTH);
    uint32_t error = nbd_get32(chunk->payload), text = nbd_get16(chunk->payload + 4);
    if (!error || text > NBD_MAX_STRING || text > chunk->length - fixed)
        return bad(conn, BT_NBDC_BAD_ERROR);
    if (fixed == 14) {
        uint64_t offset = nbd_get64(chunk->payload + 6 + text);
        if (offset < slot->offset || offset - slot->offset > slot->length)
            return bad(conn, BT_NBDC_BAD_RANGE);
    }
    return fail(conn, chunk->slot, error);
}

/* Whether the chunk's type belongs to the request, and its length to the type. */
static int check_chunk(const struct nbdc_conn *conn, const struct chunk *chunk)
{
    const struct nbdc_slot *slot = chunk->slot;
    bool wide = conn->link.mode == BT_NBDC_EXTENDED;
    if (chunk->type & NBD_REPLY_TYPE_IS_ERROR)
        return chunk->length <= NBDC_SMALL ? 0 : BT_NBDC_BAD_ERROR;
    if (chunk->type == NBD_REPLY_TYPE_NONE)
        return chunk->length == 0 && chunk->done ? 0 : BT_NBDC_BAD_LENGTH;
    if (chunk->type == NBD_REPLY_TYPE_OFFSET_DATA && slot->type == NBD_CMD_READ)
        return chunk->length > 8 && chunk->length - 8 <= slot->length ? 0 : BT_NBDC_BAD_LENGTH;
    if (chunk->type == NBD_REPLY_TYPE_OFFSET_HOLE && slot->type == NBD_CMD_READ)
        return chunk->length == 12 ? 0 : BT_NBDC_BAD_LENGTH;
    if (chunk->type == (wide ? NBD_REPLY_TYPE_BLOCK_STATUS_EXT : NBD_REPLY_TYPE_BLOCK_STATUS) &&
        slot->type == NBD_CMD_BLOCK_STATUS)
        return chunk->length <= NBDC_SMALL ? 0 : BT_NBDC_BAD_LENGTH;
    return BT_NBDC_BAD_TYPE;
}

static bool take_chunk(struct nbdc_conn *conn, const struct chunk *chunk)
{
    bool fine = true;
    chunk->slot->chunked = true;
    if (chunk->type == NBD_REPLY_TYPE_OFFSET_DATA)
        return offset_data(conn, chunk); /* the reply goes on when the data has come */
    if (chunk->type & NBD_REPLY_TYPE_IS_ERROR)
        fine = error_chunk(conn, chunk);
    else if (chunk->type == NBD_REPLY_TYPE_OFFSET_HOLE)
        fine = offset_hole(conn, chunk);
    else if (chunk->type != NBD_REPLY_TYPE_NONE)
        fine = block_status(conn, chunk);
    if (!fine)
        return false;
    conn->rx_head += chunk->head + (uint32_t)chunk->length;
    return chunk_done(conn, chunk);
}

static bool take_simple(struct nbdc_conn *conn, struct nbdc_slot *slot, uint32_t error)
{
    bool structured = conn->link.mode != BT_NBDC_SIMPLE, read = slot->type == NBD_CMD_READ;
    if (conn->link.mode == BT_NBDC_EXTENDED || slot->chunked || (structured && read) ||
        (slot->type == NBD_CMD_BLOCK_STATUS && !error))
        return bad(conn, BT_NBDC_BAD_SIMPLE);
    conn->rx_head += NBD_SIMPLE_BYTES;
    if (error && !fail(conn, slot, error))
        return false;
    if (read && !error) {
        slot->covered = (uint32_t)slot->length;
        expect_data(conn, slot, slot->at, slot->length, true);
        return true;
    }
    return reply_done(conn, slot);
}

/* ---- parsing ---- */

/* The request that a cookie names: one that is sent, or of which the payload still is. */
static struct nbdc_slot *find_slot(struct nbdc_conn *conn, uint64_t cookie)
{
    uint64_t i = cookie & 0xffff;
    struct nbdc_slot *slot = i < NBDC_SLOTS ? &conn->slots[i] : NULL;
    if (!slot || slot->cookie != cookie || slot->answered)
        return NULL;
    bool begun = slot->state == NBDC_SENDING && slot->type == NBD_CMD_WRITE && conn->tx_sent >= slot->head_length;
    return slot->state == NBDC_SENT || begun ? slot : NULL;
}

static bool parse_simple(struct nbdc_conn *conn)
{
    const uint8_t *wire = conn->rx + conn->rx_head;
    if (available(conn) < NBD_SIMPLE_BYTES)
        return false;
    struct nbdc_slot *slot = find_slot(conn, nbd_get64(wire + 8));
    return slot ? take_simple(conn, slot, nbd_get32(wire + 4)) : bad(conn, BT_NBDC_BAD_COOKIE);
}

static bool parse_chunk(struct nbdc_conn *conn)
{
    const uint8_t *wire = conn->rx + conn->rx_head;
    bool wide = conn->link.mode == BT_NBDC_EXTENDED;
    uint32_t head = wide ? NBD_EXTENDED_BYTES : NBD_CHUNK_BYTES;
    if (available(conn) < head)
        return false;
    struct chunk chunk = {
        .slot = find_slot(conn, nbd_get64(wire + 8)),
        .payload = wire + head,
        .length = wide ? nbd_get64(wire + 24) : nbd_get32(wire + 16),
        .head = head,
        .type = nbd_get16(wire + 6),
        .done = nbd_get16(wire + 4) & NBD_REPLY_FLAG_DONE,
    };
    if (!chunk.slot)
        return bad(conn, BT_NBDC_BAD_COOKIE);
    if (wide && nbd_get64(wire + 16) != chunk.slot->offset)
        return bad(conn, BT_NBDC_BAD_OFFSET);
    int loss = check_chunk(conn, &chunk);
    if (loss)
        return bad(conn, loss);
    uint64_t wanted = chunk.type == NBD_REPLY_TYPE_OFFSET_DATA ? 8 : chunk.length;
    if (available(conn) < head + wanted) {
        conn->rx_want = NBDC_RX_BYTES;
        return false;
    }
    return take_chunk(conn, &chunk);
}

/* One step. False when more has to come first, or the connection is lost. */
static bool parse_one(struct nbdc_conn *conn)
{
    if (conn->rx_slot)
        return parse_data(conn);
    if (available(conn) < 4)
        return false;
    uint32_t magic = nbd_get32(conn->rx + conn->rx_head);
    if (magic == NBD_SIMPLE_REPLY_MAGIC)
        return parse_simple(conn);
    if (magic == (conn->link.mode == BT_NBDC_EXTENDED ? NBD_EXTENDED_REPLY_MAGIC : NBD_STRUCTURED_REPLY_MAGIC) &&
        conn->link.mode != BT_NBDC_SIMPLE)
        return parse_chunk(conn);
    return bad(conn, BT_NBDC_BAD_MAGIC);
}

/* ---- the socket ---- */

/* Where the next bytes go: first the rest of the data, when there is some, then the bulk buffer. */
static int receive_vector(struct nbdc_conn *conn, struct iovec *iov, uint64_t *data)
{
    uint32_t have = available(conn);
    int n = 0;
    *data = 0;
    memmove(conn->rx, conn->rx + conn->rx_head, have); /* less than a header and a small payload */
    conn->rx_head = 0;
    conn->rx_tail = have;
    if (conn->rx_slot && !conn->rx_slot->gone) {
        const struct bt_io *io = conn->rx_slot->io;
        uint64_t before = conn->rx_at;
        for (int i = 0; i < io->iovcnt && *data < conn->rx_left; i++) {
            if (before >= io->iov[i].iov_len) {
                before -= io->iov[i].iov_len;
                continue;
            }
            if (n == RECEIVE_VECTORS)
                return n;
            uint64_t length = bt_min(io->iov[i].iov_len - before, conn->rx_left - *data);
            iov[n++] = (struct iovec){(char *)io->iov[i].iov_base + before, length};
            *data += length;
            before = 0;
        }
    }
    if (conn->rx_want <= have)
        conn->rx_want = NBDC_RX_BYTES;
    iov[n++] = (struct iovec){conn->rx + have, conn->rx_want - have};
    return n;
}

static void received(struct nbdc_conn *conn, uint64_t n, uint64_t data)
{
    uint64_t direct = bt_min(n, data);
    bt_count(&conn->counters.received, n);
    conn->rx_at += direct;
    conn->rx_left -= direct;
    conn->rx_tail += (uint32_t)(n - direct);
    if (conn->rx_slot && !conn->rx_left && !data_done(conn))
        return;
    while (parse_one(conn))
        ;
}

/* A front end has truncated the memory of one request: that fails, the connection is others', too. */
static bool memory_is_gone(struct nbdc_conn *conn)
{
    struct nbdc_slot *slot = conn->rx_slot;
    if (errno != EFAULT || !slot || slot->gone)
        return false;
    slot->gone = true;
    slot->error = slot->error ? slot->error : -EFAULT;
    conn->rx_want = NBDC_RX_BYTES;
    return true;
}

/* One receive. True when the socket may have more. */
static bool receive_once(struct nbdc_conn *conn)
{
    struct iovec iov[RECEIVE_VECTORS + 1];
    uint64_t data, asked = 0;
    struct msghdr message = {.msg_iov = iov};
    message.msg_iovlen = (size_t)receive_vector(conn, iov, &data);
    for (size_t i = 0; i < message.msg_iovlen; i++)
        asked += iov[i].iov_len;
    ssize_t n = recvmsg(conn->watch.fd, &message, MSG_DONTWAIT);
    bt_count(&conn->counters.receives, 1);
    if (n > 0) {
        received(conn, (uint64_t)n, data);
        return (uint64_t)n == asked;
    }
    if (n < 0 && memory_is_gone(conn))
        return true;
    if (n == 0 || errno == ECONNRESET)
        nbdc_lose(conn, BT_NBDC_EOF);
    else if (errno != EAGAIN && errno != EINTR)
        nbdc_lose(conn, 0x8000 | errno);
    return false;
}

void nbdc_receive(struct nbdc_conn *conn)
{
    for (int i = 0; i < RECEIVES_PER_TURN; i++)
        if (atomic_load_explicit(&conn->state, memory_order_relaxed) != NBDC_UP || !receive_once(conn))
            return;
}
