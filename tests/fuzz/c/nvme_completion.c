/* SPDX-License-Identifier: Apache-2.0 */
/* Fuzz target: an NVMe queue pair whose controller is the input: it completes commands in any order, with any
 * status, or writes what it likes into completions, commands, PRP lists and bounce pages; time passes, and Python
 * resets it.
 *
 * Every request ends exactly once; none ends between a breach of the protocol and the reset; while the controller is
 * honest the data is right; and at the end no slot, page or mapping is lost.
 *
 * Input: depth, flags, then steps. */
#define _GNU_SOURCE
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "fuzz.h"
#include "nvme_queue.h"

#define BLOCK 512u
#define DISK (512u << 10)
#define PAGES 40u
#define SHARED (256u << 10) /* of buffers that are mapped; as many are not */
#define REQUESTS 48u
#define MAX_DEPTH 20u
#define TAG 1u
#define SESSION 2u
#define COOKIE 3u
#define IOVA (1ull << 40)

static bt_datapath *dp;
static struct bt_thread *thread;
static bt_dma *dma;
static unsigned char *shared, *private, *memory, *disk, *registers;
static struct bt_nvme_layout layout;
static int interrupt;
static uint64_t skew_ns; /* how far the clock is ahead */
static bt_object *object;
static struct nvme *nvme;
static struct nvme_queue *queue;
static uint32_t depth;
static bool honest, breached, released, done_seen, starting;
static unsigned started, ended;

static struct asked {
    struct bt_request request;
    struct iovec iov[3];
    unsigned char *data;
    bool busy;
} requests[REQUESTS];

static struct command { /* fetched and not completed */
    struct nvme_sqe sqe;
    bool used;
} commands[MAX_DEPTH];
static uint32_t sq_head, cq_tail, phase;

/* The datapath's clock goes as the input says. */
int clock_gettime(clockid_t id, struct timespec *ts)
{
    long ret = syscall(SYS_clock_gettime, id, ts);
    if (id == CLOCK_MONOTONIC) {
        uint64_t now = (uint64_t)ts->tv_sec * 1000000000u + (uint64_t)ts->tv_nsec + skew_ns;
        ts->tv_sec = (time_t)(now / 1000000000u);
        ts->tv_nsec = (long)(now % 1000000000u);
    }
    return (int)ret;
}

static int map(void *opaque, void *address, uint64_t length, uint64_t *iova)
{
    (void)opaque, (void)length;
    *iova = (uintptr_t)address + IOVA;
    return 0;
}

static int unmap(void *opaque, uint64_t iova, uint64_t length)
{
    (void)opaque, (void)iova, (void)length;
    return 0;
}

static unsigned char *allocate(size_t length)
{
    void *made = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(made != MAP_FAILED);
    return made;
}

static void set_up(void)
{
    struct bt_dma_ops ops = {.map = map, .unmap = unmap};
    struct bt_dma_limits limits = {.bytes = DISK, .mappings = 64, .piece = 65536};
    struct bt_dma_counters counters = {0};
    dp = bt_datapath_new();
    CHECK(dp);
    thread = inline_thread_new(dp);
    shared = allocate(SHARED);
    private = allocate(SHARED);
    disk = allocate(DISK);
    registers = allocate(0x2000);
    CHECK(bt_nvme_queue_layout(MAX_DEPTH, PAGES, &layout) == 0);
    memory = allocate(layout.bytes);
    interrupt = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    dma = bt_dma_new(dp, &ops, NULL, &limits);
    CHECK(dma);
    bt_memory_add(dp, shared, SHARED);
    while (counters.mapped_bytes != SHARED) {
        usleep(1000);
        bt_dma_get_counters(dma, &counters);
    }
}

/* ---- requests ---- */

static void request_done(struct bt_request *request)
{
    struct asked *asked = BT_CONTAINER(request, struct asked, request);
    CHECK(asked->busy && request->ret <= 0 && request->ret > -4096);
    CHECK(!breached || starting || request->op == BT_STATUS); /* its memory may still be written to */
    asked->busy = false;
    ended++;
    if (!honest || request->ret < 0)
        return;
    if (request->op == BT_READ) {
        uint64_t at = 0;
        for (int i = 0; i < request->iovcnt; at += request->iov[i++].iov_len)
            CHECK(memcmp(request->iov[i].iov_base, disk + request->offset + at, request->iov[i].iov_len) == 0);
    }
}

/* Buffers do not overlap: each request has its own part of the memory. */
static void start(struct input *input)
{
    static const uint8_t ops[] = {BT_READ, BT_WRITE, BT_READ, BT_ZEROES, BT_DISCARD, BT_FLUSH, BT_STATUS, BT_CACHE};
    static struct bt_extent extent;
    uint8_t choice = take8(input), place = take8(input), how = take8(input);
    unsigned index = place % REQUESTS;
    struct asked *asked = &requests[index];
    uint64_t part = SHARED / REQUESTS & ~511ull, length = (1 + how % 9) * (uint64_t)BLOCK;
    if (asked->busy)
        return;
    memset(&asked->request, 0, sizeof asked->request);
    asked->request.op = ops[choice % 8];
    if (choice & 8 && asked->request.op > BT_WRITE)
        length *= 100;
    asked->data = (choice & 16 ? private : shared) + index * part + (choice & 32 ? take8(input) % 64 : 0);
    uint64_t first = choice & 64 ? 1 + take8(input) % (length - 1) : length;
    asked->iov[0] = (struct iovec){asked->data, first};
    asked->iov[1] = (struct iovec){asked->data + first, length - first};
    asked->request.thread = thread;
    asked->request.object = object;
    asked->request.done = request_done;
    asked->request.offset = (uint64_t)index * 8192; /* no two change the same blocks */
    if (length > 8192)
        length = 8192;
    asked->request.length = asked->request.op == BT_FLUSH ? 0 : length;
    asked->request.iov = asked->iov;
    asked->request.iovcnt = first < length ? 2 : 1;
    asked->request.extents = &extent;
    asked->request.extents_max = 1;
    asked->request.flags = choice & 128 ? how >> 5 & 7 : 0;
    asked->busy = true;
    started++;
    TRACE("start %u op %u length %lu\n", index, asked->request.op, asked->request.length);
    starting = true; /* some need no command */
    bt_request_start(&asked->request);
    starting = false;
}

/* ---- the controller ---- */

static uint32_t *doorbell(bool completion) { return (uint32_t *)(registers + 0x1008 + completion * 4); }

static void fetch(void)
{
    uint32_t tail = *doorbell(false);
    CHECK(tail < depth);
    for (; sq_head != tail; sq_head = (sq_head + 1) % depth)
        for (uint32_t i = 0; i < depth; i++)
            if (!commands[i].used) {
                commands[i] = (struct command){queue->sq[sq_head], true};
                break;
            }
}

static unsigned char *at_iova(uint64_t iova, uint64_t length)
{
    unsigned char *address = (unsigned char *)(uintptr_t)(iova - IOVA);
    bool in_shared = address >= shared && bt_range_ok((uint64_t)(address - shared), length, SHARED);
    bool in_pages = address >= memory && bt_range_ok((uint64_t)(address - memory), length, layout.bytes);
    CHECK(in_shared || in_pages);
    return address;
}

/* Only while honest: then PRPs are the driver's. */
static void transfer(const struct nvme_sqe *sqe, unsigned char *data, uint64_t length, bool to_disk)
{
    uint64_t entry = sqe->prp1;
    const uint64_t *list = NULL;
    for (uint64_t done = 0, n; done < length; done += n) {
        if (done && !list && length - done > 4096)
            list = (const uint64_t *)at_iova(sqe->prp2, 8);
        if (done)
            entry = list ? *list++ : sqe->prp2;
        CHECK(done ? !(entry & 4095) : !(entry & 3));
        n = bt_min(4096 - (entry & 4095), length - done);
        unsigned char *there = at_iova(entry, n);
        memcpy(to_disk ? data + done : there, to_disk ? there : data + done, n);
    }
}

static void execute(const struct nvme_sqe *sqe)
{
    uint64_t offset = (uint64_t)sqe->cdw10 * BLOCK, length = ((sqe->cdw12 & 0xFFFF) + 1) * BLOCK;
    if (!honest || sqe->opcode == NVME_FLUSH)
        return;
    if (sqe->opcode == NVME_DATASET)
        return; /* a hint */
    CHECK(sqe->nsid == 1 && sqe->cdw11 == 0 && bt_range_ok(offset, length, DISK));
    if (sqe->opcode == NVME_WRITE_ZEROES)
        memset(disk + offset, 0, length);
    else
        transfer(sqe, disk + offset, length, sqe->opcode == NVME_WRITE);
}

static void post(uint32_t place, uint32_t status)
{
    queue->cq[cq_tail].queue = place;
    queue->cq[cq_tail].status = status | phase << 16;
    if (++cq_tail == depth) {
        cq_tail = 0;
        phase ^= 1;
    }
}

static bool has_room(void) { return (cq_tail + 1) % depth != *doorbell(true); }

/* Completes a command; with what as its status, or with a mask upon all. */
static void complete(struct input *input, bool odd)
{
    uint8_t which = take8(input);
    uint16_t status = take8(input) & 1 ? take16(input) : 0;
    uint32_t place = 1 << 16 | sq_head;
    fetch();
    for (uint32_t i = 0; i < depth && has_room(); i++) {
        struct command *command = &commands[(which + i) % depth];
        if (!command->used)
            continue;
        uint32_t value = command->sqe.cid | (uint32_t)(status & 0x7FFF) << 17;
        if (odd) {
            honest = false;
            place ^= take32(input);
            value ^= take32(input) & ~0x10000u;
        } else if (!(status & NVME_STATUS_CODE)) {
            execute(&command->sqe);
        }
        command->used = false;
        TRACE("complete cid %x status %x\n", command->sqe.cid, status);
        post(place, value);
        break;
    }
}

static void scribble(struct input *input)
{
    uint32_t at = take32(input) % (uint32_t)layout.bytes, n = take8(input) % 32;
    honest = false;
    for (uint32_t i = 0; i < n && at + i < layout.bytes; i++)
        memory[at + i] = take8(input);
}

/* ---- Python ---- */

static void events(void)
{
    struct bt_event event;
    while (bt_events(dp, &event, 1)) {
        if (event.type == BT_EVENT_SESSION) {
            CHECK(event.tag == SESSION);
            breached |= (event.result & 0xFF) == BT_NVME_PROTOCOL;
        } else if (event.type == BT_EVENT_DONE) {
            CHECK(event.tag == COOKIE);
            done_seen = true;
        } else {
            CHECK(event.type == BT_EVENT_RELEASED && event.tag == TAG);
            released = true;
        }
    }
}

static void turn(void)
{
    inline_thread_turn(thread);
    events();
}

static void wait_done(void)
{
    for (int i = 0; !done_seen; i++) {
        CHECK(i < 100);
        turn();
    }
    done_seen = false;
}

static void reset(int error)
{
    TRACE("reset %d\n", error);
    bt_nvme_quiesce(object, COOKIE);
    wait_done();
    memset(commands, 0, sizeof commands);
    sq_head = cq_tail = 0;
    phase = 1;
    *doorbell(false) = *doorbell(true) = 0;
    breached = false;
    bt_nvme_resume(object, error);
    turn();
}

static void open_device(struct input *input)
{
    uint8_t flags = take8(input), limits = take8(input);
    struct bt_nvme_queue place = {.id = 1, .pages = PAGES, .interrupt = interrupt, .memory = memory};
    struct bt_nvme_options options = {
        .nsid = 1,
        .block_size = BLOCK,
        .size = DISK,
        .flags = flags & 63,
        .max_transfer = limits & 1 ? 4096 : 0,
        .zeroes_bytes = limits & 2 ? 2048 : 0,
        .discard_range_bytes = limits & 4 ? 1024 : 0,
        .discard_ranges = limits & 8 ? 2 : 0,
        .timeout_ns = 1000000000,
        .registers = registers,
        .registers_length = 0x2000,
        .stride = 4,
    };
    place.depth = depth;
    place.iova = (uintptr_t)memory + IOVA;
    memset(memory, 0, layout.bytes);
    memset(registers, 0, 0x2000);
    memset(disk, 0x5A, DISK);
    memset(commands, 0, sizeof commands);
    sq_head = cq_tail = 0;
    phase = 1;
    honest = true;
    breached = released = false;
    started = ended = 0;
    object = bt_nvme_new(dp, TAG, SESSION, flags & 64 ? NULL : dma, &options, &place, 1);
    CHECK(object);
    nvme = (struct nvme *)object;
    queue = &nvme->queues[0];
    turn();
}

static void nothing_is_lost(void)
{
    unsigned pages = 0, slots = 0;
    for (uint16_t page = queue->free_pages; page != NVME_NO_PAGE; page = queue->page_next[page])
        pages++;
    for (struct nvme_slot *slot = queue->free_slots; slot; slot = slot->next)
        slots++;
    CHECK(pages == PAGES - 1 && slots == depth - 1 && !queue->in_flight && !queue->waiting);
    for (uint64_t at = 0; at < SHARED; at += 65536) {
        struct dma_mapping *mapping = dma_get(dma, thread, (uintptr_t)shared + at, bt_now_ns());
        CHECK(mapping && mapping->uses[0].commands == 1);
        dma_put(mapping, thread);
    }
}

static void close_device(void)
{
    reset(-EIO);
    CHECK(started == ended);
    nothing_is_lost();
    bt_nvme_stop(object, COOKIE);
    wait_done();
    bt_object_unref(object);
    while (!released)
        turn();
}

static void step(struct input *input)
{
    switch (take8(input) % 16) {
    case 0 ... 4:
        start(input);
        break;
    case 5 ... 7:
        turn();
        break;
    case 8 ... 10:
        complete(input, false);
        break;
    case 11:
        complete(input, true);
        break;
    case 12: /* out of the blue */
        honest = false;
        post(take32(input), take32(input) & ~0x10000u);
        break;
    case 13:
        scribble(input);
        break;
    case 14:
        skew_ns += (uint64_t)take8(input) * 10000000;
        break;
    case 15:
        reset(take8(input) & 3 ? 0 : -ENODEV);
        break;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input input = {data, size};
    if (!dp)
        set_up();
    depth = 2 + take8(&input) % (MAX_DEPTH - 1);
    open_device(&input);
    while (input.left)
        step(&input);
    close_device();
    return 0;
}
