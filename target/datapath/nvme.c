/* SPDX-License-Identifier: Apache-2.0 */
/* The NVMe device: one queue pair for each I/O thread that has one; what Python asks of all of them. */
#include "nvme_queue.h"

static void destroy(struct bt_object *object)
{
    struct nvme *nvme = (struct nvme *)object;
    for (int i = 0; i < nvme->queue_count; i++)
        nvme_queue_free(&nvme->queues[i]);
    free(nvme);
}

static const struct bt_device_ops nvme_ops = {.submit = nvme_submit};
static const struct bt_object_ops nvme_object_ops = {.destroy = destroy};

/* ---- to and from the threads ---- */

static void start(struct bt_message *message, struct bt_thread *thread)
{
    struct nvme_queue *queue = BT_CONTAINER(message, struct nvme_queue, start);
    int ret = bt_watch_add(thread, &queue->watch, EPOLLIN);
    if (ret < 0) {
        queue->dead = ret;
        nvme_fail_waiting(queue, ret);
        return;
    }
    bt_poller_add(thread, &queue->poller);
    queue->attached = true;
    queue->running = true;
    nvme_pump(queue);
}

static void stop(struct bt_message *message, struct bt_thread *thread)
{
    struct nvme_queue *queue = BT_CONTAINER(message, struct nvme_queue, stop);
    struct nvme *nvme = queue->nvme;
    if (queue->attached) {
        bt_watch_remove(thread, &queue->watch);
        bt_poller_remove(thread, &queue->poller);
    }
    if (queue->timer_armed)
        bt_timer_cancel(thread, &queue->timer);
    queue->timer_armed = queue->attached = queue->running = false;
    queue->dead = -ESHUTDOWN;
    nvme_fail_waiting(queue, queue->dead);
    if (atomic_fetch_sub(&nvme->waiting_for, 1) == 1)
        bt_event_done(nvme->device.base.dp, nvme->cookie, 0);
}

void bt_nvme_stop(bt_object *object, uint64_t cookie)
{
    struct nvme *nvme = (struct nvme *)object;
    nvme->cookie = cookie;
    atomic_store(&nvme->waiting_for, nvme->queue_count);
    for (int i = 0; i < nvme->queue_count; i++)
        bt_thread_post(nvme->queues[i].thread, &nvme->queues[i].stop);
}

void bt_nvme_quiesce(bt_object *object, uint64_t cookie)
{
    struct nvme *nvme = (struct nvme *)object;
    nvme->cookie = cookie;
    atomic_store(&nvme->waiting_for, nvme->queue_count);
    for (int i = 0; i < nvme->queue_count; i++)
        bt_thread_post(nvme->queues[i].thread, &nvme->queues[i].quiesce);
}

void bt_nvme_resume(bt_object *object, int error)
{
    struct nvme *nvme = (struct nvme *)object;
    nvme->resume_error = error;
    for (int i = 0; i < nvme->queue_count; i++)
        bt_thread_post(nvme->queues[i].thread, &nvme->queues[i].resume);
}

void bt_nvme_get_counters(bt_object *object, struct bt_nvme_counters *out)
{
    struct nvme *nvme = (struct nvme *)object;
    uint64_t *sum = (uint64_t *)out, last = 0;
    memset(out, 0, sizeof *out);
    for (int q = 0; q < nvme->queue_count; q++) {
        const uint64_t *part = (const uint64_t *)&nvme->queues[q].counters;
        for (size_t i = 0; i < sizeof *out / sizeof *sum; i++)
            sum[i] += __atomic_load_n(&part[i], __ATOMIC_RELAXED);
        uint64_t status = __atomic_load_n(&nvme->queues[q].counters.last_status, __ATOMIC_RELAXED);
        last = status ? status : last;
    }
    out->last_status = last;
}

/* ---- making one ---- */

static bool is_power(uint64_t n) { return n && !(n & (n - 1)); }

static int check_options(const struct bt_nvme_options *options)
{
    uint64_t block = options->block_size;
    bool limits_ok = !options->max_transfer || options->max_transfer >= block;
    limits_ok &= !options->zeroes_bytes || options->zeroes_bytes >= block;
    limits_ok &= !options->discard_range_bytes || options->discard_range_bytes >= block;
    limits_ok &= !options->discard_bytes || options->discard_bytes >= block;
    if (!is_power(block) || block < 512 || block > 65536 || options->size % block || !limits_ok)
        return -EINVAL;
    if (!is_power(options->stride) || options->stride < 4 || !options->timeout_ns || !options->nsid)
        return -EINVAL;
    return options->discard_ranges <= NVME_MAX_RANGES ? 0 : -EINVAL;
}

static int check_queue(bt_datapath *dp, const struct bt_nvme_options *options, const struct bt_nvme_queue *queue)
{
    uint64_t doorbells = 0x1000 + ((uint64_t)queue->id * 2 + 2) * options->stride;
    if (!queue->id || queue->id > UINT16_MAX || doorbells > options->registers_length)
        return -EINVAL;
    if ((uintptr_t)queue->memory % NVME_PAGE || queue->iova % NVME_PAGE || !queue->memory)
        return -EINVAL;
    return bt_thread_get(dp, queue->thread) ? 0 : -EINVAL;
}

/* Threads without a pair share those of the others. */
static int assign_threads(struct nvme *nvme)
{
    for (int i = 0; i < nvme->queue_count; i++) {
        struct nvme_queue **own = &nvme->by_thread[nvme->queues[i].thread->index];
        if (*own)
            return -EINVAL;
        *own = &nvme->queues[i];
    }
    for (int i = 0; i < BT_MAX_THREADS; i++)
        if (!nvme->by_thread[i])
            nvme->by_thread[i] = &nvme->queues[i % nvme->queue_count];
    return 0;
}

static void set_options(struct nvme *nvme, const struct bt_nvme_options *options)
{
    uint64_t max = options->max_transfer ? options->max_transfer : BT_NVME_MAX_TRANSFER;
    uint64_t block = options->block_size;
    nvme->options = *options;
    nvme->block_bits = (unsigned)__builtin_ctzll(block);
    max = bt_min(bt_min(max, BT_NVME_MAX_TRANSFER), NVME_MAX_BLOCKS * block);
    nvme->max_transfer = (uint32_t)(max & ~(block - 1));
    nvme->options.zeroes_bytes &= ~(block - 1);
    nvme->options.discard_bytes &= ~(block - 1);
    nvme->options.discard_range_bytes &= ~(block - 1);
    if (!options->discard_ranges)
        nvme->options.discard_ranges = NVME_MAX_RANGES;
}

static int init_queues(struct nvme *nvme, const struct bt_nvme_queue *queues, int count)
{
    int ret = 0;
    for (int i = 0; i < count && ret == 0; i++) {
        struct nvme_queue *queue = &nvme->queues[nvme->queue_count++];
        queue->start.fn = start;
        queue->stop.fn = stop;
        queue->quiesce.fn = nvme_quiesce_message;
        queue->resume.fn = nvme_resume_message;
        ret = check_queue(nvme->device.base.dp, &nvme->options, &queues[i]);
        queue->watch.fd = -1;
        if (ret == 0)
            ret = nvme_queue_init(queue, nvme, &queues[i]);
    }
    return ret == 0 ? assign_threads(nvme) : ret;
}

bt_object *bt_nvme_new(bt_datapath *dp, uint64_t tag, uint64_t session, bt_dma *dma,
                       const struct bt_nvme_options *options, const struct bt_nvme_queue *queues, int count)
{
    int ret = count < 1 || count > BT_NVME_MAX_QUEUES ? -EINVAL : check_options(options);
    struct nvme *nvme = ret == 0 ? calloc(1, sizeof *nvme + (size_t)count * sizeof nvme->queues[0]) : NULL;
    if (!nvme) {
        errno = ret < 0 ? -ret : ENOMEM;
        return NULL;
    }
    bt_device_init(&nvme->device, dp, &nvme_ops, &nvme_object_ops, tag, options->size);
    nvme->device.base.takes_fua = true;
    nvme->session = session;
    nvme->dma = dma;
    set_options(nvme, options);
    ret = init_queues(nvme, queues, count);
    if (ret < 0) {
        free(nvme->device.base.counters);
        destroy(&nvme->device.base);
        errno = -ret;
        return NULL;
    }
    for (int i = 0; i < count; i++)
        bt_thread_post(nvme->queues[i].thread, &nvme->queues[i].start);
    return &nvme->device.base;
}
