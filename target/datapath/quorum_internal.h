/* SPDX-License-Identifier: Apache-2.0 */
/* Between quorum.c, which runs requests on all children, and quorum_vote.c, which compares what comes back. */
#ifndef BT_QUORUM_INTERNAL_H
#define BT_QUORUM_INTERNAL_H

#include "quorum.h"
#include "ranges.h"

#define BT_QUORUM_PAGE 4096u /* how buffers are aligned */
#define BT_QUORUM_CHUNK (1u << 20)       /* bytes that are voted on at once; longer requests take several rounds */
#define BT_QUORUM_MEMORY (64ull << 20)   /* buffers on one thread; requests wait for more */
#define BT_QUORUM_IDLE (8ull << 20)      /* of them, kept while no request needs them */
#define BT_QUORUM_REPORTS 256            /* more than there are kinds of them in practice; else the oldest go */

struct bt_quorum_op;

/* One child's share of a request. */
struct bt_quorum_part {
    struct bt_quorum_op *op;
    struct bt_request request;
    struct iovec iov;
    struct bt_extent extent;
    int result; /* of this round */
    bool bad;   /* outvoted in this round */
};

struct bt_quorum_op {
    struct bt_quorum_op *next; /* in the lane's list of free ones, or waiting for memory */
    struct bt_quorum *quorum;
    struct bt_io *io;
    /* Runs when nothing is pending. Starts parts and returns true, or finishes the op and returns false. */
    bool (*step)(struct bt_quorum_op *op);
    int pending;
    uint64_t at, length; /* this round's piece of the io */
    struct bt_range range;
    unsigned char *buffer;
    uint64_t buffer_size, need;
    int turn; /* FIFO: the child that is asked */
    int count, capacity;
    struct bt_quorum_part parts[];
};

/* What belongs to one thread. */
struct bt_quorum_lane {
    struct bt_quorum_op *free;
    struct bt_quorum_op *waiting, **waiting_tail;
    struct bt_deferred resume;
    uint64_t used; /* bytes of buffers of ops that run */
    uint64_t idle; /* of those that are free */
    char pad[64];
};

struct bt_quorum {
    struct bt_device device;
    bt_child children[BT_QUORUM_MAX_CHILDREN];
    int threshold;
    uint32_t flags;
    uint64_t session_tag;
    _Atomic bool stopped;
    /* Held by changes, shared; and exclusively by a read that has met children which differ, to look again. */
    struct bt_ranges ranges;
    struct bt_quorum_lane lanes[BT_MAX_THREADS];
    pthread_mutex_t lock; /* below: the reports */
    bool told;            /* that there are some */
    int reports_count;
    struct bt_quorum_report reports[BT_QUORUM_REPORTS];
};

/* ---- ops (quorum_op.c, quorum.c) ---- */

static inline uint64_t bt_quorum_pages(uint64_t n)
{
    return (n + BT_QUORUM_PAGE - 1) & ~(uint64_t)(BT_QUORUM_PAGE - 1);
}
void bt_quorum_lanes_init(struct bt_quorum *quorum);
void bt_quorum_lanes_destroy(struct bt_quorum *quorum);
/* An op for io, on the children there are now. NULL: there is no memory. */
struct bt_quorum_op *bt_quorum_op_get(struct bt_quorum *quorum, struct bt_io *io);
/* Runs the op, whose step and need are set, at once or as soon as there is room for its buffer. */
void bt_quorum_begin(struct bt_quorum_op *op);
/* Takes steps until something is pending, or it is finished. */
void bt_quorum_run(struct bt_quorum_op *op);
/* Ends the op and its io. Returns false, for a step to return. */
bool bt_quorum_finish(struct bt_quorum_op *op, int result);

/* ---- votes and reports (quorum_vote.c) ---- */

static inline bool bt_quorum_is(const struct bt_quorum *quorum, uint32_t flag) { return quorum->flags & flag; }
/* A child failed (error: negative errno), or was outvoted (0). */
void bt_quorum_report_bad(struct bt_quorum_op *op, const struct bt_quorum_part *part);
void bt_quorum_report_failure(struct bt_quorum_op *op);
/* The end: this and all later requests fail. -EIO. */
int bt_quorum_stop(struct bt_quorum_op *op, enum bt_quorum_report_type why, uint64_t at);
/* The result of this round: 0, or the most frequent error when too few parts have succeeded. */
int bt_quorum_count(struct bt_quorum_op *op);
/* Whether all parts that have succeeded hold the same data. */
bool bt_quorum_unanimous(struct bt_quorum_op *op);
/* The part whose data most have; the others that have succeeded are marked bad. -EIO: not as many as there have to
 * be. */
int bt_quorum_elect(struct bt_quorum_op *op);
/* Where the first two parts differ, from the round's start. */
uint64_t bt_quorum_difference(struct bt_quorum_op *op);
/* The first part that has succeeded, or -1. */
int bt_quorum_first(struct bt_quorum_op *op);

#endif
