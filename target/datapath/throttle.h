/* SPDX-License-Identifier: Apache-2.0 */
/* Throttling: a group of leaky buckets that throttle objects charge for the requests that pass them. */
#ifndef BT_THROTTLE_H
#define BT_THROTTLE_H

#include "datapath.h"

/* cffi: begin (plain declarations only from here to "cffi: end") */

typedef struct bt_throttle_group bt_throttle_group;

enum bt_throttle_bucket_index {
    BT_THROTTLE_BPS_TOTAL = 0,
    BT_THROTTLE_BPS_READ = 1,
    BT_THROTTLE_BPS_WRITE = 2,
    BT_THROTTLE_IOPS_TOTAL = 3,
    BT_THROTTLE_IOPS_READ = 4,
    BT_THROTTLE_IOPS_WRITE = 5,
    BT_THROTTLE_BUCKETS = 6,
};

enum bt_throttle_bounds {
    BT_THROTTLE_MAX_NESTED = 8, /* throttles on the way of one request */
};

struct bt_throttle_limit {
    double average;      /* units (bytes, requests) a second; 0: no limit */
    double max;          /* the same in a burst; 0: a tenth of a second's worth may come at once */
    double burst_length; /* seconds that a burst may last, from 1 on */
};

struct bt_throttle_limits {
    struct bt_throttle_limit buckets[6];
    double iops_size; /* a larger request counts as several; 0: it does not */
};

/* A group without limits. One reference, which the caller drops; each member has one. */
bt_throttle_group *bt_throttle_group_new(bt_datapath *dp);
void bt_throttle_group_unref(bt_throttle_group *group);
/* Takes effect at once, for those that wait too; what was used up so far is forgotten. */
void bt_throttle_group_set(bt_throttle_group *group, const struct bt_throttle_limits *limits);

/* A member of the group in front of child. */
bt_object *bt_throttle_new(bt_datapath *dp, uint64_t tag, bt_object *child, bt_throttle_group *group);
/* Moves a member to another group; what waits goes on. */
void bt_throttle_move(bt_object *throttle, bt_throttle_group *group);
/* How many requests have had to wait here. */
uint64_t bt_throttle_waited(bt_object *throttle);

/* cffi: end */

struct bt_segment;

/* One step of the walk. True: go on in segment->object; else the request is parked, or segment says why not. */
bool bt_throttle_resolve(struct bt_object *object, struct bt_segment *segment);

#endif
