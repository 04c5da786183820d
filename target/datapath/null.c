/* SPDX-License-Identifier: Apache-2.0 */
/* The null device: discards data and returns zeros, or nothing at all; with an optional latency. */
#include "core.h"

struct null {
    struct bt_device device;
    uint64_t latency_ns;
    bool read_zeroes;
};

struct null_wait { /* lies in the io's scratch */
    struct bt_timer timer;
};

static void count(struct bt_device *device, struct bt_thread *thread, int op, uint64_t offset, uint64_t length,
                  bool waited)
{
    struct bt_counters *counters = bt_counters_of(&device->base, thread);
    bt_count_request(&device->base, thread, op, offset, length);
    bt_count(waited ? &counters->engine_done : &counters->inline_done, 1);
}

static void answer(struct bt_io *io)
{
    struct null *null = (struct null *)io->device;
    if (io->op == BT_READ && null->read_zeroes)
        bt_iov_zero(io->iov, io->iovcnt, 0, io->length);
    io->status_length = io->length;
    io->status_flags = null->read_zeroes ? BT_EXTENT_ZERO : 0;
    bt_io_finish(io, 0);
}

static void latency_over(struct bt_timer *timer, struct bt_thread *thread)
{
    (void)thread;
    answer(BT_CONTAINER(timer, struct bt_io, scratch));
}

static void submit(struct bt_io *io)
{
    struct null *null = (struct null *)io->device;
    count(io->device, io->thread, io->op, io->offset, io->length, null->latency_ns != 0);
    if (!null->latency_ns) {
        answer(io);
        return;
    }
    struct bt_timer *timer = (struct bt_timer *)io->scratch;
    _Static_assert(sizeof *timer <= sizeof io->scratch, "the timer lies in scratch");
    timer->at_ns = bt_now_ns() + null->latency_ns;
    timer->fn = latency_over;
    bt_timer_add(io->thread, timer);
}

static int try_inline(struct bt_device *device, struct bt_thread *thread, int op, uint32_t flags, uint64_t offset,
                      const struct iovec *iov, int iovcnt, uint64_t length)
{
    struct null *null = (struct null *)device;
    (void)flags;
    if (null->latency_ns)
        return -EAGAIN;
    if (op == BT_READ && null->read_zeroes)
        bt_iov_zero(iov, iovcnt, 0, length);
    count(device, thread, op, offset, length, false);
    return 0;
}

static void destroy(struct bt_object *object) { free(object); }

static const struct bt_device_ops null_ops = {.submit = submit, .try_inline = try_inline};
static const struct bt_object_ops null_object_ops = {.destroy = destroy};

bt_object *bt_null_new(bt_datapath *dp, uint64_t tag, uint64_t size, uint64_t latency_ns, bool read_zeroes)
{
    struct null *null = calloc(1, sizeof *null);
    if (!null)
        return NULL;
    bt_device_init(&null->device, dp, &null_ops, &null_object_ops, tag, size);
    null->latency_ns = latency_ns;
    null->read_zeroes = read_zeroes;
    return &null->device.base;
}
