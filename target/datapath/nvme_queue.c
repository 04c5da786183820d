/* SPDX-License-Identifier: Apache-2.0 */
/* A pair of a submission and a completion queue (section 4.1), on its I/O thread: slots, rings, doorbells, and the
 * checks of what the controller writes. */
#include <fcntl.h>
#include <unistd.h>

#include "nvme_queue.h"

/* ---- memory ---- */

static uint64_t page_round(uint64_t n) { return (n + NVME_PAGE - 1) & ~(uint64_t)(NVME_PAGE - 1); }

int bt_nvme_queue_layout(uint32_t depth, uint32_t pages, struct bt_nvme_layout *out)
{
    if (depth < BT_NVME_MIN_DEPTH || depth > BT_NVME_MAX_DEPTH || pages < BT_NVME_MIN_PAGES ||
        pages > BT_NVME_MAX_PAGES)
        return -EINVAL;
    out->submission = 0;
    out->completion = page_round(depth * sizeof(struct nvme_sqe));
    out->pages = out->completion + page_round(depth * sizeof(struct nvme_cqe));
    out->bytes = out->pages + (uint64_t)pages * NVME_PAGE;
    return 0;
}

/* Page 0 stays zero: it is what is written as zeros. */
static void pages_init(struct nvme_queue *queue)
{
    queue->free_pages = NVME_NO_PAGE;
    for (uint16_t page = queue->page_count - 1; page > 0; page--) {
        queue->page_next[page] = queue->free_pages;
        queue->free_pages = page;
    }
}

static void slots_init(struct nvme_queue *queue)
{
    for (uint16_t i = queue->depth - 1; i > 0; i--) {
        struct nvme_slot *slot = &queue->slots[i - 1];
        slot->index = i - 1;
        slot->pages = slot->lists = NVME_NO_PAGE;
        slot->next = queue->free_slots;
        queue->free_slots = slot;
    }
    while ((1u << queue->index_bits) < queue->depth)
        queue->index_bits++;
}

void nvme_queue_clear(struct nvme_queue *queue)
{
    memset(queue->cq, 0, queue->depth * sizeof *queue->cq);
    queue->sq_tail = queue->sq_told = 0;
    queue->cq_head = queue->cq_told = 0;
    queue->phase = 1;
    queue->broken = false;
}

static bool poll(struct bt_poller *poller, struct bt_thread *thread);
static bool arm(struct bt_poller *poller, struct bt_thread *thread);
static void disarm(struct bt_poller *poller, struct bt_thread *thread);
static void interrupted(struct bt_watch *watch, struct bt_thread *thread, uint32_t events);
static void ring(struct bt_deferred *deferred, struct bt_thread *thread);

static void place(struct nvme_queue *queue, const struct bt_nvme_queue *place, const struct bt_nvme_layout *layout)
{
    const struct bt_nvme_options *options = &queue->nvme->options;
    unsigned char *memory = place->memory, *doorbells = (unsigned char *)options->registers + 0x1000;
    queue->sq = (struct nvme_sqe *)(memory + layout->submission);
    queue->cq = (struct nvme_cqe *)(memory + layout->completion);
    queue->pages = memory + layout->pages;
    queue->pages_iova = place->iova + layout->pages;
    queue->sq_doorbell = (uint32_t *)(doorbells + (size_t)place->id * 2 * options->stride); /* section 3.1.24 */
    queue->cq_doorbell = (uint32_t *)(doorbells + ((size_t)place->id * 2 + 1) * options->stride);
}

int nvme_queue_init(struct nvme_queue *queue, struct nvme *nvme, const struct bt_nvme_queue *from)
{
    struct bt_nvme_layout layout;
    int ret = bt_nvme_queue_layout(from->depth, from->pages, &layout);
    queue->watch.fd = -1;
    if (ret < 0)
        return ret;
    queue->nvme = nvme;
    queue->thread = bt_thread_get(nvme->device.base.dp, from->thread);
    queue->id = (uint16_t)from->id;
    queue->depth = (uint16_t)from->depth;
    queue->page_count = (uint16_t)from->pages;
    queue->slots = calloc(from->depth, sizeof *queue->slots);
    queue->page_next = calloc(from->pages, sizeof *queue->page_next);
    queue->watch.fd = fcntl(from->interrupt, F_DUPFD_CLOEXEC, 3);
    if (!queue->slots || !queue->page_next)
        return -ENOMEM;
    if (queue->watch.fd < 0 || fcntl(queue->watch.fd, F_SETFL, O_NONBLOCK) < 0)
        return -EBADF;
    place(queue, from, &layout);
    queue->busy_tail = &queue->busy;
    queue->waiting_tail = &queue->waiting;
    pages_init(queue);
    slots_init(queue);
    nvme_queue_clear(queue);
    queue->watch.ready = interrupted;
    queue->poller = (struct bt_poller){.poll = poll, .arm = arm, .disarm = disarm};
    queue->timer.fn = nvme_timer_passed;
    queue->deferred.fn = ring;
    return 0;
}

void nvme_queue_free(struct nvme_queue *queue)
{
    if (queue->watch.fd >= 0)
        close(queue->watch.fd);
    free(queue->slots);
    free(queue->page_next);
}

/* ---- slots ---- */

struct nvme_slot *nvme_slot_get(struct nvme_queue *queue)
{
    struct nvme_slot *slot = queue->free_slots;
    if (!slot)
        return NULL;
    queue->free_slots = slot->next;
    slot->reported = slot->retries = slot->aborts = slot->resets = 0;
    slot->bounced = false;
    slot->length = 0;
    return slot;
}

static void pages_put(struct nvme_queue *queue, uint16_t *list)
{
    while (*list != NVME_NO_PAGE) {
        uint16_t page = *list;
        *list = queue->page_next[page];
        queue->page_next[page] = queue->free_pages;
        queue->free_pages = page;
    }
}

void nvme_slot_release_data(struct nvme_queue *queue, struct nvme_slot *slot)
{
    while (slot->mapping_count)
        dma_put(slot->mappings[--slot->mapping_count], queue->thread);
    pages_put(queue, &slot->pages);
    pages_put(queue, &slot->lists);
}

void nvme_slot_put(struct nvme_queue *queue, struct nvme_slot *slot)
{
    nvme_slot_release_data(queue, slot);
    slot->state = NVME_SLOT_FREE;
    slot->next = queue->free_slots;
    queue->free_slots = slot;
}

void nvme_enter_busy(struct nvme_queue *queue, struct nvme_slot *slot)
{
    slot->next = NULL;
    slot->pprev = queue->busy_tail;
    *queue->busy_tail = slot;
    queue->busy_tail = &slot->next;
    queue->in_flight++;
}

void nvme_leave_busy(struct nvme_queue *queue, struct nvme_slot *slot)
{
    *slot->pprev = slot->next;
    if (slot->next)
        slot->next->pprev = slot->pprev;
    else
        queue->busy_tail = slot->pprev;
    queue->in_flight--;
}

/* ---- submission ---- */

void nvme_send(struct nvme_queue *queue, struct nvme_slot *slot)
{
    slot->generation++;
    slot->sqe.cid = (uint16_t)(slot->generation << queue->index_bits | slot->index);
    slot->state = NVME_SLOT_SENT;
    slot->reported = 0;
    slot->sent_ns = nvme_now(queue);
    nvme_enter_busy(queue, slot);
    queue->sq[queue->sq_tail] = slot->sqe;
    queue->sq_tail = (uint16_t)(queue->sq_tail + 1 == queue->depth ? 0 : queue->sq_tail + 1);
    bt_count(&queue->counters.commands, 1);
    bt_defer(queue->thread, &queue->deferred);
    if (!queue->timer_armed)
        nvme_timer_arm(queue, slot->sent_ns + queue->nvme->options.timeout_ns);
}

/* The end of a turn: one write to each doorbell. What was written to memory before is seen before. */
static void ring(struct bt_deferred *deferred, struct bt_thread *thread)
{
    struct nvme_queue *queue = BT_CONTAINER(deferred, struct nvme_queue, deferred);
    (void)thread;
    queue->now_ns = 0;
    if (!queue->running)
        return;
    if (queue->cq_told != queue->cq_head) {
        queue->cq_told = queue->cq_head;
        __atomic_store_n(queue->cq_doorbell, queue->cq_head, __ATOMIC_RELEASE);
        bt_count(&queue->counters.doorbells, 1);
    }
    if (queue->sq_told != queue->sq_tail) {
        queue->sq_told = queue->sq_tail;
        __atomic_store_n(queue->sq_doorbell, queue->sq_tail, __ATOMIC_RELEASE);
        bt_count(&queue->counters.doorbells, 1);
    }
}

/* ---- completion ---- */

void nvme_tell(struct nvme_queue *queue, enum bt_nvme_trouble what, uint16_t detail)
{
    struct bt_event event = {
        .type = BT_EVENT_SESSION,
        .tag = queue->nvme->session,
        .result = (int64_t)((uint64_t)what | (uint64_t)queue->id << 8 | (uint64_t)detail << 24),
    };
    bt_event_send(queue->nvme->device.base.dp, &event);
}

/* The controller cannot be trusted with what is in flight: it may still write to memory, so nothing of it ends
 * before the controller was reset. */
static void breach(struct nvme_queue *queue, enum bt_nvme_breach how)
{
    queue->broken = true;
    queue->running = false;
    bt_count(&queue->counters.breaches, 1);
    nvme_tell(queue, BT_NVME_PROTOCOL, (uint16_t)how);
}

/* The slot that a completion names; NULL when it is none that can be. The head is that of when the controller made
 * the entry, and entries may come in another order: it may go back. Nothing depends on it, because there are fewer
 * slots than entries. */
static struct nvme_slot *check(struct nvme_queue *queue, uint32_t place, uint32_t status)
{
    uint16_t head = (uint16_t)place, cid = (uint16_t)status;
    unsigned index = cid & ((1u << queue->index_bits) - 1);
    struct nvme_slot *slot = index < queue->depth - 1u ? &queue->slots[index] : NULL;
    if (place >> 16 != queue->id)
        breach(queue, BT_NVME_BAD_QUEUE);
    else if (head >= queue->depth)
        breach(queue, BT_NVME_BAD_HEAD);
    else if (!slot || slot->state != NVME_SLOT_SENT || slot->sqe.cid != cid)
        breach(queue, BT_NVME_BAD_COMMAND);
    if (queue->broken)
        return NULL;
    return slot;
}

/* True when the next entry is filled. */
static bool has_completion(const struct nvme_queue *queue)
{
    uint32_t status = __atomic_load_n(&queue->cq[queue->cq_head].status, __ATOMIC_ACQUIRE);
    return (status >> 16 & 1) == queue->phase;
}

static void take(struct nvme_queue *queue)
{
    struct nvme_cqe *cqe = &queue->cq[queue->cq_head];
    uint32_t status = __atomic_load_n(&cqe->status, __ATOMIC_ACQUIRE);
    uint32_t place = __atomic_load_n(&cqe->queue, __ATOMIC_RELAXED);
    if (++queue->cq_head == queue->depth) {
        queue->cq_head = 0;
        queue->phase ^= 1;
    }
    struct nvme_slot *slot = check(queue, place, status);
    if (!slot)
        return;
    bt_count(&queue->counters.completions, 1);
    nvme_leave_busy(queue, slot);
    nvme_completed(queue, slot, (uint16_t)(status >> 17));
}

bool nvme_reap(struct nvme_queue *queue)
{
    unsigned taken = 0;
    while (queue->running && taken < queue->depth && has_completion(queue)) {
        take(queue);
        taken++;
    }
    if (!taken)
        return false;
    bt_defer(queue->thread, &queue->deferred);
    nvme_pump(queue);
    return true;
}

/* ---- waking up ---- */

static bool poll(struct bt_poller *poller, struct bt_thread *thread)
{
    struct nvme_queue *queue = BT_CONTAINER(poller, struct nvme_queue, poller);
    (void)thread;
    return nvme_reap(queue); /* with nothing in flight, too: what comes then is a breach, not a reason to spin */
}

static void drain_interrupt(struct nvme_queue *queue)
{
    uint64_t count;
    if (read(queue->watch.fd, &count, sizeof count) == sizeof count)
        bt_count(&queue->counters.interrupts, 1);
}

/* The controller interrupts always; what it did while the thread was awake is not to wake it up again. */
static bool arm(struct bt_poller *poller, struct bt_thread *thread)
{
    struct nvme_queue *queue = BT_CONTAINER(poller, struct nvme_queue, poller);
    (void)thread;
    drain_interrupt(queue);
    return queue->running && has_completion(queue);
}

static void disarm(struct bt_poller *poller, struct bt_thread *thread) { (void)poller, (void)thread; }

static void interrupted(struct bt_watch *watch, struct bt_thread *thread, uint32_t events)
{
    struct nvme_queue *queue = BT_CONTAINER(watch, struct nvme_queue, watch);
    (void)thread, (void)events;
    drain_interrupt(queue);
    nvme_reap(queue);
}
