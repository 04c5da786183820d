/* SPDX-License-Identifier: Apache-2.0 */
/* A vhost-user-blk session without Python: two front-end threads drive a queue each, on two I/O threads, over a
 * file; meanwhile the control thread stops and starts the queues, moves memory, and replaces descriptors.
 *
 * test_vhost FILE [OPERATIONS] [SEED]: FILE is made and overwritten. Exits 1 at the first difference. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"
#include "core.h"

#define LANES 2u
#define RING 16u
#define DEPTH 4u /* requests in flight, of three descriptors each */
#define BLOCK 4096u
#define BLOCKS 64u /* of a lane, each in one request at a time */
#define LANE_BYTES (BLOCK * BLOCKS)
#define LANE_MEMORY 0x10000u
#define MEMORY (LANE_MEMORY * LANES)
#define NEXT 1
#define WRITE 2

struct desc {
    uint64_t addr;
    uint32_t len;
    uint16_t flags, next;
};
struct shared { /* one lane's guest memory */
    struct desc desc[RING];
    uint16_t avail_flags, avail_idx, avail[RING], used_event;
    uint16_t used_flags __attribute__((aligned(16))), used_idx;
    struct {
        uint32_t id, len;
    } used[RING];
    uint16_t avail_event;
    struct {
        struct {
            uint32_t type, reserved;
            uint64_t sector;
        } header;
        uint8_t status;
    } slots[DEPTH] __attribute__((aligned(64)));
    uint8_t data[DEPTH][BLOCK] __attribute__((aligned(4096)));
};
_Static_assert(sizeof(struct shared) <= LANE_MEMORY, "a lane's memory is large enough");

struct lane {
    pthread_t pthread;
    unsigned index;
    uint32_t random;
    unsigned left;
    struct shared *shared;
    int kick;
    _Atomic int call;
    uint16_t used_seen, kicked;
    unsigned block[DEPTH];
    bool write[DEPTH];
    bool busy[BLOCKS];
    uint8_t model[BLOCKS];
};

static bt_datapath *dp;
static struct lane lanes[LANES];
static _Atomic unsigned running = LANES;

/* ---- front ends ---- */

static uint64_t guest(const struct lane *lane, const void *p)
{
    return lane->index * LANE_MEMORY + (uint64_t)((const char *)p - (const char *)lane->shared);
}

static void submit(struct lane *lane, unsigned slot)
{
    struct shared *s = lane->shared;
    unsigned block;
    do
        block = next_random(&lane->random) % BLOCKS;
    while (lane->busy[block]);
    bool write = next_random(&lane->random) & 1;
    lane->busy[block] = true;
    lane->block[slot] = block;
    lane->write[slot] = write;
    if (write)
        lane->model[block] = (uint8_t)(next_random(&lane->random) | 1);
    memset(s->data[slot], write ? lane->model[block] : 0, BLOCK);
    s->slots[slot].header.type = write;
    s->slots[slot].header.sector = (lane->index * LANE_BYTES + (uint64_t)block * BLOCK) / 512;
    s->slots[slot].status = 0xEE;
    uint16_t d = (uint16_t)(slot * 3);
    s->desc[d] = (struct desc){guest(lane, &s->slots[slot].header), 16, NEXT, (uint16_t)(d + 1)};
    s->desc[d + 1] = (struct desc){guest(lane, s->data[slot]), BLOCK, write ? NEXT : NEXT | WRITE, (uint16_t)(d + 2)};
    s->desc[d + 2] = (struct desc){guest(lane, &s->slots[slot].status), 1, WRITE, 0};
    s->avail[s->avail_idx % RING] = d;
    __atomic_store_n(&s->avail_idx, (uint16_t)(s->avail_idx + 1), __ATOMIC_RELEASE);
}

static void kick(struct lane *lane)
{
    uint64_t one = 1;
    atomic_thread_fence(memory_order_seq_cst);
    uint16_t new = lane->shared->avail_idx, event = __atomic_load_n(&lane->shared->avail_event, __ATOMIC_ACQUIRE);
    if ((uint16_t)(new - event - 1) < (uint16_t)(new - lane->kicked))
        CHECK(write(lane->kick, &one, sizeof one) == sizeof one);
    lane->kicked = new;
}

/* What a completion must be. Returns its slot. */
static unsigned take_one(struct lane *lane)
{
    struct shared *s = lane->shared;
    unsigned slot = s->used[lane->used_seen % RING].id / 3, block = lane->block[slot];
    CHECK(slot < DEPTH && lane->busy[block]);
    CHECK(s->slots[slot].status == 0);
    CHECK(s->used[lane->used_seen % RING].len == (lane->write[slot] ? 1 : BLOCK + 1));
    lane->used_seen++;
    for (unsigned i = 0; i < BLOCK && !lane->write[slot]; i++)
        CHECK(s->data[slot][i] == lane->model[block]);
    lane->busy[block] = false;
    return slot;
}

static void wait_call(struct lane *lane)
{
    __atomic_store_n(&lane->shared->used_event, lane->used_seen, __ATOMIC_RELEASE);
    atomic_thread_fence(memory_order_seq_cst);
    if (__atomic_load_n(&lane->shared->used_idx, __ATOMIC_ACQUIRE) != lane->used_seen)
        return;
    /* The descriptor may be replaced now: then the new one is signalled. */
    struct pollfd pollfd = {.fd = atomic_load(&lane->call), .events = POLLIN};
    uint64_t count;
    if (poll(&pollfd, 1, 20) == 1 && read(pollfd.fd, &count, sizeof count) < 0)
        CHECK(errno == EAGAIN);
}

static void *front_end(void *arg)
{
    struct lane *lane = arg;
    unsigned in_flight = 0;
    for (; in_flight < DEPTH; in_flight++)
        submit(lane, in_flight);
    kick(lane);
    time_t until = time(NULL) + 60;
    while (in_flight) {
        while (__atomic_load_n(&lane->shared->used_idx, __ATOMIC_ACQUIRE) != lane->used_seen) {
            unsigned slot = take_one(lane);
            if (lane->left && lane->left--)
                submit(lane, slot);
            else
                in_flight--;
        }
        kick(lane);
        if (in_flight)
            wait_call(lane);
        CHECK(time(NULL) < until);
    }
    atomic_fetch_sub(&running, 1);
    return NULL;
}

/* ---- control ---- */

static void wait_events(enum bt_event_type type, unsigned count)
{
    struct pollfd pollfd = {.fd = bt_datapath_eventfd(dp), .events = POLLIN};
    while (count) {
        struct bt_event events[16];
        CHECK(poll(&pollfd, 1, 30000) == 1);
        int n = bt_events(dp, events, 16);
        for (int i = 0; i < n; i++) {
            CHECK(events[i].type != BT_EVENT_SESSION);
            count -= events[i].type == type;
        }
    }
}

static void stop_all(bt_vhost *session)
{
    for (unsigned i = 0; i < LANES; i++)
        CHECK(bt_vhost_queue_stop(session, i, i) == 0);
    wait_events(BT_EVENT_DONE, LANES);
    for (unsigned i = 0; i < LANES; i++)
        bt_vhost_queue_stopped(session, i);
}

static void start_all(bt_vhost *session, unsigned shift)
{
    for (unsigned i = 0; i < LANES; i++)
        CHECK(bt_vhost_queue_start(session, i, (int)((i + shift) % LANES)) == 0);
}

static void set_up_lane(bt_vhost *session, unsigned index, struct shared *shared, unsigned operations, uint32_t seed)
{
    struct lane *lane = &lanes[index];
    *lane = (struct lane){.index = index, .shared = shared, .left = operations, .random = seed * 2 + index + 1};
    lane->kick = eventfd(0, 0);
    lane->call = eventfd(0, EFD_NONBLOCK);
    uint64_t user = index * LANE_MEMORY;
    CHECK(bt_vhost_queue_set_size(session, index, RING) == 0);
    CHECK(bt_vhost_queue_set_addresses(session, index, user, user + offsetof(struct shared, avail_flags),
                                       user + offsetof(struct shared, used_flags)) == 0);
    CHECK(bt_vhost_queue_set_kick(session, index, lane->kick) == 0);
    CHECK(bt_vhost_queue_set_call(session, index, lane->call) == 0);
}

static void disturb(bt_vhost *session, const struct bt_vhost_region *extra, int fd, unsigned round)
{
    struct bt_vhost_counters counters;
    int call = eventfd(0, EFD_NONBLOCK), old = atomic_exchange(&lanes[round % LANES].call, call);
    CHECK(bt_vhost_queue_set_call(session, round % LANES, call) == 0);
    (void)old; /* the front end may be waiting on it; the process ends soon */
    bt_vhost_set_write_through(session, round & 8);
    bt_vhost_get_counters(session, &counters);
    if (round % 4)
        return;
    CHECK(bt_vhost_add_region(session, extra, fd) == -EBUSY);
    stop_all(session);
    CHECK(bt_vhost_add_region(session, extra, fd) == 0 && bt_vhost_remove_region(session, extra) == 0);
    start_all(session, round / 4);
}

int main(int argc, char **argv)
{
    CHECK(argc > 1);
    unsigned operations = argc > 2 ? (unsigned)atoi(argv[2]) : 1000;
    uint32_t seed = argc > 3 ? (uint32_t)atoi(argv[3]) : 1;
    int fd = open(argv[1], O_RDWR | O_CREAT | O_TRUNC, 0600), memory = memfd_create("guest", 0);
    CHECK(fd >= 0 && ftruncate(fd, LANES * LANE_BYTES) == 0 && ftruncate(memory, MEMORY) == 0);
    char *mapped = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
    dp = bt_datapath_new();
    CHECK(bt_thread_new(dp, 20000) == 0 && bt_thread_new(dp, 0) == 1);
    bt_object *file = bt_file_new(dp, 1, fd, LANES * LANE_BYTES, 0, BT_ENGINE_THREADS, 1, 1);
    bt_object *gate = bt_gate_new(dp, 2, file, true);
    bt_vhost *session = bt_vhost_new(dp, 3, gate, LANES, LANES * LANE_BYTES, 512, true, "serial-of-20-bytes--");
    const struct bt_vhost_region region = {0, MEMORY, 0, 0}, extra = {MEMORY, 4096, MEMORY, 0};
    CHECK(bt_vhost_add_region(session, &region, memory) == 0);
    CHECK(bt_vhost_set_features(session, 1ull << 29 | 1ull << 9) == 0);
    for (unsigned i = 0; i < LANES; i++)
        set_up_lane(session, i, (struct shared *)(mapped + i * LANE_MEMORY), operations, seed);
    start_all(session, 0);
    for (unsigned i = 0; i < LANES; i++)
        pthread_create(&lanes[i].pthread, NULL, front_end, &lanes[i]);
    for (unsigned round = 0; atomic_load(&running); round++) {
        disturb(session, &extra, memory, round);
        usleep(1000);
    }
    for (unsigned i = 0; i < LANES; i++)
        pthread_join(lanes[i].pthread, NULL);
    stop_all(session);
    bt_vhost_free(session);
    bt_object_unref(gate);
    bt_object_unref(file);
    wait_events(BT_EVENT_RELEASED, 2);
    bt_datapath_free(dp);
    puts("ok");
    return 0;
}
