/* SPDX-License-Identifier: Apache-2.0 */
/* What NVMe queues ask of an IOMMU domain: where the device finds a piece of memory, if it is mapped. */
#ifndef BT_NVME_DMA_H
#define BT_NVME_DMA_H

#include "memory.h"
#include "nvme.h"

#define DMA_PAGE 4096u

/* Written by one thread each; those that evict read them. */
struct dma_use {
    _Atomic uint32_t commands; /* in flight that use the mapping */
    _Atomic uint64_t used_ns;
    char pad[48];
};

/* A piece of shared memory that is mapped. Closed: no new command may use it. */
struct dma_mapping {
    uint64_t start, end; /* in this process */
    uint64_t iova;
    uint64_t made_ns;
    _Atomic bool closed;
    struct dma_use uses[BT_MAX_THREADS] __attribute__((aligned(64)));
};

/* The mapping that holds address, or NULL: then the caller bounces, and it will be mapped soon if it may be. Stays
 * mapped until dma_put. Only inside a turn of thread's loop. */
struct dma_mapping *dma_get(bt_dma *dma, struct bt_thread *thread, uint64_t address, uint64_t now_ns);
static inline void dma_put(struct dma_mapping *mapping, struct bt_thread *thread)
{
    atomic_fetch_sub_explicit(&mapping->uses[thread->index].commands, 1, memory_order_release);
}

#endif
