/* SPDX-License-Identifier: Apache-2.0 */
/* The registry of memory for DMA. Regions come and go rarely, from control and I/O threads; a device looks here only
 * for what it has not mapped. */
#include <sys/mman.h>

#include "memory.h"

struct region {
    uint64_t start, end;
};

struct bt_memory {
    pthread_mutex_t lock;
    struct region *regions; /* sorted, disjoint */
    size_t count, capacity;
    struct bt_memory_listener *listeners;
};

struct bt_memory *bt_memory_new(void)
{
    struct bt_memory *memory = calloc(1, sizeof *memory);
    if (memory)
        pthread_mutex_init(&memory->lock, NULL);
    return memory;
}

void bt_memory_free(struct bt_memory *memory)
{
    if (!memory)
        return;
    pthread_mutex_destroy(&memory->lock);
    free(memory->regions);
    free(memory);
}

/* The index of the first region that ends after address. */
static size_t position(const struct bt_memory *memory, uint64_t address)
{
    size_t low = 0, high = memory->count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (memory->regions[middle].end <= address)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static bool insert(struct bt_memory *memory, struct region region)
{
    if (memory->count == memory->capacity) {
        size_t capacity = memory->capacity ? memory->capacity * 2 : 64;
        struct region *regions = realloc(memory->regions, capacity * sizeof *regions);
        if (!regions)
            return false;
        memory->regions = regions;
        memory->capacity = capacity;
    }
    size_t at = position(memory, region.start);
    memmove(memory->regions + at + 1, memory->regions + at, (memory->count - at) * sizeof region);
    memory->regions[at] = region;
    memory->count++;
    return true;
}

void bt_memory_add(bt_datapath *dp, void *address, size_t length)
{
    struct bt_memory *memory = dp->memory;
    struct region region = {(uintptr_t)address, (uintptr_t)address + length};
    pthread_mutex_lock(&memory->lock);
    if (insert(memory, region))
        for (struct bt_memory_listener *l = memory->listeners; l; l = l->next)
            l->added(l, region.start, region.end);
    pthread_mutex_unlock(&memory->lock);
}

void bt_memory_hold(struct bt_memory_drop *drop) { atomic_fetch_add(&drop->refs, 1); }

void bt_memory_release(struct bt_memory_drop *drop)
{
    if (atomic_fetch_sub(&drop->refs, 1) != 1)
        return;
    munmap(drop->address, drop->length);
    free(drop);
}

/* With the lock held. True when the region was there. */
static bool take_out(struct bt_memory *memory, uint64_t start, uint64_t end)
{
    size_t at = position(memory, start);
    if (at == memory->count || memory->regions[at].start != start || memory->regions[at].end != end)
        return false;
    memmove(memory->regions + at, memory->regions + at + 1, (memory->count - at - 1) * sizeof *memory->regions);
    memory->count--;
    return true;
}

void bt_memory_remove(bt_datapath *dp, void *address, size_t length)
{
    struct bt_memory *memory = dp->memory;
    uint64_t start = (uintptr_t)address, end = start + length;
    struct bt_memory_drop *drop = malloc(sizeof *drop);
    if (!drop)
        abort(); /* without it a device might write to memory that has become something else */
    *drop = (struct bt_memory_drop){.refs = 1, .address = address, .length = length};
    pthread_mutex_lock(&memory->lock);
    if (take_out(memory, start, end))
        for (struct bt_memory_listener *l = memory->listeners; l; l = l->next)
            l->removed(l, start, end, drop);
    pthread_mutex_unlock(&memory->lock);
    bt_memory_release(drop);
}

bool bt_memory_find(bt_datapath *dp, uint64_t address, uint64_t *start, uint64_t *end)
{
    struct bt_memory *memory = dp->memory;
    pthread_mutex_lock(&memory->lock);
    size_t at = position(memory, address);
    bool found = at < memory->count && memory->regions[at].start <= address;
    if (found) {
        *start = memory->regions[at].start;
        *end = memory->regions[at].end;
    }
    pthread_mutex_unlock(&memory->lock);
    return found;
}

void bt_memory_listen(bt_datapath *dp, struct bt_memory_listener *listener)
{
    struct bt_memory *memory = dp->memory;
    pthread_mutex_lock(&memory->lock);
    listener->next = memory->listeners;
    memory->listeners = listener;
    for (size_t i = 0; i < memory->count; i++)
        listener->added(listener, memory->regions[i].start, memory->regions[i].end);
    pthread_mutex_unlock(&memory->lock);
}

void bt_memory_unlisten(bt_datapath *dp, struct bt_memory_listener *listener)
{
    struct bt_memory *memory = dp->memory;
    pthread_mutex_lock(&memory->lock);
    struct bt_memory_listener **p = &memory->listeners;
    while (*p != listener)
        p = &(*p)->next;
    *p = listener->next;
    pthread_mutex_unlock(&memory->lock);
}
