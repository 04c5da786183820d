/* SPDX-License-Identifier: Apache-2.0 */
#include "ram_device.h"

static void change(struct ram *ram, const struct bt_io *io, uint64_t length)
{
    CHECK(bt_range_ok(io->offset, io->length, ram->capacity));
    if (io->op == BT_WRITE && ram->written)
        ram->written(ram, io);
    if (ram->unchanging)
        return;
    if (io->op == BT_WRITE)
        bt_iov_to_buffer(io->iov, io->iovcnt, 0, ram->bytes + io->offset, length);
    else
        memset(ram->bytes + io->offset, 0, length);
}

static void fill(struct ram *ram, const struct bt_io *io, uint64_t length)
{
    uint64_t size = bt_object_size(ram_object(ram));
    uint64_t inside = io->offset < size ? bt_min(length, size - io->offset) : 0;
    if (inside)
        bt_iov_from_buffer(io->iov, io->iovcnt, 0, ram->bytes + io->offset, inside);
    bt_iov_zero(io->iov, io->iovcnt, inside, length - inside);
}

static bool is_bad(const struct ram *ram, const struct bt_io *io)
{
    bool touches = io->op != BT_FLUSH && io->op != BT_STATUS && io->op != BT_CACHE;
    return touches && io->offset < ram->bad_end && io->offset + io->length > ram->bad_start;
}

static void check_vector(const struct bt_io *io)
{
    uint64_t total = 0;
    for (int i = 0; i < io->iovcnt; i++)
        total += io->iov[i].iov_len;
    CHECK(total == io->length);
}

static void perform(struct ram *ram, struct bt_io *io, int error)
{
    uint64_t length = error ? io->length / 2 : io->length;
    if (is_bad(ram, io))
        error = -EIO;
    if (io->op == BT_READ || io->op == BT_WRITE)
        check_vector(io);
    if (io->op == BT_READ)
        fill(ram, io, length);
    else if (io->op == BT_WRITE || io->op == BT_ZEROES || io->op == BT_DISCARD)
        change(ram, io, length);
    io->status_length = io->length;
    io->status_flags = 0;
    bt_io_finish(io, error);
}

static void submit(struct bt_io *io)
{
    struct ram *ram = (struct ram *)io->device;
    if (ram->at_once) {
        perform(ram, io, 0);
        return;
    }
    CHECK(ram->held_count < RAM_HELD);
    ram->held[ram->held_count++] = io;
}

static void destroy(struct bt_object *object)
{
    CHECK(((struct ram *)object)->held_count == 0);
    free(object);
}

bool ram_finish(struct ram *ram, unsigned which, int error)
{
    if (!ram->held_count)
        return false;
    which %= ram->held_count;
    struct bt_io *io = ram->held[which];
    ram->held_count--;
    memmove(&ram->held[which], &ram->held[which + 1], (ram->held_count - which) * sizeof *ram->held);
    perform(ram, io, error);
    return true;
}

struct ram *ram_new(bt_datapath *dp, uint64_t tag, uint8_t *bytes, uint64_t size, uint64_t capacity)
{
    static const struct bt_device_ops ops = {.submit = submit};
    static const struct bt_object_ops object_ops = {.destroy = destroy};
    struct ram *ram = calloc(1, sizeof *ram);
    CHECK(ram);
    bt_device_init(&ram->device, dp, &ops, &object_ops, tag, size);
    ram->bytes = bytes;
    ram->capacity = capacity;
    return ram;
}
