/* SPDX-License-Identifier: Apache-2.0 */
/* The file device against a model: random operations from several I/O threads on neighbouring parts of one file,
 * whose borders lie inside blocks, on every engine, cached and O_DIRECT.
 *
 * test_file DIRECTORY [OPERATIONS] [SEED]: makes and removes files in DIRECTORY. Exits 1 at the first difference. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core.h"

#define THREADS 3
#define CLIENTS 12
#define PART 60013 /* bytes of the file for each client: prime, so that borders lie anywhere */
#define FILE_START (PART * (CLIENTS - 2) + 777)
#define OP_MAX 20000

static void fail(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    _exit(1);
}

#define CHECK(condition)                                                                                              \
    do {                                                                                                              \
        if (!(condition))                                                                                             \
            fail("%s:%d: not true: %s", __FILE__, __LINE__, #condition);                                              \
    } while (0)

/* ---- short and interrupted system calls, by --wrap ---- */

static _Atomic bool disturb;
static _Atomic uint32_t disturbance;

/* Bytes to leave out of a transfer, as a kernel may; -1: EINTR. */
static int disturbed(void)
{
    if (!atomic_load(&disturb))
        return 0;
    uint32_t n = atomic_fetch_add(&disturbance, 1) * 2654435761u >> 16;
    return n % 11 == 0 ? -1 : n % 3 == 0 ? 1 : 0;
}

static struct iovec shortened(const struct iovec *iov)
{
    struct iovec first = iov[0];
    if (first.iov_len > 8192)
        first.iov_len = first.iov_len / 2 & ~(size_t)4095; /* O_DIRECT moves whole blocks */
    return first;
}

#define WRAP(name, params, plain, cut)                                                                                \
    ssize_t __real_##name params;                                                                                     \
    ssize_t __wrap_##name params;                                                                                     \
    ssize_t __wrap_##name params                                                                                      \
    {                                                                                                                 \
        int how = disturbed();                                                                                        \
        struct iovec first = shortened(iov);                                                                          \
        if (how < 0) {                                                                                                \
            errno = EINTR;                                                                                            \
            return -1;                                                                                                \
        }                                                                                                             \
        return how && first.iov_len ? __real_##name cut : __real_##name plain;                                                         \
    }

WRAP(preadv, (int fd, const struct iovec *iov, int n, off_t at), (fd, iov, n, at), (fd, &first, 1, at))
WRAP(pwritev, (int fd, const struct iovec *iov, int n, off_t at), (fd, iov, n, at), (fd, &first, 1, at))
WRAP(preadv2, (int fd, const struct iovec *iov, int n, off_t at, int f), (fd, iov, n, at, f), (fd, &first, 1, at, f))
WRAP(pwritev2, (int fd, const struct iovec *iov, int n, off_t at, int f), (fd, iov, n, at, f), (fd, &first, 1, at, f))

/* ---- random numbers ---- */

static uint64_t next_random(uint64_t *state)
{
    *state += 0x9e3779b97f4a7c15u;
    uint64_t z = *state;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}
static uint64_t below(uint64_t *state, uint64_t n) { return next_random(state) % n; }

/* ---- clients ---- */

struct config {
    const char *name;
    int engine;
    uint32_t flags;
    uint32_t align, mem_align;
};

struct run {
    bt_datapath *dp;
    struct bt_device *device;
    const struct config *config;
    unsigned char *model; /* of the whole file */
    _Atomic int clients_left;
    _Atomic uint64_t reached; /* end of the furthest change */
    pthread_mutex_t lock;
    pthread_cond_t done;
};

struct client {
    struct run *run;
    struct bt_message message;
    struct bt_thread *thread;
    uint64_t random;
    uint64_t start; /* of its part */
    int left;
    /* the operation under way */
    int op;
    uint32_t flags;
    uint64_t offset, length;
    unsigned char *memory, *data;
    struct iovec iov[7];
    int iovcnt;
    bool verify_discard;
};

static void step(struct client *client);

/* The operation's data in up to 7 pieces of memory, aligned as the device wants it or not at all. */
static void choose_memory(struct client *client, bool aligned)
{
    const struct config *config = client->run->config;
    client->data = client->memory + (aligned ? 0 : 1 + below(&client->random, 700));
    uint64_t unit = aligned ? config->align : 1, left = client->length;
    unsigned char *at = client->data;
    int pieces = 1 + (int)below(&client->random, 7);
    for (client->iovcnt = 0; left;) {
        uint64_t n = client->iovcnt == pieces - 1 ? left : below(&client->random, left + 1) / unit * unit;
        client->iov[client->iovcnt++] = (struct iovec){.iov_base = at, .iov_len = n};
        at += n;
        left -= n;
    }
}

static void choose_range(struct client *client)
{
    uint64_t unit = below(&client->random, 2) ? client->run->config->align : 1;
    client->offset = client->start + below(&client->random, PART - 1);
    if (below(&client->random, 3) == 0)
        unit = 4096;
    uint64_t offset = (client->offset + unit - 1) / unit * unit, end = client->start + PART;
    if (offset + unit > end)
        unit = 1;
    else
        client->offset = offset;
    uint64_t most = bt_min(OP_MAX, end - client->offset);
    client->length = bt_max(unit, (1 + below(&client->random, most)) / unit * unit);
    choose_memory(client, unit > 1 && below(&client->random, 4) != 0);
}

static void choose_op(struct client *client)
{
    static const uint8_t ops[] = {BT_READ,  BT_READ,   BT_READ,   BT_READ,    BT_WRITE,   BT_WRITE, BT_WRITE,
                                  BT_WRITE, BT_ZEROES, BT_ZEROES, BT_DISCARD, BT_STATUS,  BT_CACHE, BT_FLUSH};
    client->op = ops[below(&client->random, sizeof ops)];
    client->flags = 0;
    if (client->op == BT_ZEROES)
        client->flags = (uint32_t)below(&client->random, 8);
    if (client->op == BT_WRITE || client->op == BT_DISCARD)
        client->flags = below(&client->random, 8) == 0 ? BT_FUA : 0;
    if (client->op == BT_FLUSH && below(&client->random, 4))
        client->op = BT_READ; /* they take long */
}

static void reached(struct run *run, uint64_t end)
{
    uint64_t old = atomic_load(&run->reached);
    while (old < end && !atomic_compare_exchange_weak(&run->reached, &old, end))
        ;
}

static void compare(struct client *client)
{
    const unsigned char *model = client->run->model + client->offset;
    for (uint64_t i = 0; i < client->length; i++)
        if (client->data[i] != model[i])
            fail("%s: read at %lu + %lu of %lu: %02x instead of %02x", client->run->config->name,
                 (unsigned long)client->offset, (unsigned long)i, (unsigned long)client->length, client->data[i],
                 model[i]);
}

/* Each byte that was discarded is what it was, or zero; from now on it is what was read. */
static void adopt_discarded(struct client *client)
{
    unsigned char *model = client->run->model + client->offset;
    for (uint64_t i = 0; i < client->length; i++) {
        CHECK(client->data[i] == model[i] || client->data[i] == 0);
        model[i] = client->data[i];
    }
}

static void finished(struct client *client, int result)
{
    struct run *run = client->run;
    if (result == -ENOTSUP && client->op == BT_ZEROES && (client->flags & BT_FAST_ZERO))
        return;
    if (result != 0)
        fail("%s: op %d at %lu, %lu: error %d", run->config->name, client->op, (unsigned long)client->offset,
             (unsigned long)client->length, result);
    if (client->op == BT_READ && client->verify_discard)
        adopt_discarded(client);
    else if (client->op == BT_READ)
        compare(client);
    client->verify_discard = client->op == BT_DISCARD;
    if (client->op == BT_WRITE)
        memcpy(run->model + client->offset, client->data, client->length);
    if (client->op == BT_ZEROES)
        memset(run->model + client->offset, 0, client->length);
    if (client->op == BT_WRITE || client->op == BT_ZEROES)
        reached(run, client->offset + client->length);
}

static void check_status(struct client *client, const struct bt_io *io)
{
    CHECK(io->status_length > 0 && io->status_length <= client->length);
    if (!(io->status_flags & BT_EXTENT_ZERO))
        return;
    for (uint64_t i = 0; i < io->status_length; i++)
        CHECK(client->run->model[client->offset + i] == 0);
}

static void next_step(struct bt_message *message, struct bt_thread *thread)
{
    (void)thread;
    step(BT_CONTAINER(message, struct client, message));
}

static void io_done(struct bt_io *io, int result)
{
    struct client *client = io->owner;
    CHECK(io->thread == client->thread && pthread_equal(pthread_self(), client->thread->pthread));
    if (io->op == BT_STATUS && result == 0)
        check_status(client, io);
    finished(client, result);
    client->message.fn = next_step; /* not from here: the io is not given back yet */
    bt_thread_post(client->thread, &client->message);
}

static bool tried_inline(struct client *client)
{
    struct bt_device *device = client->run->device;
    if (!device->ops->try_inline || (client->op != BT_READ && client->op != BT_WRITE) || below(&client->random, 2))
        return false;
    int result = device->ops->try_inline(device, client->thread, client->op, client->flags, client->offset,
                                         client->iov, client->iovcnt, client->length);
    if (result == -EAGAIN)
        return false;
    finished(client, result);
    return true;
}

static void submit(struct client *client)
{
    struct bt_io *io = bt_io_get(client->thread, client->iovcnt);
    io->device = client->run->device;
    io->owner = client;
    io->done = io_done;
    io->op = (uint8_t)client->op;
    io->flags = (uint8_t)client->flags;
    io->offset = client->op == BT_FLUSH ? 0 : client->offset;
    io->length = client->op == BT_FLUSH ? 0 : client->length;
    memcpy(io->iov, client->iov, (size_t)client->iovcnt * sizeof *io->iov);
    bt_io_submit(io);
}

static void step(struct client *client)
{
    struct run *run = client->run;
    while (client->left > 0 || client->verify_discard) {
        client->left--;
        if (client->verify_discard) {
            client->op = BT_READ;
            client->flags = 0;
        } else {
            choose_range(client);
            choose_op(client);
        }
        if (client->op == BT_WRITE)
            for (uint64_t i = 0; i < client->length; i++)
                client->data[i] = (unsigned char)(i * 7 + client->left);
        if (client->op == BT_READ)
            memset(client->data, 0xee, client->length);
        if (!tried_inline(client)) {
            submit(client);
            return;
        }
    }
    pthread_mutex_lock(&run->lock);
    if (atomic_fetch_sub(&run->clients_left, 1) == 1)
        pthread_cond_signal(&run->done);
    pthread_mutex_unlock(&run->lock);
}

/* ---- one run ---- */

static int open_file(const char *directory, char *path, bool direct)
{
    snprintf(path, PATH_MAX, "%s/test_file.XXXXXX", directory);
    int fd = mkstemp(path);
    CHECK(fd >= 0);
    close(fd);
    return open(path, O_RDWR | O_CLOEXEC | (direct ? O_DIRECT : 0));
}

static void fill_start(const char *path, unsigned char *model)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    for (int i = 0; i < FILE_START; i++)
        model[i] = (unsigned char)(i / 512 % 3 ? i * 31 : 0);
    CHECK(write(fd, model, FILE_START) == FILE_START);
    CHECK(fsync(fd) == 0);
    close(fd);
}

static void check_counters(struct run *run)
{
    struct bt_counters c;
    bt_object_counters(&run->device->base, &c);
    uint64_t requests = 0;
    for (int i = 0; i < BT_OPS; i++)
        requests += c.requests[i];
    CHECK(requests == c.inline_done + c.engine_done + c.failed);
    printf("%s: %lu requests: inline %lu, engine %lu, bounced %lu, failed %lu\n", run->config->name,
           (unsigned long)requests, (unsigned long)c.inline_done, (unsigned long)c.engine_done,
           (unsigned long)c.bounced, (unsigned long)c.failed);
    if (run->config->align > 1)
        CHECK(c.bounced > 0);
}

static void check_file(struct run *run, const char *path)
{
    uint64_t size = bt_max(FILE_START, atomic_load(&run->reached));
    unsigned char *content = malloc(PART * CLIENTS);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct stat st;
    CHECK(fstat(fd, &st) == 0);
    if ((uint64_t)st.st_size != size || bt_object_size(&run->device->base) != size)
        fail("%s: size %lu, known %lu, expected %lu", run->config->name, (unsigned long)st.st_size,
             (unsigned long)bt_object_size(&run->device->base), (unsigned long)size);
    CHECK(pread(fd, content, size, 0) == (ssize_t)size);
    CHECK(memcmp(content, run->model, size) == 0);
    close(fd);
    free(content);
}

static void start_clients(struct run *run, struct client *clients, int operations, uint64_t seed)
{
    run->clients_left = CLIENTS;
    for (int i = 0; i < CLIENTS; i++) {
        struct client *client = &clients[i];
        *client = (struct client){.run = run, .random = seed * 1000 + (uint64_t)i, .left = operations};
        client->start = (uint64_t)i * PART;
        client->thread = bt_thread_get(run->dp, i % THREADS);
        CHECK(posix_memalign((void **)&client->memory, 4096, OP_MAX + 8192) == 0);
        client->message.fn = next_step;
    }
    for (int i = 0; i < CLIENTS; i++)
        bt_thread_post(clients[i].thread, &clients[i].message);
    pthread_mutex_lock(&run->lock);
    while (atomic_load(&run->clients_left))
        pthread_cond_wait(&run->done, &run->lock);
    pthread_mutex_unlock(&run->lock);
    for (int i = 0; i < CLIENTS; i++)
        free(clients[i].memory);
}

static bt_datapath *start_datapath(void)
{
    bt_datapath *dp = bt_datapath_new();
    CHECK(dp);
    for (int i = 0; i < THREADS; i++)
        CHECK(bt_thread_new(dp, i == 0 ? 0 : 20000) == i);
    return dp;
}

static void wait_event(bt_datapath *dp, uint32_t type, struct bt_event *event)
{
    do {
        while (bt_events(dp, event, 1) == 0)
            usleep(100);
    } while (event->type != type);
}

static void release(bt_datapath *dp, bt_object *object)
{
    struct bt_event event;
    bt_object_unref(object);
    wait_event(dp, BT_EVENT_RELEASED, &event);
}

static void run_config(const char *directory, const struct config *config, int operations, uint64_t seed)
{
    char path[PATH_MAX];
    if (config->engine == BT_ENGINE_IO_URING && !bt_probe_io_uring()) {
        printf("%s: no io_uring here\n", config->name);
        return;
    }
    int fd = open_file(directory, path, config->flags & BT_FILE_DIRECT);
    if (fd < 0) {
        printf("%s: no O_DIRECT here\n", config->name);
        unlink(path);
        return;
    }
    struct run run = {.dp = start_datapath(), .config = config, .model = calloc(CLIENTS, PART)};
    struct client clients[CLIENTS];
    pthread_mutex_init(&run.lock, NULL);
    pthread_cond_init(&run.done, NULL);
    fill_start(path, run.model);
    run.device = (struct bt_device *)bt_file_new(run.dp, 1, fd, FILE_START, config->flags, config->engine,
                                                 config->align, config->mem_align);
    CHECK(run.device);
    close(fd);
    start_clients(&run, clients, operations, seed);
    check_file(&run, path);
    check_counters(&run);
    release(run.dp, &run.device->base);
    bt_datapath_free(run.dp);
    free(run.model);
    unlink(path);
}

static void run_all(const char *directory, int operations, uint64_t seed)
{
    static const struct config configs[] = {
        {"threads", BT_ENGINE_THREADS, 0, 1, 1},
        {"io_uring", BT_ENGINE_IO_URING, 0, 1, 1},
        {"io_uring no-flush", BT_ENGINE_IO_URING, BT_FILE_NO_FLUSH, 1, 1},
        {"threads direct 512", BT_ENGINE_THREADS, BT_FILE_DIRECT, 512, 512},
        {"native direct 512", BT_ENGINE_NATIVE, BT_FILE_DIRECT, 512, 4},
        {"native direct 4096", BT_ENGINE_NATIVE, BT_FILE_DIRECT, 4096, 4096},
        {"io_uring direct 512", BT_ENGINE_IO_URING, BT_FILE_DIRECT, 512, 4},
        {"io_uring direct 4096", BT_ENGINE_IO_URING, BT_FILE_DIRECT, 4096, 4096},
    };
    for (size_t i = 0; i < sizeof configs / sizeof *configs; i++) {
        atomic_store(&disturb, i % 2 == 0);
        run_config(directory, &configs[i], operations, seed + i);
    }
    atomic_store(&disturb, false);
}

/* ---- single cases ---- */

static int do_op(bt_datapath *dp, bt_object *object, int op, uint32_t flags, uint64_t offset, uint64_t length,
                 void *buffer)
{
    struct bt_event event;
    CHECK(bt_submit(dp, 0, object, op, flags, offset, length, buffer, 42) == 0);
    wait_event(dp, BT_EVENT_DONE, &event);
    return (int)event.result;
}

/* A failed sync of cached data is never forgotten: /dev/full takes no sync. */
static void test_failed_sync(void)
{
    bt_datapath *dp = start_datapath();
    int fd = open("/dev/full", O_RDWR | O_CLOEXEC);
    char byte = 1;
    bt_object *file = bt_file_new(dp, 1, fd, 0, 0, BT_ENGINE_THREADS, 1, 1);
    CHECK(file);
    CHECK(do_op(dp, file, BT_WRITE, 0, 0, 1, &byte) == -ENOSPC);
    CHECK(do_op(dp, file, BT_FLUSH, 0, 0, 0, NULL) == -EINVAL);
    CHECK(do_op(dp, file, BT_FLUSH, 0, 0, 0, NULL) == -EINVAL);
    release(dp, file);
    file = bt_file_new(dp, 1, fd, 0, BT_FILE_NO_FLUSH, BT_ENGINE_THREADS, 1, 1);
    CHECK(do_op(dp, file, BT_FLUSH, 0, 0, 0, NULL) == 0);
    release(dp, file);
    close(fd);
    bt_datapath_free(dp);
}

static void test_options(void)
{
    bt_datapath *dp = start_datapath();
    int fd = open("/dev/null", O_RDWR | O_CLOEXEC);
    CHECK(!bt_file_new(dp, 1, fd, 0, 0, BT_ENGINE_NATIVE, 1, 1) && errno == EINVAL);
    CHECK(!bt_file_new(dp, 1, fd, 0, 0, 7, 1, 1) && errno == EINVAL);
    CHECK(!bt_file_new(dp, 1, fd, 0, BT_FILE_DIRECT, BT_ENGINE_THREADS, 3, 1) && errno == EINVAL);
    CHECK(!bt_file_new(dp, 1, fd, 0, 0, BT_ENGINE_THREADS, 512, 1) && errno == EINVAL);
    CHECK(!bt_file_new(dp, 1, -1, 0, 0, BT_ENGINE_THREADS, 1, 1) && errno == EBADF);
    close(fd);
    bt_datapath_free(dp);
}

/* Larger than a bounce buffer, more vectors than one system call takes, errors from the kernel. */
static void test_large(const char *directory, int engine, bool direct)
{
    enum { LENGTH = (3 << 20) + 1001 };
    char path[PATH_MAX];
    int fd = open_file(directory, path, direct);
    if (fd < 0) {
        unlink(path);
        return;
    }
    bt_datapath *dp = start_datapath();
    bt_object *file = bt_file_new(dp, 1, fd, 0, direct ? BT_FILE_DIRECT : 0, engine, direct ? 512 : 1, direct ? 512 : 1);
    unsigned char *out = malloc(LENGTH), *in = malloc(LENGTH);
    for (int i = 0; i < LENGTH; i++)
        out[i] = (unsigned char)(i * 17 >> 3);
    CHECK(do_op(dp, file, BT_WRITE, BT_FUA, 3333, LENGTH, out) == 0);
    CHECK(bt_object_size(file) == 3333 + LENGTH);
    CHECK(do_op(dp, file, BT_READ, 0, 3333, LENGTH, in) == 0);
    CHECK(memcmp(in, out, LENGTH) == 0);
    CHECK(do_op(dp, file, BT_READ, 0, LENGTH, LENGTH, in) == 0);
    CHECK(memcmp(in, out + LENGTH - 3333, 3333) == 0);
    for (int i = 3333; i < LENGTH; i++)
        CHECK(in[i] == 0);
    CHECK(do_op(dp, file, BT_READ, 0, 1 << 30, 4096, in) == 0 && in[0] == 0 && in[4095] == 0);
    CHECK(do_op(dp, file, BT_WRITE, 0, UINT64_MAX - 100, 512, out) < 0);
    struct stat st;
    CHECK(fstat(fd, &st) == 0 && st.st_size == 3333 + LENGTH);
    release(dp, file);
    close(fd);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    file = bt_file_new(dp, 1, fd, LENGTH, 0, BT_ENGINE_THREADS, 1, 1);
    CHECK(do_op(dp, file, BT_WRITE, 0, 0, 512, out) == -EBADF);
    release(dp, file);
    close(fd);
    bt_datapath_free(dp);
    free(out);
    free(in);
    unlink(path);
}

/* What the device is asked with more vectors than one system call takes; on its thread. */
struct many {
    struct bt_message message;
    struct bt_device *device;
    int op, result;
    struct iovec iov[IOV_MAX + 500];
    _Atomic bool done;
};

static void many_done(struct bt_io *io, int result)
{
    struct many *many = io->owner;
    many->result = result;
    atomic_store(&many->done, true);
}

static void many_start(struct bt_message *message, struct bt_thread *thread)
{
    struct many *many = BT_CONTAINER(message, struct many, message);
    struct bt_io *io = bt_io_get(thread, IOV_MAX + 500);
    io->device = many->device;
    io->owner = many;
    io->done = many_done;
    io->op = (uint8_t)many->op;
    io->length = (IOV_MAX + 500) * 512;
    memcpy(io->iov, many->iov, sizeof many->iov);
    bt_io_submit(io);
}

static void test_many_vectors(const char *directory, int engine, bool direct)
{
    char path[PATH_MAX];
    int fd = open_file(directory, path, direct);
    bt_datapath *dp = start_datapath();
    bt_object *file =
        fd < 0 ? NULL : bt_file_new(dp, 1, fd, 0, direct ? BT_FILE_DIRECT : 0, engine, direct ? 512 : 1, 1);
    unsigned char *memory = NULL;
    CHECK(posix_memalign((void **)&memory, 4096, (IOV_MAX + 500) * 512) == 0);
    struct many *many = calloc(1, sizeof *many);
    many->device = (struct bt_device *)file;
    many->message.fn = many_start;
    for (int write = 1; file && write >= 0; write--) {
        for (int i = 0; i < IOV_MAX + 500; i++) {
            many->iov[i] = (struct iovec){.iov_base = memory + 512 * (IOV_MAX + 499 - i), .iov_len = 512};
            memset(memory + 512 * i, write ? i : 0, 512);
        }
        many->op = write ? BT_WRITE : BT_READ;
        atomic_store(&many->done, false);
        bt_thread_post(bt_thread_get(dp, 0), &many->message);
        while (!atomic_load(&many->done))
            usleep(100);
        CHECK(many->result == 0);
    }
    for (int i = 0; file && i < (IOV_MAX + 500) * 512; i++)
        CHECK(memory[i] == (unsigned char)(i / 512));
    if (file)
        release(dp, file);
    bt_datapath_free(dp);
    free(many);
    free(memory);
    close(fd);
    unlink(path);
}

static void test_iov(void)
{
    unsigned char a[100], b[100];
    struct iovec iov[] = {{a, 10}, {a + 50, 0}, {a + 20, 30}, {a + 60, 5}}, out[3];
    for (int i = 0; i < 100; i++)
        a[i] = (unsigned char)i;
    CHECK(bt_iov_slice(iov, 4, 5, 37, out, 3) == 3);
    CHECK(out[0].iov_base == a + 5 && out[0].iov_len == 5 && out[2].iov_base == a + 60 && out[2].iov_len == 2);
    CHECK(bt_iov_slice(iov, 4, 5, 37, out, 2) == -E2BIG);
    CHECK(bt_iov_slice(iov, 4, 10, 30, out, 3) == 1 && out[0].iov_base == a + 20 && out[0].iov_len == 30);
    bt_iov_to_buffer(iov, 4, 8, b, 10);
    CHECK(b[0] == 8 && b[1] == 9 && b[2] == 20 && b[9] == 27);
    bt_iov_zero(iov, 4, 9, 2);
    CHECK(a[8] == 8 && a[9] == 0 && a[10] == 10 && a[20] == 0 && a[21] == 21);
    bt_iov_from_buffer(iov, 4, 9, "xyz", 3);
    CHECK(a[9] == 'x' && a[20] == 'y' && a[21] == 'z' && a[22] == 22);
    unsigned char zeros[4096] = {0};
    for (size_t length = 0; length < 70; length++)
        for (size_t at = 0; at <= length; at++) {
            struct iovec z[] = {{zeros + 3, length / 3}, {zeros + 100, length - length / 3}};
            zeros[at < length / 3 ? 3 + at : 100 + at - length / 3] = at < length;
            CHECK(bt_iov_is_zero(z, 2, 0, length) == (at == length));
            memset(zeros, 0, 200);
        }
}

int main(int argc, char **argv)
{
    if (argc < 2)
        fail("usage: test_file DIRECTORY [OPERATIONS] [SEED]");
    int operations = argc > 2 ? atoi(argv[2]) : 400;
    uint64_t seed = argc > 3 ? strtoull(argv[3], NULL, 0) : 1;
    test_iov();
    test_options();
    test_failed_sync();
    for (int engine = BT_ENGINE_THREADS; engine <= (bt_probe_io_uring() ? BT_ENGINE_IO_URING : BT_ENGINE_NATIVE);
         engine++)
        for (int direct = engine == BT_ENGINE_NATIVE; direct <= 1; direct++) {
            test_large(argv[1], engine, direct);
            test_many_vectors(argv[1], engine, direct);
        }
    run_all(argv[1], operations, seed);
    puts("ok");
    return 0;
}
