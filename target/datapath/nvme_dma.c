/* SPDX-License-Identifier: Apache-2.0 */
/* Shared memory in an IOMMU domain. I/O threads look mappings up in a sorted table that is replaced, never changed;
 * one worker at a time changes it, because the kernel's calls are slow.
 *
 * A mapping that is closed takes no new command. A command counts itself in, then looks whether the mapping is
 * closed; who evicts closes it, then looks whether anybody is counted. So one of them sees the other. */
#define _GNU_SOURCE
#include "nvme_dma.h"

#define RETRY_NS 100000000ull /* after a piece found no room */
#define FAILED_NS 1000000000ull
#define MAX_WANTED 64 /* pieces that wait to be mapped */
#define MAX_REFUSED 16

struct dma_entry {
    uint64_t start, end;
    struct dma_mapping *mapping;
};

struct dma_table {
    size_t count;
    struct dma_entry entries[]; /* sorted, disjoint */
};

enum dma_task_kind {
    DMA_SHARE, /* map all of it that there is room for */
    DMA_WANT,  /* a request met it: map it, evict others */
    DMA_DROP,  /* unmap it, then release drop */
    DMA_CLOSE,
};

struct dma_task {
    struct dma_task *next;
    enum dma_task_kind kind;
    uint64_t start, end;
    struct bt_memory_drop *drop;
};

struct dma_refused { /* memory that the kernel does not let be mapped, though it does others */
    uint64_t start, end, until_ns;
};

struct dma_run { /* of the worker */
    struct bt_work work;
    bt_dma *dma;
};

struct bt_dma {
    bt_datapath *dp;
    struct bt_dma_ops ops;
    void *opaque;
    struct bt_dma_limits limits;
    struct bt_memory_listener listener;
    _Atomic(struct dma_table *) table; /* replaced by the worker, with the lock held */
    _Atomic uint64_t not_before_ns;    /* nothing is wanted until then */
    pthread_mutex_t lock;              /* below */
    struct dma_task *tasks, **tail;
    unsigned wanted;
    struct dma_refused refused[MAX_REFUSED];
    unsigned next_refused;
    bool working;
    struct bt_dma_counters counters;
    uint64_t close_cookie;
};

/* ---- look-up ---- */

static struct dma_table *current(bt_dma *dma) { return atomic_load_explicit(&dma->table, memory_order_acquire); }

/* The index of the first entry that ends after address. */
static size_t position(const struct dma_table *table, uint64_t address)
{
    size_t low = 0, high = table->count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (table->entries[middle].end <= address)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static bool overlaps(const struct dma_table *table, uint64_t start, uint64_t end)
{
    size_t at = position(table, start);
    return at < table->count && table->entries[at].start < end;
}

static void start_work(bt_dma *dma);

/* With the lock held. */
static void add_task(bt_dma *dma, struct dma_task task)
{
    struct dma_task *copy = malloc(sizeof *copy);
    if (!copy)
        abort();
    *copy = task;
    copy->next = NULL;
    *dma->tail = copy;
    dma->tail = &copy->next;
    start_work(dma);
}

static bool is_wanted(const bt_dma *dma, uint64_t start)
{
    for (const struct dma_task *task = dma->tasks; task; task = task->next)
        if (task->kind == DMA_WANT && task->start == start)
            return true;
    return false;
}

/* With the lock held. */
static bool is_refused(const bt_dma *dma, uint64_t address, uint64_t now_ns)
{
    for (const struct dma_refused *r = dma->refused; r < dma->refused + MAX_REFUSED; r++)
        if (address >= r->start && address < r->end && now_ns < r->until_ns)
            return true;
    return false;
}

/* A request met memory that is not mapped. */
static void want(bt_dma *dma, uint64_t address, uint64_t now_ns)
{
    uint64_t start, end, piece = address & ~(uint64_t)(dma->limits.piece - 1);
    if (now_ns < atomic_load_explicit(&dma->not_before_ns, memory_order_relaxed))
        return;
    if (!bt_memory_find(dma->dp, address, &start, &end))
        return;
    start = bt_max(start, piece);
    end = bt_min(end, piece + dma->limits.piece);
    pthread_mutex_lock(&dma->lock);
    if (dma->wanted < MAX_WANTED && !is_wanted(dma, start) && !is_refused(dma, start, now_ns) &&
        !overlaps(current(dma), start, end)) {
        dma->wanted++;
        add_task(dma, (struct dma_task){.kind = DMA_WANT, .start = start, .end = end});
    }
    pthread_mutex_unlock(&dma->lock);
}

struct dma_mapping *dma_get(bt_dma *dma, struct bt_thread *thread, uint64_t address, uint64_t now_ns)
{
    const struct dma_table *table = current(dma);
    size_t at = position(table, address);
    if (at == table->count || table->entries[at].start > address) {
        want(dma, address, now_ns);
        return NULL;
    }
    struct dma_mapping *mapping = table->entries[at].mapping;
    struct dma_use *use = &mapping->uses[thread->index];
    atomic_fetch_add_explicit(&use->commands, 1, memory_order_seq_cst);
    if (atomic_load_explicit(&mapping->closed, memory_order_seq_cst)) {
        dma_put(mapping, thread);
        return NULL;
    }
    atomic_store_explicit(&use->used_ns, now_ns, memory_order_relaxed);
    return mapping;
}

/* ---- the table's changes: on the worker ---- */

static struct dma_table *table_new(size_t count)
{
    struct dma_table *table = malloc(sizeof *table + count * sizeof table->entries[0]);
    if (!table)
        abort();
    table->count = count;
    return table;
}

static void count_mapped(bt_dma *dma, const struct dma_mapping *mapping, bool more)
{
    uint64_t length = mapping->end - mapping->start;
    dma->counters.mapped_bytes += more ? length : -length;
    dma->counters.mappings += more ? 1 : (uint64_t)-1;
    dma->counters.maps += more;
    dma->counters.unmaps += !more;
}

/* The entry at this index comes in (mapping) or goes (NULL). I/O threads may be looking at the old table. */
static void replace_table(bt_dma *dma, size_t at, struct dma_mapping *mapping)
{
    struct dma_table *old = current(dma);
    size_t skip = mapping ? 0 : 1;
    struct dma_table *table = table_new(old->count + (mapping ? 1 : 0) - skip);
    memcpy(table->entries, old->entries, at * sizeof table->entries[0]);
    if (mapping)
        table->entries[at] = (struct dma_entry){mapping->start, mapping->end, mapping};
    memcpy(table->entries + at + (mapping ? 1 : 0), old->entries + at + skip,
           (old->count - at - skip) * sizeof table->entries[0]);
    pthread_mutex_lock(&dma->lock);
    count_mapped(dma, mapping ? mapping : old->entries[at].mapping, mapping != NULL);
    atomic_store_explicit(&dma->table, table, memory_order_release);
    pthread_mutex_unlock(&dma->lock);
    bt_grace(dma->dp, free, old);
}

static void failed(bt_dma *dma, int error, uint64_t pause_ns)
{
    atomic_store_explicit(&dma->not_before_ns, bt_now_ns() + pause_ns, memory_order_relaxed);
    if (!error)
        return;
    pthread_mutex_lock(&dma->lock);
    dma->counters.failures++;
    dma->counters.last_error = (uint64_t)-error;
    pthread_mutex_unlock(&dma->lock);
}

/* Where there is no room for any, nothing is wanted for a while; else none of this region. */
static void refused(bt_dma *dma, int error, uint64_t start, uint64_t end)
{
    if (error == -ENOMEM || error == -ENOSPC) {
        failed(dma, error, FAILED_NS);
        return;
    }
    failed(dma, error, 0);
    pthread_mutex_lock(&dma->lock);
    dma->refused[dma->next_refused++ % MAX_REFUSED] = (struct dma_refused){start, end, bt_now_ns() + FAILED_NS};
    pthread_mutex_unlock(&dma->lock);
}

/* The mapping at this index, which no command uses, goes. */
static void unmap(bt_dma *dma, size_t at)
{
    struct dma_mapping *mapping = current(dma)->entries[at].mapping;
    atomic_store(&mapping->closed, true);
    int ret = dma->ops.unmap(dma->opaque, mapping->iova, mapping->end - mapping->start);
    if (ret < 0)
        failed(dma, ret, 0);
    replace_table(dma, at, NULL);
    bt_grace(dma->dp, free, mapping);
}

static uint32_t commands_of(struct dma_mapping *mapping, uint64_t *used_ns)
{
    uint32_t commands = 0;
    *used_ns = mapping->made_ns;
    for (int i = 0; i < BT_MAX_THREADS; i++) {
        commands += atomic_load(&mapping->uses[i].commands);
        *used_ns = bt_max(*used_ns, atomic_load_explicit(&mapping->uses[i].used_ns, memory_order_relaxed));
    }
    return commands;
}

/* Unmaps what was used least recently, if that was long enough ago. */
static bool evict(bt_dma *dma)
{
    const struct dma_table *table = current(dma);
    uint64_t oldest_ns = UINT64_MAX, used_ns;
    size_t oldest = 0;
    for (size_t i = 0; i < table->count; i++) {
        uint32_t commands = commands_of(table->entries[i].mapping, &used_ns);
        if (!commands && used_ns < oldest_ns) {
            oldest_ns = used_ns;
            oldest = i;
        }
    }
    if (oldest_ns == UINT64_MAX || bt_now_ns() - oldest_ns < dma->limits.idle_ns)
        return false;
    struct dma_mapping *mapping = table->entries[oldest].mapping;
    atomic_store_explicit(&mapping->closed, true, memory_order_seq_cst);
    if (commands_of(mapping, &used_ns)) {
        atomic_store(&mapping->closed, false); /* a command was quicker */
        return false;
    }
    unmap(dma, oldest);
    pthread_mutex_lock(&dma->lock);
    dma->counters.evictions++;
    pthread_mutex_unlock(&dma->lock);
    return true;
}

static bool has_room(bt_dma *dma, uint64_t length)
{
    const struct bt_dma_counters *now = &dma->counters; /* the table's, which only the worker changes */
    return now->mappings < dma->limits.mappings && now->mapped_bytes + length <= dma->limits.bytes;
}

/* False: no more can be mapped now. */
static bool map_piece(bt_dma *dma, uint64_t start, uint64_t end, bool evicting)
{
    uint64_t region_start, region_end;
    if (!bt_memory_find(dma->dp, start, &region_start, &region_end) || region_end < end)
        return true; /* it is gone; its drop waits behind this task */
    if (overlaps(current(dma), start, end))
        return true;
    while (!has_room(dma, end - start))
        if (!evicting || !evict(dma)) {
            failed(dma, 0, RETRY_NS);
            return false;
        }
    struct dma_mapping *mapping = aligned_alloc(64, sizeof *mapping);
    if (!mapping)
        abort();
    memset(mapping, 0, sizeof *mapping);
    mapping->start = start;
    mapping->end = end;
    mapping->made_ns = bt_now_ns();
    int ret = dma->ops.map(dma->opaque, (void *)(uintptr_t)start, end - start, &mapping->iova);
    if (ret < 0) {
        free(mapping);
        refused(dma, ret, region_start, region_end);
        return false;
    }
    replace_table(dma, position(current(dma), start), mapping);
    return true;
}

static void map_all(bt_dma *dma, const struct dma_task *task)
{
    uint64_t piece = dma->limits.piece, end;
    for (uint64_t start = task->start; start < task->end; start = end) {
        end = bt_min(task->end, (start & ~(piece - 1)) + piece);
        if (!map_piece(dma, start, end, task->kind == DMA_WANT))
            return;
    }
}

static void unmap_all(bt_dma *dma, uint64_t start, uint64_t end)
{
    while (overlaps(current(dma), start, end))
        unmap(dma, position(current(dma), start));
}

/* ---- the worker ---- */

static struct dma_task *next_task(bt_dma *dma);

/* Owners of memory must see that it is unmapped, so the registry is left after that; what came meanwhile holds
 * memory that is not mapped any more. */
static void finish_close(bt_dma *dma)
{
    bt_datapath *dp = dma->dp;
    uint64_t cookie = dma->close_cookie;
    unmap_all(dma, 0, UINT64_MAX);
    bt_memory_unlisten(dp, &dma->listener);
    for (struct dma_task *task; (task = next_task(dma)); free(task))
        if (task->kind == DMA_DROP)
            bt_memory_release(task->drop);
    bt_grace(dp, free, current(dma));
    if (dma->ops.close)
        dma->ops.close(dma->opaque);
    pthread_mutex_destroy(&dma->lock);
    free(dma);
    bt_event_done(dp, cookie, 0);
}

/* False: it was the last one, and dma is gone. */
static bool run_task(bt_dma *dma, struct dma_task *task)
{
    switch (task->kind) {
    case DMA_SHARE:
    case DMA_WANT:
        map_all(dma, task);
        break;
    case DMA_DROP:
        unmap_all(dma, task->start, task->end);
        bt_memory_release(task->drop);
        break;
    case DMA_CLOSE:
        finish_close(dma);
        return false;
    }
    return true;
}

static struct dma_task *next_task(bt_dma *dma)
{
    pthread_mutex_lock(&dma->lock);
    struct dma_task *task = dma->tasks;
    if (task) {
        dma->tasks = task->next;
        if (!dma->tasks)
            dma->tail = &dma->tasks;
        dma->wanted -= task->kind == DMA_WANT;
    } else {
        dma->working = false;
    }
    pthread_mutex_unlock(&dma->lock);
    return task;
}

static void run_tasks(bt_dma *dma)
{
    bool more = true;
    for (struct dma_task *task; more && (task = next_task(dma));) {
        more = run_task(dma, task);
        free(task);
    }
}

static void work_run(struct bt_work *work) { run_tasks(BT_CONTAINER(work, struct dma_run, work)->dma); }

static void work_done(struct bt_work *work) { free(BT_CONTAINER(work, struct dma_run, work)); }

/* With the lock held. */
static void start_work(bt_dma *dma)
{
    if (dma->working)
        return;
    struct dma_run *run = malloc(sizeof *run);
    if (!run)
        abort();
    dma->working = true;
    *run = (struct dma_run){.work = {.thread = dma->dp->threads[0], .run = work_run, .done = work_done}, .dma = dma};
    bt_pool_submit(dma->dp, &run->work);
}

/* ---- what the registry says ---- */

static void added(struct bt_memory_listener *listener, uint64_t start, uint64_t end)
{
    bt_dma *dma = BT_CONTAINER(listener, struct bt_dma, listener);
    pthread_mutex_lock(&dma->lock);
    if (dma->limits.bytes)
        add_task(dma, (struct dma_task){.kind = DMA_SHARE, .start = start, .end = end});
    pthread_mutex_unlock(&dma->lock);
}

static void removed(struct bt_memory_listener *listener, uint64_t start, uint64_t end, struct bt_memory_drop *drop)
{
    bt_dma *dma = BT_CONTAINER(listener, struct bt_dma, listener);
    pthread_mutex_lock(&dma->lock);
    if (dma->working || overlaps(current(dma), start, end)) {
        bt_memory_hold(drop);
        add_task(dma, (struct dma_task){.kind = DMA_DROP, .start = start, .end = end, .drop = drop});
    }
    pthread_mutex_unlock(&dma->lock);
}

/* ---- the control thread's side ---- */

bt_dma *bt_dma_new(bt_datapath *dp, const struct bt_dma_ops *ops, void *opaque, const struct bt_dma_limits *limits)
{
    bool sane = limits->piece >= DMA_PAGE && !(limits->piece & (limits->piece - 1));
    if (!sane || !dp->threads[0]) {
        errno = EINVAL;
        return NULL;
    }
    int ret = bt_pool_ready(dp); /* its work must not run where the lock is held, nor on an I/O thread */
    bt_dma *dma = ret == 0 ? calloc(1, sizeof *dma) : NULL;
    if (!dma) {
        errno = ret < 0 ? -ret : ENOMEM;
        return NULL;
    }
    dma->dp = dp;
    dma->ops = *ops;
    dma->opaque = opaque;
    dma->limits = *limits;
    dma->tail = &dma->tasks;
    atomic_store(&dma->table, table_new(0));
    pthread_mutex_init(&dma->lock, NULL);
    dma->listener.added = added;
    dma->listener.removed = removed;
    bt_memory_listen(dp, &dma->listener);
    return dma;
}

int bt_dma_map(bt_dma *dma, void *address, uint64_t length, uint64_t *iova)
{
    if (!length || ((uintptr_t)address | length) % DMA_PAGE)
        return -EINVAL;
    return dma->ops.map(dma->opaque, address, length, iova);
}

int bt_dma_unmap(bt_dma *dma, uint64_t iova, uint64_t length) { return dma->ops.unmap(dma->opaque, iova, length); }

void bt_dma_get_counters(bt_dma *dma, struct bt_dma_counters *out)
{
    pthread_mutex_lock(&dma->lock);
    *out = dma->counters;
    pthread_mutex_unlock(&dma->lock);
}

void bt_dma_free(bt_dma *dma, uint64_t cookie)
{
    pthread_mutex_lock(&dma->lock);
    dma->close_cookie = cookie;
    add_task(dma, (struct dma_task){.kind = DMA_CLOSE});
    pthread_mutex_unlock(&dma->lock); /* the worker waits for it before it can free dma */
}
