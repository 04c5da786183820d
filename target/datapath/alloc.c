/* SPDX-License-Identifier: Apache-2.0 */
/* Claims: the first write to granules that have no place of their own yet. The entries become BUSY, the data
 * and the rest of the granules are written to clusters of the grant pool, then the new entries are published. */
#include "request.h"

struct bt_claim {
    _Atomic uint64_t old; /* what the entries were; first, for readers that look through BUSY */
    struct bt_claim *next;
    struct bt_thread *thread;
    struct bt_map *map;
    struct bt_slice *slice;
    uint64_t granule, granules;
    struct bt_request *owner;
    struct bt_request *waiters; /* under the map's lock */
    struct bt_grant grant;
    bool in_place;   /* a ZERO that owns its cluster: no grant */
    uint64_t owner_pos, within; /* where the data starts: in the owner, in the first granule */
    uint64_t length;            /* of the owner's data */
    uint64_t served;            /* populate: what the owner gets of the fill, from within on */
    uint64_t head, tail; /* bytes to fill before and after it */
    uint8_t *fill;       /* head, then tail */
    bool zero_data;
    bool populate; /* all of it is fill, from the backing */
    bool as_zeros; /* that are all zeros: no cluster is needed */
    uint32_t reading;
    int read_result;
    struct bt_request read_head, read_tail, write;
    struct iovec head_iov, tail_iov;
    struct iovec *iov; /* head, data, tail */
    int iov_capacity;
};

#define ZERO_CHUNK 65536
static const uint8_t zeros[ZERO_CHUNK];

/* Claims are never freed while their thread lives: a reader may look at one just as it is reused, and then
 * finds by the entry that it has to look again. */
static struct bt_claim *claim_get(struct bt_thread *thread)
{
    struct bt_claim *claim = thread->free_claims;
    if (claim) {
        thread->free_claims = claim->next;
        return claim;
    }
    if (posix_memalign((void **)&claim, 64, sizeof *claim))
        abort();
    memset(claim, 0, sizeof *claim);
    claim->thread = thread;
    return claim;
}

static void claim_put(struct bt_claim *claim)
{
    free(claim->fill);
    claim->fill = NULL;
    claim->next = claim->thread->free_claims;
    claim->thread->free_claims = claim;
}

void bt_claim_pool_free(struct bt_thread *thread)
{
    while (thread->free_claims) {
        struct bt_claim *claim = thread->free_claims;
        thread->free_claims = claim->next;
        free(claim->iov);
        free(claim);
    }
}

static uint64_t busy_entry(struct bt_claim *claim)
{
    return ((uint64_t)(uintptr_t)claim << BT_HOST_SHIFT) | BT_ENTRY_BUSY;
}
static struct bt_claim *claim_of(uint64_t entry) { return (struct bt_claim *)(uintptr_t)(entry >> BT_HOST_SHIFT); }
uint64_t bt_claim_old(uint64_t entry)
{
    return atomic_load_explicit(&claim_of(entry)->old, memory_order_acquire);
}

uint32_t bt_map_claims(bt_object *map) { return atomic_load(&bt_as_map(map)->claims); }

/* ---- publishing ---- */

static uint64_t stride_of(struct bt_map *map)
{
    return (1ull << map->granule_bits >> BT_SECTOR_BITS) << BT_HOST_SHIFT;
}

static bool old_has_host(uint64_t old)
{
    return bt_entry_kind(old) == BT_ENTRY_DATA || (old & BT_ENTRY_HOST);
}

/* New entries when the write succeeded, the old ones again when it failed; whoever waited resolves again. */
static void publish(struct bt_claim *claim, int result)
{
    struct bt_map *map = claim->map;
    bt_entry *entries = &claim->slice->entries[claim->granule & ((1ull << map->slice_bits) - 1)];
    uint64_t value = atomic_load(&claim->old), stride = old_has_host(value) ? stride_of(map) : 0;
    if (result == 0 && claim->as_zeros) {
        value = claim->in_place ? value - BT_ENTRY_UNALLOCATED + BT_ENTRY_ZERO : BT_ENTRY_ZERO | BT_ENTRY_ALLOC;
    } else if (result == 0) {
        value = bt_entry_make(claim->grant.host_offset, BT_ENTRY_DATA | BT_ENTRY_WRITABLE | BT_ENTRY_ALLOC);
        stride = stride_of(map);
    }
    pthread_mutex_lock(&map->lock);
    for (uint64_t i = 0; i < claim->granules; i++)
        atomic_store_explicit(&entries[i], value + i * stride, memory_order_release);
    struct bt_request *waiter = claim->waiters;
    claim->waiters = NULL;
    if (result == 0)
        bt_slice_mark_dirty(map, claim->slice);
    atomic_fetch_sub(&claim->slice->pins, 1);
    pthread_mutex_unlock(&map->lock);
    while (waiter) {
        struct bt_request *next = waiter->next;
        bt_request_wake(waiter);
        waiter = next;
    }
}

bool bt_claim_wait(struct bt_request *request, const struct bt_segment *segment)
{
    struct bt_map *map = bt_as_map(segment->object);
    bt_entry *entry = &segment->slice->entries[segment->granule & ((1ull << map->slice_bits) - 1)];
    pthread_mutex_lock(&map->lock);
    bool busy = atomic_load(entry) == segment->entry;
    if (busy) {
        struct bt_claim *claim = claim_of(segment->entry);
        request->next = claim->waiters;
        claim->waiters = request;
    }
    pthread_mutex_unlock(&map->lock);
    return busy;
}

static void claim_finish(struct bt_claim *claim, int result)
{
    struct bt_request *owner = claim->owner;
    struct bt_map *map = claim->map;
    publish(claim, result);
    if ((result < 0 || claim->as_zeros) && !claim->in_place) {
        claim->grant.zeroed &= claim->as_zeros;
        bt_grant_give_back(map, claim->grant, claim->as_zeros);
    }
    atomic_fetch_sub(&map->claims, 1);
    uint64_t length = claim->served;
    if (claim->populate && result == 0 && owner->op == BT_READ)
        bt_iov_from_buffer(owner->iov, owner->iovcnt, claim->owner_pos, claim->fill + claim->within, length);
    bool populate = claim->populate;
    claim_put(claim);
    if (populate)
        bt_request_populated(owner, length, result);
    else
        bt_request_part_done(owner, result);
}

/* ---- filling and writing ---- */

static void write_done(struct bt_request *request)
{
    claim_finish(BT_CONTAINER(request, struct bt_claim, write), request->ret);
}

static void add_zeros(struct bt_claim *claim, int *n, uint64_t length)
{
    while (length) {
        uint64_t part = bt_min(length, ZERO_CHUNK);
        claim->iov[(*n)++] = (struct iovec){.iov_base = (void *)(uintptr_t)zeros, .iov_len = part};
        length -= part;
    }
}

static void iov_reserve(struct bt_claim *claim, int count)
{
    if (count <= claim->iov_capacity)
        return;
    free(claim->iov);
    claim->iov = malloc((size_t)count * sizeof *claim->iov);
    if (!claim->iov)
        abort();
    claim->iov_capacity = count;
}

static void add_fill(struct bt_claim *claim, int *n, uint64_t at, uint64_t length)
{
    if (claim->fill && length)
        claim->iov[(*n)++] = (struct iovec){.iov_base = claim->fill + at, .iov_len = length};
    else
        add_zeros(claim, n, length);
}

static void start_write(struct bt_claim *claim)
{
    struct bt_request *owner = claim->owner, *write = &claim->write;
    uint64_t total = claim->head + claim->length + claim->tail;
    iov_reserve(claim, owner->iovcnt + 6 + (int)(total / ZERO_CHUNK));
    int n = 0;
    add_fill(claim, &n, 0, claim->head);
    if (claim->zero_data)
        add_zeros(claim, &n, claim->length);
    else
        n += bt_iov_slice(owner->iov, owner->iovcnt, claim->owner_pos, claim->length, claim->iov + n, owner->iovcnt);
    add_fill(claim, &n, claim->head, claim->tail);
    write->thread = claim->thread;
    write->object = bt_child_get(&claim->map->child);
    write->done = write_done;
    write->op = BT_WRITE;
    write->flags = 0;
    write->offset = claim->grant.host_offset + (claim->populate ? 0 : claim->within - claim->head);
    write->length = total;
    write->iov = claim->iov;
    write->iovcnt = n;
    bt_request_start(write);
}

static void fill_part_done(struct bt_claim *claim, int result)
{
    if (result < 0)
        claim->read_result = result;
    if (--claim->reading)
        return;
    if (claim->read_result < 0) {
        claim_finish(claim, claim->read_result);
        return;
    }
    claim->as_zeros = claim->populate && !atomic_load(&claim->map->no_zero_entries) &&
                      bt_iov_is_zero(&claim->head_iov, 1, 0, claim->head_iov.iov_len);
    if (claim->as_zeros)
        claim_finish(claim, 0);
    else
        start_write(claim);
}

static void head_read(struct bt_request *request)
{
    fill_part_done(BT_CONTAINER(request, struct bt_claim, read_head), request->ret);
}
static void tail_read(struct bt_request *request)
{
    fill_part_done(BT_CONTAINER(request, struct bt_claim, read_tail), request->ret);
}

static void read_fill(struct bt_claim *claim, struct bt_request *read, struct iovec *iov, uint64_t offset,
                      uint64_t length, void (*done)(struct bt_request *))
{
    read->thread = claim->thread;
    read->object = &claim->map->base; /* a BUSY entry reads as what it was */
    read->done = done;
    read->op = BT_READ;
    read->flags = 0;
    read->offset = offset;
    read->length = length;
    read->iov = iov;
    read->iovcnt = 1;
    bt_request_start(read);
}

/* Reads beyond the end of the map are no business of its walker; what lies there is zeros. */
static void start_fill(struct bt_claim *claim, uint64_t start)
{
    uint64_t size = bt_object_size(&claim->map->base), tail_start = start + claim->head + claim->length;
    uint64_t tail_real = tail_start < size ? bt_min(claim->tail, size - tail_start) : 0;
    uint64_t head_real = bt_min(claim->head, size - start);
    if (posix_memalign((void **)&claim->fill, 4096, claim->head + claim->tail)) {
        claim->fill = NULL;
        claim_finish(claim, -ENOMEM);
        return;
    }
    memset(claim->fill + head_real, 0, claim->head - head_real);
    memset(claim->fill + claim->head + tail_real, 0, claim->tail - tail_real);
    claim->read_result = 0;
    claim->reading = 1u + (claim->head > 0) + (tail_real > 0);
    claim->head_iov = (struct iovec){.iov_base = claim->fill, .iov_len = head_real};
    claim->tail_iov = (struct iovec){.iov_base = claim->fill + claim->head, .iov_len = tail_real};
    if (claim->head)
        read_fill(claim, &claim->read_head, &claim->head_iov, start, head_real, head_read);
    if (tail_real)
        read_fill(claim, &claim->read_tail, &claim->tail_iov, tail_start, tail_real, tail_read);
    fill_part_done(claim, 0);
}

static bool reads_as_zeros(struct bt_map *map, uint64_t old, uint64_t start)
{
    if (bt_entry_kind(old) == BT_ENTRY_ZERO)
        return true;
    struct bt_object *backing = bt_child_get(&map->backing);
    return bt_entry_kind(old) == BT_ENTRY_UNALLOCATED && (!backing || start >= bt_object_size(backing));
}

static void run_claim(struct bt_claim *claim)
{
    struct bt_map *map = claim->map;
    uint64_t start = claim->granule << map->granule_bits;
    uint64_t end = start + (claim->granules << map->granule_bits);
    claim->head = claim->populate ? end - start : claim->within;
    claim->tail = end - (start + claim->head + claim->length);
    if (claim->populate) {
        start_fill(claim, start);
    } else if (reads_as_zeros(map, atomic_load(&claim->old), start)) {
        if (claim->grant.zeroed)
            claim->head = claim->tail = 0;
        start_write(claim);
    } else if (claim->head + claim->tail == 0) {
        start_write(claim);
    } else {
        start_fill(claim, start);
    }
}

/* ---- claiming ---- */

static uint64_t take_entries(struct bt_claim *claim, const struct bt_segment *segment, uint64_t max)
{
    struct bt_map *map = claim->map;
    uint64_t first = segment->granule & ((1ull << map->slice_bits) - 1), n = 0;
    for (; n < max; n++) {
        uint64_t expected = segment->entry;
        if (!atomic_compare_exchange_strong(&segment->slice->entries[first + n], &expected, busy_entry(claim)))
            break;
    }
    return n;
}

static uint64_t claimed_length(struct bt_map *map, const struct bt_segment *segment, uint64_t granules)
{
    uint64_t within = segment->offset & ((1ull << map->granule_bits) - 1);
    return bt_min(segment->length, (granules << map->granule_bits) - within);
}

int64_t bt_claim_start(struct bt_request *request, const struct bt_segment *segment)
{
    struct bt_map *map = bt_as_map(segment->object);
    bool in_place = segment->entry & BT_ENTRY_HOST;
    struct bt_grant grant = {bt_entry_host(segment->entry), 1, false};
    atomic_fetch_add(&map->claims, 1);
    if (!in_place && !bt_grant_take(map, segment->granules, &grant)) {
        atomic_fetch_sub(&map->claims, 1);
        return -EAGAIN;
    }
    struct bt_claim *claim = claim_get(request->thread);
    claim->map = map;
    claim->slice = segment->slice;
    claim->granule = segment->granule;
    claim->owner = request;
    claim->waiters = NULL;
    claim->in_place = in_place;
    claim->zero_data = segment->op == BT_ZEROES;
    claim->populate = segment->op == BT_READ || segment->op == BT_CACHE;
    claim->as_zeros = false;
    atomic_store_explicit(&claim->old, segment->entry, memory_order_release);
    atomic_fetch_add(&claim->slice->pins, 1);
    claim->granules = take_entries(claim, segment, grant.count);
    if (!in_place) {
        struct bt_grant rest = grant;
        rest.host_offset += claim->granules << map->granule_bits;
        rest.count -= claim->granules;
        bt_grant_give_back(map, rest, true);
        grant.count = claim->granules;
    }
    if (!claim->granules) {
        atomic_fetch_sub(&claim->slice->pins, 1);
        atomic_fetch_sub(&map->claims, 1);
        claim_put(claim);
        return 0;
    }
    bt_count(&bt_counters_of(&map->base, request->thread)->grants, in_place ? 0 : claim->granules);
    claim->grant = grant;
    claim->within = segment->offset & ((1ull << map->granule_bits) - 1);
    claim->owner_pos = request->pos;
    claim->length = claimed_length(map, segment, claim->granules);
    int64_t taken = (int64_t)claim->length;
    bt_count_request(&map->base, request->thread, segment->op, segment->offset, claim->length);
    claim->served = claim->length;
    if (claim->populate)
        claim->length = 0;
    else
        request->pending++;
    run_claim(claim);
    return taken;
}
