/* SPDX-License-Identifier: Apache-2.0 */
/* A fence and a view of it over files, without Python: lanes on two I/O threads change their own blocks through the
 * fence, which saves what they change, others read the view and find what was there before; the control thread hides
 * parts, and moves the limit.
 *
 * test_fence DISK SAVED [OPERATIONS] [SEED]: both files are made and overwritten. Exits 1 at the first difference. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include "check.h"
#include "core.h"
#include "lanes.h"

#define GRANULE_BITS 12
#define GRANULE (1u << GRANULE_BITS)
#define BLOCK 512u
#define WRITERS 24u
#define READERS 8u
#define GRANULES 200u /* a few words of marks, the last not whole */
#define SIZE (GRANULES * GRANULE - BLOCK)
#define BLOCKS (SIZE / BLOCK)
#define READ_MAX (3u * GRANULE)
#define HIDDEN_FIRST 150u /* granules from here on may be hidden */
#define COOKIE 1000u

struct lane {
    struct bt_message message;
    struct bt_request request;
    struct iovec iov;
    unsigned number;
    uint32_t random;
    unsigned left;
    unsigned block;
    uint8_t model[BLOCKS / WRITERS + 1]; /* of a writer's blocks, which are WRITERS apart */
    uint8_t data[READ_MAX];
};

static bt_datapath *dp;
static bt_object *fence, *view, *disk, *saved;
static struct lane lanes[WRITERS + READERS];
static _Atomic unsigned running = WRITERS + READERS;
static _Atomic bool hidden[GRANULES];
static unsigned asked, limits;
static uint64_t limit = SIZE / 4;

static uint8_t original(uint64_t offset) { return (uint8_t)(offset / BLOCK * 7 + 1); }

/* ---- lanes, on the I/O threads ---- */

static void go_on(struct lane *lane) { next_step(&lane->request, &lane->message, &lane->left, &running); }

static void start(struct lane *lane, bt_object *object, int op, uint64_t offset, uint64_t length,
                  void (*done)(struct bt_request *))
{
    lane->iov = (struct iovec){lane->data, length};
    begin(&lane->request, object, op, 0, offset, &lane->iov, done);
}

static void changed(struct bt_request *request)
{
    struct lane *lane = BT_CONTAINER(request, struct lane, request);
    CHECK(request->ret == 0);
    for (unsigned i = 0; request->op == BT_READ && i < BLOCK; i++)
        CHECK(lane->data[i] == lane->model[lane->block / WRITERS]);
    go_on(lane);
}

static void change(struct lane *lane)
{
    uint8_t *model = &lane->model[0];
    unsigned own = (BLOCKS - lane->number + WRITERS - 1) / WRITERS;
    lane->block = lane->number + WRITERS * (next_random(&lane->random) % own);
    model += lane->block / WRITERS;
    int op = BT_READ;
    switch (next_random(&lane->random) % 4) {
    case 0:
        op = BT_ZEROES;
        *model = 0;
        break;
    case 1:
    case 2:
        op = BT_WRITE;
        *model = (uint8_t)(next_random(&lane->random) | 1);
        memset(lane->data, *model, BLOCK);
        break;
    }
    start(lane, fence, op, (uint64_t)lane->block * BLOCK, BLOCK, changed);
}

static void viewed(struct bt_request *request)
{
    struct lane *lane = BT_CONTAINER(request, struct lane, request);
    uint64_t first = request->offset / GRANULE, last = (request->offset + request->length - 1) / GRANULE;
    if (request->ret == -EACCES) {
        bool any = false;
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
    else
        look(lane);
}

/* ---- what Python would do, on the control thread ---- */

static void answer(const struct bt_event *event)
{
    CHECK(event->reason == BT_FAULT_WRITE);
    uint64_t end = event->offset + event->length;
    if (end > limit) {
        limit = bt_min(end + SIZE / 8, SIZE);
        bt_fence_set_limit(fence, limit);
        limits++;
    }
    bt_fault_retry(event->request);
}

/* Until the event with the cookie, or, without one, for a moment. */
static void work(uint64_t cookie)
{
    struct pollfd watch = {.fd = bt_datapath_eventfd(dp), .events = POLLIN};
    for (;;) {
        struct bt_event event;
        while (bt_events(dp, &event, 1)) {
            if (event.type == BT_EVENT_FAULT) {
                answer(&event);
            } else if (event.type == BT_EVENT_DONE && event.tag == cookie) {
                CHECK(event.result == 0);
                return;
            }
        }
        poll(&watch, 1, 2);
        if (!cookie)
            return;
    }
}

static void hide_some(uint32_t *random)
{
    uint64_t first = HIDDEN_FIRST + next_random(random) % (GRANULES - HIDDEN_FIRST);
    uint64_t end = bt_min(first + next_random(random) % 4 + 1, GRANULES);
    for (uint64_t granule = first; granule < end; granule++)
        atomic_store(&hidden[granule], true);
    bt_fence_mark(fence, BT_FENCE_HIDDEN, first, end - first);
    asked++;
    CHECK(bt_submit(dp, (int)(asked % 2), fence, BT_CACHE, BT_SAVE, first << GRANULE_BITS,
                    (end - first) << GRANULE_BITS, NULL, COOKIE + asked) == 0);
    work(COOKIE + asked);
    CHECK(bt_fence_find(fence, BT_FENCE_OPEN, first, end, false) == end);
}

/* ---- setting up ---- */

/* direct: where the file system can; reads then take their time, and meet changes. */
static bt_object *make_file(const char *path, uint64_t tag, bool filled, bool direct)
{
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    CHECK(fd >= 0 && ftruncate(fd, SIZE) == 0);
    for (uint64_t at = 0; filled && at < SIZE; at += BLOCK) {
        uint8_t block[BLOCK];
        memset(block, original(at), BLOCK);
        CHECK(pwrite(fd, block, BLOCK, (off_t)at) == BLOCK);
    }
    direct = direct && fcntl(fd, F_SETFL, O_DIRECT) == 0;
    bt_object *made = bt_file_new(dp, tag, fd, SIZE, direct ? BT_FILE_DIRECT : 0, BT_ENGINE_THREADS,
                                  direct ? BLOCK : 1, direct ? BLOCK : 1);
    close(fd);
    CHECK(made);
    return made;
}

static void start_lanes(unsigned operations, uint32_t seed)
{
    for (unsigned i = 0; i < WRITERS + READERS; i++) {
        lanes[i].number = i;
        lanes[i].random = seed * 2654435761u + i + 1;
        lanes[i].left = operations;
        lanes[i].message.fn = step_message;
        for (unsigned n = 0; i < WRITERS && i + n * WRITERS < BLOCKS; n++)
            lanes[i].model[n] = original((uint64_t)(i + n * WRITERS) * BLOCK);
        bt_thread_post(bt_thread_get(dp, (int)(i % 2)), &lanes[i].message);
    }
}

static void release_all(void)
{
    bt_object *all[] = {view, fence, disk, saved};
    for (int i = 0; i < 4; i++)
        bt_object_unref(all[i]);
    for (int released = 0; released < 4;) {
        struct bt_event event;
        if (bt_events(dp, &event, 1) && event.type == BT_EVENT_RELEASED)
            released++;
    }
    bt_datapath_free(dp);
}

int main(int argc, char **argv)
{
    CHECK(argc > 2);
    unsigned operations = argc > 3 ? (unsigned)atoi(argv[3]) : 500;
    uint32_t seed = argc > 4 ? (uint32_t)atoi(argv[4]) : 1, random = seed;
    dp = bt_datapath_new();
    CHECK(bt_thread_new(dp, 0) == 0 && bt_thread_new(dp, 20000) == 1);
    disk = make_file(argv[1], 1, true, seed % 2);
    saved = make_file(argv[2], 2, false, false);
    fence = bt_fence_new(dp, 3, disk, saved, GRANULE_BITS, GRANULES);
    bt_fence_set_saving(fence, SIZE, false);
    view = bt_view_new(dp, 4, fence, SIZE);
    CHECK(fence && view);
    bt_fence_set_limit(fence, limit);
    start_lanes(operations, seed);
    for (unsigned rounds = 0; atomic_load(&running); rounds++) {
        work(0);
        if (rounds % 4 == 3)
            hide_some(&random);
    }
    uint64_t copies = bt_fence_saved(fence);
    printf("copies %lu limits %u reached %lu\n", copies, limits, bt_fence_reached(fence));
    CHECK(copies > GRANULES / 2 && limits > 0 && bt_fence_reached(fence) <= limit);
    CHECK(bt_fence_find(fence, BT_FENCE_OPEN, 0, UINT64_MAX, true) == 0);
    release_all();
    puts("ok");
    return 0;
}
