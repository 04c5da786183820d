/* SPDX-License-Identifier: Apache-2.0 */
/* The arithmetic of throttling: leaky buckets, without queues, threads and clocks. */
#ifndef BT_THROTTLE_BUCKETS_H
#define BT_THROTTLE_BUCKETS_H

#include "throttle.h"

enum { BT_READS, BT_WRITES, BT_DIRECTIONS };

struct bt_bucket {
    struct bt_throttle_limit limit;
    double level;
    double burst_level; /* keeps a long burst to its own rate */
};

struct bt_buckets {
    struct bt_bucket each[BT_THROTTLE_BUCKETS];
    double iops_size;
    bool shared; /* reads and writes are limited together */
    uint64_t leaked_ns;
};

void bt_buckets_set(struct bt_buckets *buckets, const struct bt_throttle_limits *limits, uint64_t now_ns);
/* Whether there is any limit for that direction. */
bool bt_buckets_limit(const struct bt_buckets *buckets, int direction);
/* What has leaked since it was called last. */
void bt_buckets_leak(struct bt_buckets *buckets, uint64_t now_ns);
/* Seconds until the next request may go; 0: now. */
double bt_buckets_wait(const struct bt_buckets *buckets, int direction);
void bt_buckets_charge(struct bt_buckets *buckets, int direction, uint64_t length);

#endif
