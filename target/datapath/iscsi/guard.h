/* SPDX-License-Identifier: Apache-2.0 */
/* Inside of the guard: see guard.c. */
#ifndef BT_ISCSI_GUARD_H
#define BT_ISCSI_GUARD_H

#include "digest.h"
#include "internal.h"

#define RX_BYTES (64u << 10)
#define TX_BYTES (64u << 10)
#define RAW_BYTES (32u << 10)
#define OUT_BYTES (24u << 10)
#define SMALL_MAX (16u << 10) /* data that are handed on whole: login text, sense data, rejects */

struct guard {
    int tcp, inner;
    struct iscsi_context *ctx;
    struct session *session; /* NULL: still a link's */
    int header_offer, data_offer; /* enum iscsi_header_digest */
    bool logged_in;
    bool header_digests, data_digests; /* agreed */
    bool blocked; /* the socket takes no more for now */
    unsigned pings;
    uint32_t asked; /* bytes that have come for the link's questions */
    struct output output;
    /* Data-In whose data come now */
    struct command *command;
    uint32_t data_left, tail, data_crc; /* tail: what is behind the data, padding and digest */
    unsigned char header[BHS];
    /* a PDU of libiscsi's that goes out now, where digests are put in */
    uint32_t sending, send_crc;
    bool digest_due;
    char error[160];
    uint32_t rx_start, rx_end, raw_start, raw_end, tx_start, tx_end, out_length;
    unsigned char rx[RX_BYTES], raw[RAW_BYTES], tx[TX_BYTES], out[OUT_BYTES];
};

__attribute__((format(printf, 2, 3))) int guard_refuse(struct guard *guard, const char *format, ...);
int guard_socket_failed(struct guard *guard, int error);

/* Bytes of a header, as they are now. */
static inline uint32_t guard_header_bytes(const struct guard *guard)
{
    return BHS + (guard->header_digests && guard->logged_in ? DIGEST : 0);
}
static inline uint32_t pdu_length(const unsigned char *header) { return get32(header + 4) & 0xffffff; }
static inline uint32_t pdu_padded(uint32_t length) { return (length + 3) & ~3u; }

/* ---- guard_text.c ---- */

/* The text of a login response, with a null byte behind it: 0, and what was negotiated is known; or -EPROTO. */
int guard_check_text(struct guard *guard, const char *text, uint32_t length);
/* The end of the login: whether what was demanded was agreed on. */
int guard_check_digests(struct guard *guard);
/* Takes a key out of a text, with a null byte behind it; returns the length that is left. */
uint32_t text_without(char *text, uint32_t length, const char *key);
/* Our key for the login request. */
const char *guard_data_offer(const struct guard *guard);

#endif
