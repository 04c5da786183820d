/* SPDX-License-Identifier: Apache-2.0 */
/* Maps, the way of a request through them: a directory of slices of entries, read without locks. */
#include "request.h"

#define POPULATE_AT_ONCE (1ull << 20) /* bytes that are copied from a backing with one read */

static bool map_is_dirty(struct bt_map *map)
{
    return atomic_load_explicit(&map->dirty_slices, memory_order_acquire) ||
           atomic_load_explicit(&map->hold_flush, memory_order_acquire);
}

uint64_t bt_entry_read(bt_entry *entry)
{
    for (;;) {
        uint64_t value = atomic_load_explicit(entry, memory_order_acquire);
        if (bt_entry_kind(value) != BT_ENTRY_BUSY)
            return value;
        uint64_t old = bt_claim_old(value);
        atomic_thread_fence(memory_order_acquire);
        if (atomic_load_explicit(entry, memory_order_acquire) == value)
            return old;
    }
}

/* How many granules from the first on are alike: equal bits and, with a host offset, contiguous. */
static uint64_t run_length(struct bt_map *map, struct bt_slice *slice, uint64_t first, uint64_t value,
                           uint64_t wanted)
{
    uint64_t at = first & (bt_slice_entries(map) - 1);
    uint64_t max = bt_min(wanted, bt_slice_entries(map) - at);
    bool hosted = bt_entry_kind(value) == BT_ENTRY_DATA || (value & BT_ENTRY_HOST);
    uint64_t stride = hosted ? (1ull << map->granule_bits >> BT_SECTOR_BITS) << BT_HOST_SHIFT : 0;
    uint64_t n = 1;
    while (n < max) {
        value += stride;
        if (atomic_load_explicit(&slice->entries[at + n], memory_order_acquire) != value)
            break;
        n++;
    }
    return n;
}

static bool fault(struct bt_map *map, struct bt_segment *segment, enum bt_fault_reason reason, uint64_t granules)
{
    uint64_t granule = 1ull << map->granule_bits;
    segment->kind = BT_SEG_FAULT;
    segment->reason = reason;
    segment->length = bt_min(segment->length, granules * granule - (segment->offset & (granule - 1)));
    return false;
}

static void narrow(struct bt_map *map, struct bt_segment *segment, uint64_t granules)
{
    uint64_t mask = (1ull << map->granule_bits) - 1;
    segment->granules = granules;
    segment->length = bt_min(segment->length, (granules << map->granule_bits) - (segment->offset & mask));
}

static bool go_to_data(struct bt_map *map, struct bt_segment *segment, uint64_t value)
{
    uint64_t mask = (1ull << map->granule_bits) - 1;
    segment->offset = bt_entry_host(value) + (segment->offset & mask);
    segment->object = bt_child_get(&map->child);
    segment->through_data = true;
    return true;
}

static bool end_zero(struct bt_segment *segment, uint32_t flags)
{
    segment->kind = BT_SEG_ZERO;
    segment->extent_flags = flags | BT_EXTENT_ZERO;
    return false;
}

static bool has_backing(struct bt_map *map) { return bt_child_get(&map->backing) != NULL; }

static bool resolve_read(struct bt_map *map, struct bt_segment *segment, uint64_t value)
{
    struct bt_object *backing;
    switch (bt_entry_kind(value)) {
    case BT_ENTRY_DATA:
        return go_to_data(map, segment, value);
    case BT_ENTRY_ZERO:
        return end_zero(segment, BT_EXTENT_HOLE); /* with a cluster of its own too, as QEMU reports it */
    case BT_ENTRY_UNALLOCATED:
        if (segment->into == map && !segment->bottom)
            return false; /* wherever they are, they come here */
        if (segment->bottom == &map->base)
            segment->into = NULL;
        backing = bt_child_get(&map->backing);
        if (!backing || segment->offset >= bt_object_size(backing))
            return end_zero(segment, BT_EXTENT_HOLE);
        segment->object = backing;
        return true;
    default:
        return fault(map, segment, BT_FAULT_ENTRY, 1);
    }
}

/* Of a read that populates: the first map on its way. A claim that is under way allocates it already. */
static void offer(struct bt_map *map, struct bt_segment *segment, uint64_t value, bool busy)
{
    segment->populate = false;
    if (busy || bt_entry_kind(value) != BT_ENTRY_UNALLOCATED || !has_backing(map))
        return;
    segment->into = map;
    segment->into_offset = segment->offset;
    segment->kind = BT_SEG_ALLOC;
}

static bool may_replace(struct bt_slice *slice, uint64_t value)
{
    return (value & BT_ENTRY_ALLOC) && atomic_load_explicit(&slice->writable, memory_order_acquire);
}

static bool resolve_write(struct bt_map *map, struct bt_segment *segment, struct bt_slice *slice, uint64_t value)
{
    if (bt_entry_kind(value) == BT_ENTRY_FAULT)
        return fault(map, segment, BT_FAULT_ENTRY, 1);
    if (bt_entry_kind(value) == BT_ENTRY_DATA && (value & BT_ENTRY_WRITABLE))
        return go_to_data(map, segment, value);
    if (!may_replace(slice, value))
        return fault(map, segment, BT_FAULT_WRITE, 1);
    if (bt_entry_kind(value) == BT_ENTRY_DATA || (value & BT_ENTRY_HOST))
        narrow(map, segment, 1); /* copy on write, and filling in place, go one granule at a time */
    segment->kind = BT_SEG_ALLOC;
    return false;
}

/* What a whole granule becomes; equal to the old value when nothing is to be done. */
static uint64_t zeroed_entry(struct bt_map *map, struct bt_segment *segment, uint64_t value)
{
    bool drop = segment->op == BT_DISCARD || (segment->flags & BT_UNMAP);
    bool hosted = bt_entry_kind(value) == BT_ENTRY_DATA || (value & BT_ENTRY_HOST);
    if (bt_entry_kind(value) == BT_ENTRY_UNALLOCATED && !has_backing(map))
        return value;
    if (bt_entry_kind(value) == BT_ENTRY_ZERO && !(hosted && drop))
        return value;
    if (atomic_load_explicit(&map->no_zero_entries, memory_order_relaxed))
        return BT_ENTRY_UNALLOCATED | BT_ENTRY_ALLOC;
    if (hosted && !drop && (value & BT_ENTRY_WRITABLE))
        return bt_entry_make(bt_entry_host(value),
                             BT_ENTRY_ZERO | BT_ENTRY_HOST | BT_ENTRY_WRITABLE | BT_ENTRY_ALLOC);
    return BT_ENTRY_ZERO | BT_ENTRY_ALLOC;
}

static bool reads_as_zeros(struct bt_map *map, uint64_t value)
{
    uint64_t kind = bt_entry_kind(value);
    return kind == BT_ENTRY_ZERO || (kind == BT_ENTRY_UNALLOCATED && !has_backing(map));
}

/* Zeroes of a part of a granule, or where the table has no word for zeros. */
static bool resolve_zero_data(struct bt_map *map, struct bt_segment *segment, struct bt_slice *slice, uint64_t value)
{
    if (segment->op == BT_DISCARD || reads_as_zeros(map, value)) {
        segment->kind = BT_SEG_SKIP;
        return false;
    }
    segment->flags &= (uint8_t)~BT_UNMAP;
    if (bt_entry_kind(value) != BT_ENTRY_DATA || !(value & BT_ENTRY_WRITABLE)) {
        if (segment->flags & BT_FAST_ZERO) {
            segment->kind = BT_SEG_ERROR;
            segment->error = -ENOTSUP;
            return false;
        }
    }
    return resolve_write(map, segment, slice, value);
}

static bool resolve_zeroes(struct bt_map *map, struct bt_segment *segment, struct bt_slice *slice, uint64_t value)
{
    uint64_t granule = 1ull << map->granule_bits, size = bt_object_size(&map->base);
    uint64_t within = segment->offset & (granule - 1);
    uint64_t end = segment->offset + segment->length;
    uint64_t first_end = segment->offset - within + granule;
    if (bt_entry_kind(value) == BT_ENTRY_FAULT)
        return fault(map, segment, BT_FAULT_ENTRY, 1);
    if (within || (end < first_end && end < size)) {
        narrow(map, segment, 1);
        return resolve_zero_data(map, segment, slice, value);
    }
    if (end < size && (end & (granule - 1))) { /* the last part comes on its own */
        segment->length -= end & (granule - 1);
        segment->granules = segment->length >> map->granule_bits;
    }
    if (atomic_load_explicit(&map->no_zero_entries, memory_order_relaxed) && has_backing(map)) {
        narrow(map, segment, 1);
        return resolve_zero_data(map, segment, slice, value);
    }
    segment->new_entry = zeroed_entry(map, segment, value);
    if (segment->new_entry == value) {
        segment->kind = BT_SEG_SKIP;
        return false;
    }
    if (!atomic_load_explicit(&slice->writable, memory_order_acquire) ||
        !(value & (BT_ENTRY_ALLOC | BT_ENTRY_WRITABLE)))
        return fault(map, segment, BT_FAULT_WRITE, 1);
    segment->kind = BT_SEG_SET;
    return false;
}

static bool is_change(int op) { return op == BT_WRITE || op == BT_ZEROES || op == BT_DISCARD; }

bool bt_map_resolve(struct bt_thread *thread, struct bt_map *map, struct bt_segment *segment)
{
    struct bt_counters *counters = bt_counters_of(&map->base, thread);
    uint64_t granule = segment->offset >> map->granule_bits;
    struct bt_slice *slice = bt_slice_at(map, granule >> map->slice_bits);
    if (BT_UNLIKELY(!slice)) {
        bt_count(&counters->misses, 1);
        uint64_t in_slice = granule & (bt_slice_entries(map) - 1);
        return fault(map, segment, BT_FAULT_LOAD, bt_slice_entries(map) - in_slice);
    }
    bt_count(&counters->hits, 1);
    if (!atomic_load_explicit(&slice->referenced, memory_order_relaxed))
        atomic_store_explicit(&slice->referenced, true, memory_order_relaxed);
    bt_entry *entry = &slice->entries[granule & (bt_slice_entries(map) - 1)];
    uint64_t value = atomic_load_explicit(entry, memory_order_acquire);
    bool busy = bt_entry_kind(value) == BT_ENTRY_BUSY;
    segment->slice = slice;
    segment->granule = granule;
    segment->entry = value;
    if (busy && (is_change(segment->op) || (segment->populate && segment->op == BT_CACHE))) {
        narrow(map, segment, 1);
        segment->kind = BT_SEG_BUSY;
        return false;
    }
    if (busy)
        value = bt_entry_read(entry);
    uint64_t mask = (1ull << map->granule_bits) - 1;
    uint64_t wanted = ((segment->offset & mask) + segment->length + mask) >> map->granule_bits;
    narrow(map, segment, busy || wanted == 1 ? 1 : run_length(map, slice, granule, value, wanted));
    segment->met_metadata |= map_is_dirty(map);
    if (BT_UNLIKELY(segment->populate))
        offer(map, segment, value, busy);
    int op = segment->op;
    uint64_t offset = segment->offset;
    bool go_on = op == BT_WRITE    ? resolve_write(map, segment, slice, value)
                 : is_change(op) ? resolve_zeroes(map, segment, slice, value)
                                 : resolve_read(map, segment, value);
    /* What is asked about, or has to be claimed first, is counted when it has got through. */
    if (go_on || (segment->kind != BT_SEG_FAULT && segment->kind != BT_SEG_ALLOC))
        bt_count_request(&map->base, thread, op, offset, segment->length);
    return go_on;
}

bool bt_map_populate(struct bt_segment *segment)
{
    struct bt_map *map = segment->into;
    uint64_t mask = (1ull << map->granule_bits) - 1, in_slice = bt_slice_entries(map) - 1;
    segment->object = &map->base;
    segment->offset = segment->into_offset;
    segment->granule = segment->offset >> map->granule_bits;
    segment->slice = bt_slice_at(map, segment->granule >> map->slice_bits);
    if (!segment->slice)
        return false;
    segment->entry = atomic_load_explicit(&segment->slice->entries[segment->granule & in_slice], memory_order_acquire);
    if (bt_entry_kind(segment->entry) != BT_ENTRY_UNALLOCATED)
        return false;
    if (!may_replace(segment->slice, segment->entry)) {
        fault(map, segment, BT_FAULT_WRITE, 1);
        return true;
    }
    uint64_t wanted = ((segment->offset & mask) + segment->length + mask) >> map->granule_bits;
    wanted = bt_min(wanted, bt_max(POPULATE_AT_ONCE >> map->granule_bits, 1));
    narrow(map, segment,
           segment->entry & BT_ENTRY_HOST ? 1 : run_length(map, segment->slice, segment->granule, segment->entry, wanted));
    segment->kind = BT_SEG_ALLOC;
    return true;
}

void bt_slice_mark_dirty(struct bt_map *map, struct bt_slice *slice)
{
    if (!atomic_exchange_explicit(&slice->dirty, true, memory_order_acq_rel))
        atomic_fetch_add_explicit(&map->dirty_slices, 1, memory_order_acq_rel);
}

uint64_t bt_map_replace(struct bt_map *map, const struct bt_segment *segment)
{
    uint64_t first = segment->granule & (bt_slice_entries(map) - 1), n = 0;
    uint64_t stride = (1ull << map->granule_bits >> BT_SECTOR_BITS) << BT_HOST_SHIFT;
    bool hosted = bt_entry_kind(segment->entry) == BT_ENTRY_DATA || (segment->entry & BT_ENTRY_HOST);
    bool keeps = segment->new_entry & BT_ENTRY_HOST;
    for (; n < segment->granules; n++) {
        uint64_t expected = segment->entry + (hosted ? n * stride : 0);
        uint64_t value = segment->new_entry + (keeps ? n * stride : 0);
        if (!atomic_compare_exchange_strong(&segment->slice->entries[first + n], &expected, value))
            break;
    }
    if (n)
        bt_slice_mark_dirty(map, segment->slice);
    return n;
}
