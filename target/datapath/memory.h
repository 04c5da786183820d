/* SPDX-License-Identifier: Apache-2.0 */
/* Memory that devices may use for DMA as it is: what front ends share, and the buffers of NBD sessions. Its owners
 * register it; a device that wants to map it into an IOMMU listens. */
#ifndef BT_MEMORY_H
#define BT_MEMORY_H

#include "core.h"

/* A region that goes: its memory is unmapped when the last reference does. */
struct bt_memory_drop {
    _Atomic int refs;
    void *address;
    size_t length;
};

struct bt_memory_listener {
    struct bt_memory_listener *next;
    /* Both are called with the registry locked, by whichever thread adds or removes: they must be quick. */
    void (*added)(struct bt_memory_listener *listener, uint64_t start, uint64_t end);
    /* Who still uses part of it takes a reference on drop (bt_memory_hold), and gives it back later. */
    void (*removed)(struct bt_memory_listener *listener, uint64_t start, uint64_t end, struct bt_memory_drop *drop);
};

struct bt_memory;
struct bt_memory *bt_memory_new(void);
void bt_memory_free(struct bt_memory *memory);

/* A mapping of this process, page aligned. Where that fails it is no less usable, only slower. */
void bt_memory_add(bt_datapath *dp, void *address, size_t length);
/* Takes over a mapping that was added, which no request uses any more; munmap()s it, now or as soon as no device
 * has it mapped. */
void bt_memory_remove(bt_datapath *dp, void *address, size_t length);
/* The region that holds address. False when none does. */
bool bt_memory_find(bt_datapath *dp, uint64_t address, uint64_t *start, uint64_t *end);
/* added is called for each region that is there already. */
void bt_memory_listen(bt_datapath *dp, struct bt_memory_listener *listener);
/* Afterwards no call is under way. */
void bt_memory_unlisten(bt_datapath *dp, struct bt_memory_listener *listener);
void bt_memory_hold(struct bt_memory_drop *drop);
void bt_memory_release(struct bt_memory_drop *drop);

#endif
