/* SPDX-License-Identifier: Apache-2.0 */
/* A map's directory of slices, how it is replaced by a longer one while I/O threads walk through it, and runs of
 * entries outside of the map's size. */
#define _GNU_SOURCE
#include <sys/mman.h>

#include "request.h"

/* A size of 0 has a slot too, so that there is always a directory. */
uint64_t bt_directory_slots(const struct bt_map *map, uint64_t size)
{
    return ((bt_max(size, 1) - 1) >> map->granule_bits >> map->slice_bits) + 1;
}

bt_slot *bt_directory_new(uint64_t slots)
{
    void *directory = mmap(NULL, slots * sizeof(bt_slot), PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return directory == MAP_FAILED ? NULL : directory;
}

void bt_directory_free(bt_slot *directory, uint64_t slots) { munmap((void *)directory, slots * sizeof(bt_slot)); }

struct old_directory {
    bt_slot *directory;
    uint64_t slots;
};

static void all_have_left(void *arg)
{
    struct old_directory *old = arg;
    bt_directory_free(old->directory, old->slots);
    free(old);
}

/* Walkers may be in the old directory until the grace period has passed; it leads to the same slices. Those that come
 * and go meanwhile do so on this thread, in the new one: a walker of the old one misses what has come, and asks for
 * it; what went is freed after a grace period of its own. */
int bt_map_reserve(bt_object *object, uint64_t size)
{
    struct bt_map *map = bt_as_map(object);
    if (size > INT64_MAX)
        return -EINVAL;
    uint64_t slots = bt_directory_slots(map, size);
    if (slots <= map->slices)
        return 0;
    struct old_directory *old = malloc(sizeof *old);
    bt_slot *directory = old ? bt_directory_new(slots) : NULL;
    if (!directory) {
        free(old);
        return -ENOMEM;
    }
    for (struct bt_slice *slice = map->loaded; slice; slice = slice->next)
        atomic_init(&directory[slice->index], slice);
    *old = (struct old_directory){atomic_load(&map->directory), map->slices};
    atomic_store_explicit(&map->directory, directory, memory_order_release);
    map->slices = slots;
    bt_grace(map->base.dp, all_have_left, old);
    return 0;
}

/* ---- entries that nobody uses ---- */

int64_t bt_map_fill(bt_object *object, uint64_t granule, uint64_t count, uint64_t entry, bool dirty)
{
    struct bt_map *map = bt_as_map(object);
    uint64_t mask = (1ull << map->slice_bits) - 1, done = 0;
    bt_slot *directory = atomic_load(&map->directory);
    for (; done < count; done++) {
        uint64_t index = (granule + done) >> map->slice_bits;
        struct bt_slice *slice = index < map->slices ? atomic_load(&directory[index]) : NULL;
        if (!slice)
            break;
        bt_entry *at = &slice->entries[(granule + done) & mask];
        uint64_t old = atomic_load(at);
        if (bt_entry_kind(old) == BT_ENTRY_BUSY)
            return -EBUSY;
        if (old == entry)
            continue;
        atomic_store(at, entry);
        if (dirty)
            bt_slice_mark_dirty(map, slice);
    }
    return (int64_t)done;
}
