/* SPDX-License-Identifier: Apache-2.0 */
/* A light pipelined NBD client: keeps a fixed number of requests in flight on each connection, and measures.
 *
 *     nbd_bench --socket PATH [--export NAME] --op randread|randwrite|seqread|seqwrite [--bs BYTES] [--qd N]
 *               [--connections N] [--secs S] [--ios N] [--span BYTES] [--stride BYTES] [--structured]
 *               [--verify] [--pid SERVER]
 *
 * Prints one JSON object: iops, mibps, latency percentiles in microseconds, CPU time per request of the server (--pid)
 * and of the client. --stride takes each multiple of it once before any twice; --ios ends after so many requests.
 * --verify writes a pattern, first if the operation reads, and compares what it reads. Exit status: 0, 1 on any error.
 * Protocol: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md; one thread, epoll-free. */
#define _GNU_SOURCE
#include <endian.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define PROGRAM "nbd_bench"
#include "bench.h"

#define MAX_CONNECTIONS 16
#define MAX_DEPTH 256
#define RX_BYTES (1u << 18)
#define REQUEST_MAGIC 0x25609513u
#define SIMPLE_MAGIC 0x67446698u
#define CHUNK_MAGIC 0x668e33efu

static uint64_t size;

/* ---- connections ---- */

struct request {
    uint64_t started, offset, received;
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

static struct connection connections[MAX_CONNECTIONS];

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
    fill_random(connection->tx, config.qd * (28 + config.bs));
}

/* ---- requests ---- */

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
    request->received = 0;
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
        if (config.verify)
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
    for (unsigned i = 0; i < config.qd && may_issue(); i++)
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
    if (request->received != (is_write ? 0 : config.bs))
        die("the reply for %" PRIu64 " has %" PRIu64 " bytes", request->offset, request->received);
    request->busy = false;
    connection->in_flight--;
    record(now_ns() - request->started);
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

/* A piece of the current reply, which begins `at` bytes into the block. */
static void take_piece(struct connection *connection, uint64_t at, uint64_t length)
{
    if (is_write || at > config.bs || length > config.bs - at)
        die("the server answers with data that were not asked for");
    connection->payload_at = at;
    connection->requests[connection->current].received += length;
}

static bool parse_simple(struct connection *connection, const uint8_t *p)
{
    if (get32(p + 4))
        die("the server answers with error %u", get32(p + 4));
    connection->current = cookie_of(connection, p + 8);
    connection->rx_head += 16;
    connection->payload_left = is_write ? 0 : config.bs;
    if (!is_write)
        take_piece(connection, 0, config.bs);
    connection->chunk_done = true;
    return true;
}

/* Chunks: 0 nothing, 1 data at an offset, 2 a hole at an offset. */
static bool parse_chunk(struct connection *connection, const uint8_t *p, size_t have)
{
    uint32_t type = get32(p + 4) & 0xffff, length = get32(p + 16);
    size_t head = type == 1 ? 28 : type == 2 ? 32 : 20;
    if (type > 2 || length < head - 20 || (type != 1 && length != head - 20))
        die("the server answers with a chunk of type %u and length %u", type, length);
    if (have < head)
        return false;
    connection->current = cookie_of(connection, p + 8);
    connection->chunk_done = get32(p + 4) & 0x10000;
    connection->payload_left = type == 1 ? length - 8 : 0;
    if (type) {
        uint64_t at;
        memcpy(&at, p + 20, 8);
        at = be64toh(at) - connection->requests[connection->current].offset;
        take_piece(connection, at, type == 1 ? length - 8 : get32(p + 28));
    }
    if (type == 2 && config.verify)
        die("wrong data at %" PRIu64 ": a hole", connection->requests[connection->current].offset);
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

static void run(uint64_t until)
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

static void parse_arguments(int argc, char **argv)
{
    static const struct option names[] = {
        {"socket", 1, 0, 's'}, {"export", 1, 0, 'x'},     {"op", 1, 0, 'o'},     {"bs", 1, 0, 'b'},
        {"qd", 1, 0, 'q'},     {"connections", 1, 0, 'c'}, {"secs", 1, 0, 't'},   {"ios", 1, 0, 'n'},
        {"span", 1, 0, 'S'},   {"stride", 1, 0, 'd'},      {"structured", 0, 0, 'r'}, {"verify", 0, 0, 'v'},
        {"pid", 1, 0, 'p'},    {0}};
    if (!parse_options(argc, argv, names) || config.qd > MAX_DEPTH || !config.connections ||
        config.connections > MAX_CONNECTIONS || config.bs > 32u << 20)
        die("see the head of nbd_bench.c for the options");
}

int main(int argc, char **argv)
{
    parse_arguments(argc, argv);
    for (unsigned i = 0; i < config.connections; i++)
        connect_to(&connections[i]);
    prepare_span(size);
    report(measure(), "");
    return 0;
}
