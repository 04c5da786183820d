/* SPDX-License-Identifier: Apache-2.0 */
/* Split virtqueues, device side (virtio 1.2, section 2.7): what the driver wrote there is checked here, once.
 * Knows nothing of what the buffers mean. */
#include <endian.h>

#include "vhost.h"

#define DESC_NEXT 1
#define DESC_WRITE 2
#define DESC_INDIRECT 4
#define AVAIL_NO_INTERRUPT 1
#define USED_NO_NOTIFY 1

struct used_element {
    uint32_t id;
    uint32_t length;
};

static uint16_t load16(const uint16_t *p) { return le16toh(__atomic_load_n(p, __ATOMIC_ACQUIRE)); }
static void store16(uint16_t *p, uint16_t v) { __atomic_store_n(p, htole16(v), __ATOMIC_RELEASE); }
static uint16_t *used_event(const struct vhost_ring *ring) { return ring->avail + 2 + ring->size; }
static struct used_element *used_elements(const struct vhost_ring *ring)
{
    return (struct used_element *)(ring->used + 2);
}
static uint16_t *avail_event(const struct vhost_ring *ring) { return (uint16_t *)(used_elements(ring) + ring->size); }

int vhost_ring_attach(struct vhost_ring *ring, const struct vhost_memory *memory,
                      const struct vhost_ring_place *place, uint16_t size, uint16_t last_avail)
{
    ring->desc = vhost_memory_at_user(memory, place->desc, sizeof(struct vhost_desc) * (uint64_t)size);
    ring->avail = vhost_memory_at_user(memory, place->avail, 6 + 2 * (uint64_t)size);
    ring->used = vhost_memory_at_user(memory, place->used, 6 + 8 * (uint64_t)size);
    if (!ring->desc || !ring->avail || !ring->used)
        return -EFAULT;
    if ((uintptr_t)ring->desc % 16 || (uintptr_t)ring->avail % 2 || (uintptr_t)ring->used % 4)
        return -EINVAL;
    ring->size = size;
    ring->last_avail = last_avail;
    ring->used_next = ring->published = load16(&ring->used[1]);
    return 0;
}

int vhost_ring_available(const struct vhost_ring *ring)
{
    uint16_t waiting = (uint16_t)(load16(&ring->avail[1]) - ring->last_avail);
    return waiting > ring->size ? -EPROTO : waiting;
}

int vhost_ring_take(struct vhost_ring *ring)
{
    uint16_t head = load16(&ring->avail[2 + (ring->last_avail & (ring->size - 1))]);
    ring->last_avail++;
    return head < ring->size ? head : -EPROTO;
}

/* The one place where a descriptor is read: a copy, because the driver may change it meanwhile. */
static struct vhost_desc read_desc(const struct vhost_desc *from)
{
    return (struct vhost_desc){
        .addr = le64toh(__atomic_load_n(&from->addr, __ATOMIC_RELAXED)),
        .len = le32toh(__atomic_load_n(&from->len, __ATOMIC_RELAXED)),
        .flags = le16toh(__atomic_load_n(&from->flags, __ATOMIC_RELAXED)),
        .next = le16toh(__atomic_load_n(&from->next, __ATOMIC_RELAXED)),
    };
}

static int add_buffer(const struct vhost_memory *memory, const struct vhost_desc *desc, struct vhost_chain *chain)
{
    bool writable = desc->flags & DESC_WRITE;
    int at = chain->readable + chain->writable;
    if (!writable && chain->writable)
        return -EPROTO; /* section 2.7.4.2: readable ones come first */
    if (!desc->len)
        return 0;
    int n = vhost_memory_iov(memory, desc->addr, desc->len, chain->iov + at, chain->max - at);
    if (n < 0)
        return n;
    *(writable ? &chain->writable : &chain->readable) += n;
    *(writable ? &chain->writable_bytes : &chain->readable_bytes) += desc->len;
    return 0;
}

/* The table that desc refers to, in place or (where it spans regions, or is not aligned) copied. */
static const struct vhost_desc *indirect_table(const struct vhost_ring *ring, const struct vhost_memory *memory,
                                               const struct vhost_desc *desc, int *error)
{
    struct iovec parts[4];
    int n = vhost_memory_iov(memory, desc->addr, desc->len, parts, 4);
    if (n < 0) {
        *error = n;
        return NULL;
    }
    if (n == 1 && (uintptr_t)parts[0].iov_base % 16 == 0)
        return parts[0].iov_base;
    bt_iov_to_buffer(parts, n, 0, ring->scratch, desc->len);
    return ring->scratch;
}

static int walk_indirect(const struct vhost_ring *ring, const struct vhost_memory *memory,
                         const struct vhost_desc *desc, struct vhost_chain *chain)
{
    uint32_t count = desc->len / (uint32_t)sizeof *desc;
    int error = -EPROTO;
    if (!ring->indirect || desc->flags & DESC_NEXT || !count || desc->len % sizeof *desc ||
        count > BT_VHOST_MAX_CHAIN)
        return -EPROTO;
    const struct vhost_desc *table = indirect_table(ring, memory, desc, &error);
    if (!table)
        return error;
    uint32_t i = 0;
    for (uint32_t seen = 0; seen < count; seen++) {
        struct vhost_desc inner = read_desc(&table[i]);
        if (inner.flags & DESC_INDIRECT)
            return -EPROTO;
        error = add_buffer(memory, &inner, chain);
        if (error || !(inner.flags & DESC_NEXT))
            return error;
        i = inner.next;
        if (i >= count)
            return -EPROTO;
    }
    return -EPROTO; /* more than the table holds: a loop */
}

int vhost_ring_chain(const struct vhost_ring *ring, const struct vhost_memory *memory, uint16_t head,
                     struct vhost_chain *chain)
{
    uint16_t i = head;
    chain->readable = chain->writable = 0;
    chain->readable_bytes = chain->writable_bytes = 0;
    for (uint16_t seen = 0; seen < ring->size; seen++) {
        struct vhost_desc desc = read_desc(&ring->desc[i]);
        if (desc.flags & DESC_INDIRECT)
            return walk_indirect(ring, memory, &desc, chain);
        int ret = add_buffer(memory, &desc, chain);
        if (ret || !(desc.flags & DESC_NEXT))
            return ret;
        i = desc.next;
        if (i >= ring->size)
            return -EPROTO;
    }
    return -EPROTO;
}

void vhost_ring_push(struct vhost_ring *ring, uint16_t head, uint32_t written)
{
    struct used_element *element = &used_elements(ring)[ring->used_next & (ring->size - 1)];
    __atomic_store_n(&element->id, htole32(head), __ATOMIC_RELAXED);
    __atomic_store_n(&element->length, htole32(written), __ATOMIC_RELAXED);
    ring->used_next++;
}

bool vhost_ring_publish(struct vhost_ring *ring)
{
    uint16_t old = ring->published, new = ring->used_next;
    store16(&ring->used[1], new);
    ring->published = new;
    atomic_thread_fence(memory_order_seq_cst); /* section 2.7.7.2: the index before a look at the suppression */
    if (!ring->event_idx)
        return !(load16(&ring->avail[0]) & AVAIL_NO_INTERRUPT);
    return (uint16_t)(new - load16(used_event(ring)) - 1) < (uint16_t)(new - old);
}

bool vhost_ring_arm(struct vhost_ring *ring)
{
    if (ring->event_idx)
        store16(avail_event(ring), ring->last_avail);
    else
        store16(&ring->used[0], 0);
    atomic_thread_fence(memory_order_seq_cst);
    return load16(&ring->avail[1]) != ring->last_avail;
}

void vhost_ring_disarm(struct vhost_ring *ring)
{
    /* With EVENT_IDX the index that was asked for is soon behind, which is as good. */
    if (!ring->event_idx)
        store16(&ring->used[0], USED_NO_NOTIFY);
}
