/* SPDX-License-Identifier: Apache-2.0 */
/* A device in memory that holds what is submitted until it is told to finish it, in any order, well or not. */
#ifndef BT_FUZZ_RAM_DEVICE_H
#define BT_FUZZ_RAM_DEVICE_H

#include "fuzz.h"

#define RAM_HELD 1024

struct ram {
    struct bt_device device;
    uint8_t *bytes; /* the owner's */
    uint64_t capacity;
    bool at_once;   /* nothing is held */
    bool unchanging; /* what is written is looked at by `written` and dropped */
    void (*written)(struct ram *ram, const struct bt_io *io);
    uint64_t bad_start, bad_end; /* reads and changes that touch it fail with EIO */
    struct bt_io *held[RAM_HELD];
    unsigned held_count;
};

/* The owner's reference. Reads past size give zeros; writes up to capacity are good. */
struct ram *ram_new(bt_datapath *dp, uint64_t tag, uint8_t *bytes, uint64_t size, uint64_t capacity);
/* Finishes one of those held (which is taken modulo their number); -errno fails it, half done. False: none is. */
bool ram_finish(struct ram *ram, unsigned which, int error);
static inline bt_object *ram_object(struct ram *ram) { return &ram->device.base; }

#endif
