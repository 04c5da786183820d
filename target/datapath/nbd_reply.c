/* SPDX-License-Identifier: Apache-2.0 */
/* Replies to the socket: collected, then sent together with one sendmsg from the requests' own buffers. */
#define _GNU_SOURCE
#include <sys/socket.h>

#include "nbd.h"

#define SEND_VECTORS 128
#define BLOCK 4096u
#define HOLE_MIN (32u << 10) /* shorter runs of zeros are sent as data, unless they are the whole reply */

/* EROFS and the like come from the graph's own checks; what the client cannot help is EIO. */
uint32_t nbd_error_from_errno(int error, bool fast_zero)
{
    switch (error) {
    case 0:
        return 0;
    case EPERM:
    case EACCES:
    case EROFS:
        return NBD_EPERM;
    case ENOMEM:
        return NBD_ENOMEM;
    case EINVAL:
        return NBD_EINVAL;
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
        return NBD_ENOSPC;
    case EOPNOTSUPP:
        return fast_zero ? NBD_ENOTSUP : NBD_EINVAL;
    case ESHUTDOWN:
        return NBD_ESHUTDOWN;
    default:
        return NBD_EIO;
    }
}

/* ---- queues ---- */

static void push(struct nbd_queue *queue, struct nbd_slot *slot)
{
    slot->next = NULL;
    *queue->tail = slot;
    queue->tail = &slot->next;
}

static struct nbd_slot *pop(struct nbd_queue *queue)
{
    struct nbd_slot *slot = queue->head;
    if (slot && !(queue->head = slot->next))
        queue->tail = &queue->head;
    return slot;
}

static void release(struct bt_nbd_session *session, struct nbd_slot *slot)
{
    if (slot->buffer)
        nbd_pool_put(&session->pool, slot->buffer, slot->buffer_length);
    slot->buffer = NULL;
    nbd_slot_put(session, slot);
}

/* While a turn lasts: soon enough that the client always has a part of its requests back, and makes new ones while
 * the rest is served; and seldom enough that its wake-ups do not cost more than they bring. */
static bool is_worth_sending(const struct bt_nbd_session *session)
{
    return session->tx_bytes >= NBD_FLUSH_BYTES || session->tx_replies >= NBD_FLUSH_REPLIES ||
           session->tx_written >= NBD_FLUSH_WRITTEN;
}

static void queue_reply(struct bt_nbd_session *session, struct nbd_slot *slot, bool of_owner)
{
    if (BT_UNLIKELY(session->broken)) {
        release(session, slot);
        return;
    }
    push(session->owner && !of_owner ? &session->held : &session->tx, slot);
    session->tx_bytes += slot->reply_bytes;
    session->tx_replies++;
    session->tx_written += slot->type == NBD_CMD_WRITE ? slot->length : 0;
    bt_defer(session->thread, &session->deferred);
    if (!session->tx_full && is_worth_sending(session))
        nbd_send(session);
}

void nbd_discard_replies(struct bt_nbd_session *session)
{
    struct nbd_slot *slot;
    while ((slot = pop(&session->tx)) || (slot = pop(&session->held)))
        release(session, slot);
    session->tx_sent = 0;
    session->tx_bytes = 0;
    session->owner = NULL;
}

/* ---- building ---- */

static void begin_reply(struct nbd_slot *slot)
{
    slot->chunk_count = 0;
    slot->head_used = 0;
    slot->reply_bytes = 0;
}

/* Room for a header, and the chunk that it opens. */
static uint8_t *add_chunk(struct nbd_slot *slot, uint32_t head_length, uint32_t data_at, uint32_t data_length)
{
    uint8_t *head = slot->head + slot->head_used;
    slot->chunks[slot->chunk_count++] = (struct nbd_chunk){
        .data_at = data_at,
        .data_length = data_length,
        .head_at = slot->head_used,
        .head_length = (uint16_t)head_length,
    };
    slot->head_used += (uint16_t)head_length;
    slot->reply_bytes += head_length + data_length;
    return head;
}

static void put_simple(uint8_t *head, const struct nbd_slot *call, uint32_t error)
{
    nbd_put32(head, NBD_SIMPLE_REPLY_MAGIC);
    nbd_put32(head + 4, error);
    memcpy(head + 8, &call->cookie, sizeof call->cookie);
}

static void put_chunk(uint8_t *head, const struct nbd_slot *call, uint16_t type, uint32_t length, bool done)
{
    nbd_put32(head, NBD_STRUCTURED_REPLY_MAGIC);
    nbd_put16(head + 4, done ? NBD_REPLY_FLAG_DONE : 0);
    nbd_put16(head + 6, type);
    memcpy(head + 8, &call->cookie, sizeof call->cookie);
    nbd_put32(head + 16, length);
}

static void add_error(struct nbd_slot *slot, uint32_t error, const char *reason)
{
    uint16_t text = reason ? (uint16_t)strlen(reason) : 0;
    uint8_t *head = add_chunk(slot, NBD_CHUNK_BYTES + 6u + text, 0, 0);
    put_chunk(head, slot, NBD_REPLY_TYPE_ERROR, 6u + text, true);
    nbd_put32(head + NBD_CHUNK_BYTES, error);
    nbd_put16(head + NBD_CHUNK_BYTES + 4, text);
    if (text)
        memcpy(head + NBD_CHUNK_BYTES + 6, reason, text);
}

void nbd_reply_status(struct bt_nbd_session *session, struct nbd_slot *slot, uint32_t error, const char *reason)
{
    begin_reply(slot);
    if (error)
        bt_count(&session->counters.errors, 1);
    if (error && session->mode & BT_NBD_STRUCTURED)
        add_error(slot, error, reason);
    else
        put_simple(add_chunk(slot, NBD_SIMPLE_BYTES, 0, 0), slot, error);
    queue_reply(session, slot, false);
}

/* ---- reads ---- */

static bool is_zero(const uint8_t *data, uint32_t length)
{
    uint64_t word;
    uint32_t at = 0;
    for (; at + sizeof word <= length; at += sizeof word) {
        memcpy(&word, data + at, sizeof word);
        if (word)
            return false;
    }
    for (; at < length; at++)
        if (data[at])
            return false;
    return true;
}

/* The end of the run of blocks that begins at `at` and are all zero, or all not. */
static uint32_t run_end(const uint8_t *data, uint32_t at, uint32_t length, bool zero)
{
    while (at < length && is_zero(data + at, (uint32_t)bt_min(BLOCK, length - at)) == zero)
        at += (uint32_t)bt_min(BLOCK, length - at);
    return at;
}

static void add_data(struct nbd_slot *piece, uint32_t at, uint32_t end, bool done)
{
    if (at == end)
        return;
    uint8_t *head = add_chunk(piece, NBD_CHUNK_BYTES + 8, at, end - at);
    put_chunk(head, piece->call, NBD_REPLY_TYPE_OFFSET_DATA, 8 + end - at, done);
    nbd_put64(head + NBD_CHUNK_BYTES, piece->core.offset + at);
}

static void add_hole(struct nbd_slot *piece, uint32_t at, uint32_t end, bool done)
{
    uint8_t *head = add_chunk(piece, NBD_CHUNK_BYTES + 12, 0, 0);
    put_chunk(head, piece->call, NBD_REPLY_TYPE_OFFSET_HOLE, 12, done);
    nbd_put64(head + NBD_CHUNK_BYTES, piece->core.offset + at);
    nbd_put32(head + NBD_CHUNK_BYTES + 8, end - at);
}

/* What reads as zeros is sent as holes. The data is looked at, rather than the allocation asked for: a look ends
 * at the first byte of data, and finds zeros that are stored, too. */
static void add_content(struct bt_nbd_session *session, struct nbd_slot *piece, bool done)
{
    const uint8_t *data = piece->buffer;
    uint32_t length = (uint32_t)piece->core.length, from = 0, at = 0;
    bool fragment = !(piece->call->flags & NBD_CMD_FLAG_DF) && length >= BLOCK;
    while (fragment && at < length && piece->chunk_count + 3 <= NBD_CHUNKS) {
        uint32_t start = run_end(data, at, length, false);
        at = run_end(data, start, length, true);
        if (at == start || (at - start < HOLE_MIN && at - start < length))
            continue;
        add_data(piece, from, start, false);
        add_hole(piece, start, at, done && at == length);
        bt_count(&session->counters.holes, 1);
        from = at;
    }
    add_data(piece, from, length, done);
}

void nbd_reply_read(struct bt_nbd_session *session, struct nbd_slot *piece, bool done)
{
    begin_reply(piece);
    if (session->mode & BT_NBD_STRUCTURED)
        add_content(session, piece, done);
    else
        put_simple(add_chunk(piece, NBD_SIMPLE_BYTES, 0, (uint32_t)piece->core.length), piece, 0);
    queue_reply(session, piece, false);
}

/* Pieces of an ordered read: from the first to the last the stream is theirs, other replies wait. */
void nbd_reply_ordered(struct bt_nbd_session *session, struct nbd_slot *piece, bool first, bool last)
{
    begin_reply(piece);
    uint8_t *head = add_chunk(piece, first ? NBD_SIMPLE_BYTES : 0, 0, (uint32_t)piece->core.length);
    if (first) {
        put_simple(head, piece->call, 0);
        session->owner = piece->call;
    }
    if (last)
        session->owner = NULL;
    queue_reply(session, piece, true);
    if (!last || session->broken)
        return;
    if (session->held.head) {
        *session->tx.tail = session->held.head;
        session->tx.tail = session->held.tail;
        session->held = (struct nbd_queue){NULL, &session->held.head};
    }
}

/* ---- block status ---- */

/* struct bt_extent to the wire's descriptors, in place: each is shorter than what it replaces. */
static uint32_t convert_extents(struct nbd_slot *slot)
{
    const struct bt_extent *extents = slot->buffer;
    uint8_t *out = slot->buffer;
    uint64_t left = slot->length;
    uint32_t n = 0;
    for (; n < slot->core.extents_count && left; n++) {
        uint64_t length = bt_min(extents[n].length, left);
        uint32_t flags = extents[n].flags;
        nbd_put32(out + 8 * n, (uint32_t)length);
        nbd_put32(out + 8 * n + 4, flags);
        left -= length;
    }
    return n;
}

void nbd_reply_extents(struct bt_nbd_session *session, struct nbd_slot *slot)
{
    uint32_t n = convert_extents(slot);
    if (n == 0) {
        nbd_reply_status(session, slot, NBD_EIO, "no status");
        return;
    }
    begin_reply(slot);
    uint8_t *head = add_chunk(slot, NBD_CHUNK_BYTES + 4, 0, 8 * n);
    put_chunk(head, slot, NBD_REPLY_TYPE_BLOCK_STATUS, 4 + 8 * n, true);
    nbd_put32(head + NBD_CHUNK_BYTES, session->allocation_id);
    queue_reply(session, slot, false);
}

/* ---- sending ---- */

/* Adds a part to the vector, without its first *skip bytes. */
static int add_vector(struct iovec *iov, int n, void *base, size_t length, size_t *skip)
{
    size_t drop = bt_min(*skip, length);
    *skip -= drop;
    if (drop < length)
        iov[n++] = (struct iovec){(char *)base + drop, length - drop};
    return n;
}

static int gather(struct bt_nbd_session *session, struct iovec *iov, size_t *total)
{
    size_t skip = session->tx_sent;
    int n = 0;
    *total = 0;
    for (struct nbd_slot *slot = session->tx.head; slot; slot = slot->next) {
        if (n + 2 * slot->chunk_count > SEND_VECTORS)
            break;
        for (int i = 0; i < slot->chunk_count; i++) {
            const struct nbd_chunk *chunk = &slot->chunks[i];
            n = add_vector(iov, n, slot->head + chunk->head_at, chunk->head_length, &skip);
            if (chunk->data_length)
                n = add_vector(iov, n, (char *)slot->buffer + chunk->data_at, chunk->data_length, &skip);
        }
        *total += slot->reply_bytes;
    }
    *total -= session->tx_sent;
    return n;
}

static void sent(struct bt_nbd_session *session, size_t n)
{
    bt_count(&session->counters.sent, n);
    session->tx_bytes -= n;
    n += session->tx_sent;
    while (session->tx.head && n >= session->tx.head->reply_bytes) {
        struct nbd_slot *slot = pop(&session->tx);
        n -= slot->reply_bytes;
        release(session, slot);
    }
    session->tx_sent = (uint32_t)n;
}

void nbd_send(struct bt_nbd_session *session)
{
    struct iovec iov[SEND_VECTORS];
    session->tx_replies = 0;
    session->tx_written = 0;
    while (session->tx.head && !session->tx_full) {
        size_t total;
        struct msghdr message = {.msg_iov = iov};
        message.msg_iovlen = (size_t)gather(session, iov, &total);
        ssize_t n = sendmsg(session->watch.fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        bt_count(&session->counters.sends, 1);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno != EAGAIN) {
            nbd_break(session, errno == EPIPE || errno == ECONNRESET ? BT_NBD_END_EOF : -errno);
            return;
        }
        sent(session, n > 0 ? (size_t)n : 0);
        session->tx_full = n < 0 || (size_t)n < total;
    }
}
