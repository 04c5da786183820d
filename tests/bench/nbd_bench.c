/* SPDX-License-Identifier: Apache-2.0 */
/* A light pipelined NBD client: keeps a fixed number of requests in flight on each connection, and measures.
 *
 *     nbd_bench --socket PATH [--export NAME] --op randread|randwrite|seqread|seqwrite [--bs BYTES] [--qd N]
 *               [--connections N] [--secs S] [--ios N] [--span BYTES] [--structured] [--verify] [--pid SERVER]
 *
 * Prints one JSON object: iops, mibps, latency percentiles in microseconds, the server's CPU time per request
 * (--pid). --verify writes a pattern first and compares what it reads. Exit status: 0, 1 on any error.
 * Protocol: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md; one thread, epoll-free. */
#define _GNU_SOURCE
#include <endian.h>
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
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define MAX_CONNECTIONS 16
#define MAX_DEPTH 256
#define MAX_SAMPLES (1u << 22)
#define RX_BYTES (1u << 18)
#define REQUEST_MAGIC 0x25609513u
#define SIMPLE_MAGIC 0x67446698u
#define CHUNK_MAGIC 0x668e33efu

static struct {
    const char *socket, *export, *op;
    uint64_t bs, span, ios;
    unsigned qd, connections;
    double secs;
    bool structured, verify;
    int pid;
} config = {.export = "", .op = "randread", .bs = 4096, .qd = 32, .connections = 1, .secs = 2};

static uint64_t size, issued, completed, next_sequential;
static bool is_write, is_random, stopping;
static uint32_t *samples; /* ns / 16 */
static uint32_t sample_count;
static uint64_t random_state = 88172645463325252ull;

static _Noreturn void die(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    fputs("nbd_bench: ", stderr);
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

/* ---- connections ---- */

struct request {
    uint64_t started, offset;
    bool busy;
};

struct connection {
    int fd;
    struct request requests[MAX_DEPTH];
    unsigned in_flight;
    uint8_t *tx; /* requests, with their payload behind them */
    size_t tx_length, tx_sent;
    uint8_t *rx;
    size_t rx_head, rx_tail;
    size_t payload_left, payload_at; /* of the reply that is being received */
    unsigned current;
    bool chunk_done;
};

static void full_write(int fd, const void *data, size_t length)
{
    for (size_t done = 0; done < length;) {
        ssize_t n = write(fd, (const char *)data + done, length - done);
        if (n < 0 && errno != EINTR)
            die("write: %s", strerror(errno));
        done += n > 0 ? (size_t)n : 0;
    }
}

static void full_read(int fd, void *data, size_t length)
{
    for (size_t done = 0; done < length;) {
        ssize_t n = read(fd, (char *)data + done, length - done);
        if (n == 0 || (n < 0 && errno != EINTR))
            die("read: %s", n ? strerror(errno) : "the server hung up in the handshake");
        done += n > 0 ? (size_t)n : 0;
    }
}

static uint32_t option(int fd, uint32_t number, const void *data, uint32_t length, uint8_t *reply, uint32_t max,
                       uint32_t *reply_length)
{
    struct {
        uint64_t magic;
        uint32_t option, length;
    } __attribute__((packed)) head = {htobe64(0x49484156454f5054ull), htobe32(number), htobe32(length)};
    struct {
        uint64_t magic;
        uint32_t option, type, length;
    } __attribute__((packed)) answer;
    if (data) {
        full_write(fd, &head, sizeof head);
        full_write(fd, data, length);
    }
    full_read(fd, &answer, sizeof answer);
    *reply_length = be32toh(answer.length);
    if (be64toh(answer.magic) != 0x3e889045565a9ull || *reply_length > max)
        die("bad option reply");
    full_read(fd, reply, *reply_length);
    return be32toh(answer.type);
}

static void negotiate(int fd)
{
    uint8_t greeting[18], reply[4096], go[4096 + 6];
    uint32_t flags = htobe32(3), got, type, name = (uint32_t)strlen(config.export);
    full_read(fd, greeting, sizeof greeting);
    if (memcmp(greeting, "NBDMAGICIHAVEOPT", 16) || name > 4096)
        die("not a fixed newstyle NBD server");
    full_write(fd, &flags, sizeof flags);
    if (config.structured && option(fd, 8, "", 0, reply, sizeof reply, &got) != 1)
        die("the server has no structured replies");
    uint32_t be_name = htobe32(name);
    memcpy(go, &be_name, 4);
    memcpy(go + 4, config.export, name);
    memset(go + 4 + name, 0, 2);
    type = option(fd, 7, go, name + 6, reply, sizeof reply, &got);
    for (; type == 3; type = option(fd, 7, NULL, 0, reply, sizeof reply, &got))
        if (got == 12 && !reply[0] && !reply[1]) {
            memcpy(&size, reply + 2, 8);
            size = be64toh(size);
        }
    if (type != 1)
        die("export '%s' refused (%#x)", config.export, type);
}

static void connect_to(struct connection *connection)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(config.socket) >= sizeof address.sun_path)
        die("socket path is too long");
    strcpy(address.sun_path, config.socket);
    connection->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connect(connection->fd, (struct sockaddr *)&address, sizeof address) < 0)
        die("connect %s: %s", config.socket, strerror(errno));
    int bytes = 1 << 21;
    setsockopt(connection->fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
    negotiate(connection->fd);
    connection->tx = malloc(config.qd * (28 + config.bs));
    connection->rx = malloc(RX_BYTES + config.bs);
    if (!connection->tx || !connection->rx)
        die("no memory");
}

/* ---- requests ---- */

/* Every 8 bytes say where they belong. */
static void fill_pattern(uint8_t *data, uint64_t offset)
{
    for (uint64_t i = 0; i < config.bs; i += 8) {
        uint64_t word = (offset + i) * 0x9e3779b97f4a7c15ull;
        memcpy(data + i, &word, 8);
    }
}

static void check_pattern(const uint8_t *data, uint64_t offset, uint64_t at, size_t length)
{
    for (size_t i = (8 - at % 8) % 8; i + 8 <= length; i += 8) {
        uint64_t word, want = (offset + at + i) * 0x9e3779b97f4a7c15ull;
        memcpy(&word, data + i, 8);
        if (word != want)
            die("wrong data at %" PRIu64, offset + at + i);
    }
}

static uint64_t choose_offset(void)
{
    uint64_t blocks = config.span / config.bs;
    return (is_random ? next_random() % blocks : next_sequential++ % blocks) * config.bs;
}

static void queue_request(struct connection *connection, unsigned index, uint64_t now)
{
    struct request *request = &connection->requests[index];
    struct {
        uint32_t magic;
        uint16_t flags, type;
        uint64_t cookie, offset;
        uint32_t length;
    } __attribute__((packed)) wire;
    request->offset = choose_offset();
    request->started = now;
    request->busy = true;
    wire.magic = htobe32(REQUEST_MAGIC);
    wire.flags = 0;
    wire.type = htobe16(is_write ? 1 : 0);
    wire.cookie = index;
    wire.offset = htobe64(request->offset);
    wire.length = htobe32((uint32_t)config.bs);
    memcpy(connection->tx + connection->tx_length, &wire, sizeof wire);
    connection->tx_length += sizeof wire;
    if (is_write) {
        fill_pattern(connection->tx + connection->tx_length, request->offset);
        connection->tx_length += config.bs;
    }
    connection->in_flight++;
    issued++;
}

static void top_up(struct connection *connection)
{
    uint64_t now = now_ns();
    if (connection->tx_sent < connection->tx_length)
        return; /* the buffer is not free yet */
    connection->tx_length = connection->tx_sent = 0;
    for (unsigned i = 0; i < config.qd && !stopping && (!config.ios || issued < config.ios); i++)
        if (!connection->requests[i].busy)
            queue_request(connection, i, now);
}

static void send_some(struct connection *connection)
{
    while (connection->tx_sent < connection->tx_length) {
        ssize_t n = send(connection->fd, connection->tx + connection->tx_sent,
                         connection->tx_length - connection->tx_sent, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n < 0 && errno == EAGAIN)
            return;
        if (n < 0)
            die("send: %s", strerror(errno));
        connection->tx_sent += (size_t)n;
    }
}

static void finish(struct connection *connection, unsigned index)
{
    struct request *request = &connection->requests[index];
    uint64_t ns = now_ns() - request->started;
    if (sample_count < MAX_SAMPLES)
        samples[sample_count++] = (uint32_t)(ns / 16 < UINT32_MAX ? ns / 16 : UINT32_MAX);
    request->busy = false;
    connection->in_flight--;
    completed++;
}

/* ---- replies ---- */

static unsigned cookie_of(struct connection *connection, const uint8_t *wire)
{
    uint64_t cookie;
    memcpy(&cookie, wire, 8);
    if (cookie >= config.qd || !connection->requests[cookie].busy)
        die("a reply to no request");
    return (unsigned)cookie;
}

static uint32_t get32(const uint8_t *p)
{
    uint32_t v;
    memcpy(&v, p, 4);
    return be32toh(v);
}

static bool parse_simple(struct connection *connection, const uint8_t *p)
{
    if (get32(p + 4))
        die("the server answers with error %u", get32(p + 4));
    connection->current = cookie_of(connection, p + 8);
    connection->rx_head += 16;
    connection->payload_left = is_write ? 0 : config.bs;
    connection->payload_at = 0;
    connection->chunk_done = true;
    return true;
}

static bool parse_chunk(struct connection *connection, const uint8_t *p, size_t have)
{
    uint32_t type = get32(p + 4) & 0xffff, length = get32(p + 16);
    size_t head = type == 1 ? 28 : type == 2 ? 32 : 20;
    uint64_t at;
    if (have < head)
        return false;
    connection->current = cookie_of(connection, p + 8);
    connection->chunk_done = get32(p + 4) & 0x10000;
    connection->payload_left = 0;
    if (type == 1) {
        memcpy(&at, p + 20, 8);
        connection->payload_at = be64toh(at) - connection->requests[connection->current].offset;
        connection->payload_left = length - 8;
    } else if (type != 0 && type != 2) {
        die("the server answers with a chunk of type %u", type);
    }
    connection->rx_head += head;
    return true;
}

static bool take_payload(struct connection *connection)
{
    size_t have = connection->rx_tail - connection->rx_head;
    size_t n = have < connection->payload_left ? have : connection->payload_left;
    if (config.verify && n)
        check_pattern(connection->rx + connection->rx_head, connection->requests[connection->current].offset,
                      connection->payload_at, n);
    connection->rx_head += n;
    connection->payload_at += n;
    connection->payload_left -= n;
    return connection->payload_left == 0;
}

static void parse_replies(struct connection *connection)
{
    for (;;) {
        size_t have = connection->rx_tail - connection->rx_head;
        const uint8_t *p = connection->rx + connection->rx_head;
        if (!connection->payload_left) {
            if (have < 16)
                return;
            uint32_t magic = get32(p);
            if (magic != SIMPLE_MAGIC && magic != CHUNK_MAGIC)
                die("bad reply magic %#x", magic);
            if (magic == CHUNK_MAGIC && have < 20)
                return;
            if (!(magic == SIMPLE_MAGIC ? parse_simple(connection, p) : parse_chunk(connection, p, have)))
                return;
        }
        if (!take_payload(connection))
            return;
        if (connection->chunk_done)
            finish(connection, connection->current);
    }
}

static void receive_some(struct connection *connection)
{
    size_t have = connection->rx_tail - connection->rx_head;
    memmove(connection->rx, connection->rx + connection->rx_head, have);
    connection->rx_head = 0;
    connection->rx_tail = have;
    ssize_t n = recv(connection->fd, connection->rx + have, RX_BYTES + config.bs - have, MSG_DONTWAIT);
    if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR))
        die("recv: %s", n ? strerror(errno) : "the server hung up");
    if (n > 0)
        connection->rx_tail += (size_t)n;
    parse_replies(connection);
}

/* ---- the run ---- */

static void run(struct connection *connections, uint64_t until)
{
    struct pollfd polls[MAX_CONNECTIONS];
    unsigned in_flight;
    do {
        in_flight = 0;
        if (now_ns() >= until || (config.ios && issued >= config.ios))
            stopping = true;
        for (unsigned i = 0; i < config.connections; i++) {
            top_up(&connections[i]);
            send_some(&connections[i]);
            bool more = connections[i].tx_sent < connections[i].tx_length;
            polls[i] = (struct pollfd){.fd = connections[i].fd, .events = (short)(POLLIN | (more ? POLLOUT : 0))};
            in_flight += connections[i].in_flight;
        }
        if (in_flight && poll(polls, config.connections, 30000) == 0)
            die("no reply in 30 s");
        for (unsigned i = 0; i < config.connections; i++)
            if (polls[i].revents & (POLLIN | POLLHUP))
                receive_some(&connections[i]);
    } while (in_flight || !stopping);
}

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
    printf("{\"op\":\"%s\",\"bs\":%" PRIu64 ",\"qd\":%u,\"connections\":%u,\"seconds\":%.3f,\"ios\":%" PRIu64
           ",\"iops\":%.0f,\"mibps\":%.1f,\"lat_us\":{\"mean\":%.2f,\"p50\":%.2f,\"p99\":%.2f,\"p99.9\":%.2f},"
           "\"backend_cpu_us_per_io\":%.3f}\n",
           config.op, config.bs, config.qd, config.connections, seconds, completed, (double)completed / seconds,
           (double)completed * (double)config.bs / seconds / (1 << 20), sample_count ? sum / sample_count : 0,
           percentile(0.5), percentile(0.99), percentile(0.999), completed ? cpu * 1e6 / (double)completed : 0);
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
        {"socket", 1, 0, 's'}, {"export", 1, 0, 'x'},     {"op", 1, 0, 'o'},     {"bs", 1, 0, 'b'},
        {"qd", 1, 0, 'q'},     {"connections", 1, 0, 'c'}, {"secs", 1, 0, 't'},   {"ios", 1, 0, 'n'},
        {"span", 1, 0, 'S'},   {"structured", 0, 0, 'r'},  {"verify", 0, 0, 'v'}, {"pid", 1, 0, 'p'}, {0}};
    for (int c; (c = getopt_long(argc, argv, "", names, NULL)) != -1;) {
        switch (c) {
        case 's': config.socket = optarg; break;
        case 'x': config.export = optarg; break;
        case 'o': config.op = optarg; break;
        case 'b': config.bs = bytes(optarg); break;
        case 'q': config.qd = (unsigned)atoi(optarg); break;
        case 'c': config.connections = (unsigned)atoi(optarg); break;
        case 't': config.secs = atof(optarg); break;
        case 'n': config.ios = bytes(optarg); break;
        case 'S': config.span = bytes(optarg); break;
        case 'r': config.structured = true; break;
        case 'v': config.verify = true; break;
        case 'p': config.pid = atoi(optarg); break;
        default: exit(2);
        }
    }
    is_write = strstr(config.op, "write") != NULL;
    is_random = strncmp(config.op, "rand", 4) == 0;
    if (!config.socket || !config.qd || config.qd > MAX_DEPTH || !config.connections ||
        config.connections > MAX_CONNECTIONS || !config.bs || config.bs % 8 || config.bs > 32u << 20)
        die("see the head of nbd_bench.c for the options");
}

/* So that reads find the pattern: one pass of writes over the span. */
static void write_pattern(struct connection *connections)
{
    bool was_write = is_write, was_random = is_random;
    uint64_t ios = config.ios;
    is_write = true;
    is_random = false;
    config.ios = config.span / config.bs;
    run(connections, UINT64_MAX);
    is_write = was_write;
    is_random = was_random;
    config.ios = ios;
    issued = completed = next_sequential = 0;
    sample_count = 0;
    stopping = false;
}

int main(int argc, char **argv)
{
    static struct connection connections[MAX_CONNECTIONS];
    parse_arguments(argc, argv);
    samples = malloc(MAX_SAMPLES * sizeof *samples);
    if (!samples)
        die("no memory");
    for (unsigned i = 0; i < config.connections; i++)
        connect_to(&connections[i]);
    if (!config.span || config.span > size)
        config.span = size;
    if (config.span < config.bs)
        die("the export is smaller than one request");
    if (config.verify && !is_write)
        write_pattern(connections);
    double cpu = cpu_seconds(config.pid);
    uint64_t start = now_ns();
    run(connections, config.ios ? UINT64_MAX : start + (uint64_t)(config.secs * 1e9));
    double seconds = (double)(now_ns() - start) / 1e9;
    report(seconds, config.pid ? cpu_seconds(config.pid) - cpu : 0);
    return 0;
}
