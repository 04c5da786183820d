/* SPDX-License-Identifier: Apache-2.0 */
/* A vhost-user-blk front end that measures: one split virtqueue (VERSION_1, EVENT_IDX), a fixed number of requests
 * in flight, waiting on the call eventfd as a guest waits for its interrupt.
 *
 *     vhost_bench --socket PATH --op randread|randwrite|seqread|seqwrite [--bs BYTES] [--qd N] [--secs S]
 *                 [--ios N] [--span BYTES] [--stride BYTES] [--poll] [--verify] [--pid BACKEND]
 *
 * Prints one JSON object as nbd_bench does, and has its options. --poll spins on the used ring instead of waiting.
 * Exit status 0, or 1 on any error.
 * Specifications: QEMU docs/interop/vhost-user.rst; virtio 1.2, sections 2.7 and 5.2. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#define PROGRAM "vhost_bench"
#include "bench.h"

#define RING 256
#define MAX_DEPTH (RING / 4)
#define GUEST_BASE 0x100000000ull
#define DATA_AT 0x100000u
#define HEADER_STRIDE 32
#define PATIENCE 30 /* seconds without a completion */

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

static int sock, kick_fd, call_fd;
static uint8_t *memory;
static size_t memory_size;
static struct desc *descs;
static struct avail *avail;
static struct used *used;
static uint16_t avail_idx, used_seen, kicked_idx;
static uint64_t capacity, wakeups, kicks;
static uint64_t started[MAX_DEPTH], offsets[MAX_DEPTH];

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
    /* Some back ends make the descriptors that they get non-blocking, which is a flag of the open file: of ours too.
     * The answer says that they have done so; a wait is then one read(2) again, as an interrupt is one event. */
    ask_u64(GET_FEATURES);
    if (fcntl(call_fd, F_SETFL, fcntl(call_fd, F_GETFL) & ~O_NONBLOCK) < 0)
        die("fcntl: %s", strerror(errno));
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

static void submit(unsigned slot, uint64_t now)
{
    struct header *header = header_of(slot);
    uint16_t first = (uint16_t)(slot * 3);
    offsets[slot] = choose_offset();
    started[slot] = now;
    *header = (struct header){.type = is_write, .sector = offsets[slot] / 512, .status = 0xff};
    if (is_write && config.verify)
        fill_pattern(data_of(slot), offsets[slot]);
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
        check_pattern(data_of(slot), offsets[slot], 0, config.bs);
    record(now - started[slot]);
}

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
    uint64_t count;
    if (read(call_fd, &count, 8) == 8)
        wakeups++;
    else if (errno != EINTR)
        die("call: %s", strerror(errno));
}

/* Once a second. A watchdog in the wait itself would cost a system call for each wake-up. */
static void watch(int signal)
{
    static const char lost[] = PROGRAM ": lost notification\n", stuck[] = PROGRAM ": no completion in 30 s\n";
    static uint64_t seen;
    static unsigned quiet;
    (void)signal;
    quiet = completed == seen ? quiet + 1 : 0;
    seen = completed;
    if (quiet < PATIENCE)
        return;
    bool is_lost = __atomic_load_n(&used->idx, __ATOMIC_ACQUIRE) != used_seen;
    ssize_t ignored = is_lost ? write(2, lost, sizeof lost - 1) : write(2, stuck, sizeof stuck - 1);
    (void)ignored;
    _exit(1);
}

static void start_watchdog(void)
{
    struct sigaction action = {.sa_handler = watch};
    struct itimerval second = {{1, 0}, {1, 0}};
    sigaction(SIGALRM, &action, NULL);
    setitimer(ITIMER_REAL, &second, NULL);
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

static void parse_arguments(int argc, char **argv)
{
    static const struct option names[] = {
        {"socket", 1, 0, 's'}, {"op", 1, 0, 'o'},   {"bs", 1, 0, 'b'},     {"qd", 1, 0, 'q'},   {"secs", 1, 0, 't'},
        {"ios", 1, 0, 'n'},    {"span", 1, 0, 'S'}, {"stride", 1, 0, 'd'}, {"poll", 0, 0, 'P'}, {"verify", 0, 0, 'v'},
        {"pid", 1, 0, 'p'},    {0}};
    if (!parse_options(argc, argv, names) || config.qd > MAX_DEPTH || config.bs % 512 || config.bs > 16u << 20 ||
        unit() % 512)
        die("see the head of vhost_bench.c for the options");
}

int main(int argc, char **argv)
{
    parse_arguments(argc, argv);
    kick_fd = eventfd(0, EFD_CLOEXEC);
    call_fd = eventfd(0, EFD_CLOEXEC);
    if (kick_fd < 0 || call_fd < 0)
        die("no memory or descriptors");
    connect_to_backend();
    make_memory();
    start_queue();
    prepare_span(capacity);
    fill_random(memory + DATA_AT, config.qd * config.bs);
    start_watchdog();
    struct measured measured = measure();
    uint32_t queue[2] = {0};
    ask(GET_VRING_BASE, queue, sizeof queue);
    char more[80];
    snprintf(more, sizeof more, ",\"kicks\":%" PRIu64 ",\"wakeups\":%" PRIu64, kicks, wakeups);
    report(measured, more);
    return 0;
}
