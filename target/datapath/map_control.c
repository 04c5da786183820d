/* SPDX-License-Identifier: Apache-2.0 */
/* Maps, the control thread's side: it loads, reads, changes and drops slices. A dropped slice waits in limbo for a
 * grace period: if a claim or a change got in meanwhile, it is put back. */
#include "request.h"

static uint64_t slice_bytes(const struct bt_map *map)
{
    return sizeof(struct bt_slice) + bt_slice_entries(map) * sizeof(uint64_t);
}

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
    if (bt_slice_at(map, index))
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
    for (uint64_t i = 0; i < bt_slice_entries(map); i++)
        atomic_init(&slice->entries[i], entries[i]);
    link_slice(map, slice);
    return 0;
}

int bt_map_set_writable(bt_object *object, uint64_t index, bool writable)
{
    struct bt_map *map = bt_as_map(object);
    struct bt_slice *slice = index < map->slices ? bt_slice_at(map, index) : NULL;
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
        struct bt_slice *slice = index < map->slices ? bt_slice_at(map, index) : NULL;
        if (!slice)
            return -ENOENT;
        out[i] = bt_entry_read(&slice->entries[(granule + i) & (bt_slice_entries(map) - 1)]);
    }
    return 0;
}

int bt_map_set(bt_object *object, uint64_t granule, uint64_t expected, uint64_t entry, bool dirty)
{
    struct bt_map *map = bt_as_map(object);
    uint64_t index = granule >> map->slice_bits;
    struct bt_slice *slice = index < map->slices ? bt_slice_at(map, index) : NULL;
    if (!slice)
        return -ENOENT;
    bt_entry *at = &slice->entries[granule & (bt_slice_entries(map) - 1)];
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
    struct bt_slice *slice = index < map->slices ? bt_slice_at(map, index) : NULL;
    if (!slice)
        return -ENOENT;
    if (atomic_exchange_explicit(&slice->dirty, false, memory_order_acq_rel))
        atomic_fetch_sub_explicit(&map->dirty_slices, 1, memory_order_acq_rel);
    for (uint64_t i = 0; i < bt_slice_entries(map); i++)
        out[i] = bt_entry_read(&slice->entries[i]);
    return 0;
}

int bt_map_redirty(bt_object *object, uint64_t index)
{
    struct bt_map *map = bt_as_map(object);
    struct bt_slice *slice = index < map->slices ? bt_slice_at(map, index) : NULL;
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
