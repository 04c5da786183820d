/* SPDX-License-Identifier: Apache-2.0 */
/* A blocking NBD client for test_traffic.c: a batch of requests, then their replies in any order. */
#ifndef TRAFFIC_NBD_H
#define TRAFFIC_NBD_H

#include <sys/socket.h>

#include "nbd.h"
#include "traffic.h"

static inline void nbd_write_all(int sock, const void *data, size_t length)
{
    for (const char *at = data; length;) {
        ssize_t n = send(sock, at, length, MSG_NOSIGNAL);
        CHECK(n > 0);
        at += n;
        length -= (size_t)n;
    }
}

static inline void nbd_read_all(int sock, void *data, size_t length)
{
    for (char *at = data; length;) {
        ssize_t n = recv(sock, at, length, 0);
        CHECK(n > 0);
        at += n;
        length -= (size_t)n;
    }
}

static inline void nbd_encode(uint8_t wire[NBD_REQUEST_BYTES], uint16_t type, uint16_t flags, uint64_t cookie,
                              uint64_t offset, uint32_t length)
{
    nbd_put32(wire, NBD_REQUEST_MAGIC);
    nbd_put16(wire + 4, flags);
    nbd_put16(wire + 6, type);
    nbd_put64(wire + 8, cookie);
    nbd_put64(wire + 16, offset);
    nbd_put32(wire + 24, length);
}

static inline void nbd_send_one(int sock, struct owner *owner, unsigned index)
{
    static const uint16_t types[] = {NBD_CMD_READ, NBD_CMD_WRITE, NBD_CMD_WRITE_ZEROES, NBD_CMD_TRIM, NBD_CMD_FLUSH};
    const struct operation *operation = &owner->batch[index];
    uint8_t wire[NBD_REQUEST_BYTES];
    uint16_t flags = operation->kind == KIND_WRITE && dice(owner, 16) == 0 ? NBD_CMD_FLAG_FUA : 0;
    if (operation->kind == KIND_ZEROES && dice(owner, 2))
        flags |= NBD_CMD_FLAG_NO_HOLE;
    nbd_encode(wire, types[operation->kind], flags, index, (uint64_t)operation->block * BLOCK,
               operation->blocks * BLOCK);
    nbd_write_all(sock, wire, sizeof wire);
    if (operation->kind == KIND_WRITE)
        nbd_write_all(sock, owner->data[index], operation->blocks * BLOCK);
}

static inline void nbd_receive_one(int sock, struct owner *owner, uint32_t *answered)
{
    uint8_t head[NBD_SIMPLE_BYTES];
    nbd_read_all(sock, head, sizeof head);
    CHECK(nbd_get32(head) == NBD_SIMPLE_REPLY_MAGIC && nbd_get32(head + 4) == 0);
    uint64_t index = nbd_get64(head + 8);
    CHECK(index < owner->batch_size && !(*answered >> index & 1));
    *answered |= 1u << index;
    if (owner->batch[index].kind == KIND_READ)
        nbd_read_all(sock, owner->data[index], owner->batch[index].blocks * BLOCK);
    completed(owner, (unsigned)index);
}

/* Batches of verified requests, then DISC. */
static inline void nbd_client(int sock, struct owner *owner, unsigned batches)
{
    uint8_t wire[NBD_REQUEST_BYTES];
    while (batches--) {
        uint32_t answered = 0;
        fill_batch(owner);
        for (unsigned i = 0; i < owner->batch_size; i++)
            nbd_send_one(sock, owner, i);
        for (unsigned i = 0; i < owner->batch_size; i++)
            nbd_receive_one(sock, owner, &answered);
    }
    nbd_encode(wire, NBD_CMD_DISC, 0, 0, 0, 0);
    nbd_write_all(sock, wire, sizeof wire);
}

#endif
