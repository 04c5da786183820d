/* SPDX-License-Identifier: Apache-2.0 */
/* The NVMe device against a flat model: requests of all kinds and sizes on three I/O threads with two queue pairs,
 * from shared memory that comes and goes, from memory that is not shared, and from what PRPs cannot express; with
 * errors that pass, commands that are lost, aborts, and resets.
 *
 * test_nvme [REQUESTS] [SEED] [BLOCK] [DEPTH]. Exits 1 at the first difference. */
#define _GNU_SOURCE
#include <stdio.h>

#include "nvme_world.h"

#define THREADS 3u
#define SLOTS 4u                /* requests in flight on each thread */
#define SLOT_BYTES (5u << 20)   /* of the disk: each slot has its own part */
#define MEMORY (6u << 20)       /* of a slot's buffers */
#define MAX_TRANSFER (4u << 20)
#define PIECES 6

enum memory_kind { SHARED, PRIVATE, KINDS };

struct slot {
    struct lane *lane;
    struct bt_request request;
    struct iovec iov[PIECES];
    unsigned char *memory[KINDS];
    uint64_t base;        /* on the disk */
    unsigned char *model; /* SLOT_BYTES */
    unsigned char *data; /* what was read, in one piece */
    enum memory_kind kind;
    struct bt_extent extent;
};

struct lane {
    struct bt_message message;
    struct bt_thread *thread;
    struct slot slots[SLOTS];
    uint32_t random;
    unsigned left, busy;
};

static struct world world;
static struct lane lanes[THREADS];
static _Atomic unsigned running = THREADS;
static _Atomic unsigned failed, finished;
static uint32_t block;

static unsigned char *new_memory(enum memory_kind kind)
{
    void *memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(memory != MAP_FAILED);
    if (kind == SHARED)
        bt_memory_add(world.dp, memory, MEMORY);
    return memory;
}

/* The sizes that matter: one block, a few pages, more than a page of PRPs. */
static uint64_t random_length(struct lane *lane)
{
    uint32_t kind = next_random(&lane->random) % 64, most = kind == 0 ? SLOT_BYTES : kind < 8 ? 300000 : 24576;
    uint64_t length = next_random(&lane->random) % most & ~(uint64_t)(block - 1);
    return length ? length : block;
}

/* Cuts [0, length) into pieces, at places that PRPs can express or not, somewhere in the slot's memory. */
static int random_iov(struct slot *slot, uint64_t length)
{
    struct lane *lane = slot->lane;
    unsigned char *at = slot->memory[slot->kind];
    uint32_t style = next_random(&lane->random) % 4;
    uint64_t left = length;
    int count = 0;
    at += style == 0 ? next_random(&lane->random) % 4096 & ~3u : style == 1 ? next_random(&lane->random) % 4096 : 0;
    while (left) {
        uint64_t n = left;
        if (count < PIECES - 1 && next_random(&lane->random) % 3)
            n = 1 + next_random(&lane->random) % left;
        if (style == 2 && n != left)
            n = bt_min((n + 4095) & ~4095ull, left);
        slot->iov[count++] = (struct iovec){at, n};
        left -= n;
        at += n;
        if (next_random(&lane->random) % 2)
            at += style == 2 ? 4096 : 512;
        CHECK(at <= slot->memory[slot->kind] + MEMORY);
    }
    return count;
}

static void start(struct slot *slot);

static void check_read(struct slot *slot)
{
    struct bt_request *request = &slot->request;
    bt_iov_to_buffer(request->iov, request->iovcnt, 0, slot->data, request->length);
    CHECK(memcmp(slot->data, slot->model + (request->offset - slot->base), request->length) == 0);
}

static void done(struct bt_request *request)
{
    struct slot *slot = BT_CONTAINER(request, struct slot, request);
    if (request->ret < 0) { /* the machine is so slow that too many resets or aborts met it: it is done again */
        CHECK(request->ret == -EIO || request->ret == -ETIMEDOUT);
        atomic_fetch_add(&failed, 1);
        bt_request_start(request);
        return;
    }
    if (request->op == BT_READ)
        check_read(slot);
    if (request->op == BT_STATUS)
        CHECK(request->extents_count == 1 && slot->extent.length == request->length && !slot->extent.flags);
    slot->lane->busy--;
    atomic_fetch_add(&finished, 1);
    start(slot);
}

static void fill(struct slot *slot, uint64_t at, uint64_t length)
{
    uint32_t value = next_random(&slot->lane->random);
    for (uint64_t i = 0; i < length; i += 4) {
        value = value * 1664525 + 1013904223;
        memcpy(slot->model + at + i, &value, 4);
    }
    for (uint64_t i = 0, from = at; i < (uint64_t)slot->request.iovcnt; from += slot->iov[i++].iov_len)
        memcpy(slot->iov[i].iov_base, slot->model + from, slot->iov[i].iov_len);
}

/* Between requests of the slot its shared memory may go, and other memory come. */
static void churn(struct slot *slot)
{
    bt_memory_remove(world.dp, slot->memory[SHARED], MEMORY);
    slot->memory[SHARED] = new_memory(SHARED);
}

static void set_up(struct slot *slot)
{
    static const uint8_t ops[] = {BT_READ, BT_READ, BT_READ, BT_WRITE, BT_WRITE, BT_WRITE, BT_ZEROES, BT_DISCARD,
                                  BT_FLUSH, BT_STATUS, BT_CACHE, BT_READ, BT_WRITE, BT_READ, BT_WRITE, BT_READ};
    struct lane *lane = slot->lane;
    struct bt_request *request = &slot->request;
    uint64_t length = random_length(lane);
    uint64_t at = next_random(&lane->random) % (SLOT_BYTES - length + 1) & ~(uint64_t)(block - 1);
    slot->kind = next_random(&lane->random) % 4 ? SHARED : PRIVATE;
    memset(request, 0, sizeof *request);
    request->thread = lane->thread;
    request->object = world.device;
    request->done = done;
    request->op = ops[next_random(&lane->random) % sizeof ops];
    request->offset = slot->base + at;
    request->length = request->op == BT_FLUSH ? 0 : length;
    request->extents = &slot->extent;
    request->extents_max = 1;
    if (request->op == BT_READ || request->op == BT_WRITE) {
        request->iov = slot->iov;
        request->iovcnt = random_iov(slot, length);
    }
    if (request->op == BT_WRITE || request->op == BT_ZEROES)
        request->flags = next_random(&lane->random) % 8 ? 0 : BT_FUA;
    if (request->op == BT_ZEROES)
        request->flags |= next_random(&lane->random) & BT_UNMAP;
    if (request->op == BT_WRITE)
        fill(slot, at, length);
    if (request->op == BT_ZEROES || request->op == BT_DISCARD)
        memset(slot->model + at, 0, length);
}

static void start(struct slot *slot)
{
    struct lane *lane = slot->lane;
    if (!lane->left) {
        if (!lane->busy)
            atomic_fetch_sub(&running, 1);
        return;
    }
    lane->left--;
    lane->busy++;
    if (next_random(&lane->random) % 50 == 0)
        churn(slot);
    set_up(slot);
    bt_request_start(&slot->request);
}

static void lane_start(struct bt_message *message, struct bt_thread *thread)
{
    struct lane *lane = BT_CONTAINER(message, struct lane, message);
    (void)thread;
    for (unsigned i = 0; i < SLOTS; i++)
        start(&lane->slots[i]);
}

static void lane_init(struct lane *lane, unsigned index, uint32_t seed, unsigned requests)
{
    lane->thread = bt_thread_get(world.dp, (int)index);
    lane->random = (seed + index) * 2654435761u + 1;
    lane->left = requests;
    lane->message.fn = lane_start;
    for (unsigned i = 0; i < SLOTS; i++) {
        struct slot *slot = &lane->slots[i];
        slot->lane = lane;
        slot->base = (uint64_t)(index * SLOTS + i) * SLOT_BYTES;
        slot->model = calloc(1, SLOT_BYTES);
        slot->data = malloc(SLOT_BYTES);
        for (int kind = 0; kind < KINDS; kind++)
            slot->memory[kind] = new_memory(kind);
    }
}

static void lane_free(struct lane *lane)
{
    for (unsigned i = 0; i < SLOTS; i++) {
        struct slot *slot = &lane->slots[i];
        CHECK(memcmp(slot->model, world.mock.disk + slot->base, SLOT_BYTES) == 0);
        free(slot->model);
        free(slot->data);
        bt_memory_remove(world.dp, slot->memory[SHARED], MEMORY);
        munmap(slot->memory[PRIVATE], MEMORY);
    }
}

/* Trouble of every kind, one at a time, as long as requests come. */
static void disturb(uint32_t *random)
{
    struct mock *mock = &world.mock;
    *random = *random * 1664525 + 1013904223;
    switch (*random >> 28) {
    case 0:
        world.needs_reset = true;
        break;
    case 1:
        atomic_store(&mock->fail_status, 0x006); /* internal error, for a time */
        atomic_store(&mock->fail_left, 3);
        break;
    case 2:
        atomic_store(&mock->ignores_aborts, *random & 0x100000);
        atomic_store(&mock->hold_left, 1);
        break;
    case 3:
        atomic_store(&mock->breach, MOCK_WRONG_PHASE);
        break;
    case 4:
        atomic_store(&mock->latency_ns, *random & 0xFFFF);
        break;
    default:
        break;
    }
}

static void run(uint32_t seed)
{
    uint64_t until = bt_now_ns() + 4 * WORLD_PATIENCE_NS;
    unsigned next = 0;
    for (unsigned i = 0; i < THREADS; i++)
        bt_thread_post(lanes[i].thread, &lanes[i].message);
    while (atomic_load(&running)) {
        world_events(&world, 1);
        if (world.needs_reset)
            world_reset(&world, 0);
        if (atomic_load(&finished) >= next) {
            next = atomic_load(&finished) + 60;
            disturb(&seed);
        }
        CHECK(bt_now_ns() < until);
    }
}

static void report(void)
{
    struct bt_nvme_counters nvme;
    struct bt_dma_counters dma;
    bt_nvme_get_counters(world.device, &nvme);
    bt_dma_get_counters(world.dma, &dma);
    printf("aligned %lu unaligned %lu errors %lu commands %lu retries %lu timeouts %lu aborted %lu resets %lu "
           "resubmitted %lu doorbells %lu interrupts %lu waits %lu handed over %lu\n",
           nvme.aligned, nvme.unaligned, nvme.completion_errors, nvme.commands, nvme.retries, nvme.timeouts,
           nvme.aborted, nvme.resets, nvme.resubmitted, nvme.doorbells, nvme.interrupts, nvme.waits,
           nvme.handed_over);
    printf("maps %lu unmaps %lu evictions %lu mapped %lu most %u chained %lu fua %lu stuck %u failed %u\n", dma.maps,
           dma.unmaps, dma.evictions, dma.mapped_bytes, world.mock.most_spans, world.mock.chained, world.mock.fua,
           world.stuck, failed);
    CHECK(nvme.aligned && nvme.unaligned && nvme.handed_over && nvme.waits);
    CHECK(world.options.flags & BT_NVME_NO_FUA ? !world.mock.fua : world.mock.fua);
    CHECK(failed < 20);
    CHECK(nvme.commands >= nvme.completions && dma.maps && dma.unmaps && !nvme.breaches);
}

int main(int argc, char **argv)
{
    unsigned requests = argc > 1 ? (unsigned)atoi(argv[1]) : 2000;
    uint32_t seed = argc > 2 ? (uint32_t)atoi(argv[2]) : 1;
    uint32_t depth = argc > 4 ? (uint32_t)atoi(argv[4]) : 8;
    struct bt_dma_limits limits = {.bytes = 24u << 20, .mappings = 14, .piece = 2u << 20, .idle_ns = 3000000};
    if (seed & 2)
        limits.bytes = 128u << 20, limits.mappings = 100; /* all fits */
    block = argc > 3 ? (uint32_t)atoi(argv[3]) : 512;
    world.dp = bt_datapath_new();
    for (unsigned i = 0; i < THREADS; i++)
        CHECK(bt_thread_new(world.dp, i == 0 ? 0 : 50000) == (int)i);
    mock_init(&world.mock, (uint64_t)THREADS * SLOTS * SLOT_BYTES, block, MAX_TRANSFER, seed);
    for (unsigned i = 0; i < 2; i++)
        world.queues[world.queue_count++] = mock_queue_new(&world.mock, i + 1, depth, 48, (int)i);
    world.options.timeout_ns = 150000000;
    world.options.flags = BT_NVME_VOLATILE_CACHE | BT_NVME_DISCARD | BT_NVME_DEALLOCATE;
    world.options.flags |= seed & 1 ? BT_NVME_WRITE_ZEROES : BT_NVME_NO_FUA * (seed % 4 == 0);
    world.options.discard_range_bytes = 65536;
    world.options.discard_bytes = 1u << 20;
    world_open(&world, &limits);
    for (unsigned i = 0; i < THREADS; i++)
        lane_init(&lanes[i], i, seed, requests);
    run(seed);
    report();
    for (unsigned i = 0; i < THREADS; i++)
        lane_free(&lanes[i]);
    world_close(&world);
    printf("ok\n");
    return 0;
}
