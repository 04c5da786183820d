/* SPDX-License-Identifier: Apache-2.0 */
/* Buffers of one NBD session: powers of two from 4 KiB to NBD_PIECE, each class with its free list. Memory comes
 * from mmap, so that a buffer never shows what other parts of the process left behind, and so that freed memory
 * really goes. Small buffers are carved from slabs, which go when nothing is in use. */
#define _GNU_SOURCE
#include <sys/mman.h>

#include "memory.h"
#include "nbd.h"

#define SMALLEST 4096u
#define SLAB_BYTES (256u << 10)
#define SMALL_CLASSES 4 /* up to 32 KiB */

static unsigned class_of(uint32_t length)
{
    unsigned c = 0;
    while ((SMALLEST << c) < length)
        c++;
    return c;
}

static void push(struct nbd_pool *pool, unsigned class, void *buffer)
{
    *(void **)buffer = pool->free[class];
    pool->free[class] = buffer;
}

static void *pop(struct nbd_pool *pool, unsigned class)
{
    void *buffer = pool->free[class];
    if (buffer)
        pool->free[class] = *(void **)buffer;
    return buffer;
}

static void *map(struct nbd_pool *pool, size_t bytes)
{
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        return NULL;
    bt_memory_add(pool->server->dp, memory, bytes);
    pool->bytes += bytes;
    atomic_fetch_add_explicit(&pool->server->in_use, bytes, memory_order_relaxed);
    return memory;
}

static void unmap(struct nbd_pool *pool, void *memory, size_t bytes)
{
    bt_memory_remove(pool->server->dp, memory, bytes);
    pool->bytes -= bytes;
    atomic_fetch_sub_explicit(&pool->server->in_use, bytes, memory_order_relaxed);
}

static void trim_large(struct nbd_pool *pool)
{
    for (unsigned class = SMALL_CLASSES; class < NBD_CLASSES; class ++) {
        void *buffer;
        while ((buffer = pop(pool, class)))
            unmap(pool, buffer, SMALLEST << class);
    }
}

void nbd_pool_trim(struct nbd_pool *pool)
{
    trim_large(pool);
    if (pool->in_use)
        return;
    for (unsigned class = 0; class < SMALL_CLASSES; class ++)
        pool->free[class] = NULL;
    while (pool->slabs) {
        struct nbd_slab *slab = pool->slabs;
        pool->slabs = slab->next;
        unmap(pool, slab->memory, slab->bytes);
        free(slab);
    }
}

static bool server_is_full(struct nbd_pool *pool, uint64_t bytes)
{
    uint64_t in_use = atomic_load_explicit(&pool->server->in_use, memory_order_relaxed);
    return in_use + bytes > pool->server->memory;
}

/* The server's bound is soft: sessions that look at the same time may pass it by one buffer each. */
static bool admits(struct nbd_pool *pool, uint64_t bytes)
{
    uint64_t limit = server_is_full(pool, bytes) ? NBD_SESSION_MEMORY_LOW : NBD_SESSION_MEMORY;
    return pool->bytes + bytes <= limit;
}

static bool make_room(struct nbd_pool *pool, uint64_t bytes)
{
    if (BT_LIKELY(admits(pool, bytes)))
        return true;
    nbd_pool_trim(pool);
    return admits(pool, bytes);
}

static bool add_slab(struct nbd_pool *pool, unsigned class)
{
    struct nbd_slab *slab = malloc(sizeof *slab);
    void *memory = slab ? map(pool, SLAB_BYTES) : NULL;
    if (!memory) {
        free(slab);
        return false;
    }
    *slab = (struct nbd_slab){.next = pool->slabs, .memory = memory, .bytes = SLAB_BYTES};
    pool->slabs = slab;
    for (size_t at = SLAB_BYTES; at > 0; at -= SMALLEST << class)
        push(pool, class, (char *)memory + at - (SMALLEST << class));
    return true;
}

void *nbd_pool_get(struct nbd_pool *pool, uint32_t length)
{
    unsigned class = class_of(length);
    void *buffer = pop(pool, class);
    if (BT_UNLIKELY(!buffer)) {
        bool small = class < SMALL_CLASSES;
        uint64_t bytes = small ? SLAB_BYTES : SMALLEST << class;
        if (!make_room(pool, bytes))
            return NULL;
        if (small)
            buffer = add_slab(pool, class) ? pop(pool, class) : NULL;
        else
            buffer = map(pool, bytes);
    }
    if (buffer)
        pool->in_use++;
    return buffer;
}

void nbd_pool_put(struct nbd_pool *pool, void *buffer, uint32_t length)
{
    unsigned class = class_of(length);
    pool->in_use--;
    if (class >= SMALL_CLASSES && BT_UNLIKELY(server_is_full(pool, 0)))
        unmap(pool, buffer, SMALLEST << class);
    else
        push(pool, class, buffer);
}
