/* SPDX-License-Identifier: Apache-2.0 */
/* Between the life of an io (device.c) and the commands that its parts become (ops.c). */
#ifndef BT_ISCSI_OPS_H
#define BT_ISCSI_OPS_H

#include "internal.h"

enum stage { DATA, DURABLE };

struct io_state { /* in the io's scratch */
    uint64_t pos, end; /* how far it has been started; how far the LUN goes */
    int32_t result;
    uint16_t pending;
    uint8_t session, stage;
    uint64_t source_offset; /* of a copy: the source is the io's `bounce` */
};
_Static_assert(sizeof(struct io_state) <= sizeof(((struct bt_io *)0)->scratch), "the state lies in scratch");

static inline struct io_state *state_of(struct bt_io *io) { return (struct io_state *)io->scratch; }
static inline struct node *node_of(struct bt_io *io) { return (struct node *)io->device; }
static inline struct session *session_of(struct bt_io *io) { return &node_of(io)->sessions[state_of(io)->session]; }

/* ops.c */
/* Starts the next part of the io, which takes state->pos on by so much; or ends it with an error. */
void ops_start_some(struct bt_io *io);
void ops_start_flush(struct bt_io *io);
bool ops_can_copy(struct bt_device *destination, struct bt_device *source);
/* Whether zeroes may unmap, with the certainty that they read as zeros. */
bool ops_may_unmap(const struct node *node);

/* device.c: a part is over. The io may be, too. */
void io_part_over(struct bt_io *io, int result);

#endif
