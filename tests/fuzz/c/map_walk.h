/* SPDX-License-Identifier: Apache-2.0 */
/* The model of map_walk.c: what each byte of the disk must be, and what each cluster of the image is used for. */
#ifndef BT_FUZZ_MAP_WALK_H
#define BT_FUZZ_MAP_WALK_H

#include "fuzz.h"
#include "request.h"

#define GRANULES_MAX 16
#define GRANULE_BITS_MAX 10
#define SLICE_ENTRIES_MAX 8
#define CLUSTERS_MAX (3 * GRANULES_MAX + 8)
#define DISK_MAX (GRANULES_MAX << GRANULE_BITS_MAX)
#define NO_CLUSTER UINT64_MAX
#define OWN_DATA (BT_ENTRY_DATA | BT_ENTRY_WRITABLE | BT_ENTRY_ALLOC)

enum cluster_state {
    CLUSTER_FRESH,  /* never used: reads as zeros */
    CLUSTER_FREE,   /* poisoned */
    CLUSTER_OWN,    /* granted, or the map's own */
    CLUSTER_SHARED, /* a snapshot has it, too */
};

struct geometry {
    uint32_t granule_bits, slice_bits;
    uint64_t granules, size, clusters, backing_size;
    bool zero_entries;
    uint8_t policy;
    bool writable[GRANULES_MAX];
    uint64_t tables[GRANULES_MAX + SLICE_ENTRIES_MAX]; /* entries as on disk */
    enum cluster_state state[CLUSTERS_MAX];
    bool frozen[CLUSTERS_MAX];
    bool granted[CLUSTERS_MAX]; /* and not free since */
    uint8_t child_bytes[CLUSTERS_MAX << GRANULE_BITS_MAX];
    uint8_t frozen_bytes[CLUSTERS_MAX << GRANULE_BITS_MAX];
    uint8_t backing_bytes[DISK_MAX];
    uint8_t fault_bytes[DISK_MAX]; /* of granules whose entry is FAULT */
    /* A byte is model, or other (after a request that failed, or a discard), or not known at all. */
    uint8_t model[DISK_MAX], other[DISK_MAX];
    uint8_t knowledge[DISK_MAX]; /* enum knowledge */
};

enum knowledge { BYTE_KNOWN, BYTE_EITHER, BYTE_UNKNOWN };

struct change {
    int op;
    uint64_t offset, length;
    int result;
    const uint8_t *data;
};

void geometry_read(struct geometry *g, struct input *in);
uint64_t entry_cluster(const struct geometry *g, uint64_t entry);
uint64_t cluster_entry(const struct geometry *g, uint64_t cluster, uint64_t bits);
/* The first of count neighbours that are free, now in use; zeroed: that read as zeros. */
uint64_t cluster_take(struct geometry *g, uint64_t count, bool zeroed);
void cluster_free(struct geometry *g, uint64_t cluster);
/* From now on it must not change. */
void cluster_freeze(struct geometry *g, uint64_t cluster);
/* At the end, with the pool revoked and all written back. dropping: some requests dropped clusters. */
void clusters_check(const struct geometry *g, bool dropping);
/* A request is done: checks what was read, notes what was changed. */
void model_apply(struct geometry *g, const struct change *change);
void model_check_status(const struct geometry *g, uint64_t offset, uint64_t length, const struct bt_extent *extents,
                        uint32_t count);

#endif
