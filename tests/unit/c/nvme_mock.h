/* SPDX-License-Identifier: Apache-2.0 */
/* An NVMe controller in memory, with its own thread: I/O queues, doorbells, PRPs, interrupts. It checks all that the
 * driver gives it, completes in any order, and misbehaves on request. Its IOMMU knows what is mapped: an access to
 * anything else ends the test. */
#ifndef NVME_MOCK_H
#define NVME_MOCK_H

#include <fcntl.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <sys/mman.h>

#include "check.h"
#include "nvme_queue.h"

#define MOCK_QUEUES 4u
#define MOCK_DEPTH 1024u
#define MOCK_SPANS 4096u
#define MOCK_REGISTERS 0x3000u
#define MOCK_IOVA (1ull << 40) /* a device address is that of the process and this */

enum mock_breach { /* what is wrong with the next completion */
    MOCK_GOOD = 0,
    MOCK_CID_RANGE,   /* no such command identifier */
    MOCK_CID_FREE,    /* one that is not in flight */
    MOCK_CID_AGAIN,   /* a second completion of the same command */
    MOCK_WRONG_QUEUE, /* another submission queue's */
    MOCK_OLD_HEAD,    /* none: the head of a while ago, as when entries are made by several engines */
    MOCK_HUGE_HEAD,   /* a head outside of the queue */
    MOCK_WRONG_PHASE, /* never seen: the old phase */
};

struct mock_command {
    struct nvme_sqe sqe;
    uint64_t due_ns;
    bool used, held;
};

struct mock_queue {
    uint32_t id, depth; /* depth 0: there is none */
    struct nvme_sqe *sq;
    struct nvme_cqe *cq;
    int interrupt;
    uint32_t sq_head, cq_tail;
    uint32_t phase;
    uint32_t count; /* of commands below */
    bool signal;
    struct mock_command commands[MOCK_DEPTH];
};

struct mock_span {
    uint64_t iova, length;
};

struct mock {
    pthread_t pthread;
    pthread_mutex_t lock; /* a step of the controller; resets and aborts */
    struct mock_queue queues[MOCK_QUEUES];
    unsigned char *registers;
    unsigned char *disk;
    uint64_t size;
    uint32_t block, nsid, max_transfer, random;
    pthread_mutex_t iommu; /* below */
    struct mock_span spans[MOCK_SPANS];
    uint32_t span_count, most_spans;
    _Atomic int map_error;        /* maps fail with it */
    _Atomic uint64_t map_pause_ns; /* and take so long */
    /* what it is told to do, from any thread */
    _Atomic bool stop;
    _Atomic uint64_t latency_ns;  /* half of it to all of it */
    _Atomic unsigned fail_left;   /* so many commands fail with fail_status */
    _Atomic unsigned fail_status; /* type, code, and DNR */
    _Atomic unsigned fail_opcode; /* only this one, plus 1; 0: any */
    _Atomic unsigned hold_left;   /* so many are not completed */
    _Atomic unsigned breach;      /* mock_breach */
    _Atomic bool asleep, ignores_aborts, silent; /* silent: no interrupts */
    /* what it has seen */
    _Atomic uint64_t done[256]; /* by opcode */
    _Atomic uint64_t fua, deallocated, chained, aborts, resets, held;
};

/* ---- the IOMMU ---- */

static inline int mock_map(void *opaque, void *address, uint64_t length, uint64_t *iova)
{
    struct mock *mock = opaque;
    int ret = 0;
    *iova = (uintptr_t)address + MOCK_IOVA;
    CHECK(length && !((*iova | length) & 4095));
    struct timespec pause = {0, (long)atomic_load(&mock->map_pause_ns)};
    nanosleep(&pause, NULL);
    pthread_mutex_lock(&mock->iommu);
    for (uint32_t i = 0; i < mock->span_count; i++)
        CHECK(*iova + length <= mock->spans[i].iova || mock->spans[i].iova + mock->spans[i].length <= *iova);
    if (mock->map_error) {
        ret = mock->map_error;
    } else {
        CHECK(mock->span_count < MOCK_SPANS);
        mock->spans[mock->span_count++] = (struct mock_span){*iova, length};
        mock->most_spans = mock->span_count > mock->most_spans ? mock->span_count : mock->most_spans;
    }
    pthread_mutex_unlock(&mock->iommu);
    return ret;
}

static inline int mock_unmap(void *opaque, uint64_t iova, uint64_t length)
{
    struct mock *mock = opaque;
    int ret = -ENOENT;
    CHECK(msync((void *)(uintptr_t)(iova - MOCK_IOVA), length, MS_ASYNC) == 0); /* the memory is still there */
    pthread_mutex_lock(&mock->iommu);
    for (uint32_t i = 0; i < mock->span_count && ret < 0; i++)
        if (mock->spans[i].iova == iova && mock->spans[i].length == length) {
            mock->spans[i] = mock->spans[--mock->span_count];
            ret = 0;
        }
    pthread_mutex_unlock(&mock->iommu);
    CHECK(ret == 0);
    return ret;
}

/* With the lock of the IOMMU held. */
static inline unsigned char *mock_memory(struct mock *mock, uint64_t iova, uint64_t length)
{
    for (uint32_t i = 0; i < mock->span_count; i++)
        if (iova >= mock->spans[i].iova && bt_range_ok(iova - mock->spans[i].iova, length, mock->spans[i].length))
            return (unsigned char *)(uintptr_t)(iova - MOCK_IOVA);
    CHECK(!"the device uses an address that is not mapped");
    return NULL;
}

/* ---- commands ---- */

/* Moves data between the disk and what the PRPs name; both ways are checked entry by entry. */
static inline void mock_transfer(struct mock *mock, const struct nvme_sqe *sqe, unsigned char *disk, uint64_t length,
                                 bool to_disk)
{
    uint64_t entry = sqe->prp1, list = 0, done = 0;
    unsigned used = 0;
    CHECK(!(entry & 3));
    pthread_mutex_lock(&mock->iommu);
    while (done < length) {
        uint64_t n = bt_min(4096 - (entry & 4095), length - done);
        unsigned char *memory = mock_memory(mock, entry, n);
        memcpy(to_disk ? disk + done : memory, to_disk ? memory : disk + done, n);
        done += n;
        if (done == length)
            break;
        if (!list && done + 4096 >= length) {
            entry = sqe->prp2;
        } else {
            if (!list) {
                list = sqe->prp2;
                CHECK(!(list & 7));
                used = (unsigned)(list & 4095) / 8;
            }
            uint64_t *page = (uint64_t *)mock_memory(mock, list & ~4095ull, 4096);
            if (used == 511 && length - done > 4096) {
                list = page[511];
                CHECK(!(list & 4095));
                page = (uint64_t *)mock_memory(mock, list, 4096);
                used = 0;
                atomic_fetch_add(&mock->chained, 1);
            }
            entry = page[used++];
        }
        CHECK(!(entry & 4095));
    }
    pthread_mutex_unlock(&mock->iommu);
}

static inline unsigned char *mock_disk(struct mock *mock, uint64_t start, uint64_t blocks)
{
    CHECK(bt_range_ok(start, blocks, mock->size / mock->block));
    return mock->disk + start * mock->block;
}

static inline void mock_dataset(struct mock *mock, const struct nvme_sqe *sqe)
{
    struct nvme_range ranges[256];
    unsigned count = (sqe->cdw10 & 255) + 1;
    CHECK(sqe->cdw11 == NVME_DSM_DEALLOCATE && sqe->cdw10 < 256);
    mock_transfer(mock, sqe, (unsigned char *)ranges, count * sizeof ranges[0], true);
    for (unsigned i = 0; i < count; i++) {
        CHECK(ranges[i].blocks);
        memset(mock_disk(mock, ranges[i].start, ranges[i].blocks), 0, (size_t)ranges[i].blocks * mock->block);
    }
}

static inline void mock_execute(struct mock *mock, const struct nvme_sqe *sqe)
{
    uint64_t start = sqe->cdw10 | (uint64_t)sqe->cdw11 << 32, blocks = (sqe->cdw12 & 0xFFFF) + 1;
    CHECK(sqe->nsid == mock->nsid && !sqe->flags);
    atomic_fetch_add(&mock->done[sqe->opcode], 1);
    if (sqe->cdw12 & NVME_CDW12_FUA)
        atomic_fetch_add(&mock->fua, 1);
    switch (sqe->opcode) {
    case NVME_FLUSH:
        break;
    case NVME_READ:
    case NVME_WRITE:
        CHECK(blocks * mock->block <= mock->max_transfer);
        mock_transfer(mock, sqe, mock_disk(mock, start, blocks), blocks * mock->block, sqe->opcode == NVME_WRITE);
        break;
    case NVME_WRITE_ZEROES:
        if (sqe->cdw12 & NVME_CDW12_DEAC)
            atomic_fetch_add(&mock->deallocated, 1);
        memset(mock_disk(mock, start, blocks), 0, blocks * mock->block);
        break;
    case NVME_DATASET:
        mock_dataset(mock, sqe);
        break;
    default:
        CHECK(!"a known command");
    }
}

/* ---- queues ---- */

static inline uint32_t *mock_doorbell(struct mock *mock, uint32_t id, bool completion)
{
    return (uint32_t *)(mock->registers + 0x1000 + (id * 2 + completion) * 4);
}

static inline void mock_fetch(struct mock *mock, struct mock_queue *queue)
{
    uint32_t tail = __atomic_load_n(mock_doorbell(mock, queue->id, false), __ATOMIC_ACQUIRE);
    CHECK(tail < queue->depth);
    for (; queue->sq_head != tail; queue->sq_head = (queue->sq_head + 1) % queue->depth) {
        struct nvme_sqe sqe = queue->sq[queue->sq_head];
        struct mock_command *place = NULL;
        for (uint32_t i = 0; i < queue->depth; i++) {
            CHECK(!queue->commands[i].used || queue->commands[i].sqe.cid != sqe.cid);
            if (!queue->commands[i].used && !place)
                place = &queue->commands[i];
        }
        CHECK(place);
        uint64_t latency = atomic_load(&mock->latency_ns);
        *place = (struct mock_command){.sqe = sqe, .used = true};
        place->due_ns = bt_now_ns() + (latency ? latency / 2 + next_random(&mock->random) % latency / 2 : 0);
        if (atomic_load(&mock->hold_left)) {
            atomic_fetch_sub(&mock->hold_left, 1);
            atomic_fetch_add(&mock->held, 1);
            place->held = true;
        }
        queue->count++;
    }
}

static inline bool mock_has_room(struct mock *mock, const struct mock_queue *queue)
{
    uint32_t head = __atomic_load_n(mock_doorbell(mock, queue->id, true), __ATOMIC_ACQUIRE);
    CHECK(head < queue->depth);
    return (queue->cq_tail + 1) % queue->depth != head;
}

static inline void mock_post(struct mock_queue *queue, uint32_t place, uint32_t status)
{
    struct nvme_cqe *cqe = &queue->cq[queue->cq_tail];
    __atomic_store_n(&cqe->queue, place, __ATOMIC_RELAXED);
    __atomic_store_n(&cqe->status, status | queue->phase << 16, __ATOMIC_RELEASE);
    if (++queue->cq_tail == queue->depth) {
        queue->cq_tail = 0;
        queue->phase ^= 1;
    }
    queue->signal = true;
}

/* One completion, or something that only looks like it. */
static inline void mock_complete(struct mock *mock, struct mock_queue *queue, struct mock_command *command,
                                 unsigned status)
{
    uint32_t place = queue->id << 16 | queue->sq_head, value = command->sqe.cid | status << 17;
    switch (atomic_exchange(&mock->breach, MOCK_GOOD)) {
    case MOCK_CID_RANGE:
        value |= 0xFFFF;
        break;
    case MOCK_CID_FREE:
        value ^= 0x8000; /* another generation */
        break;
    case MOCK_CID_AGAIN:
        mock_post(queue, place, value);
        break;
    case MOCK_WRONG_QUEUE:
        place += 1 << 16;
        break;
    case MOCK_OLD_HEAD:
        place = queue->id << 16 | (queue->sq_head + queue->depth - 2) % queue->depth;
        break;
    case MOCK_HUGE_HEAD:
        place |= 0xFFFF;
        break;
    case MOCK_WRONG_PHASE:
        queue->phase ^= 1; /* as if it were the entry of the round before */
        mock_post(queue, place, value);
        queue->phase ^= 1;
        command->used = false;
        queue->count--;
        return;
    }
    mock_post(queue, place, value);
    command->used = false;
    queue->count--;
}

static inline unsigned mock_status(struct mock *mock, const struct nvme_sqe *sqe)
{
    unsigned opcode = atomic_load(&mock->fail_opcode);
    if (!atomic_load(&mock->fail_left) || (opcode && opcode != sqe->opcode + 1u))
        return 0;
    atomic_fetch_sub(&mock->fail_left, 1);
    return atomic_load(&mock->fail_status);
}

/* Completes what is due, beginning anywhere. */
static inline bool mock_work(struct mock *mock, struct mock_queue *queue)
{
    uint64_t now = bt_now_ns();
    uint32_t from = next_random(&mock->random) % queue->depth;
    bool any = false;
    for (uint32_t i = 0; i < queue->depth && queue->count && mock_has_room(mock, queue); i++) {
        struct mock_command *command = &queue->commands[(from + i) % queue->depth];
        if (!command->used || command->held || command->due_ns > now)
            continue;
        unsigned status = mock_status(mock, &command->sqe);
        if (!status)
            mock_execute(mock, &command->sqe);
        mock_complete(mock, queue, command, status);
        any = true;
    }
    return any;
}

static inline void *mock_main(void *opaque)
{
    struct mock *mock = opaque;
    struct timespec pause = {0, 20000};
    while (!atomic_load(&mock->stop)) {
        bool any = false;
        pthread_mutex_lock(&mock->lock);
        for (unsigned i = 0; i < MOCK_QUEUES && !atomic_load(&mock->asleep); i++) {
            struct mock_queue *queue = &mock->queues[i];
            if (!queue->depth)
                continue;
            mock_fetch(mock, queue);
            any |= mock_work(mock, queue);
            uint64_t one = 1;
            if (queue->signal && !atomic_load(&mock->silent))
                CHECK(write(queue->interrupt, &one, sizeof one) == sizeof one);
            queue->signal = false;
        }
        pthread_mutex_unlock(&mock->lock);
        if (any)
            sched_yield();
        else
            nanosleep(&pause, NULL);
    }
    return NULL;
}

/* ---- what Python does with a real one ---- */

static inline void mock_init(struct mock *mock, uint64_t size, uint32_t block, uint32_t max_transfer, uint32_t seed)
{
    memset(mock, 0, sizeof *mock);
    pthread_mutex_init(&mock->lock, NULL);
    pthread_mutex_init(&mock->iommu, NULL);
    mock->size = size;
    mock->block = block;
    mock->nsid = 3;
    mock->max_transfer = max_transfer;
    mock->random = seed * 2654435761u + 1;
    mock->registers = mmap(NULL, MOCK_REGISTERS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    mock->disk = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(mock->registers != MAP_FAILED && mock->disk != MAP_FAILED);
    CHECK(pthread_create(&mock->pthread, NULL, mock_main, mock) == 0);
}

/* Creates a queue pair, in memory that it maps. */
static inline struct bt_nvme_queue mock_queue_new(struct mock *mock, uint32_t id, uint32_t depth, uint32_t pages,
                                                  int thread)
{
    struct bt_nvme_layout layout;
    struct bt_nvme_queue made = {.id = id, .depth = depth, .pages = pages, .thread = thread};
    CHECK(bt_nvme_queue_layout(depth, pages, &layout) == 0);
    made.memory = mmap(NULL, layout.bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(made.memory != MAP_FAILED && mock_map(mock, made.memory, layout.bytes, &made.iova) == 0);
    made.interrupt = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    pthread_mutex_lock(&mock->lock);
    struct mock_queue *queue = &mock->queues[id - 1];
    queue->sq = (struct nvme_sqe *)((char *)made.memory + layout.submission);
    queue->cq = (struct nvme_cqe *)((char *)made.memory + layout.completion);
    queue->interrupt = made.interrupt;
    queue->id = id;
    queue->phase = 1;
    queue->depth = depth;
    pthread_mutex_unlock(&mock->lock);
    return made;
}

static inline void mock_queue_free(struct mock *mock, const struct bt_nvme_queue *queue)
{
    struct bt_nvme_layout layout;
    bt_nvme_queue_layout(queue->depth, queue->pages, &layout);
    pthread_mutex_lock(&mock->lock);
    mock->queues[queue->id - 1].depth = 0;
    pthread_mutex_unlock(&mock->lock);
    mock_unmap(mock, queue->iova, layout.bytes);
    munmap(queue->memory, layout.bytes);
    close(queue->interrupt);
}

/* Disables the controller, and makes the same queues again. */
static inline void mock_reset(struct mock *mock)
{
    pthread_mutex_lock(&mock->lock);
    for (unsigned i = 0; i < MOCK_QUEUES; i++) {
        struct mock_queue *queue = &mock->queues[i];
        if (!queue->depth)
            continue;
        queue->sq_head = queue->cq_tail = queue->count = 0;
        queue->phase = 1;
        memset(queue->commands, 0, sizeof queue->commands);
        __atomic_store_n(mock_doorbell(mock, queue->id, false), 0, __ATOMIC_RELEASE);
        __atomic_store_n(mock_doorbell(mock, queue->id, true), 0, __ATOMIC_RELEASE);
    }
    atomic_fetch_add(&mock->resets, 1);
    pthread_mutex_unlock(&mock->lock);
}

/* The Abort command. */
static inline bool mock_abort(struct mock *mock, uint32_t id, uint16_t cid)
{
    bool found = false;
    pthread_mutex_lock(&mock->lock);
    struct mock_queue *queue = &mock->queues[id - 1];
    for (uint32_t i = 0; i < queue->depth && !atomic_load(&mock->ignores_aborts); i++) {
        struct mock_command *command = &queue->commands[i];
        if (!command->used || command->sqe.cid != cid || !mock_has_room(mock, queue))
            continue;
        mock_complete(mock, queue, command, NVME_ABORTED);
        found = true;
    }
    atomic_fetch_add(&mock->aborts, found);
    pthread_mutex_unlock(&mock->lock);
    return found;
}

static inline void mock_free(struct mock *mock)
{
    atomic_store(&mock->stop, true);
    pthread_join(mock->pthread, NULL);
    munmap(mock->registers, MOCK_REGISTERS);
    munmap(mock->disk, mock->size);
    pthread_mutex_destroy(&mock->lock);
    pthread_mutex_destroy(&mock->iommu);
}

#endif
