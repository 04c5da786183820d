/* SPDX-License-Identifier: Apache-2.0 */
/* Physical region pages (section 4.3): how a command says where its data lies. The first entry may begin anywhere in
 * a page, at a multiple of 4; all others are whole pages, but for the end. Up to two stand in the command, more in
 * list pages, whose last entry leads to the next list page when there are more. */
#include "nvme_queue.h"

#define PER_LIST (NVME_PAGE / sizeof(uint64_t))
#define DIRECT_MIN 32768u /* less than that at a time is not worth commands of its own */

/* ---- the queue's pages ---- */

static uint16_t page_take(struct nvme_queue *queue, uint16_t *list)
{
    uint16_t page = queue->free_pages;
    if (page == NVME_NO_PAGE)
        return NVME_NO_PAGE;
    queue->free_pages = queue->page_next[page];
    queue->page_next[page] = *list;
    *list = page;
    return page;
}

static uint64_t page_iova(const struct nvme_queue *queue, uint16_t page)
{
    return queue->pages_iova + (uint64_t)page * NVME_PAGE;
}

static unsigned char *page_host(const struct nvme_queue *queue, uint16_t page)
{
    return queue->pages + (size_t)page * NVME_PAGE;
}

/* ---- building ---- */

struct prp {
    struct nvme_queue *queue;
    struct nvme_slot *slot;
    uint64_t *list; /* the page that is filled now */
    unsigned count, used; /* entries in all; in this page */
};

static bool list_page(struct prp *prp, uint64_t *iova)
{
    uint16_t page = page_take(prp->queue, &prp->slot->lists);
    if (page == NVME_NO_PAGE)
        return false;
    prp->list = (uint64_t *)page_host(prp->queue, page);
    prp->used = 0;
    *iova = page_iova(prp->queue, page);
    return true;
}

/* False when pages are short. */
static bool prp_add(struct prp *prp, uint64_t iova)
{
    struct nvme_sqe *sqe = &prp->slot->sqe;
    uint64_t moved, place;
    unsigned n = prp->count++;
    if (n == 0) {
        sqe->prp1 = iova;
        return true;
    }
    if (n == 1) {
        sqe->prp2 = iova;
        return true;
    }
    if (n == 2) {
        moved = sqe->prp2;
        if (!list_page(prp, &place))
            return false;
        sqe->prp2 = place;
        prp->list[prp->used++] = moved;
    } else if (prp->used == PER_LIST) {
        uint64_t *last = &prp->list[PER_LIST - 1];
        moved = *last;
        if (!list_page(prp, &place))
            return false;
        *last = place;
        prp->list[prp->used++] = moved;
    }
    prp->list[prp->used++] = iova;
    return true;
}

static struct prp prp_begin(struct nvme_queue *queue, struct nvme_slot *slot)
{
    slot->sqe.prp1 = slot->sqe.prp2 = 0;
    return (struct prp){.queue = queue, .slot = slot};
}

/* ---- data where it is ---- */

/* A walk over the memory of an io, from an offset on. */
struct walk {
    const struct iovec *iov, *end;
    uint64_t skip;
};

static struct walk walk_to(const struct bt_io *io, uint64_t offset)
{
    struct walk walk = {io->iov, io->iov + io->iovcnt, offset};
    while (walk.iov < walk.end && walk.skip >= walk.iov->iov_len)
        walk.skip -= walk.iov++->iov_len;
    return walk;
}

/* The next run, max bytes at most; 0 at the end. */
static uint64_t walk_next(struct walk *walk, uint64_t max, uint64_t *address)
{
    while (walk->iov < walk->end) {
        uint64_t n = bt_min(walk->iov->iov_len - walk->skip, max);
        *address = (uintptr_t)walk->iov->iov_base + walk->skip;
        walk->iov++;
        walk->skip = 0;
        if (n)
            return n;
    }
    return 0;
}

/* The slot's mapping that holds address. */
static const struct dma_mapping *held(const struct nvme_slot *slot, uint64_t address)
{
    for (unsigned i = 0; i < slot->mapping_count; i++)
        if (address >= slot->mappings[i]->start && address < slot->mappings[i]->end)
            return slot->mappings[i];
    return NULL;
}

static const struct dma_mapping *hold(struct nvme_queue *queue, struct nvme_slot *slot, uint64_t address)
{
    const struct dma_mapping *found = held(slot, address);
    if (found || slot->mapping_count == NVME_SLOT_MAPPINGS)
        return found;
    struct dma_mapping *mapping = dma_get(queue->nvme->dma, queue->thread, address, nvme_now(queue));
    if (mapping)
        slot->mappings[slot->mapping_count++] = mapping;
    return mapping;
}

/* How many bytes of the run lie in mapped memory. */
static uint64_t mapped_part(struct nvme_queue *queue, struct nvme_slot *slot, uint64_t address, uint64_t length)
{
    uint64_t done = 0;
    while (done < length) {
        const struct dma_mapping *mapping = hold(queue, slot, address + done);
        if (!mapping)
            break;
        done += bt_min(length - done, mapping->end - (address + done));
    }
    return done;
}

/* How much can be said in PRPs: what is mapped, and whose inner ends are those of pages. */
static uint64_t direct_length(struct nvme_queue *queue, struct nvme_slot *slot, uint64_t max)
{
    struct walk walk = walk_to(slot->io, slot->offset);
    uint64_t length = 0, previous_end = 0, address, n;
    while (length < max && (n = walk_next(&walk, max - length, &address))) {
        bool joins = address == previous_end || !((address | previous_end) & (NVME_PAGE - 1));
        bool fits = length ? joins : !(address & 3);
        uint64_t part = fits ? mapped_part(queue, slot, address, n) : 0;
        length += part;
        previous_end = address + n;
        if (part < n)
            break;
    }
    return length & ~((1ull << queue->nvme->block_bits) - 1);
}

static bool build_direct(struct nvme_queue *queue, struct nvme_slot *slot, uint64_t length)
{
    struct walk walk = walk_to(slot->io, slot->offset);
    struct prp prp = prp_begin(queue, slot);
    uint64_t address, n;
    while (length && (n = walk_next(&walk, length, &address))) {
        length -= n;
        while (n) {
            uint64_t part = bt_min(n, NVME_PAGE - (address & (NVME_PAGE - 1)));
            const struct dma_mapping *mapping = held(slot, address);
            bool starts = !prp.count || !(address & (NVME_PAGE - 1));
            if (starts && !prp_add(&prp, mapping->iova + (address - mapping->start)))
                return false;
            address += part;
            n -= part;
        }
    }
    return true;
}

/* ---- bounced data ---- */

/* Pages are taken from the end, so that the list is in order. */
static bool build_bounced(struct nvme_queue *queue, struct nvme_slot *slot, uint64_t length)
{
    struct prp prp = prp_begin(queue, slot);
    for (uint64_t at = 0; at < length; at += NVME_PAGE)
        if (page_take(queue, &slot->pages) == NVME_NO_PAGE)
            return false;
    for (uint16_t page = slot->pages; page != NVME_NO_PAGE; page = queue->page_next[page])
        if (!prp_add(&prp, page_iova(queue, page)))
            return false;
    return true;
}

static void copy_pages(struct nvme_queue *queue, struct nvme_slot *slot, bool in)
{
    const struct bt_io *io = slot->io;
    uint64_t at = 0;
    for (uint16_t page = slot->pages; page != NVME_NO_PAGE; page = queue->page_next[page]) {
        uint64_t n = bt_min(NVME_PAGE, slot->length - at);
        if (in)
            bt_iov_to_buffer(io->iov, io->iovcnt, slot->offset + at, page_host(queue, page), n);
        else
            bt_iov_from_buffer(io->iov, io->iovcnt, slot->offset + at, page_host(queue, page), n);
        at += n;
    }
}

void nvme_unbounce(struct nvme_queue *queue, struct nvme_slot *slot) { copy_pages(queue, slot, false); }

/* ---- what commands ask for ---- */

static uint32_t bounce(struct nvme_queue *queue, struct nvme_slot *slot, uint64_t length)
{
    nvme_slot_release_data(queue, slot);
    if (!build_bounced(queue, slot, length))
        return 0;
    slot->bounced = true;
    slot->length = (uint32_t)length;
    if (slot->io->op == BT_WRITE)
        copy_pages(queue, slot, true);
    bt_count(&queue->counters.unaligned, 1);
    bt_count(&queue->counters.bounced_bytes, length);
    return slot->length;
}

uint32_t nvme_map_data(struct nvme_queue *queue, struct nvme_slot *slot, uint64_t max)
{
    uint64_t length = queue->nvme->dma ? direct_length(queue, slot, max) : 0;
    if (length < max && length < DIRECT_MIN)
        return bounce(queue, slot, bt_min(max, BT_NVME_BOUNCE));
    if (!build_direct(queue, slot, length))
        return 0;
    slot->length = (uint32_t)length;
    bt_count(&queue->counters.aligned, 1);
    bt_count(&queue->counters.direct_bytes, length);
    return slot->length;
}

uint32_t nvme_map_zeros(struct nvme_queue *queue, struct nvme_slot *slot, uint64_t max)
{
    struct prp prp = prp_begin(queue, slot);
    for (uint64_t at = 0; at < max; at += NVME_PAGE)
        if (!prp_add(&prp, page_iova(queue, 0)))
            return 0;
    return (uint32_t)max;
}

void *nvme_map_page(struct nvme_queue *queue, struct nvme_slot *slot)
{
    struct prp prp = prp_begin(queue, slot);
    uint16_t page = page_take(queue, &slot->pages);
    if (page == NVME_NO_PAGE)
        return NULL;
    prp_add(&prp, page_iova(queue, page));
    return page_host(queue, page);
}
