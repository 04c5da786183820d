/* SPDX-License-Identifier: Apache-2.0 */
/* Shared and exclusive ranges of a file: agents on several threads take and leave random ranges, mostly shared, and
 * mark the blocks they hold; nobody may meet an exclusive one.
 *
 * test_ranges [ROUNDS] [SEED] */
#define _GNU_SOURCE
#include <stdio.h>
#include <unistd.h>

#include "check.h"
#include "ranges.h"

#define THREADS 3
#define AGENTS 18
#define BLOCKS 64
#define EXCLUSIVE 1000

struct shared {
    struct bt_ranges ranges;
    _Atomic int holders[BLOCKS]; /* 1 for each shared one, EXCLUSIVE for an exclusive one */
    _Atomic int left;
    _Atomic uint32_t waits, counted;
};

struct agent {
    struct bt_range range;
    struct bt_message message;
    struct shared *shared;
    uint32_t random;
    int rounds, turns;
};

static uint32_t below(struct agent *agent, uint32_t n)
{
    agent->random = agent->random * 1664525u + 1013904223u;
    return (agent->random >> 8) % n;
}

static void mark(struct agent *agent, int sign)
{
    struct bt_range *range = &agent->range;
    for (uint64_t b = range->start; b < bt_min(range->end, BLOCKS); b++) {
        int before = atomic_fetch_add(&agent->shared->holders[b], sign * (range->exclusive ? EXCLUSIVE : 1));
        CHECK(sign < 0 || (range->exclusive ? before == 0 : before < EXCLUSIVE));
    }
}

static void again(struct agent *agent)
{
    bt_thread_post(agent->range.thread, &agent->message);
}

static void granted(struct bt_range *range)
{
    struct agent *agent = BT_CONTAINER(range, struct agent, range);
    if (range->counted)
        atomic_fetch_add(&agent->shared->counted, 1);
    mark(agent, 1);
    agent->turns = (int)below(agent, 4);
    again(agent);
}

static void take_range(struct agent *agent)
{
    struct bt_range *range = &agent->range;
    range->start = below(agent, BLOCKS);
    range->end = below(agent, 10) ? range->start + 1 + below(agent, 6) : UINT64_MAX;
    range->exclusive = below(agent, 60) == 0;
    range->granted = granted;
    if (bt_range_acquire(&agent->shared->ranges, range))
        granted(range);
    else
        atomic_fetch_add(&agent->shared->waits, 1);
}

static void turn(struct bt_message *message, struct bt_thread *thread)
{
    struct agent *agent = BT_CONTAINER(message, struct agent, message);
    CHECK(thread == agent->range.thread);
    if (agent->range.held && agent->turns-- > 0) {
        again(agent);
        return;
    }
    if (agent->range.held) {
        mark(agent, -1);
        bt_range_release(&agent->shared->ranges, &agent->range);
    }
    if (agent->rounds-- > 0)
        take_range(agent);
    else
        atomic_fetch_sub(&agent->shared->left, 1);
}

int main(int argc, char **argv)
{
    int rounds = argc > 1 ? atoi(argv[1]) : 20000;
    uint32_t seed = argc > 2 ? (uint32_t)atoi(argv[2]) : 1;
    struct shared *shared = calloc(1, sizeof *shared);
    struct agent agents[AGENTS];
    bt_datapath *dp = bt_datapath_new();
    CHECK(dp && shared);
    for (int i = 0; i < THREADS; i++)
        CHECK(bt_thread_new(dp, 10000) == i);
    bt_ranges_init(&shared->ranges);
    shared->left = AGENTS;
    for (int i = 0; i < AGENTS; i++) {
        agents[i] = (struct agent){.shared = shared, .random = seed * 100 + (uint32_t)i, .rounds = rounds};
        agents[i].range.thread = bt_thread_get(dp, i % THREADS);
        agents[i].message.fn = turn;
    }
    for (int i = 0; i < AGENTS; i++)
        bt_thread_post(agents[i].range.thread, &agents[i].message);
    while (atomic_load(&shared->left))
        usleep(1000);
    CHECK(!shared->ranges.head && !atomic_load(&shared->ranges.exclusive));
    CHECK(shared->waits > 0 && shared->counted > 0);
    printf("ok: %u waited, %u were only counted\n", shared->waits, shared->counted);
    bt_datapath_free(dp);
    bt_ranges_destroy(&shared->ranges);
    free(shared);
    return 0;
}
