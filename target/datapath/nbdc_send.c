/* SPDX-License-Identifier: Apache-2.0 */
/* Ios to requests, as the server's transmission flags allow, and requests to the socket: all of a turn together. */
#define _GNU_SOURCE
#include <sys/socket.h>

#include "nbdc_internal.h"

#define SEND_VECTORS 192
#define TRIM_MAX (1u << 30) /* of one TRIM or BLOCK_STATUS without extended headers; its length has 32 bits */

static const uint8_t zeros[64u << 10];

/* ---- what an io becomes ---- */

struct plan {
    uint64_t length; /* bytes of the io that the server has to do with */
    uint64_t max;    /* in one request */
    uint16_t type, flags;
    bool zeros;  /* WRITE of zeros */
    bool single; /* one request, whatever it covers */
    bool over;   /* nothing is sent; the io ends with... */
    int result;  /* ...this */
};

static bool can(const struct nbdc_conn *conn, uint32_t flag) { return conn->link.transmission_flags & flag; }

static bool wants_fua(const struct nbdc_conn *conn, const struct bt_io *io)
{
    return (io->flags & BT_FUA) && !conn->client->no_flush;
}

static uint16_t fua(const struct nbdc_conn *conn, const struct bt_io *io)
{
    return wants_fua(conn, io) && can(conn, NBD_FLAG_SEND_FUA) ? NBD_CMD_FLAG_FUA : 0;
}

static void skip(struct plan *plan, int result)
{
    plan->over = true;
    plan->result = result;
}

static void plan_zeroes(const struct nbdc_conn *conn, struct bt_io *io, struct plan *plan)
{
    bool known = can(conn, NBD_FLAG_SEND_WRITE_ZEROES) && nbdc_io(io)->stage != NBDC_AS_DATA;
    plan->flags = fua(conn, io);
    plan->max = conn->link.max_payload;
    if ((io->flags & BT_FAST_ZERO) && !(known && can(conn, NBD_FLAG_SEND_FAST_ZERO))) {
        skip(plan, -EOPNOTSUPP);
    } else if (!known) {
        plan->type = NBD_CMD_WRITE;
        plan->zeros = true;
    } else {
        plan->type = NBD_CMD_WRITE_ZEROES;
        plan->flags |= io->flags & BT_UNMAP ? 0 : NBD_CMD_FLAG_NO_HOLE;
        plan->flags |= io->flags & BT_FAST_ZERO ? NBD_CMD_FLAG_FAST_ZERO : 0;
        if (conn->link.mode == BT_NBDC_EXTENDED)
            plan->max = INT64_MAX;
    }
}

static void plan_status(const struct nbdc_conn *conn, struct bt_io *io, struct plan *plan)
{
    io->status_length = io->length;
    io->status_flags = plan->length ? 0 : BT_EXTENT_HOLE | BT_EXTENT_ZERO; /* padding past the end */
    if (conn->link.context_id < 0 || !plan->length) {
        if (plan->length)
            io->status_length = plan->length;
        skip(plan, 0);
        return;
    }
    plan->type = NBD_CMD_BLOCK_STATUS;
    plan->flags = NBD_CMD_FLAG_REQ_ONE;
    plan->single = true;
    if (conn->link.mode != BT_NBDC_EXTENDED)
        plan->max = TRIM_MAX;
}

static void plan_flush(const struct nbdc_conn *conn, struct plan *plan)
{
    plan->type = NBD_CMD_FLUSH;
    plan->length = 0;
    plan->single = true;
    if (conn->client->no_flush || !can(conn, NBD_FLAG_SEND_FLUSH))
        skip(plan, 0);
}

static void plan_data(const struct nbdc_conn *conn, struct bt_io *io, struct plan *plan)
{
    plan->type = io->op == BT_READ ? NBD_CMD_READ : NBD_CMD_WRITE;
    plan->max = conn->link.max_payload;
    if (io->op == BT_WRITE) {
        plan->flags = fua(conn, io);
        if (plan->length < io->length)
            skip(plan, -ENOSPC);
    } else if (plan->length < io->length && !nbdc_io(io)->pos) {
        bt_iov_zero(io->iov, io->iovcnt, plan->length, io->length - plan->length);
    }
}

static struct plan make_plan(const struct nbdc_conn *conn, struct bt_io *io)
{
    uint64_t size = atomic_load_explicit(&conn->client->export_size, memory_order_relaxed);
    uint64_t left = io->offset < size ? size - io->offset : 0;
    struct plan plan = {.length = bt_min(io->length, left), .max = INT64_MAX};
    bool extended = conn->link.mode == BT_NBDC_EXTENDED;
    if (nbdc_io(io)->stage == NBDC_FLUSH || io->op == BT_FLUSH) {
        plan_flush(conn, &plan);
    } else if (io->op == BT_READ || io->op == BT_WRITE) {
        plan_data(conn, io, &plan);
    } else if (io->op == BT_ZEROES) {
        plan_zeroes(conn, io, &plan);
    } else if (io->op == BT_STATUS) {
        plan_status(conn, io, &plan);
    } else { /* DISCARD, CACHE */
        bool discard = io->op == BT_DISCARD;
        plan.type = discard ? NBD_CMD_TRIM : NBD_CMD_CACHE;
        plan.flags = discard ? fua(conn, io) : 0;
        plan.max = !discard ? conn->link.max_payload : extended ? INT64_MAX : TRIM_MAX;
        if (!can(conn, discard ? NBD_FLAG_SEND_TRIM : NBD_FLAG_SEND_CACHE))
            skip(&plan, 0);
    }
    if ((conn->link.transmission_flags & NBD_FLAG_READ_ONLY) &&
        (io->op == BT_WRITE || io->op == BT_ZEROES || io->op == BT_DISCARD))
        skip(&plan, -EPERM);
    if (!plan.length && !plan.single)
        plan.over = true;
    return plan;
}

/* ---- requests ---- */

static bool has_payload(const struct nbdc_slot *slot) { return slot->type == NBD_CMD_WRITE; }

static void put_head(const struct nbdc_conn *conn, struct nbdc_slot *slot)
{
    bool extended = conn->link.mode == BT_NBDC_EXTENDED;
    uint8_t *head = slot->head;
    nbd_put32(head, extended ? NBD_EXTENDED_REQUEST_MAGIC : NBD_REQUEST_MAGIC);
    nbd_put16(head + 4, slot->flags | (extended && has_payload(slot) ? NBD_CMD_FLAG_PAYLOAD_LEN : 0));
    nbd_put16(head + 6, slot->type);
    nbd_put64(head + 8, slot->cookie);
    nbd_put64(head + 16, slot->offset);
    if (extended)
        nbd_put64(head + 24, slot->length);
    else
        nbd_put32(head + 24, (uint32_t)slot->length);
    slot->head_length = extended ? NBD_EXTENDED_BYTES : NBD_REQUEST_BYTES;
}

void nbdc_slot_free(struct nbdc_conn *conn, struct nbdc_slot *slot)
{
    free(slot->pieces.list);
    slot->pieces = (struct nbdc_pieces){0};
    slot->state = NBDC_FREE;
    slot->io = NULL;
    slot->next = conn->free_slots;
    conn->free_slots = slot;
    conn->in_flight--;
}

static void make_request(struct nbdc_conn *conn, struct bt_io *io, const struct plan *plan)
{
    struct nbdc_slot *slot = conn->free_slots;
    struct nbdc_io *nio = nbdc_io(io);
    conn->free_slots = slot->next;
    conn->in_flight++;
    slot->next = NULL;
    slot->io = io;
    /* A reply that comes twice, or for a connection before this one, has a cookie that nothing has. */
    slot->cookie = ++conn->generation << 16 | (uint64_t)(slot - conn->slots);
    slot->at = plan->single ? 0 : nio->pos;
    slot->length = bt_min(plan->length - slot->at, plan->max);
    slot->offset = plan->type == NBD_CMD_FLUSH ? 0 : io->offset + slot->at;
    slot->type = plan->type;
    slot->flags = plan->flags;
    slot->state = NBDC_UNSENT;
    slot->zeros = plan->zeros;
    slot->gone = false;
    slot->answered = slot->chunked = slot->status = false;
    slot->error = 0;
    slot->covered = 0;
    put_head(conn, slot);
    *conn->tx_tail = slot;
    conn->tx_tail = &slot->next;
    nio->pos += slot->length;
    nio->pending++;
    bt_count(&conn->counters.requests, 1);
}

/* Makes as many requests of the io as there are slots for. True when all are made. */
static bool make_requests(struct nbdc_conn *conn, struct bt_io *io)
{
    struct nbdc_io *nio = nbdc_io(io);
    for (;;) {
        struct plan plan = make_plan(conn, io);
        if (plan.over) {
            nio->result = plan.result;
            return true;
        }
        if (!plan.single && nio->pos >= plan.length)
            return true;
        if (!conn->free_slots)
            return false;
        make_request(conn, io, &plan);
        if (plan.single)
            return true;
    }
}

/* ---- the end of an io ---- */

static bool is_change(int op) { return op == BT_WRITE || op == BT_ZEROES || op == BT_DISCARD; }

static void again(struct nbdc_conn *conn, struct bt_io *io, enum nbdc_stage stage)
{
    struct nbdc_io *nio = nbdc_io(io);
    nio->stage = stage;
    nio->result = 0;
    nio->pos = 0;
    nbdc_enqueue(conn, io);
}

/* All requests of the io are answered. */
static void settle(struct nbdc_conn *conn, struct bt_io *io)
{
    struct nbdc_io *nio = nbdc_io(io);
    bool unsupported = nio->result == -EOPNOTSUPP && nio->stage == NBDC_PLAIN;
    if (unsupported && io->op == BT_ZEROES && !(io->flags & BT_FAST_ZERO)) {
        again(conn, io, NBDC_AS_DATA);
        return;
    }
    if (unsupported && io->op == BT_DISCARD)
        nio->result = 0; /* it is a hint */
    if (nio->result == 0 && nio->stage != NBDC_FLUSH && is_change(io->op) && wants_fua(conn, io) &&
        !can(conn, NBD_FLAG_SEND_FUA)) {
        again(conn, io, NBDC_FLUSH);
        return;
    }
    nbdc_complete(io, nio->result);
}

void nbdc_answered(struct nbdc_conn *conn, struct nbdc_slot *slot)
{
    struct bt_io *io = slot->io;
    struct nbdc_io *nio = nbdc_io(io);
    slot->answered = true;
    if (slot->state != NBDC_SENT)
        return; /* its data is still being sent from the io's memory */
    if (slot->error) {
        bt_count(&conn->counters.errors, 1);
        if (!nio->result)
            nio->result = slot->error;
    }
    nbdc_slot_free(conn, slot);
    if (--nio->pending == 0 && !nio->queued)
        settle(conn, io);
    if (conn->waiting.head)
        bt_defer(atomic_load_explicit(&conn->thread, memory_order_relaxed), &conn->deferred);
}

static void issue(struct nbdc_conn *conn)
{
    struct bt_io *io;
    while ((io = conn->waiting.head)) {
        struct nbdc_io *nio = nbdc_io(io);
        if (!nio->result && !make_requests(conn, io))
            return;
        conn->waiting.head = nio->next;
        if (!nio->next)
            conn->waiting.tail = &conn->waiting.head;
        conn->queued--;
        nio->queued = false;
        if (!nio->pending)
            settle(conn, io);
    }
}

/* ---- the socket ---- */

static int add_vector(struct iovec *out, int n, const void *base, uint64_t length, uint64_t *drop, uint64_t *total)
{
    if (*drop >= length) {
        *drop -= length;
        return n;
    }
    out[n] = (struct iovec){(char *)(uintptr_t)base + *drop, length - *drop};
    *total += length - *drop;
    *drop = 0;
    return n + 1;
}

static int add_zeros(const struct nbdc_slot *slot, struct iovec *out, int n, uint64_t *drop, uint64_t *total)
{
    for (uint64_t at = 0; at < slot->length && n < SEND_VECTORS; at += sizeof zeros)
        n = add_vector(out, n, zeros, bt_min(sizeof zeros, slot->length - at), drop, total);
    return n;
}

static int add_data(const struct nbdc_slot *slot, struct iovec *out, int n, uint64_t *drop, uint64_t *total)
{
    const struct bt_io *io = slot->io;
    uint64_t before = slot->at, left = slot->length;
    for (int i = 0; i < io->iovcnt && left && n < SEND_VECTORS; i++) {
        const struct iovec *from = &io->iov[i];
        if (before >= from->iov_len) {
            before -= from->iov_len;
            continue;
        }
        uint64_t length = bt_min(left, from->iov_len - before);
        n = add_vector(out, n, (char *)from->iov_base + before, length, drop, total);
        before = 0;
        left -= length;
    }
    return n;
}

static int gather(const struct nbdc_conn *conn, struct iovec *out, uint64_t *total)
{
    uint64_t drop = conn->tx_sent;
    int n = 0;
    *total = 0;
    for (const struct nbdc_slot *slot = conn->tx_head; slot && n < SEND_VECTORS; slot = slot->next) {
        n = add_vector(out, n, slot->head, slot->head_length, &drop, total);
        if (slot->zeros)
            n = add_zeros(slot, out, n, &drop, total);
        else if (has_payload(slot))
            n = add_data(slot, out, n, &drop, total);
    }
    return n;
}

static void sent(struct nbdc_conn *conn, uint64_t n)
{
    bt_count(&conn->counters.sent, n);
    n += conn->tx_sent;
    while (conn->tx_head) {
        struct nbdc_slot *slot = conn->tx_head;
        uint64_t bytes = slot->head_length + (has_payload(slot) ? slot->length : 0);
        if (n < bytes) {
            slot->state = n ? NBDC_SENDING : NBDC_UNSENT;
            break;
        }
        n -= bytes;
        conn->tx_head = slot->next;
        if (!slot->next)
            conn->tx_tail = &conn->tx_head;
        slot->state = NBDC_SENT;
        if (slot->answered)
            nbdc_answered(conn, slot);
    }
    conn->tx_sent = n;
}

/* A front end has truncated the memory of a request. Nothing of what was to be sent was: with one vector at a time it
 * shows whose it is. That request fails; the server, which waits for its data, gets zeros. */
static bool memory_is_gone(struct nbdc_conn *conn)
{
    struct nbdc_slot *slot = conn->tx_head;
    if (errno != EFAULT || (conn->cautious && slot->zeros))
        return false;
    if (conn->cautious) {
        slot->zeros = true;
        slot->error = -EFAULT;
    }
    conn->cautious = !conn->cautious;
    return true;
}

/* False when the socket takes no more now, or the connection is lost. */
static bool send_once(struct nbdc_conn *conn)
{
    struct iovec iov[SEND_VECTORS];
    uint64_t total;
    struct msghdr message = {.msg_iov = iov};
    message.msg_iovlen = (size_t)gather(conn, iov, &total);
    if (BT_UNLIKELY(conn->cautious)) {
        message.msg_iovlen = 1;
        total = iov[0].iov_len;
    }
    ssize_t n = sendmsg(conn->watch.fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    bt_count(&conn->counters.sends, 1);
    if (n < 0 && (errno == EINTR || memory_is_gone(conn)))
        return true;
    if (n < 0 && errno != EAGAIN) {
        nbdc_lose(conn, errno == EPIPE || errno == ECONNRESET ? BT_NBDC_EOF : 0x8000 | errno);
        return false;
    }
    sent(conn, n > 0 ? (uint64_t)n : 0);
    conn->tx_full = n < 0 || (uint64_t)n < total;
    return !conn->tx_full;
}

void nbdc_send(struct nbdc_conn *conn)
{
    do
        issue(conn);
    while (conn->tx_head && !conn->tx_full && send_once(conn));
    if (BT_UNLIKELY(conn->cautious) && !conn->tx_head)
        conn->cautious = false;
}
