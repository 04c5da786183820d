/* SPDX-License-Identifier: Apache-2.0 */
/* From requests to the gate and back. A READ or WRITE of more than NBD_PIECE bytes is done in pieces, so that a
 * client's largest request costs no more memory than its share, and so that socket and disk work at once.
 */
#define _GNU_SOURCE
#include "nbd.h"

/* ---- starting ---- */

static void core_done(struct bt_request *core);

static uint8_t core_flags(const struct bt_nbd_session *session, const struct nbd_slot *call)
{
    uint8_t flags = 0;
    if (call->flags & NBD_CMD_FLAG_FUA || session->mode & BT_NBD_WRITETHROUGH)
        flags |= BT_FUA;
    if (call->type == NBD_CMD_WRITE_ZEROES) {
        if (!(call->flags & NBD_CMD_FLAG_NO_HOLE))
            flags |= BT_UNMAP;
        if (call->flags & NBD_CMD_FLAG_FAST_ZERO)
            flags |= BT_FAST_ZERO;
    }
    return flags;
}

static bool changes(uint16_t type)
{
    return type == NBD_CMD_WRITE || type == NBD_CMD_TRIM || type == NBD_CMD_WRITE_ZEROES;
}

static void start(struct bt_nbd_session *session, struct nbd_slot *slot)
{
    static const uint8_t ops[] = {
        [NBD_CMD_READ] = BT_READ,       [NBD_CMD_WRITE] = BT_WRITE,
        [NBD_CMD_FLUSH] = BT_FLUSH,     [NBD_CMD_TRIM] = BT_DISCARD,
        [NBD_CMD_CACHE] = BT_CACHE,     [NBD_CMD_WRITE_ZEROES] = BT_ZEROES,
        [NBD_CMD_BLOCK_STATUS] = BT_STATUS,
    };
    const struct nbd_slot *call = slot->call;
    slot->core.thread = session->thread;
    slot->core.object = session->gate;
    slot->core.hurried = &session->hurried;
    slot->core.done = core_done;
    slot->core.op = ops[call->type];
    slot->core.flags = changes(call->type) ? core_flags(session, call) : 0;
    slot->core.iov = &slot->iov;
    slot->core.iovcnt = call->type == NBD_CMD_READ || call->type == NBD_CMD_WRITE;
    slot->iov = (struct iovec){slot->buffer, slot->core.length};
    session->active++;
    bt_request_start(&slot->core);
}

/* False: no buffer now. */
static bool take_buffer(struct bt_nbd_session *session, struct nbd_slot *slot, uint32_t length)
{
    slot->buffer = nbd_pool_get(&session->pool, length);
    slot->buffer_length = length;
    return slot->buffer != NULL;
}

static uint32_t buffer_need(const struct nbd_slot *call)
{
    if (call->type == NBD_CMD_BLOCK_STATUS)
        return call->flags & NBD_CMD_FLAG_REQ_ONE ? sizeof(struct bt_extent)
                                                  : NBD_STATUS_EXTENTS * sizeof(struct bt_extent);
    return (uint32_t)bt_min(call->length - call->assigned, NBD_PIECE);
}

static bool is_whole(const struct nbd_slot *call)
{
    return call->type == NBD_CMD_BLOCK_STATUS || call->length <= NBD_PIECE;
}

/* Simple replies have no way to say which part of a read they hold: its pieces are sent in order. */
static bool is_ordered(const struct bt_nbd_session *session, const struct nbd_slot *call)
{
    return call->type == NBD_CMD_READ && !is_whole(call) && !(session->mode & BT_NBD_STRUCTURED);
}

/* The slot of the call's next piece, with its buffer; NULL: wait, or the call was answered with an error. */
static struct nbd_slot *next_piece(struct bt_nbd_session *session, struct nbd_slot *call)
{
    struct nbd_slot *piece = is_whole(call) ? call : nbd_slot_get(session);
    if (!piece)
        return NULL;
    uint32_t length = buffer_need(call);
    if (!take_buffer(session, piece, length)) {
        if (piece != call)
            nbd_slot_put(session, piece);
        if (!session->pool.in_use && !call->pieces)
            nbd_fail(session, call, NBD_ENOMEM, "no memory");
        return NULL;
    }
    piece->call = call;
    piece->type = call->type;
    piece->core.offset = call->offset + call->assigned;
    piece->core.length = length;
    call->assigned += length;
    call->pieces++;
    return piece;
}

static void wait_for(struct bt_nbd_session *session, enum nbd_rx_state state)
{
    if (session->state != NBD_RX_CLOSED)
        session->state = state;
}

static void start_status(struct bt_nbd_session *session, struct nbd_slot *slot)
{
    slot->core.length = slot->length;
    slot->core.extents = slot->buffer;
    slot->core.extents_max = slot->flags & NBD_CMD_FLAG_REQ_ONE ? 1 : NBD_STATUS_EXTENTS;
    slot->assigned = slot->length;
    start(session, slot);
}

static void start_read(struct bt_nbd_session *session, struct nbd_slot *piece)
{
    struct nbd_slot *call = piece->call;
    if (call->assigned == call->length && !is_ordered(session, call)) {
        session->call = NULL;
        wait_for(session, NBD_RX_HEADER);
    }
    start(session, piece);
}

static void receive_payload(struct bt_nbd_session *session, struct nbd_slot *piece)
{
    session->call = NULL;
    session->piece = piece;
    session->piece_got = 0;
    wait_for(session, NBD_RX_PAYLOAD);
}

bool nbd_continue(struct bt_nbd_session *session)
{
    struct nbd_slot *call = session->call;
    if (is_ordered(session, call) && call->pieces)
        return false;
    struct nbd_slot *piece = next_piece(session, call);
    if (!piece)
        return session->state != NBD_RX_START;
    if (call->type == NBD_CMD_WRITE) {
        receive_payload(session, piece);
    } else if (call->type == NBD_CMD_READ) {
        start_read(session, piece);
    } else {
        session->call = NULL;
        wait_for(session, NBD_RX_HEADER);
        start_status(session, piece);
    }
    return true;
}

void nbd_payload_done(struct bt_nbd_session *session)
{
    struct nbd_slot *piece = session->piece, *call = piece->call;
    session->piece = NULL;
    if (call->assigned < call->length) {
        session->call = call;
        wait_for(session, NBD_RX_START);
    } else {
        wait_for(session, NBD_RX_HEADER);
    }
    start(session, piece);
}

void nbd_begin(struct bt_nbd_session *session, struct nbd_slot *slot)
{
    slot->call = slot;
    slot->assigned = slot->pieces = slot->error = 0;
    bool large = slot->type == NBD_CMD_WRITE && slot->length >= NBD_LARGE_WRITE;
    session->rx_want = large ? NBD_REQUEST_BYTES : NBD_RX_BYTES;
    if (slot->type == NBD_CMD_READ || slot->type == NBD_CMD_WRITE || slot->type == NBD_CMD_BLOCK_STATUS) {
        session->call = slot;
        session->state = NBD_RX_START;
        return;
    }
    slot->pieces = 1;
    slot->assigned = slot->length;
    slot->core.offset = slot->offset;
    slot->core.length = slot->length;
    start(session, slot);
}

void nbd_fail(struct bt_nbd_session *session, struct nbd_slot *call, uint32_t error, const char *reason)
{
    if (is_ordered(session, call) && session->owner == call) {
        nbd_break(session, -EIO); /* a part was sent as good */
        return;
    }
    session->call = NULL;
    if (call->type == NBD_CMD_WRITE && call->assigned < call->length) {
        session->drain_left = call->length - call->assigned;
        session->rx_want = NBD_RX_BYTES;
        wait_for(session, NBD_RX_DRAIN);
    } else {
        wait_for(session, NBD_RX_HEADER);
    }
    nbd_reply_status(session, call, error, reason);
}

/* ---- done ---- */

static void drop_buffer(struct bt_nbd_session *session, struct nbd_slot *slot)
{
    if (slot->buffer)
        nbd_pool_put(&session->pool, slot->buffer, slot->buffer_length);
    slot->buffer = NULL;
    session->relieved = true;
}

static void drop_piece(struct bt_nbd_session *session, struct nbd_slot *piece)
{
    drop_buffer(session, piece);
    nbd_slot_put(session, piece);
}

static void whole_done(struct bt_nbd_session *session, struct nbd_slot *slot, uint32_t error)
{
    if (!error && slot->type == NBD_CMD_READ) {
        nbd_reply_read(session, slot, true);
    } else if (!error && slot->type == NBD_CMD_BLOCK_STATUS) {
        nbd_reply_extents(session, slot);
    } else {
        drop_buffer(session, slot);
        nbd_reply_status(session, slot, error, NULL);
    }
}

static void write_piece_done(struct bt_nbd_session *session, struct nbd_slot *piece, bool complete)
{
    struct nbd_slot *call = piece->call;
    drop_piece(session, piece);
    if (complete)
        nbd_reply_status(session, call, call->error, NULL);
}

static void read_piece_done(struct bt_nbd_session *session, struct nbd_slot *piece, uint32_t error, bool complete)
{
    struct nbd_slot *call = piece->call;
    if (error)
        drop_piece(session, piece);
    else
        nbd_reply_read(session, piece, complete && !call->error);
    if (complete && call->error)
        nbd_reply_status(session, call, call->error, NULL);
    else if (complete)
        nbd_slot_put(session, call);
}

/* Only now may the next request begin: it could be another ordered read. */
static void ordered_done(struct bt_nbd_session *session, struct nbd_slot *call)
{
    session->call = NULL;
    wait_for(session, NBD_RX_HEADER);
    nbd_slot_put(session, call);
}

static void ordered_piece_done(struct bt_nbd_session *session, struct nbd_slot *piece, uint32_t error, bool complete)
{
    struct nbd_slot *call = piece->call;
    bool first = piece->core.offset == call->offset;
    session->relieved = true;
    if (!error) {
        nbd_reply_ordered(session, piece, first, complete);
        if (complete)
            ordered_done(session, call);
        return;
    }
    drop_piece(session, piece);
    nbd_fail(session, call, error, NULL);
}

static void piece_done(struct bt_nbd_session *session, struct nbd_slot *piece, uint32_t error)
{
    struct nbd_slot *call = piece->call;
    bool complete = --call->pieces == 0 && call->assigned == call->length;
    if (error && !call->error)
        call->error = error;
    if (call->type == NBD_CMD_WRITE)
        write_piece_done(session, piece, complete);
    else if (is_ordered(session, call))
        ordered_piece_done(session, piece, error, complete);
    else
        read_piece_done(session, piece, error, complete);
}

static void core_done(struct bt_request *core)
{
    struct nbd_slot *slot = BT_CONTAINER(core, struct nbd_slot, core);
    struct bt_nbd_session *session = slot->session;
    uint32_t error = 0;
    if (BT_UNLIKELY(core->ret))
        error = nbd_error_from_errno(-core->ret, slot->call->flags & NBD_CMD_FLAG_FAST_ZERO);
    session->active--;
    bt_defer(session->thread, &session->deferred);
    if (slot->call == slot)
        whole_done(session, slot, error);
    else
        piece_done(session, slot, error);
}
