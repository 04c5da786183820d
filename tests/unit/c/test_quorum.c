/* SPDX-License-Identifier: Apache-2.0 */
/* A quorum of three children in memory that answer late and in any order. Lanes on two I/O threads read and change
 * their own blocks and check them; with options they also
 *   r  read everything while others write (what races must neither look like damage nor be torn),
 *   c  damage the last child behind the quorum's back,
 *   f  make requests of the last child fail,
 *   l  let the control thread take the last child away and put a fresh copy in its place,
 *   w  repair what was outvoted,
 *   b  make those reads large, all on one thread, so that they take several rounds and wait for memory.
 *
 * test_quorum OPTIONS [OPERATIONS] [SEED]. Exits 1 at the first difference. */
#define _GNU_SOURCE
#include <poll.h>
#include <stdio.h>

#include "check.h"
#include "core.h"
#include "lanes.h"
#include "quorum.h"

#define CHILDREN 3u
#define LAST (CHILDREN - 1)
#define BLOCK 512u
#define OWN 16u /* blocks of a lane */
#define MOST_LANES 48u
#define SIZE (3u << 20)
#define SESSION 7
#define COOKIE 1

struct ram {
    struct bt_device device;
    pthread_mutex_t lock;
    uint8_t *bytes;
    uint32_t random;
    bool failing;
};

struct lane {
    struct bt_message message;
    struct bt_request request;
    struct iovec iov;
    unsigned number, left;
    unsigned block, blocks; /* of this operation; of the lane's own, or of all */
    bool look;
    uint32_t random;
    uint8_t holds[OWN];
    uint8_t *data;
};

static bt_datapath *dp;
static bt_object *quorum, *gate;
static struct ram *rams[CHILDREN];
static const char *options;
static unsigned lane_count = 24, threads = 2, tags = 1;
static struct lane lanes[MOST_LANES];
static _Atomic unsigned running;
static unsigned bad_reports, swaps;

static bool has(char option) { return strchr(options, option) != NULL; }

/* ---- children ---- */

static void ram_perform(struct ram *ram, struct bt_io *io)
{
    int result = 0;
    pthread_mutex_lock(&ram->lock);
    if (ram->failing && next_random(&ram->random) % 4 == 0)
        result = -EIO;
    else if (io->op == BT_READ)
        bt_iov_from_buffer(io->iov, io->iovcnt, 0, ram->bytes + io->offset, io->length);
    else if (io->op == BT_WRITE)
        bt_iov_to_buffer(io->iov, io->iovcnt, 0, ram->bytes + io->offset, io->length);
    else if (io->op == BT_ZEROES)
        memset(ram->bytes + io->offset, 0, io->length);
    pthread_mutex_unlock(&ram->lock);
    CHECK(io->op != BT_DISCARD);
    io->status_length = io->length;
    io->status_flags = 0;
    bt_io_finish(io, result);
}

static void ram_turn(struct bt_message *message, struct bt_thread *thread)
{
    struct bt_io *io = BT_CONTAINER(message, struct bt_io, message);
    if (io->scratch[0]-- > 0)
        bt_thread_post(thread, message);
    else
        ram_perform((struct ram *)io->device, io);
}

static void ram_submit(struct bt_io *io)
{
    struct ram *ram = (struct ram *)io->device;
    pthread_mutex_lock(&ram->lock);
    io->scratch[0] = next_random(&ram->random) % 8;
    pthread_mutex_unlock(&ram->lock);
    if (!io->scratch[0]--) {
        ram_perform(ram, io);
        return;
    }
    io->message.fn = ram_turn;
    bt_thread_post(io->thread, &io->message);
}

static void ram_destroy(struct bt_object *object)
{
    struct ram *ram = (struct ram *)object;
    free(ram->bytes);
    free(ram);
}

static struct ram *ram_new(const uint8_t *bytes)
{
    static const struct bt_device_ops ops = {.submit = ram_submit};
    static const struct bt_object_ops object_ops = {.destroy = ram_destroy};
    struct ram *ram = calloc(1, sizeof *ram);
    CHECK(ram && (ram->bytes = calloc(1, SIZE)));
    if (bytes)
        memcpy(ram->bytes, bytes, SIZE);
    bt_device_init(&ram->device, dp, &ops, &object_ops, ++tags, SIZE);
    pthread_mutex_init(&ram->lock, NULL);
    ram->random = tags * 7919;
    return ram;
}

/* ---- lanes, on the I/O threads ---- */

static void damage(struct lane *lane)
{
    struct ram *ram = rams[LAST];
    unsigned at = (lane->number * OWN + next_random(&lane->random) % OWN) * BLOCK;
    pthread_mutex_lock(&ram->lock);
    memset(ram->bytes + at, (int)(next_random(&lane->random) & 0xff), BLOCK);
    pthread_mutex_unlock(&ram->lock);
}

static void check_data(const struct lane *lane)
{
    for (unsigned b = 0; b < lane->blocks; b++) {
        const uint8_t *block = lane->data + b * BLOCK;
        if (!lane->look)
            CHECK(block[0] == lane->holds[lane->block + b]);
        CHECK(memcmp(block, block + 1, BLOCK - 1) == 0);
    }
}

static void lane_done(struct bt_request *request)
{
    struct lane *lane = BT_CONTAINER(request, struct lane, request);
    CHECK(request->ret == 0);
    if (request->op == BT_READ)
        check_data(lane);
    next_step(request, &lane->message, &lane->left, &running);
}

static int choose(struct lane *lane)
{
    unsigned dice = next_random(&lane->random) % 100;
    uint8_t value = (uint8_t)next_random(&lane->random);
    lane->block = next_random(&lane->random) % OWN;
    lane->blocks = 1 + next_random(&lane->random) % (OWN - lane->block);
    lane->look = has('r') && dice < 10;
    if (lane->look)
        lane->blocks = has('b') ? 2 * (SIZE / BLOCK / 3) : lane_count * OWN;
    if (dice < 40)
        return BT_READ;
    if (dice > 97)
        return BT_FLUSH;
    if (dice > 95)
        return BT_DISCARD;
    memset(lane->holds + lane->block, dice < 50 ? 0 : value, lane->blocks);
    memset(lane->data, value, lane->blocks * BLOCK);
    return dice < 50 ? BT_ZEROES : BT_WRITE;
}

static void lane_step(struct bt_message *message, struct bt_thread *thread)
{
    struct lane *lane = BT_CONTAINER(message, struct lane, message);
    if (has('c') && next_random(&lane->random) % 4 == 0)
        damage(lane);
    int op = choose(lane);
    uint64_t offset = lane->look ? 0 : (lane->number * OWN + lane->block) * BLOCK;
    lane->request.thread = thread;
    lane->iov = (struct iovec){lane->data, lane->blocks * BLOCK};
    int flags = lane->left % 5 == 0 && op == BT_WRITE ? BT_FUA : 0;
    begin(&lane->request, gate, op, flags, offset, &lane->iov, lane_done);
}

/* ---- the control thread ---- */

static void take_reports(void)
{
    struct bt_quorum_report report;
    while (bt_quorum_report(quorum, &report)) {
        CHECK(report.type == BT_QUORUM_BAD && (has('c') || has('f')));
        CHECK(report.child != rams[0]->device.base.tag && report.child != rams[1]->device.base.tag);
        CHECK(bt_range_ok(report.offset, report.length, SIZE));
        bad_reports++;
    }
}

/* True when the DONE event has come. */
static bool take_events(int timeout)
{
    struct bt_event events[16];
    struct pollfd pfd = {.fd = bt_datapath_eventfd(dp), .events = POLLIN};
    bool done = false;
    poll(&pfd, 1, timeout);
    int n = bt_events(dp, events, 16);
    for (int i = 0; i < n; i++) {
        if (events[i].type == BT_EVENT_SESSION && quorum)
            take_reports();
        done |= events[i].type == BT_EVENT_DONE && events[i].tag == COOKIE;
        CHECK(events[i].type != BT_EVENT_DONE || events[i].result == 0);
    }
    return done;
}

static void wait_done(void)
{
    while (!take_events(100))
        ;
}

/* Under drain: the last child goes, or is there again as a copy of the first. */
static void swap_last(void)
{
    bool gone = swaps++ % 2;
    bt_gate_drain(gate, COOKIE);
    wait_done();
    if (gone) {
        struct ram *fresh = ram_new(rams[0]->bytes);
        fresh->failing = rams[LAST]->failing;
        bt_object_unref(&rams[LAST]->device.base);
        rams[LAST] = fresh;
        bt_object_set_child(quorum, LAST, &fresh->device.base);
    } else {
        bt_object_set_child(quorum, LAST, NULL);
    }
    bt_gate_resume(gate, NULL);
}

static void read_all(void)
{
    uint8_t *data = malloc(SIZE);
    CHECK(data && bt_submit(dp, 0, gate, BT_READ, 0, 0, SIZE, data, COOKIE) == 0);
    wait_done();
    CHECK(memcmp(data, rams[0]->bytes, SIZE) == 0 && memcmp(data, rams[1]->bytes, SIZE) == 0);
    if (has('w') && !has('f'))
        CHECK(swaps % 2 || memcmp(data, rams[LAST]->bytes, SIZE) == 0);
    free(data);
}

static void start(unsigned operations, unsigned seed)
{
    bt_object *children[CHILDREN];
    dp = bt_datapath_new();
    CHECK(dp);
    for (unsigned i = 0; i < threads; i++)
        CHECK(bt_thread_new(dp, 10000) == (int)i);
    for (unsigned i = 0; i < CHILDREN; i++) {
        rams[i] = ram_new(NULL);
        children[i] = &rams[i]->device.base;
    }
    rams[LAST]->failing = has('f');
    int threshold = has('c') || has('f') || has('l') ? 2 : 3;
    quorum = bt_quorum_new(dp, 1, SESSION, SIZE, children, CHILDREN, threshold, has('w') ? BT_QUORUM_REWRITE : 0);
    gate = bt_gate_new(dp, 2, quorum, true);
    CHECK(quorum && gate);
    running = lane_count;
    for (unsigned i = 0; i < lane_count; i++) {
        lanes[i].number = i;
        lanes[i].left = operations;
        lanes[i].random = seed * 1000003u + i * 7919u + 1;
        lanes[i].message.fn = lane_step;
        CHECK((lanes[i].data = malloc(SIZE)));
        bt_thread_post(bt_thread_get(dp, (int)(i % threads)), &lanes[i].message);
    }
}

int main(int argc, char **argv)
{
    CHECK(argc > 1);
    options = argv[1];
    if (has('b')) {
        lane_count = MOST_LANES;
        threads = 1;
    }
    start(argc > 2 ? (unsigned)atoi(argv[2]) : 300, argc > 3 ? (unsigned)atoi(argv[3]) : 1);
    while (atomic_load(&running)) {
        take_events(1);
        if (has('l'))
            swap_last();
    }
    read_all();
    take_reports();
    CHECK(bad_reports || !(has('c') || has('f')));
    CHECK(swaps > 2 || !has('l'));
    struct bt_counters counters;
    bt_object_counters(quorum, &counters);
    for (int op = 0; op < BT_OPS; op++)
        CHECK(counters.failed[op] == 0);
    bt_object_unref(gate);
    bt_object_unref(quorum);
    quorum = NULL;
    for (unsigned i = 0; i < CHILDREN; i++)
        bt_object_unref(&rams[i]->device.base);
    for (unsigned i = 0; i < lane_count; i++)
        free(lanes[i].data);
    usleep(20000);
    take_events(0);
    bt_datapath_free(dp);
    printf("%u reports, %u swaps\nok\n", bad_reports, swaps);
    return 0;
}
