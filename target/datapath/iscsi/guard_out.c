/* SPDX-License-Identifier: Apache-2.0 */
/* The guard's way to the target. What libiscsi writes is passed on as it is, but where we want data digests, which it
 * does not have: then the login request offers them, and behind the data of each PDU comes the digest. It is that of
 * a copy, which is what is sent: a client may change its buffer meanwhile. */
#define _GNU_SOURCE
#include <poll.h>
#include <sys/socket.h>

#include "guard.h"

#define LOGIN_TEXT_MAX 8192u /* MaxRecvDataSegmentLength of the login phase (RFC 7143 section 6.1) */
#define LOGIN_REQUEST 0x03
#define STAGE 0x0c
#define OPERATIONAL 0x04
#define PUSHES 32 /* sends in a row, before others on the thread have their turn */

/* 1: sent all that there is in tx. 0: the socket is full. */
static int send_tx(struct guard *guard)
{
    while (guard->tx_start < guard->tx_end) {
        ssize_t n = send(guard->tcp, guard->tx + guard->tx_start, guard->tx_end - guard->tx_start, MSG_NOSIGNAL);
        if (n < 0 && errno == EAGAIN)
            return 0;
        if (n < 0 && errno != EINTR)
            return guard_socket_failed(guard, errno);
        guard->tx_start += n > 0 ? (uint32_t)n : 0;
    }
    guard->tx_start = guard->tx_end = 0;
    return 1;
}

/* Reads what libiscsi has written. The number of new bytes. */
static uint32_t read_inner(struct guard *guard, unsigned char *buffer, uint32_t *end, uint32_t size)
{
    uint32_t before = *end;
    while (*end < size) {
        ssize_t n = recv(guard->inner, buffer + *end, size - *end, MSG_DONTWAIT);
        if (n <= 0)
            break;
        output_passes(&guard->output, guard->session, guard_header_bytes(guard), buffer + *end, (uint32_t)n);
        *end += (uint32_t)n;
    }
    return *end - before;
}

static uint32_t raw_there(const struct guard *guard) { return guard->raw_end - guard->raw_start; }

static unsigned char *move_raw(struct guard *guard, uint32_t length)
{
    unsigned char *to = guard->tx + guard->tx_end;
    memcpy(to, guard->raw + guard->raw_start, length);
    guard->raw_start += length;
    guard->tx_end += length;
    return to;
}

/* A login request, as a whole, with our key in place of libiscsi's. 1: moved on. 0: not now. */
static int move_login(struct guard *guard)
{
    const unsigned char *header = guard->raw + guard->raw_start;
    const char *offer = guard_data_offer(guard);
    uint32_t offer_size = (uint32_t)strlen(offer) + 1;
    if (raw_there(guard) < BHS)
        return 0;
    uint32_t length = pdu_length(header);
    if ((header[0] & 0x3f) != LOGIN_REQUEST || header[4] || length + offer_size > LOGIN_TEXT_MAX)
        return guard_refuse(guard, "libiscsi sends a login request that is not understood");
    uint32_t all = BHS + pdu_padded(length);
    if (raw_there(guard) < all || TX_BYTES - guard->tx_end < all + pdu_padded(offer_size) + 1)
        return 0;
    unsigned char *moved = move_raw(guard, all), *text = moved + BHS;
    if ((moved[1] & STAGE) != OPERATIONAL)
        return 1;
    text[length] = 0;
    length = text_without((char *)text, length, "DataDigest=");
    memcpy(text + length, offer, offer_size);
    length += offer_size;
    memset(text + length, 0, pdu_padded(length) - length);
    moved[5] = 0;
    put16(moved + 6, (uint16_t)length);
    guard->tx_end = (uint32_t)(text + pdu_padded(length) - guard->tx);
    return 1;
}

static int move_header(struct guard *guard)
{
    uint32_t bytes = guard_header_bytes(guard);
    if (raw_there(guard) < bytes || TX_BYTES - guard->tx_end < bytes)
        return 0;
    const unsigned char *header = move_raw(guard, bytes);
    if (header[4])
        return guard_refuse(guard, "libiscsi sends additional header segments");
    guard->sending = pdu_padded(pdu_length(header));
    guard->send_crc = 0;
    guard->digest_due = guard->sending;
    return 1;
}

/* The next of what libiscsi has written. 1: moved on. 0: not now. */
static int move_on(struct guard *guard)
{
    if (!guard->logged_in)
        return move_login(guard);
    uint32_t room = TX_BYTES - guard->tx_end;
    if (guard->sending) {
        uint32_t n = (uint32_t)bt_min(guard->sending, bt_min(raw_there(guard), room));
        guard->send_crc = crc32c(guard->send_crc, move_raw(guard, n), n);
        guard->sending -= n;
        return n > 0;
    }
    if (!guard->digest_due)
        return move_header(guard);
    if (room < DIGEST)
        return 0;
    digest_put(guard->send_crc, guard->tx + guard->tx_end);
    guard->tx_end += DIGEST;
    guard->digest_due = false;
    return 1;
}

/* Fills tx with what libiscsi has written, changed. The bytes in tx and those that are new; or -errno. */
static int fill_changed(struct guard *guard)
{
    uint32_t came = 0, new;
    int ret;
    do {
        memmove(guard->raw, guard->raw + guard->raw_start, raw_there(guard));
        guard->raw_end = raw_there(guard);
        guard->raw_start = 0;
        new = read_inner(guard, guard->raw, &guard->raw_end, RAW_BYTES);
        came += new;
        while ((ret = move_on(guard)) > 0)
            ;
        if (ret < 0)
            return ret;
    } while (new);
    return (int)(guard->tx_end + came);
}

/* 0: there is nothing. -errno. */
static int fill_tx(struct guard *guard)
{
    if (guard->data_offer && (guard->data_digests || !guard->logged_in))
        return fill_changed(guard);
    read_inner(guard, guard->tx, &guard->tx_end, TX_BYTES);
    return (int)guard->tx_end;
}

int guard_push(struct guard *guard)
{
    int ret = 1;
    for (int i = 0; i < PUSHES && ret > 0; i++) {
        bool more = iscsi_which_events(guard->ctx) & POLLOUT;
        if (more && iscsi_service(guard->ctx, POLLOUT) < 0)
            return guard_refuse(guard, "%s", iscsi_get_error(guard->ctx));
        int filled = fill_tx(guard);
        ret = filled > 0 ? send_tx(guard) : filled;
        guard->blocked = filled > 0;
        if (filled == 0 || ret > 0)
            guard->pings = 0;
    }
    return ret < 0 ? ret : 0;
}
