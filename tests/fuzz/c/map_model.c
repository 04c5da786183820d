/* SPDX-License-Identifier: Apache-2.0 */
#include "map_walk.h"

#define POISON 0xDD

/* ---- clusters ---- */

uint64_t cluster_entry(const struct geometry *g, uint64_t cluster, uint64_t bits)
{
    return bt_entry_make(cluster << g->granule_bits, bits);
}

uint64_t entry_cluster(const struct geometry *g, uint64_t entry)
{
    bool hosted = bt_entry_kind(entry) == BT_ENTRY_DATA || entry & BT_ENTRY_HOST;
    uint64_t cluster = bt_entry_host(entry) >> g->granule_bits;
    CHECK(!hosted || cluster < g->clusters);
    return hosted ? cluster : NO_CLUSTER;
}

static uint8_t *bytes_of(struct geometry *g, uint64_t cluster)
{
    return g->child_bytes + (cluster << g->granule_bits);
}

uint64_t cluster_take(struct geometry *g, uint64_t count, bool zeroed)
{
    for (uint64_t first = 0; first + count <= g->clusters; first++) {
        uint64_t n = 0;
        while (n < count && (g->state[first + n] == CLUSTER_FRESH || (!zeroed && g->state[first + n] == CLUSTER_FREE)))
            n++;
        if (n < count)
            continue;
        TRACE("clusters %lu to %lu are taken\n", first, first + count - 1);
        for (n = 0; n < count; n++) {
            if (!zeroed)
                memset(bytes_of(g, first + n), POISON, 1ull << g->granule_bits);
            g->state[first + n] = CLUSTER_OWN;
        }
        return first;
    }
    return NO_CLUSTER;
}

void cluster_free(struct geometry *g, uint64_t cluster)
{
    TRACE("cluster %lu is free\n", cluster);
    if (g->state[cluster] == CLUSTER_SHARED)
        return;
    CHECK(g->state[cluster] == CLUSTER_OWN);
    g->state[cluster] = CLUSTER_FREE;
    g->granted[cluster] = false;
    memset(bytes_of(g, cluster), POISON, 1ull << g->granule_bits);
}

void cluster_freeze(struct geometry *g, uint64_t cluster)
{
    g->frozen[cluster] = true;
    memcpy(g->frozen_bytes + (cluster << g->granule_bits), bytes_of(g, cluster), 1ull << g->granule_bits);
}

void clusters_check(const struct geometry *g, bool dropping)
{
    bool seen[CLUSTERS_MAX] = {false};
    for (uint64_t i = 0; i < g->granules; i++) {
        uint64_t cluster = entry_cluster(g, g->tables[i]);
        if (cluster == NO_CLUSTER)
            continue;
        CHECK(!seen[cluster] && (g->state[cluster] == CLUSTER_OWN || g->state[cluster] == CLUSTER_SHARED));
        CHECK(g->state[cluster] == CLUSTER_OWN || !(g->tables[i] & BT_ENTRY_WRITABLE));
        seen[cluster] = true;
    }
    for (uint64_t i = 0; i < g->clusters; i++) {
        CHECK(dropping || !g->granted[i] || seen[i] || g->state[i] == CLUSTER_SHARED);
        CHECK(!g->frozen[i] || !memcmp(g->frozen_bytes + (i << g->granule_bits),
                                       g->child_bytes + (i << g->granule_bits), 1ull << g->granule_bits));
    }
}

/* ---- the disk at first ---- */

static void set_content(struct geometry *g, uint64_t granule, uint8_t *place)
{
    uint64_t size = 1ull << g->granule_bits;
    memset(place, (int)(1 + granule), size);
    place[size - 1] = 0;
    memcpy(g->model + granule * size, place, size);
}

static uint64_t initial_entry(struct geometry *g, uint64_t granule, uint8_t kind)
{
    uint64_t cluster, start = granule << g->granule_bits;
    if (kind % 8 >= 2 && kind % 8 <= 5) {
        cluster = cluster_take(g, 1, kind & 8);
        set_content(g, granule, bytes_of(g, cluster));
        if (kind % 8 == 2)
            return cluster_entry(g, cluster, OWN_DATA);
        if (kind % 8 == 3 && g->zero_entries) {
            memset(g->model + start, 0, 1ull << g->granule_bits);
            return cluster_entry(g, cluster, BT_ENTRY_ZERO | BT_ENTRY_HOST | BT_ENTRY_WRITABLE | BT_ENTRY_ALLOC);
        }
        g->state[cluster] = CLUSTER_SHARED;
        cluster_freeze(g, cluster);
        return cluster_entry(g, cluster, kind % 8 == 4 ? BT_ENTRY_DATA : BT_ENTRY_DATA | BT_ENTRY_ALLOC);
    }
    if (kind % 8 == 6) {
        set_content(g, granule, g->fault_bytes + start);
        return BT_ENTRY_FAULT;
    }
    if (kind % 8 == 1 && g->zero_entries) {
        memset(g->model + start, 0, 1ull << g->granule_bits);
        return BT_ENTRY_ZERO | BT_ENTRY_ALLOC;
    }
    return BT_ENTRY_UNALLOCATED | (kind % 8 == 7 ? 0 : BT_ENTRY_ALLOC);
}

static void read_backing(struct geometry *g, uint8_t kind)
{
    g->backing_size = kind % 4 == 0 ? 0 : kind % 4 == 1 ? g->granules << g->granule_bits : 1 + kind * g->size / 256;
    for (uint64_t i = 0; i < g->backing_size; i += 512)
        memset(g->backing_bytes + i, (int)(0x80 + i / 512 % 64), bt_min(512, g->backing_size - i));
    memset(g->model, 0, g->granules << g->granule_bits);
    memcpy(g->model, g->backing_bytes, bt_min(g->backing_size, g->granules << g->granule_bits));
}

void geometry_read(struct geometry *g, struct input *in)
{
    uint8_t shape = take8(in), count = take8(in), tail = take8(in);
    g->granule_bits = 9 + shape % 2;
    g->slice_bits = 1 + shape / 4 % 3;
    g->granules = 1 + count % GRANULES_MAX;
    g->size = (g->granules << g->granule_bits) - (tail & 1 ? tail / 2 : 0);
    g->clusters = 3 * g->granules + 8;
    g->zero_entries = !(shape & 0x80);
    g->policy = take8(in) % 8 ? 0 : shape / 32;
    memset(g->state, 0, sizeof g->state);
    memset(g->frozen, 0, sizeof g->frozen);
    memset(g->granted, 0, sizeof g->granted);
    memset(g->child_bytes, 0, g->clusters << g->granule_bits);
    memset(g->knowledge, 0, (g->granules << g->granule_bits));
    read_backing(g, take8(in));
    uint32_t writable = take8(in) & 1 ? take32(in) : UINT32_MAX;
    for (uint64_t i = 0; i < GRANULES_MAX; i++)
        g->writable[i] = writable >> i & 1;
    for (uint64_t i = 0; i < GRANULES_MAX + SLICE_ENTRIES_MAX; i++)
        g->tables[i] = i < g->granules ? initial_entry(g, i, take8(in)) : BT_ENTRY_UNALLOCATED | BT_ENTRY_ALLOC;
}

/* ---- bytes ---- */

static void check_read(struct geometry *g, const struct change *change)
{
    for (uint64_t i = 0; i < change->length; i++) {
        uint64_t at = change->offset + i;
        uint8_t got = change->data[i];
        bool right = g->knowledge[at] == BYTE_UNKNOWN || got == g->model[at] ||
                     (g->knowledge[at] == BYTE_EITHER && got == g->other[at]);
        if (!right)
            TRACE("byte %#lx is %#x, not %#x\n", at, got, g->model[at]);
        CHECK(right);
        g->model[at] = got;
        g->knowledge[at] = BYTE_KNOWN;
    }
}

static void note_either(struct geometry *g, uint64_t at, uint8_t value)
{
    if (g->knowledge[at] == BYTE_KNOWN && g->model[at] != value) {
        g->other[at] = value;
        g->knowledge[at] = BYTE_EITHER;
    } else if (g->knowledge[at] == BYTE_EITHER && g->other[at] != value && g->model[at] != value) {
        g->knowledge[at] = BYTE_UNKNOWN;
    }
}

void model_apply(struct geometry *g, const struct change *change)
{
    if (change->op == BT_READ && change->result == 0)
        check_read(g, change);
    if (change->op != BT_WRITE && change->op != BT_ZEROES && change->op != BT_DISCARD)
        return;
    for (uint64_t i = 0; i < change->length; i++) {
        uint64_t at = change->offset + i;
        uint8_t value = change->op == BT_WRITE ? change->data[i] : 0;
        if (change->result < 0 || change->op == BT_DISCARD) {
            note_either(g, at, value);
        } else {
            g->model[at] = value;
            g->knowledge[at] = BYTE_KNOWN;
        }
    }
}

static bool may_be_zero(const struct geometry *g, uint64_t at)
{
    return g->knowledge[at] == BYTE_UNKNOWN || !g->model[at] || (g->knowledge[at] == BYTE_EITHER && !g->other[at]);
}

void model_check_status(const struct geometry *g, uint64_t offset, uint64_t length, const struct bt_extent *extents,
                        uint32_t count)
{
    CHECK(count > 0 && length > 0);
    for (uint32_t n = 0; n < count; n++) {
        CHECK(extents[n].length && extents[n].length <= length);
        for (uint64_t i = 0; i < extents[n].length && extents[n].flags & BT_EXTENT_ZERO; i++)
            CHECK(may_be_zero(g, offset + i));
        offset += extents[n].length;
        length -= extents[n].length;
    }
    CHECK(length == 0);
}
