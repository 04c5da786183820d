/* SPDX-License-Identifier: Apache-2.0 */
/* An NBD server for the fuzz target nbd_client: takes a client's requests from a socket and checks each of them;
 * answers as it is told, rightly or not, and knows which of its answers were right. Its disk never changes: a write
 * has to bring what lies there already. */
#ifndef NBD_SERVER_MODEL_H
#define NBD_SERVER_MODEL_H

#include "fuzz.h"
#include "nbd_wire.h"
#include "nbdc.h"

#define REGION (72u << 10) /* each call of the harness has one, so that an offset names its call */
#define CALLS 48u
#define MODEL_SIZE (REGION * CALLS)
#define MODEL_PAYLOAD (32u << 10)
#define MODEL_CONTEXT 3

/* Its content: never 0xEE, which buffers are filled with before. Made by the first model_begin. */
extern uint8_t model_disk[MODEL_SIZE];

struct wanted { /* one request */
    uint64_t cookie, offset, length, covered;
    uint16_t type, flags;
    bool open, failed;
};

struct server_model {
    int fd; /* -1: none */
    struct bt_nbdc_link link;
    uint8_t in[256 << 10];
    size_t have;
    uint64_t payload_left, payload_at;
    struct wanted wanted[512];
    uint8_t covered[512][MODEL_PAYLOAD]; /* bytes of each request that were told */
    unsigned count;
    uint8_t out[1 << 20];
    size_t out_length, out_sent;
    bool lied;    /* data that was sent may be wrong */
    bool illegal; /* the client may give this connection up */
    bool stopped; /* it said DISC, or the socket is gone */
};

void model_begin(struct server_model *model, int fd, const struct bt_nbdc_link *link);
/* Reads what the client has sent. True when there was something. */
bool model_read(struct server_model *model);
/* Sends up to `most` bytes of what was answered. True when some went. */
bool model_write(struct server_model *model, size_t most);
/* One answer, or a part of one, as the input says. */
void model_answer(struct server_model *model, struct input *in);
/* All that is open is answered rightly. */
void model_answer_all(struct server_model *model);
/* Bytes as they are. */
void model_raw(struct server_model *model, struct input *in, size_t length);
void model_close(struct server_model *model);

/* The bytes that were answered without an error, in the call that has this region, since its start was asked for. */
extern uint64_t model_good[CALLS];
extern bool model_failed[CALLS]; /* an error was told */

#endif
