/* SPDX-License-Identifier: Apache-2.0 */
/* From the socket to requests. Everything that the client says is copied into a slot and checked here, once; the
 * rest of the session trusts it. */
#define _GNU_SOURCE
#include <sys/socket.h>

#include "nbd.h"

#define RECEIVES_PER_TURN 16

/* ---- what a request may say ---- */

struct command {
    uint16_t flags; /* allowed beside FUA */
    bool known, writes, no_range;
};
static const struct command commands[] = {
    [NBD_CMD_READ] = {.known = true, .flags = NBD_CMD_FLAG_DF},
    [NBD_CMD_WRITE] = {.known = true, .writes = true},
    [NBD_CMD_FLUSH] = {.known = true, .no_range = true},
    [NBD_CMD_TRIM] = {.known = true, .writes = true},
    [NBD_CMD_CACHE] = {.known = true},
    [NBD_CMD_WRITE_ZEROES] = {.known = true, .writes = true, .flags = NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO},
    [NBD_CMD_BLOCK_STATUS] = {.known = true, .flags = NBD_CMD_FLAG_REQ_ONE},
};

static uint32_t refuse(struct nbd_slot *slot, uint32_t error, const char *reason)
{
    slot->reason = reason;
    return error;
}

static uint16_t allowed_flags(const struct bt_nbd_session *session, const struct command *command)
{
    uint16_t flags = command->flags;
    if (session->transmission_flags & NBD_FLAG_SEND_FUA)
        flags |= NBD_CMD_FLAG_FUA;
    if (!(session->transmission_flags & NBD_FLAG_SEND_DF))
        flags &= (uint16_t)~NBD_CMD_FLAG_DF;
    if (!(session->transmission_flags & NBD_FLAG_SEND_FAST_ZERO))
        flags &= (uint16_t)~NBD_CMD_FLAG_FAST_ZERO;
    return flags;
}

static uint32_t check_range(const struct bt_nbd_session *session, struct nbd_slot *slot)
{
    bool grows = slot->type == NBD_CMD_WRITE || slot->type == NBD_CMD_WRITE_ZEROES;
    if (slot->length == 0)
        return refuse(slot, NBD_EINVAL, "length is 0");
    uint64_t size = atomic_load_explicit(&session->size, memory_order_relaxed);
    if (!bt_range_ok(slot->offset, slot->length, size))
        return refuse(slot, grows ? NBD_ENOSPC : NBD_EINVAL, "range is past the end of the export");
    return 0;
}

static uint32_t check_length(const struct bt_nbd_session *session, struct nbd_slot *slot)
{
    if (slot->type == NBD_CMD_WRITE && slot->length > NBD_MAX_PAYLOAD)
        return refuse(slot, NBD_EINVAL, "length is more than the maximum payload");
    if (slot->type != NBD_CMD_READ)
        return 0;
    if (slot->length > NBD_MAX_PAYLOAD)
        return refuse(slot, session->mode & BT_NBD_STRUCTURED ? NBD_EOVERFLOW : NBD_EINVAL,
                      "length is more than the maximum payload");
    if (slot->flags & NBD_CMD_FLAG_DF && slot->length > NBD_PIECE)
        return refuse(slot, NBD_EOVERFLOW, "length is too much for one chunk");
    return 0;
}

/* 0, or the NBD error to answer with. */
static uint32_t check(const struct bt_nbd_session *session, struct nbd_slot *slot)
{
    const struct command *command = slot->type < sizeof commands / sizeof *commands ? &commands[slot->type] : NULL;
    if (!command || !command->known)
        return refuse(slot, NBD_EINVAL, "unknown command");
    if (BT_UNLIKELY(session->shut))
        return refuse(slot, NBD_ESHUTDOWN, "export is being removed");
    if (slot->flags & ~allowed_flags(session, command))
        return refuse(slot, NBD_EINVAL, "flag does not belong to the command");
    if (command->no_range)
        return slot->offset || slot->length ? refuse(slot, NBD_EINVAL, "offset and length must be 0") : 0;
    if (command->writes && session->transmission_flags & NBD_FLAG_READ_ONLY)
        return refuse(slot, NBD_EPERM, "export is read-only");
    if (slot->type == NBD_CMD_BLOCK_STATUS && !(session->mode & BT_NBD_ALLOCATION))
        return refuse(slot, NBD_EINVAL, "no metadata context was selected");
    uint32_t error = check_range(session, slot);
    return error ? error : check_length(session, slot);
}

/* ---- parsing ---- */

static uint32_t available(const struct bt_nbd_session *session) { return session->rx_tail - session->rx_head; }

static void stall(struct bt_nbd_session *session)
{
    session->rx_stalled = true;
    session->relieved = false;
    bt_count(&session->counters.stalls, 1);
}

static void refuse_request(struct bt_nbd_session *session, struct nbd_slot *slot, uint32_t error)
{
    uint32_t payload = slot->type == NBD_CMD_WRITE ? slot->length : 0;
    nbd_reply_status(session, slot, error, slot->reason);
    if (payload > NBD_MAX_DRAIN) {
        nbd_close(session, BT_NBD_END_PROTOCOL);
    } else if (payload && session->state == NBD_RX_HEADER) {
        session->drain_left = payload;
        session->rx_want = NBD_RX_BYTES; /* a large write before may have left it at one header */
        session->state = NBD_RX_DRAIN;
    }
}

static void decode(struct nbd_slot *slot, const uint8_t *wire)
{
    slot->flags = nbd_get16(wire + 4);
    slot->type = nbd_get16(wire + 6);
    memcpy(&slot->cookie, wire + 8, sizeof slot->cookie); /* opaque */
    slot->offset = nbd_get64(wire + 16);
    slot->length = nbd_get32(wire + 24);
}

static bool parse_header(struct bt_nbd_session *session)
{
    if (available(session) < NBD_REQUEST_BYTES)
        return false;
    const uint8_t *wire = session->rx + session->rx_head;
    if (nbd_get32(wire) != NBD_REQUEST_MAGIC) {
        nbd_close(session, BT_NBD_END_PROTOCOL);
        return false;
    }
    if (nbd_get16(wire + 6) == NBD_CMD_DISC) {
        nbd_close(session, BT_NBD_END_DISCONNECT);
        return false;
    }
    struct nbd_slot *slot = nbd_slot_get(session);
    if (!slot) {
        stall(session);
        return false;
    }
    decode(slot, wire);
    session->rx_head += NBD_REQUEST_BYTES;
    bt_count(&session->counters.requests, 1);
    uint32_t error = check(session, slot);
    if (BT_UNLIKELY(error))
        refuse_request(session, slot, error);
    else
        nbd_begin(session, slot);
    return true;
}

static bool parse_payload(struct bt_nbd_session *session)
{
    struct nbd_slot *piece = session->piece;
    uint32_t n = (uint32_t)bt_min(piece->core.length - session->piece_got, available(session));
    memcpy((uint8_t *)piece->buffer + session->piece_got, session->rx + session->rx_head, n);
    session->rx_head += n;
    session->piece_got += n;
    if (session->piece_got < piece->core.length)
        return false;
    nbd_payload_done(session);
    return true;
}

static bool parse_drain(struct bt_nbd_session *session)
{
    uint32_t n = (uint32_t)bt_min(session->drain_left, available(session));
    session->rx_head += n;
    session->drain_left -= n;
    if (session->drain_left)
        return false;
    session->state = NBD_RX_HEADER;
    return true;
}

static bool parse_one(struct bt_nbd_session *session)
{
    switch (session->state) {
    case NBD_RX_HEADER:
        return parse_header(session);
    case NBD_RX_START:
        if (nbd_continue(session))
            return true;
        stall(session);
        return false;
    case NBD_RX_PAYLOAD:
        return parse_payload(session);
    case NBD_RX_DRAIN:
        return parse_drain(session);
    case NBD_RX_CLOSED:
        break;
    }
    return false;
}

void nbd_parse(struct bt_nbd_session *session)
{
    session->rx_stalled = false;
    while (!session->pausing && parse_one(session))
        ;
}

/* ---- the socket ---- */

/* Where the next bytes go: first the rest of the payload, when there is one, then the bulk buffer. */
static int receive_vector(struct bt_nbd_session *session, struct iovec iov[2], size_t *payload)
{
    uint32_t have = available(session);
    int n = 0;
    *payload = 0;
    memmove(session->rx, session->rx + session->rx_head, have); /* less than a header, or nothing */
    session->rx_head = 0;
    session->rx_tail = have;
    if (session->state == NBD_RX_PAYLOAD) {
        struct nbd_slot *piece = session->piece;
        *payload = piece->core.length - session->piece_got;
        iov[n++] = (struct iovec){(uint8_t *)piece->buffer + session->piece_got, *payload};
        if (piece->call->assigned < piece->call->length)
            return n; /* what follows is payload, too */
    }
    iov[n++] = (struct iovec){session->rx + have, session->rx_want - have};
    return n;
}

static void receive_failed(struct bt_nbd_session *session, ssize_t n)
{
    if (n == 0)
        nbd_close(session, BT_NBD_END_EOF);
    else if (errno != EAGAIN && errno != EINTR)
        nbd_break(session, errno == ECONNRESET ? BT_NBD_END_EOF : -errno);
}

/* One receive. True when the socket may have more. */
static bool receive_once(struct bt_nbd_session *session)
{
    struct iovec iov[2];
    size_t payload;
    struct msghdr message = {.msg_iov = iov};
    message.msg_iovlen = (size_t)receive_vector(session, iov, &payload);
    size_t asked = iov[0].iov_len + (message.msg_iovlen > 1 ? iov[1].iov_len : 0);
    ssize_t n = recvmsg(session->watch.fd, &message, MSG_DONTWAIT);
    bt_count(&session->counters.receives, 1);
    if (n <= 0) {
        receive_failed(session, n);
        return false;
    }
    bt_count(&session->counters.received, (uint64_t)n);
    size_t direct = bt_min((size_t)n, payload);
    session->piece_got += (uint32_t)direct;
    session->rx_tail += (uint32_t)((size_t)n - direct);
    nbd_parse(session);
    return (size_t)n == asked;
}

void nbd_receive(struct bt_nbd_session *session)
{
    for (int i = 0; i < RECEIVES_PER_TURN; i++)
        if (session->state == NBD_RX_CLOSED || session->rx_stalled || !receive_once(session))
            return;
}
