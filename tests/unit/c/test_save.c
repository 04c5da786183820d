/* SPDX-License-Identifier: Apache-2.0 */
/* A fence that saves what it holds back, over memory: lanes on two I/O threads change their own blocks through it,
 * others read the view and find what was there before; the place where it is saved fails and dawdles now and then.
 * The control thread says what that means, has parts saved and hides parts. What a thread sanitizer sees of the
 * memory is whether something is changed under a reader.
 *
 * test_save [OPERATIONS] [SEED]. Exits 1 at the first difference. */
#define _GNU_SOURCE
#include <poll.h>

#include "check.h"
#include "core.h"
#include "lanes.h"

#define GRANULE_BITS 12
#define GRANULE (1u << GRANULE_BITS)
#define BLOCK 512u
#define WRITERS 96u /* more than there may be saves */
#define READERS 8u
#define LANES (WRITERS + READERS + 1)
#define SHARED_GRANULES 200u /* the writers' */
#define SHARED (SHARED_GRANULES * GRANULE)
#define BLOCKS (SHARED / BLOCK)
#define BIG (3u << 20) /* behind it, of the one who changes much at once */
#define SIZE (SHARED + BIG - BLOCK)
#define GRANULES ((SIZE + GRANULE - 1) / GRANULE)
#define READ_MAX (3u * GRANULE)
#define HIDDEN_FIRST 150u /* granules from here on, up to the shared ones' end, may be hidden */
#define COOKIE 1000u

struct lane {
    struct bt_message message;
    struct bt_request request;
    struct iovec iov;
    unsigned number;
    uint32_t random;
    unsigned left;
    unsigned block;
    uint8_t value;
    uint8_t model[BLOCKS / WRITERS + 1]; /* of a writer's blocks, which are WRITERS apart */
    uint8_t *data;
};

struct memory {
    struct bt_device device;
    uint8_t *bytes;
    bool fails;
};

struct late {
    struct bt_timer timer;
    struct bt_io *io;
};

static bt_datapath *dp;
static struct memory *disk, *saved;
static bt_object *fence, *view;
static struct lane lanes[LANES];
static uint8_t big_model[BIG];
static _Atomic unsigned running = LANES;
static _Atomic bool hidden[GRANULES], given_up;
static unsigned faults, late_faults, failed_changes, asked;

static uint8_t original(uint64_t offset)
{
    return offset >> GRANULE_BITS & 8 ? 0 : (uint8_t)(offset / BLOCK * 7 + 1); /* some are zeros */
}

/* ---- memory as a device ---- */

static int serve(struct memory *memory, struct bt_io *io)
{
    uint8_t *at = memory->bytes + io->offset;
    CHECK(bt_range_ok(io->offset, io->length, SIZE));
    if (io->op == BT_READ) {
        bt_iov_from_buffer(io->iov, io->iovcnt, 0, at, io->length);
    } else if (io->op == BT_WRITE) {
        bt_iov_to_buffer(io->iov, io->iovcnt, 0, at, io->length);
    } else if (io->op == BT_ZEROES || io->op == BT_DISCARD) {
        memset(at, 0, io->length);
    } else if (io->op == BT_STATUS) {
        io->status_length = io->length;
        io->status_flags = 0;
    }
    return 0;
}

static void serve_late(struct bt_timer *timer, struct bt_thread *thread)
{
    struct late *late = BT_CONTAINER(timer, struct late, timer);
    struct bt_io *io = late->io;
    (void)thread;
    free(late);
    bt_io_finish(io, serve((struct memory *)io->device, io));
}

static void submit(struct bt_io *io)
{
    static _Thread_local uint32_t random = 88172645;
    struct memory *memory = (struct memory *)io->device;
    uint32_t what = next_random(&random) % 16;
    if (memory->fails && io->op != BT_READ && what == 0) {
        bt_io_finish(io, -ENOSPC);
    } else if (what < 8) {
        bt_io_finish(io, serve(memory, io));
    } else {
        struct late *late = calloc(1, sizeof *late);
        late->io = io;
        late->timer.fn = serve_late;
        late->timer.at_ns = bt_now_ns() + (what == 15 ? 3000000 : next_random(&random) % 100000);
        bt_timer_add(io->thread, &late->timer);
    }
}

static void memory_destroy(struct bt_object *object)
{
    free(((struct memory *)object)->bytes);
    free(object);
}
static const struct bt_device_ops memory_ops = {.submit = submit};
static const struct bt_object_ops memory_object_ops = {.destroy = memory_destroy};

static struct memory *make_memory(uint64_t tag, bool filled)
{
    struct memory *memory = calloc(1, sizeof *memory);
    bt_device_init(&memory->device, dp, &memory_ops, &memory_object_ops, tag, SIZE);
    memory->bytes = calloc(1, SIZE);
    for (uint64_t at = 0; filled && at < SIZE; at++)
        memory->bytes[at] = original(at);
    memory->fails = !filled;
    return memory;
}

/* ---- lanes, on the I/O threads ---- */

static void go_on(struct lane *lane) { next_step(&lane->request, &lane->message, &lane->left, &running); }

static void start(struct lane *lane, bt_object *object, int op, uint64_t offset, uint64_t length,
                  void (*done)(struct bt_request *))
{
    lane->iov = (struct iovec){lane->data, length};
    begin(&lane->request, object, op, 0, offset, &lane->iov, done);
}

/* A change that failed has not been made: the copy of its only granule has failed. */
static void changed(struct bt_request *request)
{
    struct lane *lane = BT_CONTAINER(request, struct lane, request);
    uint8_t *model = &lane->model[lane->block / WRITERS];
    CHECK(request->ret == 0 || request->ret == -ENOSPC || request->ret == -ETIMEDOUT);
    for (unsigned i = 0; request->op == BT_READ && i < BLOCK; i++)
        CHECK(lane->data[i] == *model);
    if (request->op != BT_READ && request->ret == 0)
        *model = lane->value;
    go_on(lane);
}

static void change(struct lane *lane)
{
    static const uint8_t ops[] = {BT_READ, BT_ZEROES, BT_WRITE, BT_WRITE, BT_DISCARD};
    unsigned own = (BLOCKS - lane->number + WRITERS - 1) / WRITERS;
    lane->block = lane->number + WRITERS * (next_random(&lane->random) % own);
    int op = ops[next_random(&lane->random) % sizeof ops];
    lane->value = op == BT_WRITE ? (uint8_t)(next_random(&lane->random) | 1) : 0;
    memset(lane->data, lane->value, BLOCK);
    start(lane, fence, op, (uint64_t)lane->block * BLOCK, BLOCK, changed);
}

/* What failed may have been made in part: it is done again. */
static void big_changed(struct bt_request *request)
{
    struct lane *lane = BT_CONTAINER(request, struct lane, request);
    if (request->op == BT_READ) {
        CHECK(request->ret == 0 && !memcmp(lane->data, big_model + (request->offset - SHARED), request->length));
    } else if (request->ret < 0) {
        lane->left += lane->left == 1; /* the last one comes through */
        lane->block = 1;
        go_on(lane);
        return;
    } else {
        memset(big_model + (request->offset - SHARED), lane->value, request->length);
    }
    lane->block = 0;
    go_on(lane);
}

static void change_much(struct lane *lane)
{
    static uint64_t offset, length;
    static int op;
    if (!lane->block) {
        op = next_random(&lane->random) % 3;
        offset = next_random(&lane->random) % (SIZE - SHARED);
        length = bt_min(next_random(&lane->random) % (next_random(&lane->random) % 4 ? 300000 : 2000000) + 1,
                        SIZE - SHARED - offset);
        lane->value = op == BT_WRITE ? (uint8_t)(next_random(&lane->random) | 1) : 0;
        memset(lane->data, lane->value, length);
    }
    start(lane, fence, op, SHARED + offset, length, big_changed);
}

static void viewed(struct bt_request *request)
{
    struct lane *lane = BT_CONTAINER(request, struct lane, request);
    uint64_t first = request->offset / GRANULE, last = (request->offset + request->length - 1) / GRANULE;
    if (request->ret == -EACCES) {
        bool any = atomic_load(&given_up);
        for (uint64_t granule = first; granule <= last; granule++)
            any |= atomic_load(&hidden[granule]);
        CHECK(any);
    } else {
        CHECK(request->ret == 0);
        for (uint64_t i = 0; i < request->length; i++)
            CHECK(lane->data[i] == original(request->offset + i));
    }
    go_on(lane);
}

static void look(struct lane *lane)
{
    uint64_t offset = next_random(&lane->random) % SIZE;
    uint64_t length = bt_min(next_random(&lane->random) % READ_MAX + 1, SIZE - offset);
    start(lane, view, BT_READ, offset, length, viewed);
}

static void step_message(struct bt_message *message, struct bt_thread *thread)
{
    struct lane *lane = BT_CONTAINER(message, struct lane, message);
    lane->request.thread = thread;
    if (lane->number < WRITERS)
        change(lane);
    else if (lane->number < WRITERS + READERS)
        look(lane);
    else
        change_much(lane);
}

/* ---- what Python would do, on the control thread ---- */

static void answer(const struct bt_event *event)
{
    CHECK(event->reason == BT_FAULT_SAVE && (event->result == -ENOSPC || event->result == -ETIMEDOUT));
    late_faults += event->result == -ETIMEDOUT;
    if (++faults % 2) {
        failed_changes++;
        bt_fault_done(event->request, (int)event->result);
    } else {
        bt_fault_retry(event->request);
    }
}

/* Answers faults until the event with the cookie, or, without one, for a moment. Its result. */
static int64_t work(uint64_t cookie)
{
    struct pollfd watch = {.fd = bt_datapath_eventfd(dp), .events = POLLIN};
    for (;;) {
        struct bt_event event;
        while (bt_events(dp, &event, 1)) {
            if (event.type == BT_EVENT_FAULT)
                answer(&event);
            else if (event.type == BT_EVENT_DONE && event.tag == cookie)
                return event.result;
        }
        poll(&watch, 1, 2);
        if (!cookie)
            return 0;
    }
}

static void save_some(uint32_t *random)
{
    uint64_t first = next_random(random) % SHARED_GRANULES, end = first + next_random(random) % 8 + 1;
    bool hide = first >= HIDDEN_FIRST && end <= SHARED_GRANULES;
    for (uint64_t granule = first; hide && granule < end; granule++)
        atomic_store(&hidden[granule], true);
    if (hide)
        bt_fence_mark(fence, BT_FENCE_HIDDEN, first, end - first);
    asked++;
    CHECK(bt_submit(dp, (int)(asked % 2), fence, BT_CACHE, BT_SAVE, first << GRANULE_BITS,
                    (end - first) << GRANULE_BITS, NULL, COOKIE + asked) == 0);
    int64_t result = work(COOKIE + asked);
    CHECK(result == 0 || result == -ENOSPC || result == -ETIMEDOUT);
    if (result == 0)
        CHECK(bt_fence_find(fence, BT_FENCE_OPEN, first, end, false) == bt_min(end, GRANULES));
    if (asked % 4 == 0) {
        bt_fence_wait_readers(fence, 1);
        work(1);
    }
}

static void give_up(void)
{
    atomic_store(&given_up, true);
    bt_fence_mark_all(fence, BT_FENCE_HIDDEN);
    bt_fence_wait_readers(fence, 2);
    work(2);
    bt_synchronize(&saved->device.base, 3);
    work(3);
    bt_fence_mark_all(fence, BT_FENCE_OPEN);
}

/* ---- setting up ---- */

static void start_lanes(unsigned operations, uint32_t seed)
{
    for (unsigned i = 0; i < BIG - BLOCK; i++)
        big_model[i] = original(SHARED + i);
    for (unsigned i = 0; i < LANES; i++) {
        lanes[i].number = i;
        lanes[i].random = seed * 2654435761u + i + 1;
        lanes[i].left = i < LANES - 1 ? operations : operations / 4;
        lanes[i].message.fn = step_message;
        lanes[i].data = malloc(i < LANES - 1 ? READ_MAX : BIG);
        for (unsigned n = 0; i < WRITERS && i + n * WRITERS < BLOCKS; n++)
            lanes[i].model[n] = original((uint64_t)(i + n * WRITERS) * BLOCK);
        bt_thread_post(bt_thread_get(dp, (int)(i % 2)), &lanes[i].message);
    }
}

static void release_all(void)
{
    bt_object *all[] = {view, fence, &disk->device.base, &saved->device.base};
    for (int i = 0; i < 4; i++)
        bt_object_unref(all[i]);
    for (int released = 0; released < 4;) {
        struct bt_event event;
        if (bt_events(dp, &event, 1) && event.type == BT_EVENT_RELEASED)
            released++;
    }
    bt_datapath_free(dp);
    for (unsigned i = 0; i < LANES; i++)
        free(lanes[i].data);
}

int main(int argc, char **argv)
{
    unsigned operations = argc > 1 ? (unsigned)atoi(argv[1]) : 500;
    uint32_t seed = argc > 2 ? (uint32_t)atoi(argv[2]) : 1, random = seed;
    dp = bt_datapath_new();
    CHECK(bt_thread_new(dp, 0) == 0 && bt_thread_new(dp, 20000) == 1);
    disk = make_memory(1, true);
    saved = make_memory(2, false);
    fence = bt_fence_new(dp, 3, &disk->device.base, &saved->device.base, GRANULE_BITS, GRANULES);
    bt_fence_set_saving(fence, SIZE, seed % 2);
    bt_fence_set_timeout(fence, seed % 4 < 2 ? 2000000 : 0);
    view = bt_view_new(dp, 4, fence, SIZE);
    CHECK(fence && view);
    start_lanes(operations, seed);
    for (unsigned rounds = 0; atomic_load(&running); rounds++) {
        work(0);
        save_some(&random);
        if (seed % 4 == 3 && rounds == 5)
            give_up();
    }
    bt_fence_settle(fence, 4);
    CHECK(work(4) == 0);
    printf("saved %lu faults %u late %u failed %u asked %u\n", bt_fence_saved(fence), faults, late_faults,
           failed_changes, asked);
    CHECK(bt_fence_saved(fence) <= GRANULES && (atomic_load(&given_up) || bt_fence_saved(fence) > 100));
    CHECK(faults > 0 && (late_faults == 0) == (seed % 4 >= 2));
    release_all();
    puts("ok");
    return 0;
}
