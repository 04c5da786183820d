/* SPDX-License-Identifier: Apache-2.0 */
/* Leaky buckets, with QEMU's rules for bursts (docs/throttle.txt there).
 *
 * They are filled when a request is let go, and leak with time; a request goes when none is too full. So a late clock
 * loses nothing: what has leaked meanwhile goes at once. */
#include "throttle_buckets.h"

#define NS 1e9
#define SHORT_BURST 0.1 /* seconds' worth that may always come at once */

static const int charged[BT_DIRECTIONS][4] = {
    {BT_THROTTLE_BPS_TOTAL, BT_THROTTLE_IOPS_TOTAL, BT_THROTTLE_BPS_READ, BT_THROTTLE_IOPS_READ},
    {BT_THROTTLE_BPS_TOTAL, BT_THROTTLE_IOPS_TOTAL, BT_THROTTLE_BPS_WRITE, BT_THROTTLE_IOPS_WRITE},
};

static bool is_limited(const struct bt_bucket *bucket) { return bucket->limit.average > 0; }
/* A burst of more than a second is itself limited to max a second. */
static bool is_long_burst(const struct bt_bucket *bucket) { return bucket->limit.burst_length > 1; }

void bt_buckets_set(struct bt_buckets *buckets, const struct bt_throttle_limits *limits, uint64_t now_ns)
{
    for (int i = 0; i < BT_THROTTLE_BUCKETS; i++)
        buckets->each[i] = (struct bt_bucket){.limit = limits->buckets[i]};
    buckets->iops_size = limits->iops_size;
    buckets->leaked_ns = now_ns;
    buckets->shared =
        is_limited(&buckets->each[BT_THROTTLE_BPS_TOTAL]) || is_limited(&buckets->each[BT_THROTTLE_IOPS_TOTAL]);
}

bool bt_buckets_limit(const struct bt_buckets *buckets, int direction)
{
    for (int i = 0; i < 4; i++)
        if (is_limited(&buckets->each[charged[direction][i]]))
            return true;
    return false;
}

static double less(double level, double leak) { return level > leak ? level - leak : 0; }

void bt_buckets_leak(struct bt_buckets *buckets, uint64_t now_ns)
{
    if (now_ns <= buckets->leaked_ns)
        return;
    double seconds = (double)(now_ns - buckets->leaked_ns) / NS;
    buckets->leaked_ns = now_ns;
    for (int i = 0; i < BT_THROTTLE_BUCKETS; i++) {
        struct bt_bucket *bucket = &buckets->each[i];
        if (!is_limited(bucket))
            continue;
        bucket->level = less(bucket->level, bucket->limit.average * seconds);
        if (is_long_burst(bucket))
            bucket->burst_level = less(bucket->burst_level, bucket->limit.max * seconds);
    }
}

static double wait_of(const struct bt_bucket *bucket)
{
    const struct bt_throttle_limit *limit = &bucket->limit;
    if (!is_limited(bucket))
        return 0;
    double size = limit->max > 0 ? limit->max * limit->burst_length : limit->average * SHORT_BURST;
    if (bucket->level > size)
        return (bucket->level - size) / limit->average;
    double burst_size = limit->max * SHORT_BURST;
    if (is_long_burst(bucket) && bucket->burst_level > burst_size)
        return (bucket->burst_level - burst_size) / limit->max;
    return 0;
}

double bt_buckets_wait(const struct bt_buckets *buckets, int direction)
{
    double longest = 0;
    for (int i = 0; i < 4; i++) {
        double wait = wait_of(&buckets->each[charged[direction][i]]);
        longest = wait > longest ? wait : longest;
    }
    return longest;
}

void bt_buckets_charge(struct bt_buckets *buckets, int direction, uint64_t length)
{
    double bytes = (double)length;
    double requests = buckets->iops_size > 0 && bytes > buckets->iops_size ? bytes / buckets->iops_size : 1;
    for (int i = 0; i < 4; i++) {
        struct bt_bucket *bucket = &buckets->each[charged[direction][i]];
        double units = charged[direction][i] < BT_THROTTLE_IOPS_TOTAL ? bytes : requests;
        bucket->level += units;
        if (is_long_burst(bucket))
            bucket->burst_level += units;
    }
}
