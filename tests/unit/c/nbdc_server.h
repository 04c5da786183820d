/* SPDX-License-Identifier: Apache-2.0 */
/* A server for test_nbdc.c: one thread for each connection, a disk in memory that they share. It answers in any order,
 * in pieces, with holes, and dies in mid-word when it is told to. */
#ifndef NBDC_SERVER_H
#define NBDC_SERVER_H

#include <poll.h>
#include <sys/socket.h>

#include "check.h"
#include "core.h"
#include "nbd_wire.h"
#include "nbdc.h"

#define DISK_BYTES (8u << 20)
#define HELD 12 /* requests that wait to be answered in another order */

struct disk {
    pthread_mutex_t lock;
    uint8_t data[DISK_BYTES];
};

struct wanted { /* one request, as it came */
    uint64_t cookie, offset, length;
    uint16_t type, flags;
};

struct server {
    struct disk *disk;
    pthread_t thread;
    int fd;
    uint32_t mode; /* bt_nbdc_mode */
    uint32_t random;
    uint32_t life; /* replies until it dies; 0: never */
    struct wanted held[HELD];
    unsigned held_count;
    uint8_t out[(2u << 20) + 4096];
    size_t out_length;
    uint8_t payload[1u << 20];
};

static inline uint32_t server_dice(struct server *server, uint32_t sides)
{
    server->random = server->random * 1664525u + 1013904223u;
    return (server->random >> 8) % sides;
}

static inline bool server_get(struct server *server, void *data, size_t length)
{
    for (char *at = data; length;) {
        ssize_t n = recv(server->fd, at, length, 0);
        if (n <= 0)
            return false;
        at += n;
        length -= (size_t)n;
    }
    return true;
}

static inline bool server_flush(struct server *server, size_t length)
{
    for (uint8_t *at = server->out; length;) {
        ssize_t n = send(server->fd, at, length, MSG_NOSIGNAL);
        if (n <= 0)
            return false;
        at += n;
        length -= (size_t)n;
    }
    server->out_length = 0;
    return true;
}

static inline uint8_t *server_room(struct server *server, size_t length)
{
    uint8_t *at = server->out + server->out_length;
    CHECK(server->out_length + length <= sizeof server->out);
    server->out_length += length;
    return at;
}

/* A chunk's header; the payload is for the caller to fill. */
static inline uint8_t *server_chunk(struct server *server, const struct wanted *wanted, uint16_t type, uint32_t length,
                                    bool done)
{
    bool wide = server->mode == BT_NBDC_EXTENDED;
    uint32_t head = wide ? NBD_EXTENDED_BYTES : NBD_CHUNK_BYTES;
    uint8_t *at = server_room(server, head + length);
    nbd_put32(at, wide ? NBD_EXTENDED_REPLY_MAGIC : NBD_STRUCTURED_REPLY_MAGIC);
    nbd_put16(at + 4, done ? NBD_REPLY_FLAG_DONE : 0);
    nbd_put16(at + 6, type);
    nbd_put64(at + 8, wanted->cookie);
    if (wide) {
        nbd_put64(at + 16, wanted->offset);
        nbd_put64(at + 24, length);
    } else {
        nbd_put32(at + 16, length);
    }
    return at + head;
}

static inline void server_simple(struct server *server, const struct wanted *wanted, uint32_t error)
{
    uint8_t *at = server_room(server, NBD_SIMPLE_BYTES);
    nbd_put32(at, NBD_SIMPLE_REPLY_MAGIC);
    nbd_put32(at + 4, error);
    nbd_put64(at + 8, wanted->cookie);
}

static inline void server_piece(struct server *server, const struct wanted *wanted, uint64_t at, uint32_t length,
                                bool done)
{
    const uint8_t *data = server->disk->data + wanted->offset + at;
    bool zero = data[0] == 0 && memcmp(data, data + 1, length - 1) == 0;
    uint8_t *out = server_chunk(server, wanted, zero ? NBD_REPLY_TYPE_OFFSET_HOLE : NBD_REPLY_TYPE_OFFSET_DATA,
                                zero ? 12 : 8 + length, done);
    nbd_put64(out, wanted->offset + at);
    if (zero)
        nbd_put32(out + 8, length);
    else
        memcpy(out + 8, data, length);
}

static inline void server_read(struct server *server, const struct wanted *wanted)
{
    uint32_t length = (uint32_t)wanted->length, piece = 512u << server_dice(server, 8);
    if (server->mode == BT_NBDC_SIMPLE) {
        server_simple(server, wanted, 0);
        memcpy(server_room(server, length), server->disk->data + wanted->offset, length);
        return;
    }
    uint32_t pieces = (length + piece - 1) / piece, step = server_dice(server, 2) ? 1 : pieces - 1;
    for (uint32_t i = 0; i < pieces; i++) { /* forwards or backwards */
        uint32_t at = (i * (step ? step : 1)) % pieces * piece;
        if (step != 1)
            at = (pieces - 1 - i) * piece;
        server_piece(server, wanted, at, (uint32_t)bt_min(piece, length - at), i == pieces - 1);
    }
}

static inline void server_status(struct server *server, const struct wanted *wanted)
{
    const uint8_t *data = server->disk->data + wanted->offset;
    uint64_t length = 1;
    bool zero = data[0] == 0, wide = server->mode == BT_NBDC_EXTENDED;
    while (length < wanted->length && (data[length] == 0) == zero)
        length++;
    uint8_t *out = server_chunk(server, wanted, wide ? NBD_REPLY_TYPE_BLOCK_STATUS_EXT : NBD_REPLY_TYPE_BLOCK_STATUS,
                                wide ? 24 : 12, true);
    nbd_put32(out, 7);
    if (wide) {
        nbd_put32(out + 4, 1);
        nbd_put64(out + 8, length);
        nbd_put64(out + 16, zero ? 3 : 0);
    } else {
        nbd_put32(out + 4, (uint32_t)length);
        nbd_put32(out + 8, zero ? 3 : 0);
    }
}

static inline void server_answer(struct server *server, const struct wanted *wanted)
{
    pthread_mutex_lock(&server->disk->lock);
    if (wanted->type == NBD_CMD_READ)
        server_read(server, wanted);
    else if (wanted->type == NBD_CMD_BLOCK_STATUS)
        server_status(server, wanted);
    else if (server->mode == BT_NBDC_EXTENDED || (server->mode == BT_NBDC_STRUCTURED && server_dice(server, 2)))
        server_chunk(server, wanted, NBD_REPLY_TYPE_NONE, 0, true);
    else
        server_simple(server, wanted, 0);
    pthread_mutex_unlock(&server->disk->lock);
}

/* The request, and what it changes. */
static inline bool server_take(struct server *server, struct wanted *wanted)
{
    bool wide = server->mode == BT_NBDC_EXTENDED;
    uint8_t wire[NBD_EXTENDED_BYTES];
    if (!server_get(server, wire, wide ? NBD_EXTENDED_BYTES : NBD_REQUEST_BYTES))
        return false;
    CHECK(nbd_get32(wire) == (wide ? NBD_EXTENDED_REQUEST_MAGIC : NBD_REQUEST_MAGIC));
    *wanted = (struct wanted){
        .flags = nbd_get16(wire + 4),
        .type = nbd_get16(wire + 6),
        .cookie = nbd_get64(wire + 8),
        .offset = nbd_get64(wire + 16),
        .length = wide ? nbd_get64(wire + 24) : nbd_get32(wire + 24),
    };
    if (wanted->type == NBD_CMD_DISC)
        return false;
    CHECK(bt_range_ok(wanted->offset, wanted->length, DISK_BYTES));
    bool payload = wanted->type == NBD_CMD_WRITE;
    CHECK(!wide || payload == !!(wanted->flags & NBD_CMD_FLAG_PAYLOAD_LEN));
    if (payload && (wanted->length > sizeof server->payload || !server_get(server, server->payload, wanted->length)))
        return false;
    pthread_mutex_lock(&server->disk->lock);
    if (payload)
        memcpy(server->disk->data + wanted->offset, server->payload, wanted->length);
    else if (wanted->type == NBD_CMD_WRITE_ZEROES || wanted->type == NBD_CMD_TRIM)
        memset(server->disk->data + wanted->offset, 0, wanted->length);
    pthread_mutex_unlock(&server->disk->lock);
    return true;
}

static inline bool server_has_more(const struct server *server)
{
    struct pollfd watch = {.fd = server->fd, .events = POLLIN};
    return poll(&watch, 1, 0) == 1;
}

static inline void *server_main(void *arg)
{
    struct server *server = arg;
    for (;;) {
        bool more = server->held_count < HELD && (!server->held_count || server_has_more(server));
        if (more) {
            if (!server_take(server, &server->held[server->held_count]))
                break;
            server->held_count++;
            continue;
        }
        unsigned i = server_dice(server, server->held_count);
        struct wanted wanted = server->held[i];
        server->held[i] = server->held[--server->held_count];
        server_answer(server, &wanted);
        bool dies = server->life && --server->life == 0;
        if (!server_flush(server, dies ? server_dice(server, (uint32_t)server->out_length) : server->out_length) ||
            dies)
            break;
    }
    shutdown(server->fd, SHUT_RDWR);
    return NULL;
}

/* Returns the client's end. */
static inline int server_start(struct server *server, struct disk *disk, uint32_t mode, uint32_t seed, uint32_t life)
{
    int ends[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
    server->disk = disk;
    server->mode = mode;
    server->random = seed;
    server->life = life;
    server->held_count = 0;
    server->out_length = 0;
    server->fd = ends[1];
    CHECK(pthread_create(&server->thread, NULL, server_main, server) == 0);
    return ends[0];
}

static inline void server_join(struct server *server)
{
    pthread_join(server->thread, NULL);
    close(server->fd);
}

#endif
