/* SPDX-License-Identifier: Apache-2.0 */
/* What the ring and the AIO context of an I/O thread offer to file.c: one transfer on one descriptor. Retrying,
 * short results and ends of files are the caller's. */
#ifndef BT_ENGINE_H
#define BT_ENGINE_H

#include <linux/aio_abi.h>

#include "core.h"

enum bt_transfer_kind { BT_TRANSFER_READ, BT_TRANSFER_WRITE, BT_TRANSFER_DATASYNC, BT_TRANSFER_FALLOCATE };

/* So many transfers of a turn that go to a disk are submitted before the turn ends: the disk works while the thread
 * prepares the next ones. Measured on virtio-blk at depth 32: about a fifth more than with one submission a turn;
 * one at a time gains no more and costs more. */
#define BT_DISK_BATCH 4

/* Lives until done; belongs to the thread that started it. */
struct bt_transfer {
    struct bt_transfer *next;
    /* bytes moved, 0, or -errno. May start the same transfer again. */
    void (*done)(struct bt_transfer *transfer, int64_t result);
    int fd;
    uint8_t kind;
    bool disk; /* goes to the disk, not to the page cache */
    int flags; /* READ, WRITE: RWF_*; FALLOCATE: its mode */
    const struct iovec *iov;
    int iovcnt;
    uint64_t offset;
    uint64_t length; /* FALLOCATE */
    struct iocb iocb;
};

/* 0, or -errno when the thread has no ring and can get none; then done is not called. */
int bt_uring_start(struct bt_thread *thread, struct bt_transfer *transfer);
/* The same through Linux AIO; READ and WRITE only. */
int bt_aio_start(struct bt_thread *thread, struct bt_transfer *transfer);
/* 0, or -errno when AIO cannot be used here. */
int bt_aio_probe(void);

#endif
