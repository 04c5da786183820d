/* SPDX-License-Identifier: Apache-2.0 */
/* Maps: a directory of slices of entries. I/O threads read them without locks; the control thread loads and
 * drops slices. A dropped slice waits in limbo for a grace period: if a claim or a change got in meanwhile,
 * it is put back. */
#include "request.h"

#define POPULATE_AT_ONCE (1ull << 20) /* bytes that are copied from a backing with one read */

static uint64_t slice_entries(const struct bt_map *map) { return 1ull << map->slice_bits; }
static uint64_t slice_bytes(const struct bt_map *map)
{
    return sizeof(struct bt_slice) + slice_entries(map) * sizeof(uint64_t);
}
static struct bt_slice *slice_at(struct bt_map *map, uint64_t index)
{
    bt_slot *directory = atomic_load_explicit(&map->directory, memory_order_acquire);
    return atomic_load_explicit(&directory[index], memory_order_acquire);
}

/* ---- resolving ---- */

static bool map_is_dirty(struct bt_map *map)
{
    return atomic_load_explicit(&map->dirty_slices, memory_order_acquire) ||
           atomic_load_explicit(&map->hold_flush, memory_order_acquire);
}

/* The entry, with a claim looked through when only reading. */
static uint64_t read_entry(bt_entry *entry)
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
    uint64_t at = first & (slice_entries(map) - 1);
    uint64_t max = bt_min(wanted, slice_entries(map) - at);
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
    struct bt_slice *slice = slice_at(map, granule >> map->slice_bits);
    if (BT_UNLIKELY(!slice)) {
        bt_count(&counters->misses, 1);
        uint64_t in_slice = granule & (slice_entries(map) - 1);
        return fault(map, segment, BT_FAULT_LOAD, slice_entries(map) - in_slice);
    }
    bt_count(&counters->hits, 1);
    if (!atomic_load_explicit(&slice->referenced, memory_order_relaxed))
        atomic_store_explicit(&slice->referenced, true, memory_order_relaxed);
    bt_entry *entry = &slice->entries[granule & (slice_entries(map) - 1)];
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
        value = read_entry(entry);
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
    uint64_t mask = (1ull << map->granule_bits) - 1, in_slice = slice_entries(map) - 1;
    segment->object = &map->base;
    segment->offset = segment->into_offset;
    segment->granule = segment->offset >> map->granule_bits;
    segment->slice = slice_at(map, segment->granule >> map->slice_bits);
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
    uint64_t first = segment->granule & (slice_entries(map) - 1), n = 0;
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

/* ---- the control thread's side ---- */

static void map_destroy(struct bt_object *object)
{
    struct bt_map *map = bt_as_map(object);
    for (struct bt_slice *slice = map->loaded, *next; slice; slice = next) {
        next = slice->next;
        free(slice);
    }
    for (struct bt_slice *slice = map->limbo, *next; slice; slice = next) {
        next = slice->next;
        free(slice);
    }
    bt_directory_free(atomic_load(&map->directory), map->slices);
    pthread_mutex_destroy(&map->lock);
    free(map->grants);
    free(map);
}

static const struct bt_object_ops map_ops = {.destroy = map_destroy};

bt_object *bt_map_new(bt_datapath *dp, uint64_t tag, uint32_t granule_bits, uint32_t slice_bits, uint64_t size,
                      bt_object *child, bt_object *backing)
{
    if (granule_bits < BT_SECTOR_BITS || granule_bits > 31 || slice_bits > 24 || size > INT64_MAX) {
        errno = EINVAL;
        return NULL;
    }
    struct bt_map *map = calloc(1, sizeof *map);
    if (!map)
        return NULL;
    bt_object_init(&map->base, dp, BT_OBJ_MAP, &map_ops, tag, size);
    map->granule_bits = granule_bits;
    map->slice_bits = slice_bits;
    map->slices = bt_directory_slots(map, size);
    map->directory = bt_directory_new(map->slices);
    if (!map->directory) {
        free(map->base.counters);
        free(map);
        return NULL;
    }
    map->clock_hand = &map->loaded;
    pthread_mutex_init(&map->lock, NULL);
    bt_child_init(&map->child, child);
    bt_child_init(&map->backing, backing);
    map->base.children = &map->child;
    map->base.child_count = 2;
    return &map->base;
}

uint64_t bt_map_slices(bt_object *map) { return bt_as_map(map)->slices; }

void bt_map_set_zero_entries(bt_object *object, bool supported)
{
    atomic_store(&bt_as_map(object)->no_zero_entries, !supported);
}

static void link_slice(struct bt_map *map, struct bt_slice *slice)
{
    slice->next = map->loaded;
    if (map->clock_hand == &map->loaded && map->loaded)
        map->clock_hand = &slice->next;
    map->loaded = slice;
    map->loaded_count++;
    atomic_store_explicit(&atomic_load(&map->directory)[slice->index], slice, memory_order_release);
}

/* Takes the slice with this index back out of limbo. */
static struct bt_slice *leave_limbo(struct bt_map *map, uint64_t index)
{
    pthread_mutex_lock(&map->lock);
    struct bt_slice **p = &map->limbo, *found;
    while (*p && (*p)->index != index)
        p = &(*p)->next;
    found = *p;
    if (found)
        *p = found->next;
    pthread_mutex_unlock(&map->lock);
    return found;
}

int bt_map_load(bt_object *object, uint64_t index, const uint64_t *entries, bool writable)
{
    struct bt_map *map = bt_as_map(object);
    if (index >= map->slices)
        return -EINVAL;
    if (slice_at(map, index))
        return -EEXIST;
    struct bt_slice *slice = leave_limbo(map, index);
    if (slice) {
        atomic_store(&slice->writable, writable); /* it may have changed meanwhile; the entries have not */
        link_slice(map, slice);
        return -EEXIST;
    }
    slice = calloc(1, slice_bytes(map));
    if (!slice)
        return -ENOMEM;
    slice->index = index;
    slice->referenced = true;
    slice->writable = writable;
    for (uint64_t i = 0; i < slice_entries(map); i++)
        atomic_init(&slice->entries[i], entries[i]);
    link_slice(map, slice);
    return 0;
}

int bt_map_set_writable(bt_object *object, uint64_t index, bool writable)
{
    struct bt_map *map = bt_as_map(object);
    struct bt_slice *slice = index < map->slices ? slice_at(map, index) : NULL;
    if (!slice)
        return -ENOENT;
    atomic_store(&slice->writable, writable);
    return 0;
}

int bt_map_get(bt_object *object, uint64_t granule, uint64_t count, uint64_t *out)
{
    struct bt_map *map = bt_as_map(object);
    for (uint64_t i = 0; i < count; i++) {
        uint64_t index = (granule + i) >> map->slice_bits;
        struct bt_slice *slice = index < map->slices ? slice_at(map, index) : NULL;
        if (!slice)
            return -ENOENT;
        out[i] = read_entry(&slice->entries[(granule + i) & (slice_entries(map) - 1)]);
    }
    return 0;
}

int bt_map_set(bt_object *object, uint64_t granule, uint64_t expected, uint64_t entry, bool dirty)
{
    struct bt_map *map = bt_as_map(object);
    uint64_t index = granule >> map->slice_bits;
    struct bt_slice *slice = index < map->slices ? slice_at(map, index) : NULL;
    if (!slice)
        return -ENOENT;
    bt_entry *at = &slice->entries[granule & (slice_entries(map) - 1)];
    if (bt_entry_kind(atomic_load(at)) == BT_ENTRY_BUSY)
        return -EBUSY;
    if (!atomic_compare_exchange_strong(at, &expected, entry))
        return bt_entry_kind(expected) == BT_ENTRY_BUSY ? -EBUSY : -ESTALE;
    if (dirty)
        bt_slice_mark_dirty(map, slice);
    return 0;
}

/* Slices in limbo that cannot go return to the table. */
static void readmit_survivors(struct bt_map *map)
{
    pthread_mutex_lock(&map->lock);
    struct bt_slice *kept = NULL, *slice = map->limbo;
    map->limbo = NULL;
    while (slice) {
        struct bt_slice *next = slice->next;
        if (atomic_load(&slice->pins) || atomic_load(&slice->dirty)) {
            link_slice(map, slice);
        } else {
            slice->next = kept;
            kept = slice;
        }
        slice = next;
    }
    map->limbo = kept;
    pthread_mutex_unlock(&map->lock);
}

static int list_slices(struct bt_map *map, bool dirty_only, uint64_t *out, int max)
{
    int n = 0;
    readmit_survivors(map);
    for (struct bt_slice *slice = map->loaded; slice && n < max; slice = slice->next)
        if (!dirty_only || atomic_load(&slice->dirty))
            out[n++] = slice->index;
    return n;
}

int bt_map_loaded(bt_object *map, uint64_t *out, int max) { return list_slices(bt_as_map(map), false, out, max); }
int bt_map_dirty(bt_object *map, uint64_t *out, int max) { return list_slices(bt_as_map(map), true, out, max); }

int bt_map_clean(bt_object *object, uint64_t index, uint64_t *out)
{
    struct bt_map *map = bt_as_map(object);
    struct bt_slice *slice = index < map->slices ? slice_at(map, index) : NULL;
    if (!slice)
        return -ENOENT;
    if (atomic_exchange_explicit(&slice->dirty, false, memory_order_acq_rel))
        atomic_fetch_sub_explicit(&map->dirty_slices, 1, memory_order_acq_rel);
    for (uint64_t i = 0; i < slice_entries(map); i++)
        out[i] = read_entry(&slice->entries[i]);
    return 0;
}

int bt_map_redirty(bt_object *object, uint64_t index)
{
    struct bt_map *map = bt_as_map(object);
    struct bt_slice *slice = index < map->slices ? slice_at(map, index) : NULL;
    if (!slice)
        return -ENOENT;
    bt_slice_mark_dirty(map, slice);
    return 0;
}

void bt_map_hold_flush(bt_object *object, bool hold) { atomic_store(&bt_as_map(object)->hold_flush, hold); }

uint64_t bt_map_bytes(bt_object *object)
{
    struct bt_map *map = bt_as_map(object);
    return map->loaded_count * slice_bytes(map);
}

struct eviction {
    struct bt_map *map;
    uint64_t id; /* a slice may be loaded again and dropped again before the first grace period ends */
};

static struct bt_slice *limbo_end(struct bt_map *map, uint64_t id)
{
    struct bt_slice **p = &map->limbo, *slice;
    while (*p && (*p)->eviction != id)
        p = &(*p)->next;
    slice = *p;
    if (!slice || atomic_load(&slice->pins) || atomic_load(&slice->dirty))
        return NULL;
    *p = slice->next;
    return slice;
}

/* After the grace period nobody can be in the middle of looking at the slice. One that was claimed or changed
 * before everybody had left stays in limbo until it is asked for (its claim pins it, its dirt is on no disk). */
static void evicted(void *arg)
{
    struct eviction *eviction = arg;
    struct bt_map *map = eviction->map;
    pthread_mutex_lock(&map->lock);
    struct bt_slice *slice = limbo_end(map, eviction->id);
    pthread_mutex_unlock(&map->lock);
    free(slice);
    bt_object_unref(&map->base);
    free(eviction);
}

static void evict(struct bt_map *map, struct bt_slice **at)
{
    struct bt_slice *slice = *at;
    struct eviction *eviction = malloc(sizeof *eviction);
    if (!eviction)
        return;
    atomic_store_explicit(&atomic_load(&map->directory)[slice->index], NULL, memory_order_release);
    *at = slice->next;
    map->loaded_count--;
    pthread_mutex_lock(&map->lock);
    slice->next = map->limbo;
    map->limbo = slice;
    slice->eviction = ++map->evictions;
    *eviction = (struct eviction){.map = map, .id = slice->eviction};
    pthread_mutex_unlock(&map->lock);
    bt_object_ref(&map->base);
    bt_grace(map->base.dp, evicted, eviction);
}

uint64_t bt_map_shrink(bt_object *object, uint64_t bytes)
{
    struct bt_map *map = bt_as_map(object);
    readmit_survivors(map);
    uint64_t looks = 2 * map->loaded_count;
    while (map->loaded_count * slice_bytes(map) > bytes && looks-- > 0) {
        if (!*map->clock_hand)
            map->clock_hand = &map->loaded;
        struct bt_slice *slice = *map->clock_hand;
        if (!slice)
            break;
        if (atomic_exchange(&slice->referenced, false) || atomic_load(&slice->dirty) || atomic_load(&slice->pins))
            map->clock_hand = &slice->next;
        else
            evict(map, map->clock_hand);
    }
    return map->loaded_count * slice_bytes(map);
}
