/* SPDX-License-Identifier: Apache-2.0 */
/* A vhost-user-blk front end that measures: one split virtqueue (VERSION_1, EVENT_IDX), a fixed number of requests
 * in flight, waiting on the call eventfd as a guest waits for its interrupt.
 *
 *     vhost_bench --socket PATH --op randread|randwrite|seqread|seqwrite [--bs BYTES] [--qd N] [--secs S]
 *                 [--ios N] [--span BYTES] [--poll] [--verify] [--pid BACKEND]
 *
 * Prints one JSON object as nbd_bench does. --poll spins on the used ring instead of waiting. Exit status 0, 1.
 * Specifications: QEMU docs/interop/vhost-user.rst; virtio 1.2, sections 2.7 and 5.2. */
#define _GNU_SOURCE
#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <poll.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define RING 256
#define MAX_DEPTH (RING / 4)
#define MAX_SAMPLES (1u << 22)
#define GUEST_BASE 0x100000000ull
#define DATA_AT 0x100000u
#define HEADER_STRIDE 32

enum { GET_FEATURES = 1, SET_FEATURES, SET_OWNER, SET_MEM_TABLE = 5, SET_VRING_NUM = 8, SET_VRING_ADDR, SET_VRING_BASE,
       GET_VRING_BASE, SET_VRING_KICK, SET_VRING_CALL, GET_PROTOCOL_FEATURES = 15, SET_PROTOCOL_FEATURES,
       SET_VRING_ENABLE = 18, GET_CONFIG = 24 };
#define F_EVENT_IDX (1ull << 29)
#define F_PROTOCOL (1ull << 30)
#define F_VERSION_1 (1ull << 32)
#define F_BLK_FLUSH (1ull << 9)
#define P_CONFIG (1ull << 9)

struct desc {
    uint64_t addr;
    uint32_t len;
    uint16_t flags, next;
};
struct avail {
    uint16_t flags, idx, ring[RING], used_event;
};
struct used {
    uint16_t flags, idx;
    struct {
        uint32_t id, len;
    } ring[RING];
    uint16_t avail_event;
};
struct header {
    uint32_t type, reserved;
    uint64_t sector;
    uint8_t status;
};

static struct {
    const char *socket, *op;
    uint64_t bs, span, ios;
    unsigned qd;
    double secs;
    bool poll, verify;
    int pid;
} config = {.op = "randread", .bs = 4096, .qd = 32, .secs = 2};

static int sock, kick_fd, call_fd;
static uint8_t *memory;
static size_t memory_size;
static struct desc *descs;
static struct avail *avail;
static struct used *used;
static uint16_t avail_idx, used_seen, kicked_idx;
static bool is_write, is_random, stopping;
static uint64_t capacity, issued, completed, wakeups, kicks, next_sequential;
static uint64_t started[MAX_DEPTH], offsets[MAX_DEPTH];
static uint32_t *samples, sample_count;
static uint64_t random_state = 88172645463325252ull;

static _Noreturn void die(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    fputs("vhost_bench: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    exit(1);
}

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t next_random(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    return random_state ^= random_state << 17;
}

/* ---- vhost-user messages ---- */

struct message {
    uint32_t request, flags, size;
    uint8_t payload[512];
} __attribute__((packed));

static void send_message(uint32_t request, const void *payload, uint32_t size, int fd)
{
    struct message message = {.request = request, .flags = 1, .size = size};
    char control[CMSG_SPACE(sizeof(int))] = {0};
    struct iovec iov = {&message, 12 + size};
    struct msghdr header = {.msg_iov = &iov, .msg_iovlen = 1};
    if (size)
        memcpy(message.payload, payload, size);
    if (fd >= 0) {
        header.msg_control = control;
        header.msg_controllen = sizeof control;
        struct cmsghdr *cmsg = CMSG_FIRSTHDR(&header);
        cmsg->cmsg_level = SOL_SOCKET;
        cmsg->cmsg_type = SCM_RIGHTS;
        cmsg->cmsg_len = CMSG_LEN(sizeof fd);
        memcpy(CMSG_DATA(cmsg), &fd, sizeof fd);
    }
    if (sendmsg(sock, &header, MSG_NOSIGNAL) != (ssize_t)iov.iov_len)
        die("sendmsg %u: %s", request, strerror(errno));
}

static void receive(void *data, size_t length)
{
    for (size_t done = 0; done < length;) {
        ssize_t n = read(sock, (char *)data + done, length - done);
        if (n <= 0)
            die("the back end hung up");
        done += (size_t)n;
    }
}

static struct message ask(uint32_t request, const void *payload, uint32_t size)
{
    struct message message;
    send_message(request, payload, size, -1);
    receive(&message, 12);
    if (message.size > sizeof message.payload || message.request != request)
        die("bad reply to %u", request);
    receive(message.payload, message.size);
    return message;
}

static uint64_t ask_u64(uint32_t request)
{
    struct message message = ask(request, NULL, 0);
    uint64_t value;
    memcpy(&value, message.payload, 8);
    return value;
}

static void send_u64(uint32_t request, uint64_t value, int fd) { send_message(request, &value, 8, fd); }

static void send_state(uint32_t request, uint32_t value)
{
    uint32_t state[2] = {0, value};
    send_message(request, state, sizeof state, -1);
}

/* ---- set-up ---- */

static void share_memory(int fd)
{
    struct {
        uint32_t count, padding;
        uint64_t guest, size, user, offset;
    } table = {1, 0, GUEST_BASE, memory_size, (uint64_t)(uintptr_t)memory, 0};
    send_message(SET_MEM_TABLE, &table, sizeof table, fd);
}

static void start_queue(void)
{
    struct {
        uint32_t index, flags;
        uint64_t desc, used, avail, log;
    } addr = {0, 0, (uint64_t)(uintptr_t)descs, (uint64_t)(uintptr_t)used, (uint64_t)(uintptr_t)avail, 0};
    send_state(SET_VRING_NUM, RING);
    send_state(SET_VRING_BASE, 0);
    send_message(SET_VRING_ADDR, &addr, sizeof addr, -1);
    send_u64(SET_VRING_CALL, 0, call_fd);
    send_u64(SET_VRING_KICK, 0, kick_fd);
    send_state(SET_VRING_ENABLE, 1);
}

static void connect_to_backend(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(config.socket) >= sizeof address.sun_path)
        die("socket path is too long");
    strcpy(address.sun_path, config.socket);
    sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connect(sock, (struct sockaddr *)&address, sizeof address) < 0)
        die("connect %s: %s", config.socket, strerror(errno));
    uint64_t features = ask_u64(GET_FEATURES), wanted = F_VERSION_1 | F_EVENT_IDX | F_PROTOCOL | F_BLK_FLUSH;
    if ((features & wanted) != wanted)
        die("the back end lacks features: %#" PRIx64, wanted & ~features);
    if (!(ask_u64(GET_PROTOCOL_FEATURES) & P_CONFIG))
        die("the back end has no config space");
    send_u64(SET_PROTOCOL_FEATURES, P_CONFIG, -1);
    send_message(SET_OWNER, NULL, 0, -1);
    uint8_t config_space[12 + 60] = {0};
    uint32_t length = 60;
    memcpy(config_space + 4, &length, 4);
    struct message reply = ask(GET_CONFIG, config_space, sizeof config_space);
    memcpy(&capacity, reply.payload + 12, 8);
    capacity *= 512;
    send_u64(SET_FEATURES, wanted, -1);
}

static void make_memory(void)
{
    memory_size = (DATA_AT + MAX_DEPTH * config.bs + 4095) & ~4095ull;
    int fd = memfd_create("guest", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, (off_t)memory_size) < 0)
        die("memfd: %s", strerror(errno));
    memory = mmap(NULL, memory_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
    if (memory == MAP_FAILED)
        die("mmap: %s", strerror(errno));
    descs = (struct desc *)memory;
    avail = (struct avail *)(memory + 0x4000);
    used = (struct used *)(memory + 0x8000);
    share_memory(fd);
    close(fd);
}

/* ---- requests ---- */

static uint8_t *data_of(unsigned slot) { return memory + DATA_AT + slot * config.bs; }
static struct header *header_of(unsigned slot) { return (struct header *)(memory + 0x10000 + slot * HEADER_STRIDE); }
static uint64_t guest(const void *p) { return GUEST_BASE + (uint64_t)((const uint8_t *)p - memory); }

static void pattern(uint8_t *data, uint64_t offset, bool check)
{
    for (uint64_t i = 0; i < config.bs; i += 8) {
        uint64_t word = (offset + i) * 0x9e3779b97f4a7c15ull;
        if (check && memcmp(data + i, &word, 8))
            die("wrong data at %" PRIu64, offset + i);
        memcpy(data + i, &word, 8);
    }
}

static uint64_t choose_offset(void)
{
    uint64_t blocks = config.span / config.bs;
    return (is_random ? next_random() % blocks : next_sequential++ % blocks) * config.bs;
}

static void submit(unsigned slot, uint64_t now)
{
    struct header *header = header_of(slot);
    uint16_t first = (uint16_t)(slot * 3);
    offsets[slot] = choose_offset();
    started[slot] = now;
    *header = (struct header){.type = is_write, .sector = offsets[slot] / 512, .status = 0xff};
    if (is_write)
        pattern(data_of(slot), offsets[slot], false);
    descs[first] = (struct desc){guest(header), 16, 1, (uint16_t)(first + 1)};
    descs[first + 1] = (struct desc){guest(data_of(slot)), (uint32_t)config.bs, (uint16_t)(1 | (is_write ? 0 : 2)),
                                     (uint16_t)(first + 2)};
    descs[first + 2] = (struct desc){guest(&header->status), 1, 2, 0};
    avail->ring[avail_idx++ % RING] = first;
    issued++;
}

static void publish(void)
{
    __atomic_store_n(&avail->idx, avail_idx, __ATOMIC_RELEASE);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    uint16_t event = __atomic_load_n(&used->avail_event, __ATOMIC_RELAXED);
    if ((uint16_t)(avail_idx - event - 1) < (uint16_t)(avail_idx - kicked_idx)) {
        uint64_t one = 1;
        kicks++;
        if (write(kick_fd, &one, 8) != 8)
            die("kick: %s", strerror(errno));
    }
    kicked_idx = avail_idx;
}

static void complete(unsigned slot, uint64_t now)
{
    if (header_of(slot)->status)
        die("request at %" PRIu64 " failed with status %u", offsets[slot], header_of(slot)->status);
    if (config.verify && !is_write)
        pattern(data_of(slot), offsets[slot], true);
    uint64_t ns = now - started[slot];
    if (sample_count < MAX_SAMPLES)
        samples[sample_count++] = (uint32_t)(ns / 16 < UINT32_MAX ? ns / 16 : UINT32_MAX);
    completed++;
}

static bool may_issue(void) { return !stopping && (!config.ios || issued < config.ios); }

/* Takes what is used and issues as much again. Returns how many were taken. */
static unsigned reap(void)
{
    uint16_t idx = __atomic_load_n(&used->idx, __ATOMIC_ACQUIRE);
    unsigned n = 0;
    uint64_t now = idx == used_seen ? 0 : now_ns();
    bool any = false;
    for (; used_seen != idx; used_seen++, n++) {
        unsigned slot = used->ring[used_seen % RING].id / 3;
        if (slot >= config.qd)
            die("the back end used a chain that it was not given");
        complete(slot, now);
        if (may_issue()) {
            submit(slot, now);
            any = true;
        }
    }
    if (any)
        publish();
    return n;
}

static void wait_for_call(void)
{
    __atomic_store_n(&avail->used_event, used_seen, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (__atomic_load_n(&used->idx, __ATOMIC_ACQUIRE) != used_seen)
        return;
    struct pollfd watch = {.fd = call_fd, .events = POLLIN};
    uint64_t count;
    if (poll(&watch, 1, 30000) == 0)
        die(__atomic_load_n(&used->idx, __ATOMIC_ACQUIRE) == used_seen ? "no completion in 30 s"
                                                                       : "lost notification");
    if (read(call_fd, &count, 8) == 8)
        wakeups++;
}

static void run(uint64_t until)
{
    uint64_t now = now_ns();
    for (unsigned slot = 0; slot < config.qd && may_issue(); slot++)
        submit(slot, now);
    publish();
    while (issued > completed) {
        unsigned n = reap();
        if (n && now_ns() >= until)
            stopping = true;
        if (!n && !config.poll)
            wait_for_call();
    }
}

/* ---- the report ---- */

static double cpu_seconds(int pid)
{
    char path[64], text[1024];
    unsigned long user = 0, system = 0;
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    FILE *file = fopen(path, "r");
    size_t n = file ? fread(text, 1, sizeof text - 1, file) : 0;
    if (file)
        fclose(file);
    text[n] = 0;
    char *after_name = strrchr(text, ')');
    if (!after_name ||
        sscanf(after_name + 2, "%*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu", &user, &system) != 2)
        return 0;
    return (double)(user + system) / (double)sysconf(_SC_CLK_TCK);
}

static int by_value(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return x < y ? -1 : x > y;
}

static double percentile(double p)
{
    return sample_count ? samples[(uint32_t)(p * (sample_count - 1))] * 16.0 / 1000 : 0;
}

static void report(double seconds, double cpu)
{
    double sum = 0;
    qsort(samples, sample_count, sizeof *samples, by_value);
    for (uint32_t i = 0; i < sample_count; i++)
        sum += samples[i] * 16.0 / 1000;
    printf("{\"op\":\"%s\",\"bs\":%" PRIu64 ",\"qd\":%u,\"seconds\":%.3f,\"ios\":%" PRIu64
           ",\"iops\":%.0f,\"mibps\":%.1f,\"lat_us\":{\"mean\":%.2f,\"p50\":%.2f,\"p99\":%.2f,\"p99.9\":%.2f},"
           "\"backend_cpu_us_per_io\":%.3f,\"kicks\":%" PRIu64 ",\"wakeups\":%" PRIu64 "}\n",
           config.op, config.bs, config.qd, seconds, completed, (double)completed / seconds,
           (double)completed * (double)config.bs / seconds / (1 << 20), sample_count ? sum / sample_count : 0,
           percentile(0.5), percentile(0.99), percentile(0.999), completed ? cpu * 1e6 / (double)completed : 0, kicks,
           wakeups);
}

static uint64_t bytes(const char *text)
{
    char *end;
    uint64_t value = strtoull(text, &end, 10);
    int shift = *end == 'k' ? 10 : *end == 'm' ? 20 : *end == 'g' ? 30 : 0;
    return value << shift;
}

static void parse_arguments(int argc, char **argv)
{
    static const struct option names[] = {
        {"socket", 1, 0, 's'}, {"op", 1, 0, 'o'},   {"bs", 1, 0, 'b'},   {"qd", 1, 0, 'q'},     {"secs", 1, 0, 't'},
        {"ios", 1, 0, 'n'},    {"span", 1, 0, 'S'}, {"poll", 0, 0, 'P'}, {"verify", 0, 0, 'v'}, {"pid", 1, 0, 'p'},
        {0}};
    for (int c; (c = getopt_long(argc, argv, "", names, NULL)) != -1;) {
        switch (c) {
        case 's': config.socket = optarg; break;
        case 'o': config.op = optarg; break;
        case 'b': config.bs = bytes(optarg); break;
        case 'q': config.qd = (unsigned)atoi(optarg); break;
        case 't': config.secs = atof(optarg); break;
        case 'n': config.ios = bytes(optarg); break;
        case 'S': config.span = bytes(optarg); break;
        case 'P': config.poll = true; break;
        case 'v': config.verify = true; break;
        case 'p': config.pid = atoi(optarg); break;
        default: exit(2);
        }
    }
    is_write = strstr(config.op, "write") != NULL;
    is_random = strncmp(config.op, "rand", 4) == 0;
    if (!config.socket || !config.qd || config.qd > MAX_DEPTH || !config.bs || config.bs % 512 ||
        config.bs > 16u << 20)
        die("see the head of vhost_bench.c for the options");
}

/* So that reads find the pattern: one pass of writes over the span. */
static void write_pattern(void)
{
    bool was_write = is_write, was_random = is_random;
    uint64_t ios = config.ios;
    is_write = true;
    is_random = false;
    config.ios = config.span / config.bs;
    run(UINT64_MAX);
    is_write = was_write;
    is_random = was_random;
    config.ios = ios;
    issued = completed = next_sequential = 0;
    sample_count = 0;
}

int main(int argc, char **argv)
{
    parse_arguments(argc, argv);
    samples = malloc(MAX_SAMPLES * sizeof *samples);
    kick_fd = eventfd(0, EFD_CLOEXEC);
    call_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (!samples || kick_fd < 0 || call_fd < 0)
        die("no memory or descriptors");
    connect_to_backend();
    make_memory();
    start_queue();
    if (!config.span || config.span > capacity)
        config.span = capacity;
    if (config.span < config.bs)
        die("the disk is smaller than one request");
    if (config.verify && !is_write)
        write_pattern();
    double cpu = cpu_seconds(config.pid);
    uint64_t start = now_ns();
    run(config.ios ? UINT64_MAX : start + (uint64_t)(config.secs * 1e9));
    double seconds = (double)(now_ns() - start) / 1e9;
    cpu = config.pid ? cpu_seconds(config.pid) - cpu : 0;
    send_state(GET_VRING_BASE, 0);
    report(seconds, cpu);
    return 0;
}
