/* SPDX-License-Identifier: Apache-2.0 */
/* The NBD client without Python: verified requests from several I/O threads over one connection or several, while
 * servers die in mid-reply and come back.
 *
 * test_nbdc MODE CONNECTIONS THREADS SEED [REQUESTS [lost]]: MODE 0 simple, 1 structured, 2 extended; lost: one client
 * takes its memory away all the time, as a front end can. Exits 1 at the first difference. */
#define _GNU_SOURCE
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include "nbdc_server.h"

#define WORKERS 24u
#define REGION (DISK_BYTES / WORKERS / 4096 * 4096)
#define PAYLOAD (64u << 10) /* so that larger requests are split */
#define SERVERS_MAX 8u
#define RECONNECT_NS 20000000000ull

enum tag { TAG_CLIENT = 1, TAG_SESSION };
enum cookie { COOKIE_STOP = 1 };

/* One request after the other on a region of its own, of which it knows the content. */
struct worker {
    struct bt_request request;
    struct bt_message start;
    unsigned id;
    uint32_t random;
    unsigned left;
    bool stale; /* a DISCARD has been here */
    struct iovec iov[3];
    struct bt_extent extent;
    uint8_t model[REGION], own[REGION], *buffer;
};

static bt_datapath *dp;
static bt_object *client;
static struct disk disk = {.lock = PTHREAD_MUTEX_INITIALIZER};
static struct server servers[SERVERS_MAX];
static struct worker workers[WORKERS];
static _Atomic unsigned running = WORKERS;
static uint32_t mode, connections, seed, deaths;
static bool stopped;

/* ---- memory that is taken away ---- */

static struct worker *thief;
static int memory = -1;
static unsigned lost;

/* As the handler of vhost_memory.c: who touches what is gone goes on with zeros. */
static void touched(int number, siginfo_t *info, void *context)
{
    (void)number, (void)context;
    uintptr_t page = (uintptr_t)info->si_addr & ~(uintptr_t)4095;
    mmap((void *)page, 4096, PROT_READ | PROT_WRITE, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

static void take_away(void)
{
    CHECK(mmap(thief->buffer, REGION, PROT_READ | PROT_WRITE, MAP_FIXED | MAP_SHARED, memory, 0) == thief->buffer);
    CHECK(ftruncate(memory, 0) == 0);
}

static void make_thief(struct worker *worker)
{
    struct sigaction action = {.sa_sigaction = touched, .sa_flags = SA_SIGINFO};
    CHECK(sigaction(SIGBUS, &action, NULL) == 0);
    memory = memfd_create("lost", MFD_CLOEXEC);
    thief = worker;
    worker->buffer = mmap(NULL, REGION, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
    CHECK(memory >= 0 && worker->buffer != MAP_FAILED);
}

/* ---- what all of them do ---- */

static uint32_t dice(struct worker *worker, uint32_t sides)
{
    worker->random = worker->random * 1664525u + 1013904223u;
    return (worker->random >> 8) % sides;
}

/* ---- requests ---- */

static void check(struct worker *worker)
{
    struct bt_request *request = &worker->request;
    uint64_t at = request->offset - worker->id * (uint64_t)REGION;
    if (worker == thief) {
        CHECK(request->ret == 0 || request->ret == -EFAULT);
        lost += request->ret == -EFAULT;
        return;
    }
    CHECK(request->ret == 0);
    if (request->op == BT_READ) {
        CHECK(memcmp(worker->buffer, worker->model + at, request->length) == 0);
    } else if (request->op == BT_WRITE) {
        memcpy(worker->model + at, worker->buffer, request->length);
    } else if (request->op == BT_ZEROES || request->op == BT_DISCARD) {
        memset(worker->model + at, 0, request->length); /* this server's TRIM zeroes */
    } else if (request->op == BT_STATUS) {
        CHECK(request->extents_count == 1 && worker->extent.length && worker->extent.length <= request->length);
        for (uint64_t i = 0; worker->extent.flags & BT_EXTENT_ZERO && i < worker->extent.length; i++)
            CHECK(worker->model[at + i] == 0);
    }
}

static void next(struct worker *worker)
{
    static const uint8_t ops[] = {BT_READ, BT_READ, BT_READ, BT_WRITE, BT_WRITE, BT_ZEROES, BT_DISCARD, BT_STATUS,
                                  BT_FLUSH, BT_CACHE};
    struct bt_request *request = &worker->request;
    uint32_t length = dice(worker, 8) ? 1 + dice(worker, 16 << 10) : 1 + dice(worker, REGION);
    uint32_t at = dice(worker, REGION - length + 1);
    request->op = ops[dice(worker, sizeof ops)];
    request->flags = dice(worker, 8) ? 0 : BT_FUA;
    request->offset = worker->id * (uint64_t)REGION + at;
    request->length = length;
    if (worker == thief)
        take_away();
    else if (request->op == BT_WRITE)
        for (uint32_t i = 0; i < length; i++)
            worker->buffer[i] = dice(worker, 512) ? (uint8_t)(i + worker->random) : 0;
    else
        memset(worker->buffer, 0xee, length);
    uint32_t cut = dice(worker, length + 1), cut2 = cut + dice(worker, length - cut + 1);
    worker->iov[0] = (struct iovec){worker->buffer, cut};
    worker->iov[1] = (struct iovec){worker->buffer + cut, cut2 - cut};
    worker->iov[2] = (struct iovec){worker->buffer + cut2, length - cut2};
    bt_request_start(request);
}

static void done(struct bt_request *request)
{
    struct worker *worker = BT_CONTAINER(request, struct worker, request);
    check(worker);
    if (--worker->left == 0) {
        atomic_fetch_sub(&running, 1);
        return;
    }
    bt_thread_post(request->thread, &worker->start); /* not from inside: a chain of inline ends would be deep */
}

static void start(struct bt_message *message, struct bt_thread *thread)
{
    struct worker *worker = BT_CONTAINER(message, struct worker, start);
    worker->request.thread = thread;
    next(worker);
}

/* ---- what Python would do ---- */

static void attach(uint32_t i)
{
    struct bt_nbdc_link link = {
        .mode = mode,
        .transmission_flags = NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA | NBD_FLAG_SEND_TRIM | NBD_FLAG_SEND_CACHE,
        .max_payload = PAYLOAD,
        .block = 1,
        .context_id = mode ? 7 : -1,
    };
    if (seed & 1)
        link.transmission_flags |= NBD_FLAG_SEND_WRITE_ZEROES;
    if (seed & 2)
        link.transmission_flags &= ~(uint32_t)NBD_FLAG_SEND_FUA;
    int fd = server_start(&servers[i], &disk, mode, seed + deaths, deaths < 40 ? 20 + (seed + deaths * 7) % 300 : 0);
    CHECK(bt_nbdc_attach(client, i, fd, &link) == 0);
}

static void handle_events(void)
{
    struct bt_event events[16];
    struct pollfd watch = {.fd = bt_datapath_eventfd(dp), .events = POLLIN};
    poll(&watch, 1, 20);
    int n = bt_events(dp, events, 16);
    for (int i = 0; i < n; i++) {
        if (events[i].type == BT_EVENT_SESSION) {
            CHECK(events[i].tag == TAG_SESSION);
            CHECK((events[i].result & 0xffff) == BT_NBDC_EOF);
            uint32_t index = (uint32_t)(events[i].result >> 16);
            server_join(&servers[index]);
            deaths++;
            attach(index);
        } else if (events[i].type == BT_EVENT_DONE) {
            CHECK(events[i].tag == COOKIE_STOP);
            stopped = true;
        }
    }
}

int main(int argc, char **argv)
{
    CHECK(argc >= 5);
    mode = (uint32_t)atoi(argv[1]);
    connections = (uint32_t)atoi(argv[2]);
    int threads = atoi(argv[3]);
    seed = (uint32_t)atoi(argv[4]);
    dp = bt_datapath_new();
    for (int i = 0; i < threads; i++)
        CHECK(bt_thread_new(dp, 20000) == i);
    client = bt_nbdc_new(dp, TAG_CLIENT, TAG_SESSION, DISK_BYTES, connections, 1 + seed % 8, RECONNECT_NS,
                         false);
    CHECK(client && connections <= SERVERS_MAX);
    for (uint32_t i = 0; i < connections; i++)
        attach(i);
    if (argc > 6)
        make_thief(&workers[1]);
    for (unsigned i = 0; i < WORKERS; i++) {
        struct worker *worker = &workers[i];
        worker->id = i;
        worker->random = seed * 1000 + i;
        worker->left = argc > 5 ? (unsigned)atoi(argv[5]) : 200;
        if (worker != thief)
            worker->buffer = worker->own;
        worker->start.fn = start;
        worker->request.object = client;
        worker->request.done = done;
        worker->request.iov = worker->iov;
        worker->request.iovcnt = 3;
        worker->request.extents = &worker->extent;
        worker->request.extents_max = 1;
        /* Most come from the last thread: a lone connection moves there. */
        bt_thread_post(bt_thread_get(dp, i < 3 ? 0 : threads - 1), &worker->start);
    }
    while (atomic_load(&running))
        handle_events();
    for (unsigned i = 0; i < WORKERS; i++)
        CHECK(&workers[i] == thief || memcmp(workers[i].model, disk.data + i * (uint64_t)REGION, REGION) == 0);
    CHECK(!thief || lost > 10);
    bt_nbdc_stop(client, COOKIE_STOP);
    while (!stopped)
        handle_events();
    for (uint32_t i = 0; i < connections; i++)
        server_join(&servers[i]);
    bt_object_unref(client);
    bt_datapath_free(dp);
    printf("%u deaths\nok\n", deaths);
    return 0;
}
