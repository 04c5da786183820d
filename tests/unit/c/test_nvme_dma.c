/* SPDX-License-Identifier: Apache-2.0 */
/* What an IOMMU domain maps of shared memory, and when it lets go of it.
 *
 * test_nvme_dma. Exits 1 at the first difference. */
#define _GNU_SOURCE
#include <stdio.h>

#include "nvme_world.h"

#define LENGTH 65536u

/* ---- a machine that starts no more threads, by --wrap ---- */

static _Atomic bool no_threads;

int __real_pthread_create(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
int __wrap_pthread_create(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*run)(void *), void *arg)
{
    return atomic_load(&no_threads) ? EAGAIN : __real_pthread_create(thread, attr, run, arg);
}

static int refused_map(void *opaque, void *address, uint64_t length, uint64_t *iova)
{
    (void)opaque, (void)address, (void)length, (void)iova;
    return -ENOMEM;
}

static int refused_unmap(void *opaque, uint64_t iova, uint64_t length)
{
    (void)opaque, (void)iova, (void)length;
    return -ENOENT;
}

/* Whether a read into this memory went there directly. It must be right in any case. */
static bool is_direct(struct world *world, unsigned char *memory)
{
    uint64_t before = case_counters(world).aligned;
    memset(memory, 0xEE, LENGTH);
    CHECK(case_do(world, BT_READ, 0, 8192, LENGTH, memory) == 0);
    CHECK(memcmp(memory, world->mock.disk + 8192, LENGTH) == 0);
    return case_counters(world).aligned > before;
}

static void until_direct(struct world *world, unsigned char *memory)
{
    uint64_t until = bt_now_ns() + WORLD_PATIENCE_NS;
    while (!is_direct(world, memory)) {
        world_events(world, 1);
        CHECK(bt_now_ns() < until);
    }
}

/* Memory that is there before and after the device; what is not shared is never mapped. */
static void test_add_and_remove(void)
{
    static const struct bt_dma_limits limits = {.bytes = 64 * MIB, .mappings = 64, .piece = 2 * MIB};
    struct world *world = case_begin(512, 16, 0, &limits);
    unsigned char *first = share(world, 5 * MIB), *second = share(world, LENGTH), *private = map_memory(LENGTH);
    await_mapped(world, 5 * MIB + LENGTH);
    CHECK(is_direct(world, first) && is_direct(world, first + 5 * MIB - LENGTH) && is_direct(world, second));
    CHECK(!is_direct(world, private));
    bt_memory_remove(world->dp, first, 5 * MIB);
    await_mapped(world, LENGTH);
    CHECK(is_direct(world, second));
    bt_memory_remove(world->dp, second, LENGTH);
    await_mapped(world, 0);
    CHECK(dma_counters(world).mappings == 0 && dma_counters(world).maps == dma_counters(world).unmaps);
    CHECK(dma_counters(world).evictions == 0);
    munmap(private, LENGTH);
    case_end(world);
}

static void test_no_mappings_at_all(void)
{
    static const struct bt_dma_limits limits = {.bytes = 0, .mappings = 0, .piece = 4096};
    struct world *world = case_begin(512, 16, 0, &limits);
    unsigned char *memory = share(world, LENGTH);
    CHECK(!is_direct(world, memory) && !is_direct(world, memory));
    bt_memory_remove(world->dp, memory, LENGTH);
    CHECK(dma_counters(world).maps == 0);
    case_end(world);
}

/* Room for two of three: the one that was not used for the longest time goes, and comes back when it is used. */
static void evict_by(const struct bt_dma_limits *limits)
{
    struct world *world = case_begin(512, 16, 0, limits);
    unsigned char *memory[3];
    for (int i = 0; i < 2; i++)
        memory[i] = share(world, LENGTH);
    await_mapped(world, 2 * LENGTH);
    CHECK(is_direct(world, memory[1]) && is_direct(world, memory[0]));
    memory[2] = share(world, LENGTH); /* nothing goes just because this comes */
    CHECK(is_direct(world, memory[1]) && is_direct(world, memory[0]));
    until_direct(world, memory[2]);
    CHECK(dma_counters(world).evictions == 1 && dma_counters(world).mapped_bytes == 2 * LENGTH);
    CHECK(is_direct(world, memory[0]) && is_direct(world, memory[2])); /* so it was 1 that went */
    until_direct(world, memory[1]);
    CHECK(dma_counters(world).evictions == 2 && is_direct(world, memory[2]));
    until_direct(world, memory[0]);
    CHECK(world->mock.most_spans == 3); /* and the queue's */
    for (int i = 0; i < 3; i++)
        bt_memory_remove(world->dp, memory[i], LENGTH);
    case_end(world);
}

static void test_eviction(void)
{
    evict_by(&(struct bt_dma_limits){.bytes = 2 * LENGTH, .mappings = 100, .piece = 2 * MIB});
    evict_by(&(struct bt_dma_limits){.bytes = 64 * MIB, .mappings = 2, .piece = 2 * MIB});
}

/* What is in use stays: it was used a moment ago. */
static void test_no_thrashing(void)
{
    static const struct bt_dma_limits limits = {
        .bytes = LENGTH, .mappings = 100, .piece = 2 * MIB, .idle_ns = 60000000000ull};
    struct world *world = case_begin(512, 16, 0, &limits);
    unsigned char *first = share(world, LENGTH), *second;
    await_mapped(world, LENGTH);
    second = share(world, LENGTH);
    for (int i = 0; i < 300; i++)
        CHECK(is_direct(world, first) && !is_direct(world, second));
    CHECK(dma_counters(world).maps == 1 && !dma_counters(world).evictions);
    bt_memory_remove(world->dp, first, LENGTH);
    until_direct(world, second);
    bt_memory_remove(world->dp, second, LENGTH);
    case_end(world);
}

/* A command in flight holds its mapping, however long it takes. */
static void test_held_by_command(void)
{
    static const struct bt_dma_limits limits = {.bytes = LENGTH, .mappings = 100, .piece = 2 * MIB};
    case_timeout_ns = CASE_TIMEOUT_NS;
    struct world *world = case_begin(512, 16, 0, &limits);
    unsigned char *first = share(world, LENGTH), *second;
    await_mapped(world, LENGTH);
    second = share(world, LENGTH);
    atomic_store(&world->mock.hold_left, 1);
    atomic_store(&world->mock.ignores_aborts, true);
    memset(first, 0, LENGTH);
    uint64_t cookie = case_submit(world, BT_READ, 0, 8192, LENGTH, first);
    case_await(world, &world->timeouts, 0);
    for (int i = 0; i < 100; i++)
        CHECK(!is_direct(world, second));
    CHECK(!dma_counters(world).evictions);
    world_reset(world, 0);
    CHECK(world_wait(world, cookie) == 0 && memcmp(first, world->mock.disk + 8192, LENGTH) == 0);
    until_direct(world, second);
    CHECK(dma_counters(world).evictions == 1);
    bt_memory_remove(world->dp, first, LENGTH);
    bt_memory_remove(world->dp, second, LENGTH);
    case_end(world);
}

/* The kernel refuses: requests go on with copies, and later it is tried again. */
static void test_refused(void)
{
    static const struct bt_dma_limits limits = {.bytes = 64 * MIB, .mappings = 64, .piece = 2 * MIB};
    struct world *world = case_begin(512, 16, 0, &limits);
    atomic_store(&world->mock.map_error, -ENOMEM);
    unsigned char *memory = share(world, LENGTH);
    uint64_t until = bt_now_ns() + WORLD_PATIENCE_NS;
    while (!dma_counters(world).failures) {
        CHECK(!is_direct(world, memory) && bt_now_ns() < until);
        world_events(world, 1);
    }
    CHECK(dma_counters(world).last_error == ENOMEM && !dma_counters(world).mapped_bytes);
    CHECK(!is_direct(world, memory));
    atomic_store(&world->mock.map_error, 0);
    until_direct(world, memory);
    bt_memory_remove(world->dp, memory, LENGTH);
    case_end(world);
}

/* One guest's memory cannot be mapped, for example because its file is too short; that of others can. */
static void test_region_that_is_refused_leaves_the_others_alone(void)
{
    static const struct bt_dma_limits limits = {.bytes = 2 * LENGTH, .mappings = 64, .piece = 2 * MIB};
    struct world *world = case_begin(512, 16, 0, &limits);
    unsigned char *good = share(world, 2 * LENGTH), *other, *bad;
    await_mapped(world, 2 * LENGTH);
    other = share(world, LENGTH); /* there is no room: it is mapped when it is wanted */
    bt_synchronize(world->device, world_cookie(world));
    bt_memory_remove(world->dp, good, 2 * LENGTH);
    await_mapped(world, 0);
    atomic_store(&world->mock.map_error, -EFAULT);
    bad = share(world, LENGTH);
    uint64_t until = bt_now_ns() + WORLD_PATIENCE_NS;
    while (!dma_counters(world).failures) {
        world_events(world, 1);
        CHECK(bt_now_ns() < until);
    }
    atomic_store(&world->mock.map_error, 0);
    uint64_t since = bt_now_ns();
    CHECK(!is_direct(world, bad));
    until_direct(world, other);
    CHECK(bt_now_ns() - since < 700000000);
    CHECK(!is_direct(world, bad)); /* not asked for again so soon */
    until_direct(world, bad);
    bt_memory_remove(world->dp, other, LENGTH);
    bt_memory_remove(world->dp, bad, LENGTH);
    case_end(world);
}

/* Mapping is slow: nobody waits for it, not even who removes the memory meanwhile. */
static void test_slow_mapping(void)
{
    static const struct bt_dma_limits limits = {.bytes = 64 * MIB, .mappings = 64, .piece = 65536};
    struct world *world = case_begin(512, 16, 0, &limits);
    atomic_store(&world->mock.map_pause_ns, 900000000);
    unsigned char *memory = share(world, MIB);
    uint64_t before = bt_now_ns();
    CHECK(!is_direct(world, memory) && !is_direct(world, memory + LENGTH));
    bt_memory_remove(world->dp, memory, MIB);
    CHECK(bt_now_ns() - before < 850000000);
    atomic_store(&world->mock.map_pause_ns, 0);
    memory = share(world, LENGTH);
    until_direct(world, memory);
    bt_memory_remove(world->dp, memory, LENGTH);
    await_mapped(world, 0);
    case_end(world);
}

/* Memory that goes while the domain is closed: it is unmapped first, whichever comes first. */
static void test_close(void)
{
    static const struct bt_dma_limits limits = {.bytes = 64 * MIB, .mappings = 100, .piece = 65536};
    struct world *world = case_begin(512, 16, 0, &limits);
    struct bt_dma_ops ops = {.map = mock_map, .unmap = mock_unmap};
    for (unsigned i = 0; i < 20; i++) {
        unsigned char *memory = share(world, 10 * LENGTH);
        await_mapped(world, 10 * LENGTH);
        bt_memory_remove(world->dp, memory, 10 * LENGTH);
        await_mapped(world, 0);
        CHECK(bt_memory_find(world->dp, (uintptr_t)memory, &(uint64_t){0}, &(uint64_t){0}) == false);
    }
    uint64_t cookie = world_cookie(world);
    unsigned char *memory[6];
    for (unsigned i = 0; i < 6; i++)
        memory[i] = share(world, 10 * LENGTH);
    await_mapped(world, 60 * LENGTH);
    bt_dma_free(world->dma, cookie);
    for (unsigned i = 0; i < 6; i++)
        bt_memory_remove(world->dp, memory[i], 10 * LENGTH);
    world_wait(world, cookie);
    CHECK(world->mock.span_count == 1); /* the queue's */
    world->dma = bt_dma_new(world->dp, &ops, &world->mock, &limits); /* for case_end, which frees it */
    case_end(world);
}

/* Without a worker it would do its work where it has its own lock, and stand still for ever. */
static void test_no_worker_can_be_started(void)
{
    static const struct bt_dma_limits limits = {.bytes = MIB, .mappings = 8, .piece = 2 * MIB};
    static const struct bt_dma_ops ops = {.map = refused_map, .unmap = refused_unmap};
    struct world *world = case_begin(512, 16, 0, NULL);
    unsigned char *memory = share(world, LENGTH);
    atomic_store(&no_threads, true);
    CHECK(!bt_dma_new(world->dp, &ops, NULL, &limits) && errno == EAGAIN);
    atomic_store(&no_threads, false);
    bt_memory_remove(world->dp, memory, LENGTH);
    case_end(world);
}

int main(void)
{
    static const struct {
        const char *name;
        void (*run)(void);
    } tests[] = {
        {"add and remove", test_add_and_remove}, {"no mappings at all", test_no_mappings_at_all},
        {"eviction", test_eviction},             {"no thrashing", test_no_thrashing},
        {"held by command", test_held_by_command}, {"refused", test_refused},
        {"slow mapping", test_slow_mapping},       {"close", test_close},
        {"region that is refused", test_region_that_is_refused_leaves_the_others_alone},
        {"no worker can be started", test_no_worker_can_be_started},
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
