/* SPDX-License-Identifier: Apache-2.0 */
/* Throttles under load from two I/O threads. Argument: what to try.
 *   rate SECONDS  two members of one group: how many requests each got
 *   churn SEED    limits, groups and drains change all the time; every request is answered, no drain waits
 *   nested        a request through several throttles is charged once by each */
#define _GNU_SOURCE
#include <stdio.h>
#include <unistd.h>

#include "check.h"
#include "core.h"
#include "throttle.h"

#define MEMBERS 3
#define DEPTH 16
#define SIZE (1u << 30)

struct worker {
    struct bt_request request;
    struct bt_message message;
    struct bt_deferred again;
    struct member *member;
    char data[4096];
    struct iovec iov;
    unsigned random;
};
static struct member {
    bt_object *object, *gate;
    int depth;
    struct worker workers[DEPTH];
    _Atomic uint64_t done;
} members[MEMBERS];
static bt_datapath *dp;
static bt_object *disk;
static bt_throttle_group *groups[2];
static _Atomic bool stopping;
static _Atomic int running;
static unsigned released;

static void go_on(struct worker *worker)
{
    static const uint8_t ops[] = {BT_READ, BT_WRITE, BT_ZEROES, BT_READ};
    if (atomic_load(&stopping)) {
        atomic_fetch_sub(&running, 1);
        return;
    }
    worker->random = worker->random * 1103515245 + 12345;
    worker->request.op = ops[worker->random >> 16 & 3];
    worker->request.offset = (worker->random >> 8 & 0xff) * 4096;
    bt_request_start(&worker->request);
}

static void again(struct bt_deferred *deferred, struct bt_thread *thread)
{
    (void)thread;
    go_on(BT_CONTAINER(deferred, struct worker, again));
}

static void done(struct bt_request *request)
{
    struct worker *worker = BT_CONTAINER(request, struct worker, request);
    CHECK(request->ret == 0);
    atomic_fetch_add(&worker->member->done, 1);
    bt_defer(request->thread, &worker->again);
}

static void begin(struct bt_message *message, struct bt_thread *thread)
{
    struct worker *worker = BT_CONTAINER(message, struct worker, message);
    worker->request.thread = thread;
    go_on(worker);
}

static void start(int index, int depth)
{
    struct member *member = &members[index];
    member->depth = depth;
    for (int i = 0; i < depth; i++) {
        struct worker *worker = &member->workers[i];
        worker->member = member;
        worker->random = (unsigned)(index * 100 + i);
        worker->iov = (struct iovec){worker->data, sizeof worker->data};
        worker->request.object = member->gate;
        worker->request.length = sizeof worker->data;
        worker->request.iov = &worker->iov;
        worker->request.iovcnt = 1;
        worker->request.done = done;
        worker->message.fn = begin;
        worker->again.fn = again;
        atomic_fetch_add(&running, 1);
        bt_thread_post(bt_thread_get(dp, index % 2), &worker->message);
    }
}

/* True when the DONE of cookie came in time. */
static bool wait_for(uint64_t cookie, int ms)
{
    struct bt_event events[16];
    for (int i = 0; i < ms * 5; i++) {
        int n = bt_events(dp, events, 16);
        bool found = false;
        for (int k = 0; k < n; k++) {
            found |= events[k].type == BT_EVENT_DONE && events[k].tag == cookie;
            released += events[k].type == BT_EVENT_RELEASED;
        }
        if (found)
            return true;
        usleep(200);
    }
    return false;
}

static void set_up(void)
{
    dp = bt_datapath_new();
    CHECK(dp && bt_thread_new(dp, 0) == 0 && bt_thread_new(dp, 32768) == 1);
    disk = bt_null_new(dp, 1, SIZE, 0, true);
    for (int i = 0; i < 2; i++)
        groups[i] = bt_throttle_group_new(dp);
    for (int i = 0; i < MEMBERS; i++) { /* the last one is above the first */
        bt_object *below = i == MEMBERS - 1 ? members[0].object : disk;
        members[i].object = bt_throttle_new(dp, (uint64_t)(10 + i), below, groups[i == MEMBERS - 1]);
        members[i].gate = bt_gate_new(dp, (uint64_t)(20 + i), members[i].object, true);
    }
}

static void tear_down(void)
{
    const struct bt_throttle_limits none = {0};
    atomic_store(&stopping, true);
    for (int i = 0; i < 2; i++)
        bt_throttle_group_set(groups[i], &none);
    for (int i = 0; i < 5000 && atomic_load(&running); i++)
        usleep(1000);
    CHECK(atomic_load(&running) == 0);
    for (int i = 0; i < MEMBERS; i++) {
        bt_object_unref(members[i].gate);
        bt_object_unref(members[i].object);
    }
    bt_object_unref(disk);
    bt_throttle_group_unref(groups[0]);
    bt_throttle_group_unref(groups[1]);
    for (int i = 0; i < 1000 && released < 2 * MEMBERS + 1; i++)
        wait_for(UINT64_MAX, 1);
    CHECK(released == 2 * MEMBERS + 1);
    bt_datapath_free(dp);
}

/* ---- rate ---- */

static void try_rate(int seconds)
{
    struct bt_throttle_limits limits = {0};
    limits.buckets[BT_THROTTLE_IOPS_TOTAL] = (struct bt_throttle_limit){2000, 0, 1};
    bt_throttle_group_set(groups[0], &limits);
    start(0, DEPTH);
    start(1, 4);
    uint64_t began = bt_now_ns();
    usleep((unsigned)seconds * 1000000);
    uint64_t counts[2] = {atomic_load(&members[0].done), atomic_load(&members[1].done)};
    double took = (double)(bt_now_ns() - began) / 1e9, wanted = 2000 * took + 200;
    double total = (double)(counts[0] + counts[1]);
    printf("%llu %llu\n", (unsigned long long)counts[0], (unsigned long long)counts[1]);
    CHECK(total > 0.9 * wanted - DEPTH && total < 1.05 * wanted + DEPTH);
    CHECK(counts[0] > 0.35 * total && counts[1] > 0.35 * total);
}

/* ---- churn ---- */

static void set_random_limits(bt_throttle_group *group)
{
    struct bt_throttle_limits limits = {0};
    for (int i = 0; i < BT_THROTTLE_BUCKETS; i++) {
        double scale = i < BT_THROTTLE_IOPS_TOTAL ? 4096 : 1, average = scale * (1 << rand() % 16);
        bool burst = rand() % 2;
        if (rand() % 2)
            limits.buckets[i] = (struct bt_throttle_limit){average, burst ? 2 * average : 0, burst ? 1 + rand() % 3 : 1};
    }
    limits.iops_size = rand() % 2 ? 1024 : 0;
    bt_throttle_group_set(group, &limits);
}

static void drain_one(uint64_t cookie)
{
    bt_object *gate = members[rand() % MEMBERS].gate;
    bt_gate_drain(gate, cookie);
    if (rand() % 4)
        CHECK(wait_for(cookie, 2000));
    bt_gate_resume(gate, NULL);
}

static void try_churn(unsigned seed)
{
    srand(seed);
    for (int i = 0; i < MEMBERS; i++)
        start(i, DEPTH);
    for (uint64_t step = 0; step < 1000; step++) {
        switch (rand() % 4) {
        case 0:
            set_random_limits(groups[rand() % 2]);
            break;
        case 1:
            bt_throttle_move(members[rand() % MEMBERS].object, groups[rand() % 2]);
            break;
        case 2:
            drain_one(1000 + step);
            break;
        default:
            usleep((unsigned)rand() % 2000);
        }
    }
    for (int i = 0; i < MEMBERS; i++)
        CHECK(atomic_load(&members[i].done) > 100);
}

/* ---- nested ---- */

static void one_request(struct worker *worker, uint64_t cookie, uint64_t length)
{
    CHECK(bt_submit(dp, 0, members[MEMBERS - 1].gate, BT_READ, 0, 0, length, worker->data, cookie) == 0);
    CHECK(wait_for(cookie, 5000));
}

/* The upper one has the burst for one request, the lower for two: the second waits for the upper, and so on. */
static void try_nested(void)
{
    struct bt_throttle_limits limits = {0};
    limits.buckets[BT_THROTTLE_BPS_READ] = (struct bt_throttle_limit){40960, 0, 1};
    bt_throttle_group_set(groups[1], &limits);
    bt_throttle_group_set(groups[0], &limits);
    uint64_t began = bt_now_ns();
    for (int i = 0; i < 11; i++)
        one_request(&members[0].workers[0], 100 + (uint64_t)i, 4096);
    double took = (double)(bt_now_ns() - began) / 1e9;
    printf("%.3f\n", took);
    CHECK(took > 0.85 && took < 2); /* 10 KiB a tenth of a second, after the first two */
}

int main(int argc, char **argv)
{
    CHECK(argc > 1);
    set_up();
    if (!strcmp(argv[1], "rate"))
        try_rate(atoi(argv[2]));
    else if (!strcmp(argv[1], "churn"))
        try_churn((unsigned)atoi(argv[2]));
    else
        try_nested();
    tear_down();
    puts("ok");
    return 0;
}
