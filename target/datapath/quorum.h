/* SPDX-License-Identifier: Apache-2.0 */
/* The quorum: a device over several children that hold the same data. Changes go to all of them; what is read is put
 * to the vote (by content), or comes from the first child that can. blkverify is the same with two children, and ends
 * at the first difference.
 *
 * The children are the slots of the object, in order and without gaps; bt_object_set_child changes them under drain.
 */
#ifndef BT_QUORUM_H
#define BT_QUORUM_H

#include "datapath.h"

/* cffi: begin (plain declarations only from here to "cffi: end") */

enum bt_quorum_bounds {
    BT_QUORUM_MAX_CHILDREN = 64,
};

enum bt_quorum_flags {
    BT_QUORUM_FIFO = 1,      /* reads: from the first child that gives no error, without a vote */
    BT_QUORUM_REWRITE = 2,   /* a child that was outvoted gets what the others have */
    BT_QUORUM_VERIFY = 4,    /* children whose data differs are the end */
    BT_QUORUM_BLKVERIFY = 8, /* so are children (two) whose results differ; only the first is flushed */
};

enum bt_quorum_report_type {
    BT_QUORUM_BAD = 0,     /* a child failed, or was outvoted (error 0) */
    BT_QUORUM_FAILURE = 1, /* too few children agree */
    BT_QUORUM_DATA = 2,    /* VERIFY: the data differs at byte `at`; the device serves nothing more */
    BT_QUORUM_RESULT = 3,  /* BLKVERIFY: the results differ: error and other; the device serves nothing more */
};

struct bt_quorum_report {
    uint32_t type;
    uint32_t op;
    uint64_t child; /* BAD: the tag of its object */
    uint64_t offset;
    uint64_t length;
    uint64_t at;
    int error; /* positive errno */
    int other;
};

/* A SESSION event with session_tag tells that there are reports. NULL and errno. */
bt_object *bt_quorum_new(bt_datapath *dp, uint64_t tag, uint64_t session_tag, uint64_t size, bt_object **children,
                         int count, int threshold, uint32_t flags);
/* The oldest report, which is forgotten then. False when there is none: the next one sends an event again. Of those
 * alike (type, op, child) that were not taken, the newest is kept. */
bool bt_quorum_report(bt_object *quorum, struct bt_quorum_report *out);

/* cffi: end */

#endif
