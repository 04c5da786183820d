/* SPDX-License-Identifier: Apache-2.0 */
/* The file device against a model: random operations from several I/O threads on neighbouring parts of one file,
 * whose borders lie inside blocks, on every engine, cached and O_DIRECT.
 *
 * test_file DIRECTORY [OPERATIONS] [SEED]: makes and removes files in DIRECTORY. Exits 1 at the first difference.
 * test_file DEVICE [OPERATIONS] [SEED]: overwrites the block device, of at least 1 MiB. */
#define _GNU_SOURCE
#include <linux/fs.h>
#include <sys/ioctl.h>

#include "file_common.h"

#define CLIENTS 12
#define PART 60013 /* bytes of the file for each client: prime, so that borders lie anywhere */
#define FILE_START (PART * (CLIENTS - 2) + 777)
#define OP_MAX 20000

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

#define WRAP(name, params, plain, cut)                                                                       \
    ssize_t __real_##name params;                                                                            \
    ssize_t __wrap_##name params;                                                                            \
    ssize_t __wrap_##name params                                                                             \
    {                                                                                                        \
        int how = disturbed();                                                                               \
        struct iovec first = shortened(iov);                                                                 \
        if (how < 0) {                                                                                       \
            errno = EINTR;                                                                                   \
            return -1;                                                                                       \
        }                                                                                                    \
        return how && first.iov_len ? __real_##name cut : __real_##name plain;                               \
    }

WRAP(preadv, (int fd, const struct iovec *iov, int n, off_t at), (fd, iov, n, at), (fd, &first, 1, at))
WRAP(pwritev, (int fd, const struct iovec *iov, int n, off_t at), (fd, iov, n, at), (fd, &first, 1, at))
WRAP(preadv2, (int fd, const struct iovec *iov, int n, off_t at, int f), (fd, iov, n, at, f),
     (fd, &first, 1, at, f))
WRAP(pwritev2, (int fd, const struct iovec *iov, int n, off_t at, int f), (fd, iov, n, at, f),
     (fd, &first, 1, at, f))

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

static void fill_start(const char *path, unsigned char *model)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    memset(model, 0, PART * CLIENTS);
    for (int i = 0; i < FILE_START; i++)
        model[i] = (unsigned char)(i / 512 % 3 ? i * 31 : 0);
    int length = is_device(path) ? PART * CLIENTS : FILE_START;
    CHECK(write(fd, model, (size_t)length) == length);
    CHECK(fsync(fd) == 0);
    close(fd);
}

static void check_counters(struct run *run)
{
    struct bt_counters c;
    bt_object_counters(&run->device->base, &c);
    uint64_t requests = 0, failed = 0;
    for (int i = 0; i < BT_OPS; i++) {
        requests += c.requests[i];
        failed += c.failed[i];
    }
    CHECK(requests == c.inline_done + c.engine_done + failed);
    printf("%s: %lu requests: inline %lu, engine %lu, bounced %lu, failed %lu\n", run->config->name,
           (unsigned long)requests, (unsigned long)c.inline_done, (unsigned long)c.engine_done,
           (unsigned long)c.bounced, (unsigned long)failed);
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
    bool sizes_right = (uint64_t)st.st_size == size && bt_object_size(&run->device->base) == size;
    if (S_ISREG(st.st_mode) && !sizes_right)
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
        remove_file(path);
        return;
    }
    struct run run = {.dp = start_datapath(), .config = config, .model = calloc(CLIENTS, PART)};
    struct client clients[CLIENTS];
    pthread_mutex_init(&run.lock, NULL);
    pthread_cond_init(&run.done, NULL);
    fill_start(path, run.model);
    uint32_t flags = config->flags | (is_device(path) ? BT_FILE_BLOCK : 0);
    run.device = (struct bt_device *)bt_file_new(run.dp, 1, fd, FILE_START, flags, config->engine, config->align,
                                                 config->mem_align);
    CHECK(run.device);
    close(fd);
    start_clients(&run, clients, operations, seed);
    check_file(&run, path);
    check_counters(&run);
    release(run.dp, &run.device->base);
    bt_datapath_free(run.dp);
    free(run.model);
    remove_file(path);
}

/* A device of 4096-byte sectors takes no O_DIRECT of less. */
static bool config_fits(const char *device, const struct config *config)
{
    int fd = open(device, O_RDONLY | O_CLOEXEC), sector = 0;
    CHECK(ioctl(fd, BLKSSZGET, &sector) == 0);
    close(fd);
    return config->align == 1 || config->align >= (uint32_t)sector;
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
        if (!is_device(directory) || config_fits(directory, &configs[i]))
            run_config(directory, &configs[i], operations, seed + i);
    }
    atomic_store(&disturb, false);
}

int main(int argc, char **argv)
{
    if (argc < 2)
        fail("usage: test_file DIRECTORY|DEVICE [OPERATIONS] [SEED]");
    int operations = argc > 2 ? atoi(argv[2]) : 400;
    uint64_t seed = argc > 3 ? strtoull(argv[3], NULL, 0) : 1;
    run_all(argv[1], operations, seed);
    puts("ok");
    return 0;
}
