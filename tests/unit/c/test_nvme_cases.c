/* SPDX-License-Identifier: Apache-2.0 */
/* Single cases of the NVMe device: which commands requests become, what lies in PRPs and what is bounced.
 *
 * test_nvme_cases. Exits 1 at the first difference. */
#define _GNU_SOURCE
#include <stdio.h>

#include "nvme_world.h"

static const struct bt_dma_limits roomy = {.bytes = 1ull << 30, .mappings = 1000, .piece = 2 * MIB};

static uint64_t done(struct world *world, int opcode) { return atomic_load(&world->mock.done[opcode]); }

static bool all_are(const unsigned char *data, size_t length, unsigned char value)
{
    for (size_t i = 0; i < length; i++)
        if (data[i] != value)
            return false;
    return true;
}

/* ---- PRPs ---- */

struct shape {
    uint64_t at, length; /* of the buffer, in shared memory */
    unsigned direct, bounced; /* commands */
};

/* What is there is read, changed, and written; both ways must take the same commands. */
static void one_shape(struct world *world, unsigned char *memory, const struct shape *shape)
{
    struct bt_nvme_counters before = case_counters(world), after;
    unsigned char *data = memory + shape->at, *disk = world->mock.disk + 4096;
    CHECK(case_do(world, BT_READ, 0, 4096, shape->length, data) == 0);
    CHECK(memcmp(data, disk, shape->length) == 0);
    for (uint64_t i = 0; i < shape->length; i++)
        data[i] ^= (unsigned char)(i * 7 + shape->at);
    CHECK(case_do(world, BT_WRITE, 0, 4096, shape->length, data) == 0);
    CHECK(memcmp(data, disk, shape->length) == 0);
    after = case_counters(world);
    CHECK(after.aligned - before.aligned == 2 * shape->direct);
    CHECK(after.unaligned - before.unaligned == 2 * shape->bounced);
}

static void test_shapes(void)
{
    static const struct shape shapes[] = {
        {0, 512, 1, 0},           {3584, 512, 1, 0},           {4092, 512, 1, 0},
        {4, 4096, 1, 0},          {0, 8192, 1, 0},             {4092, 8192, 1, 0},
        {8, 12288, 1, 0},         {512, MIB, 1, 0},            {0, 2 * MIB, 1, 0},
        {0, 2 * MIB + 4096, 1, 0}, {0, 2 * MIB + 8192, 1, 0}, {4092, 2 * MIB, 1, 0},
        {0, 4 * MIB, 1, 0},       {100, 4 * MIB, 1, 0},        {0, 4 * MIB + 512, 2, 0},
        {2 * MIB - 512, 1024, 1, 0}, {2 * MIB - 4, 4 * MIB, 1, 0}, {16 * MIB - 512, 512, 1, 0},
        {1, 512, 0, 1},           {2, 8192, 0, 1},             {4095, 131072, 0, 1},
        {3, 131584, 0, 2},        {5, MIB, 0, 8},
    };
    struct world *world = case_begin(512, 16, 0, &roomy);
    unsigned char *memory = share(world, 16 * MIB);
    await_mapped(world, 16 * MIB);
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++)
        one_shape(world, memory, &shapes[i]);
    CHECK(world->mock.chained);
    bt_memory_remove(world->dp, memory, 16 * MIB);
    case_end(world);
}

/* A command can name only so many mappings: what lies in more is cut where they end. */
static void test_small_pieces(void)
{
    struct bt_dma_limits limits = roomy;
    limits.piece = 65536;
    struct world *world = case_begin(512, 16, 0, &limits);
    unsigned char *memory = share(world, 2 * MIB);
    await_mapped(world, 2 * MIB);
    one_shape(world, memory, &(struct shape){0, MIB, 4, 0});
    one_shape(world, memory, &(struct shape){65536 - 512, 1024, 1, 0});
    bt_memory_remove(world->dp, memory, 2 * MIB);
    case_end(world);
}

/* ---- commands ---- */

static void test_flush(void)
{
    static unsigned char data[4096];
    struct world *world = case_begin(4096, 16, 0, NULL); /* no volatile cache */
    CHECK(case_do(world, BT_FLUSH, 0, 0, 0, NULL) == 0);
    CHECK(case_do(world, BT_WRITE, BT_FUA, 0, 4096, data) == 0);
    CHECK(done(world, NVME_FLUSH) == 0 && world->mock.fua == 0);
    case_end(world);
    world = case_begin(4096, 16, BT_NVME_VOLATILE_CACHE | BT_NVME_WRITE_ZEROES | BT_NVME_DISCARD, NULL);
    CHECK(case_do(world, BT_FLUSH, 0, 0, 0, NULL) == 0 && done(world, NVME_FLUSH) == 1);
    CHECK(case_do(world, BT_WRITE, BT_FUA, 0, 4096, data) == 0 && world->mock.fua == 1);
    CHECK(case_do(world, BT_ZEROES, BT_FUA, 0, 4096, NULL) == 0 && world->mock.fua == 2);
    CHECK(case_do(world, BT_WRITE, 0, 0, 4096, data) == 0 && world->mock.fua == 2);
    CHECK(case_do(world, BT_READ, BT_FUA, 0, 4096, data) == 0 && done(world, NVME_FLUSH) == 1);
    CHECK(case_do(world, BT_DISCARD, BT_FUA, 0, 4096, NULL) == 0 && done(world, NVME_FLUSH) == 2); /* it has no bit */
    CHECK(case_do(world, BT_DISCARD, 0, 0, 4096, NULL) == 0 && done(world, NVME_FLUSH) == 2);
    case_end(world);
    world = case_begin(4096, 16, BT_NVME_VOLATILE_CACHE | BT_NVME_NO_FUA, NULL);
    CHECK(case_do(world, BT_WRITE, BT_FUA, 0, 4096, data) == 0);
    CHECK(done(world, NVME_FLUSH) == 1 && world->mock.fua == 0);
    atomic_store(&world->mock.fail_opcode, NVME_FLUSH + 1);
    atomic_store(&world->mock.fail_status, 0x280 | NVME_STATUS_DNR);
    atomic_store(&world->mock.fail_left, 1);
    CHECK(case_do(world, BT_ZEROES, BT_FUA, 0, 4096, NULL) == -EIO); /* not durable, so not done */
    case_end(world);
    world = case_begin(4096, 16, BT_NVME_VOLATILE_CACHE | BT_NVME_NO_FLUSH, NULL);
    CHECK(case_do(world, BT_FLUSH, 0, 0, 0, NULL) == 0 && case_do(world, BT_WRITE, BT_FUA, 0, 4096, data) == 0);
    CHECK(done(world, NVME_FLUSH) == 0 && world->mock.fua == 0);
    case_end(world);
}

static void test_zeroes(void)
{
    struct world *world = case_begin(512, 16, BT_NVME_WRITE_ZEROES | BT_NVME_DEALLOCATE, NULL);
    CHECK(case_do(world, BT_ZEROES, BT_FAST_ZERO, 512, 7 * MIB, NULL) == 0);
    CHECK(done(world, NVME_WRITE_ZEROES) == 1 && all_are(world->mock.disk + 512, 7 * MIB, 0));
    CHECK(world->mock.disk[511] == 0 && world->mock.disk[7 * MIB + 512 + 1] != 0);
    CHECK(case_do(world, BT_ZEROES, BT_UNMAP, 0, 4096, NULL) == 0 && world->mock.deallocated == 1);
    /* It said that it can, and it cannot: data is written instead, now and later. */
    memset(world->mock.disk, 0x11, CASE_SIZE);
    atomic_store(&world->mock.fail_opcode, NVME_WRITE_ZEROES + 1);
    atomic_store(&world->mock.fail_status, NVME_INVALID_OPCODE | NVME_STATUS_DNR);
    atomic_store(&world->mock.fail_left, 1);
    CHECK(case_do(world, BT_ZEROES, 0, 1024, 6 * MIB, NULL) == 0);
    CHECK(done(world, NVME_WRITE) == 2 && all_are(world->mock.disk + 1024, 6 * MIB, 0));
    CHECK(world->mock.disk[1023] == 0x11 && world->mock.disk[6 * MIB + 1024] == 0x11);
    CHECK(case_do(world, BT_ZEROES, 0, 0, 512, NULL) == 0 && done(world, NVME_WRITE) == 3);
    CHECK(case_do(world, BT_ZEROES, BT_FAST_ZERO, 0, 512, NULL) == -ENOTSUP);
    case_end(world);
    world = case_begin(512, 16, BT_NVME_WRITE_ZEROES, NULL);
    CHECK(case_do(world, BT_ZEROES, BT_UNMAP, 0, 4096, NULL) == 0 && world->mock.deallocated == 0);
    atomic_store(&world->mock.fail_status, NVME_INVALID_OPCODE | NVME_STATUS_DNR);
    atomic_store(&world->mock.fail_left, 1);
    CHECK(case_do(world, BT_ZEROES, BT_FAST_ZERO, 0, 4096, NULL) == -ENOTSUP);
    case_end(world);
}

static void test_discard(void)
{
    struct world *world = case_begin(512, 16, BT_NVME_DISCARD, NULL);
    CHECK(case_do(world, BT_DISCARD, 0, 512, 7 * MIB, NULL) == 0);
    CHECK(done(world, NVME_DATASET) == 1 && all_are(world->mock.disk + 512, 7 * MIB, 0));
    atomic_store(&world->mock.fail_status, NVME_INVALID_OPCODE | NVME_STATUS_DNR);
    atomic_store(&world->mock.fail_left, 1);
    CHECK(case_do(world, BT_DISCARD, 0, 0, MIB, NULL) == 0); /* a hint */
    CHECK(case_do(world, BT_DISCARD, 0, 0, MIB, NULL) == 0 && done(world, NVME_DATASET) == 1);
    case_end(world);
    world = case_begin(512, 16, 0, NULL);
    CHECK(case_do(world, BT_DISCARD, 0, 0, MIB, NULL) == 0 && done(world, NVME_DATASET) == 0);
    case_end(world);
}

static struct world *limited_begin(void)
{
    struct world *world = calloc(1, sizeof *world);
    CHECK(world);
    world->options.discard_ranges = 8;
    world->options.discard_range_bytes = 65536;
    world->options.discard_bytes = 400 << 10; /* less than eight ranges */
    world->options.zeroes_bytes = 100 << 10;
    case_start(world, 4096, 16, BT_NVME_DISCARD | BT_NVME_WRITE_ZEROES, NULL, 65536);
    return world;
}

static void test_limits(void)
{
    static unsigned char data[MIB];
    struct world *world = limited_begin();
    CHECK(case_do(world, BT_READ, 0, 0, MIB, data) == 0 && done(world, NVME_READ) == 16);
    CHECK(case_do(world, BT_DISCARD, 0, 0, 3 * MIB, NULL) == 0 && done(world, NVME_DATASET) == 8);
    CHECK(case_do(world, BT_ZEROES, 0, 3 * MIB, MIB, NULL) == 0 && done(world, NVME_WRITE_ZEROES) == 11);
    CHECK(all_are(world->mock.disk, 4 * MIB, 0) && world->mock.disk[4 * MIB + 2] != 0);
    case_end(world);
}

static void test_ends(void)
{
    static unsigned char data[8192];
    struct world *world = case_begin(512, 16, 0, NULL);
    memset(data, 0xEE, sizeof data);
    CHECK(case_do(world, BT_READ, 0, CASE_SIZE - 512, 8192, data) == 0);
    CHECK(memcmp(data, world->mock.disk + CASE_SIZE - 512, 512) == 0 && all_are(data + 512, 7680, 0));
    memset(data, 0xEE, sizeof data);
    CHECK(case_do(world, BT_READ, 0, 1ull << 60, 8192, data) == 0 && all_are(data, 8192, 0));
    CHECK(case_do(world, BT_WRITE, 0, CASE_SIZE - 512, 1024, data) == -ENOSPC);
    CHECK(case_do(world, BT_ZEROES, 0, UINT64_MAX - 511, 512, NULL) == -ENOSPC);
    CHECK(case_do(world, BT_READ, 0, 100, 512, data) == -EINVAL);
    CHECK(case_do(world, BT_WRITE, 0, 512, 100, data) == -EINVAL);
    CHECK(done(world, NVME_WRITE) == 0 && done(world, NVME_READ) == 1);
    case_end(world);
}

/* ---- what is refused ---- */

static struct bt_nvme_options options;
static struct bt_nvme_queue queues[2];
static unsigned char unused[65 * 65536] __attribute__((aligned(4096)));

static void check_refused(struct world *world, int count)
{
    errno = 0;
    CHECK(!bt_nvme_new(world->dp, 5, 6, NULL, &options, queues, count) && errno == EINVAL);
    options = world->options;
    queues[0] = queues[1] = world->queues[0];
    queues[0].memory = queues[1].memory = unused;
    queues[1].id = 2;
    queues[1].thread = 1;
}

static void test_refusals(void)
{
    struct world *world = case_begin(512, 16, 0, NULL);
    struct bt_nvme_layout layout;
    CHECK(bt_thread_new(world->dp, 0) == 1);
    check_refused(world, 0); /* no queue at all */
    check_refused(world, BT_NVME_MAX_QUEUES + 1);
#define REFUSE(change) ((change), check_refused(world, 2))
    REFUSE(options.block_size = 256);
    REFUSE(options.block_size = 768);
    REFUSE(options.block_size = 1u << 20);
    REFUSE(options.size++);
    REFUSE(options.nsid = 0);
    REFUSE(options.stride = 2);
    REFUSE(options.timeout_ns = 0);
    REFUSE(options.max_transfer = 511);
    REFUSE(options.zeroes_bytes = 1);
    REFUSE(options.discard_bytes = 1);
    REFUSE(options.discard_range_bytes = 1);
    REFUSE(options.discard_ranges = 257);
    REFUSE(options.registers_length = 0x1000); /* the doorbells lie outside */
    REFUSE(queues[0].id = 0);
    REFUSE(queues[1].id = 70000);
    REFUSE(queues[1].id = 1024);
    REFUSE(queues[1].depth = 1);
    REFUSE(queues[1].depth = BT_NVME_MAX_DEPTH + 1);
    REFUSE(queues[0].pages = BT_NVME_MIN_PAGES - 1);
    REFUSE(queues[1].thread = 0); /* another one has it */
    REFUSE(queues[1].thread = 2);
    REFUSE(queues[0].iova += 512);
    REFUSE(queues[0].memory = NULL);
    queues[1].interrupt = -1;
    CHECK(!bt_nvme_new(world->dp, 5, 6, NULL, &options, queues, 2) && errno == EBADF);
    CHECK(bt_nvme_queue_layout(16, BT_NVME_MAX_PAGES + 1, &layout) == -EINVAL);
    case_end(world);
}

int main(void)
{
    static const struct {
        const char *name;
        void (*run)(void);
    } tests[] = {
        {"shapes", test_shapes}, {"small pieces", test_small_pieces}, {"flush", test_flush},
        {"zeroes", test_zeroes}, {"discard", test_discard},           {"limits", test_limits},
        {"ends", test_ends},     {"refusals", test_refusals},
    };
    for (size_t i = 0; i < sizeof tests / sizeof tests[0]; i++) {
        printf("%s\n", tests[i].name);
        fflush(stdout);
        tests[i].run();
    }
    printf("ok\n");
    return 0;
}
