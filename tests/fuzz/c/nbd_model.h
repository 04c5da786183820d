/* SPDX-License-Identifier: Apache-2.0 */
/* A client's view of its NBD session: reads the bytes that it sends as the protocol document says, knows what is to
 * be answered and how, and checks every byte that comes back. */
#ifndef BT_FUZZ_NBD_MODEL_H
#define BT_FUZZ_NBD_MODEL_H

#include "fuzz.h"
#include "nbd.h"

#define EXPORT_SIZE ((160u << 10) + 4608) /* some pieces, which are smaller here */
#define BAD_START 0xA000u /* the device fails here */
#define BAD_END 0xA200u
#define REQUESTS_MAX 512
#define STREAM_MAX (1u << 20)

struct call {
    uint16_t type, flags;
    uint64_t offset;
    uint32_t length;
    bool valid;    /* else it is to be answered with an error */
    bool complete; /* its payload was sent */
    bool answered;
    size_t payload, end; /* in the stream: of the header, of all that belongs to it */
    uint32_t covered; /* bytes of a READ, or of a BLOCK_STATUS, that have come */
};

struct client {
    uint32_t mode;
    uint16_t flags;
    uint8_t stream[STREAM_MAX]; /* what was sent */
    size_t sent, parsed;
    uint32_t payload_left;
    bool ended; /* what follows is not read: DISC, or a broken rule */
    struct call calls[REQUESTS_MAX];
    unsigned count, answered;
    /* a reply that has come in part */
    uint8_t head[64];
    unsigned head_got, head_need;
    struct call *reading;
    uint64_t at; /* in the export: where the data that comes belongs */
    uint32_t left;
    bool chunk_done, in_extents;
    uint8_t content[EXPORT_SIZE];
};

void client_reset(struct client *client, uint32_t mode, uint16_t flags);
/* Bytes are added to the stream. Cookies of complete headers are replaced by the request's number. */
void client_send(struct client *client, const uint8_t *data, size_t length);
/* Sets cookies in what is not parsed yet; to be called before the stream's new bytes leave. */
void client_parse(struct client *client);
/* Bytes that came back. */
void client_receive(struct client *client, const uint8_t *data, size_t length);
/* Whether some request wrote these bytes here. */
bool client_wrote(const struct client *client, uint64_t offset, const uint8_t *data, size_t length);

#endif
