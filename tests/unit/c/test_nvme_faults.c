/* SPDX-License-Identifier: Apache-2.0 */
/* A controller that fails, is late, or breaks the protocol: what becomes of the requests, and what Python is told.
 *
 * test_nvme_faults. Exits 1 at the first difference. */
#define _GNU_SOURCE
#include <stdio.h>

#include "nvme_world.h"

#define BYTES 8192u

static unsigned char buffer[64][BYTES] __attribute__((aligned(4096)));

static bool is_disk(const struct world *world, const unsigned char *data, uint64_t offset, uint64_t length)
{
    return memcmp(data, world->mock.disk + offset, length) == 0;
}

static int64_t read_at(struct world *world, uint64_t offset)
{
    memset(buffer[0], 0xEE, BYTES);
    return case_do(world, BT_READ, 0, offset, BYTES, buffer[0]);
}

static void must_read(struct world *world)
{
    CHECK(read_at(world, 4 * BYTES) == 0 && is_disk(world, buffer[0], 4 * BYTES, BYTES));
}

/* ---- status codes ---- */

static const struct {
    unsigned status;
    int error;
    bool tried_again;
} statuses[] = {
    {0x001 | NVME_STATUS_DNR, -ENOTSUP, false}, {0x001, -ENOTSUP, false},
    {0x002, -EINVAL, false},                    {0x004, -EIO, true},
    {0x004 | NVME_STATUS_DNR, -EIO, false},     {0x006, -EIO, true},
    {0x00B, -ENODEV, false},                    {0x015, -EACCES, false},
    {0x020, -EROFS, false},                     {0x080, -EIO, false},
    {0x081, -ENOSPC, false},                    {0x082, -EIO, true},
    {0x083, -EBADE, false},                     {0x182, -EROFS, false},
    {0x281 | NVME_STATUS_DNR, -EIO, false},     {0x286, -EACCES, false},
    {0x7FF | NVME_STATUS_DNR, -EIO, false},     {0x007 | NVME_STATUS_DNR, -ETIMEDOUT, false},
};

static void test_statuses(void)
{
    struct world *world = case_begin(512, 16, 0, NULL);
    for (size_t i = 0; i < sizeof statuses / sizeof statuses[0]; i++) {
        struct bt_nvme_counters before = case_counters(world);
        atomic_store(&world->mock.fail_status, statuses[i].status);
        atomic_store(&world->mock.fail_left, 1000);
        CHECK(read_at(world, 0) == statuses[i].error);
        atomic_store(&world->mock.fail_left, 0);
        struct bt_nvme_counters after = case_counters(world);
        unsigned errors = statuses[i].tried_again ? 1 + NVME_MAX_RETRIES : 1;
        CHECK(after.completion_errors - before.completion_errors == errors);
        CHECK(after.retries - before.retries == errors - 1);
        CHECK(after.last_status == (statuses[i].status & NVME_STATUS_CODE));
        must_read(world);
    }
    CHECK(world->errors && world->errors < 3); /* Python is told, but of one in a second only */
    case_end(world);
}

/* An error that passes is not seen by anybody. */
static void test_passing_error(void)
{
    struct world *world = case_begin(512, 16, 0, NULL);
    atomic_store(&world->mock.fail_status, 0x082);
    atomic_store(&world->mock.fail_left, NVME_MAX_RETRIES);
    must_read(world);
    CHECK(case_counters(world).retries == NVME_MAX_RETRIES);
    case_end(world);
}

/* One part of a large request fails: so does the request, once, and the others are not harmed. */
static void test_one_part_fails(void)
{
    static unsigned char large[3u << 20];
    struct world *world = case_begin(512, 16, 0, NULL); /* all of it is bounced, in parts */
    atomic_store(&world->mock.fail_status, 0x281 | NVME_STATUS_DNR);
    atomic_store(&world->mock.fail_left, 1);
    CHECK(case_do(world, BT_READ, 0, 0, sizeof large, large) == -EIO);
    CHECK(case_do(world, BT_READ, 0, 0, sizeof large, large) == 0 && is_disk(world, large, 0, sizeof large));
    case_end(world);
}

/* ---- the protocol ---- */

static const struct {
    enum mock_breach breach;
    enum bt_nvme_breach told;
} breaches[] = {
    {MOCK_CID_RANGE, BT_NVME_BAD_COMMAND}, {MOCK_CID_FREE, BT_NVME_BAD_COMMAND},
    {MOCK_CID_AGAIN, BT_NVME_BAD_COMMAND}, {MOCK_WRONG_QUEUE, BT_NVME_BAD_QUEUE},
    {MOCK_HUGE_HEAD, BT_NVME_BAD_HEAD},
};

/* Submits reads, mostly more than the queue holds, while the controller is asleep. */
static void fill_queue(struct world *world, uint64_t *cookies, unsigned count)
{
    uint64_t before = case_counters(world).commands, until = bt_now_ns() + WORLD_PATIENCE_NS;
    for (unsigned i = 0; i < count; i++)
        cookies[i] = case_submit(world, BT_READ, 0, i * BYTES, BYTES, buffer[i]);
    while (case_counters(world).commands - before < bt_min(count, world->queues[0].depth - 1)) {
        world_events(world, 1);
        CHECK(bt_now_ns() < until);
    }
    world_events(world, 5); /* until the doorbell has rung */
}

/* What is in flight fails, but only after the reset; what waits, and what comes later, goes on. */
static void one_breach(enum mock_breach breach, enum bt_nvme_breach told)
{
    struct world *world = case_begin(512, 8, 0, NULL);
    uint64_t cookies[20];
    unsigned count = 20;
    unsigned failed = 0, early = 0, answered = breach == MOCK_CID_AGAIN; /* once rightly */
    must_read(world);
    atomic_store(&world->mock.asleep, true);
    fill_queue(world, cookies, count);
    atomic_store(&world->mock.breach, breach);
    atomic_store(&world->mock.asleep, false);
    case_await(world, &world->breaches, 0);
    CHECK(world->breach == told);
    world_events(world, 30);
    for (unsigned i = 0; i < count; i++)
        early += world->done[cookies[i]];
    CHECK(early == answered);
    world_reset(world, 0);
    for (unsigned i = 0; i < count; i++) {
        int64_t result = world_wait(world, cookies[i]);
        CHECK(result == -EIO || (result == 0 && is_disk(world, buffer[i], i * BYTES, BYTES)));
        failed += result == -EIO;
    }
    CHECK(failed == bt_min(count, 7) - answered && world->breaches == 1);
    must_read(world);
    CHECK(case_counters(world).breaches == 1);
    case_end(world);
}

static void test_breaches(void)
{
    for (size_t i = 0; i < sizeof breaches / sizeof breaches[0]; i++)
        one_breach(breaches[i].breach, breaches[i].told);
}

/* Completions may be made in another order than the heads that they tell. */
static void test_head_that_goes_back_is_no_breach(void)
{
    struct world *world = case_begin(512, 8, 0, NULL);
    for (unsigned i = 0; i < 20; i++) {
        must_read(world);
        atomic_store(&world->mock.breach, MOCK_OLD_HEAD);
        must_read(world);
    }
    CHECK(!world->breaches && !case_counters(world).breaches);
    case_end(world);
}

/* A completion with the wrong phase is none; the queue stands still until a reset, and nothing is lost. */
static void test_wrong_phase(void)
{
    case_timeout_ns = CASE_TIMEOUT_NS;
    struct world *world = case_begin(512, 8, 0, NULL);
    atomic_store(&world->mock.breach, MOCK_WRONG_PHASE);
    uint64_t cookie = case_submit(world, BT_READ, 0, 0, BYTES, buffer[0]);
    case_await(world, &world->stuck, 0);
    CHECK(world->timeouts == 1 && !world->done[cookie]);
    world_reset(world, 0);
    CHECK(world_wait(world, cookie) == 0 && is_disk(world, buffer[0], 0, BYTES));
    case_end(world);
}

/* A completion out of the blue, when nothing is in flight. */
static void unasked_completion(bool silent)
{
    struct world *world = case_begin(512, 8, 0, NULL);
    must_read(world);
    atomic_store(&world->mock.silent, silent);
    pthread_mutex_lock(&world->mock.lock);
    mock_post(&world->mock.queues[0], 1 << 16 | world->mock.queues[0].sq_head, 0);
    pthread_mutex_unlock(&world->mock.lock);
    if (silent) /* it is found when the thread wakes up for something else */
        bt_synchronize(world->device, world_cookie(world));
    case_await(world, &world->breaches, 0);
    world_reset(world, 0);
    atomic_store(&world->mock.silent, false);
    must_read(world);
    case_end(world);
}

static void test_unasked_completions(void)
{
    unasked_completion(false);
    unasked_completion(true);
}

/* ---- timeouts ---- */

static void test_abort(void)
{
    case_timeout_ns = CASE_TIMEOUT_NS;
    struct world *world = case_begin(512, 8, 0, NULL);
    atomic_store(&world->mock.hold_left, 1);
    must_read(world); /* aborted, tried again */
    CHECK(world->timeouts == 1 && !world->stuck && world->mock.aborts == 1);
    CHECK(case_counters(world).aborted == 1 && case_counters(world).timeouts == 1);
    atomic_store(&world->mock.hold_left, 2);
    CHECK(read_at(world, 0) == -ETIMEDOUT); /* and again: a clean error */
    CHECK(world->mock.aborts == 3 && !world->stuck);
    must_read(world);
    case_end(world);
}

/* The others in the queue go on meanwhile. */
static void test_abort_ignored(void)
{
    case_timeout_ns = CASE_TIMEOUT_NS;
    struct world *world = case_begin(512, 8, 0, NULL);
    atomic_store(&world->mock.ignores_aborts, true);
    atomic_store(&world->mock.hold_left, 1);
    memset(buffer[1], 0x5A, BYTES);
    uint64_t cookie = case_submit(world, BT_WRITE, 0, BYTES, BYTES, buffer[1]);
    must_read(world);
    case_await(world, &world->stuck, 0);
    CHECK(world->timeouts == 1 && !world->done[cookie]);
    must_read(world);
    world_reset(world, 0);
    CHECK(world_wait(world, cookie) == 0 && is_disk(world, buffer[1], BYTES, BYTES));
    CHECK(case_counters(world).resubmitted == 1 && case_counters(world).resets == 1);
    case_end(world);
}

/* A command that no reset helps fails after so many; the queue is alive. */
static void test_reset_does_not_help(void)
{
    case_timeout_ns = CASE_TIMEOUT_NS;
    struct world *world = case_begin(512, 8, 0, NULL);
    atomic_store(&world->mock.ignores_aborts, true);
    atomic_store(&world->mock.hold_left, 1 + NVME_MAX_RESETS);
    uint64_t cookie = case_submit(world, BT_READ, 0, 0, BYTES, buffer[0]);
    for (unsigned i = 0; i <= NVME_MAX_RESETS; i++) {
        CHECK(!world->done[cookie]);
        case_await(world, &world->stuck, i);
        world_reset(world, 0);
    }
    CHECK(world_wait(world, cookie) == -EIO);
    must_read(world);
    case_end(world);
}

/* A lost interrupt costs time, not more: polling is off, so only the timer finds what has completed. */
static void test_lost_interrupts(void)
{
    case_timeout_ns = CASE_TIMEOUT_NS;
    struct world *world = case_begin(512, 8, 0, NULL);
    atomic_store(&world->mock.silent, true);
    atomic_store(&world->mock.latency_ns, 20000000); /* the thread sleeps by then */
    for (int i = 0; i < 3; i++)
        must_read(world);
    CHECK(!world->stuck && !case_counters(world).interrupts);
    case_end(world);
}

/* ---- quiesce and resume ---- */

/* The reset failed: all requests fail at once, and new ones do; until a later reset works. */
static void test_dead_and_back(void)
{
    struct world *world = case_begin(512, 4, 0, NULL);
    uint64_t cookies[10];
    atomic_store(&world->mock.hold_left, 3);
    for (unsigned i = 0; i < 10; i++)
        cookies[i] = case_submit(world, BT_READ, 0, i * BYTES, BYTES, buffer[i]);
    world_reset(world, -ENODEV);
    for (unsigned i = 0; i < 10; i++)
        CHECK(world_wait(world, cookies[i]) == -ENODEV);
    CHECK(read_at(world, 0) == -ENODEV);
    atomic_store(&world->mock.hold_left, 0);
    world_reset(world, 0);
    must_read(world);
    case_end(world);
}

/* Nothing touches the doorbells between quiesce and resume, and what came meanwhile waits; synchronize with it. */
static void test_quiesced(void)
{
    struct world *world = case_begin(512, 8, 0, NULL);
    uint64_t quiesce = world_cookie(world), synchronize, cookies[5];
    must_read(world);
    bt_nvme_quiesce(world->device, quiesce);
    world_wait(world, quiesce);
    struct bt_nvme_counters before = case_counters(world);
    for (unsigned i = 0; i < 5; i++)
        cookies[i] = case_submit(world, BT_READ, 0, i * BYTES, BYTES, buffer[i]);
    synchronize = world_cookie(world);
    bt_synchronize(world->device, synchronize);
    for (int i = 0; i < 3; i++)
        world_events(world, 30);
    CHECK(!world->done[cookies[0]] && !world->done[synchronize]);
    CHECK(case_counters(world).doorbells == before.doorbells);
    mock_reset(&world->mock);
    bt_nvme_resume(world->device, 0);
    CHECK(world_wait(world, synchronize) == 0);
    for (unsigned i = 0; i < 5; i++)
        CHECK(world_wait(world, cookies[i]) == 0 && is_disk(world, buffer[i], i * BYTES, BYTES));
    case_end(world);
}

/* Far more requests than the queue has room for, whatever its depth. */
static void test_full_queue(void)
{
    static const uint32_t depths[] = {2, 3, 7, 64};
    for (size_t d = 0; d < 4; d++) {
        struct world *world = case_begin(512, depths[d], 0, NULL);
        uint64_t cookies[500];
        for (unsigned i = 0; i < 500; i++)
            cookies[i] = case_submit(world, BT_READ, 0, i * BYTES, BYTES, buffer[i % 64]);
        for (unsigned i = 0; i < 500; i++)
            CHECK(world_wait(world, cookies[i]) == 0);
        struct bt_nvme_counters counters = case_counters(world);
        CHECK(counters.waits && counters.commands == 500 && counters.completions == 500);
        case_end(world);
    }
}

int main(void)
{
    static const struct {
        const char *name;
        void (*run)(void);
    } tests[] = {
        {"statuses", test_statuses},
        {"passing error", test_passing_error},
        {"one part fails", test_one_part_fails},
        {"breaches", test_breaches},
        {"head that goes back", test_head_that_goes_back_is_no_breach},
        {"wrong phase", test_wrong_phase},
        {"unasked completions", test_unasked_completions},
        {"abort", test_abort},
        {"abort ignored", test_abort_ignored},
        {"reset does not help", test_reset_does_not_help},
        {"lost interrupts", test_lost_interrupts},
        {"dead and back", test_dead_and_back},
        {"quiesced", test_quiesced},
        {"full queue", test_full_queue},
    };
    for (size_t i = 0; i < sizeof tests / sizeof tests[0]; i++) {
        printf("%s\n", tests[i].name);
        fflush(stdout);
        case_timeout_ns = WORLD_PATIENCE_NS;
        tests[i].run();
    }
    printf("ok\n");
    return 0;
}
