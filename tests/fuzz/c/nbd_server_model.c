/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <sys/socket.h>
#include <unistd.h>

#include "nbd_server_model.h"

uint64_t model_good[CALLS];
bool model_failed[CALLS];

uint8_t model_disk[MODEL_SIZE];
static const uint8_t zeros[REGION];

static void make_disk(void)
{
    for (uint64_t i = 0; i < MODEL_SIZE; i++)
        model_disk[i] = i / 4096 % 5 == 2 ? 0 : (uint8_t)(1 + (i / 512 * 7 + i) % 229);
}

void model_begin(struct server_model *model, int fd, const struct bt_nbdc_link *link)
{
    if (!model_disk[0])
        make_disk();
    model->fd = fd;
    model->link = *link;
    model->have = model->payload_left = model->out_length = model->out_sent = 0;
    model->count = 0;
    model->lied = model->illegal = model->stopped = false;
}

void model_close(struct server_model *model)
{
    if (model->fd >= 0)
        close(model->fd);
    model->fd = -1;
    model->stopped = model->illegal = true;
}

static bool extended(const struct server_model *model) { return model->link.mode == BT_NBDC_EXTENDED; }

static bool can(const struct server_model *model, uint32_t flag) { return model->link.transmission_flags & flag; }

/* ---- what the client may ask ---- */

static uint32_t allowed_flags(const struct server_model *model, uint16_t type)
{
    uint32_t fua = can(model, NBD_FLAG_SEND_FUA) ? NBD_CMD_FLAG_FUA : 0;
    switch (type) {
    case NBD_CMD_WRITE:
        return fua | (extended(model) ? NBD_CMD_FLAG_PAYLOAD_LEN : 0);
    case NBD_CMD_WRITE_ZEROES:
        return fua | NBD_CMD_FLAG_NO_HOLE | (can(model, NBD_FLAG_SEND_FAST_ZERO) ? NBD_CMD_FLAG_FAST_ZERO : 0);
    case NBD_CMD_TRIM:
        return fua;
    case NBD_CMD_BLOCK_STATUS:
        return NBD_CMD_FLAG_REQ_ONE;
    default:
        return 0;
    }
}

static bool known_command(const struct server_model *model, uint16_t type)
{
    static const uint32_t needs[] = {[NBD_CMD_FLUSH] = NBD_FLAG_SEND_FLUSH,
                                     [NBD_CMD_TRIM] = NBD_FLAG_SEND_TRIM,
                                     [NBD_CMD_CACHE] = NBD_FLAG_SEND_CACHE,
                                     [NBD_CMD_WRITE_ZEROES] = NBD_FLAG_SEND_WRITE_ZEROES,
                                     [NBD_CMD_BLOCK_STATUS] = 0};
    if (type == NBD_CMD_BLOCK_STATUS)
        return model->link.context_id >= 0 && model->link.mode != BT_NBDC_SIMPLE;
    return type < sizeof needs / sizeof *needs && (!needs[type] || can(model, needs[type]));
}

static void check_request(struct server_model *model, const struct wanted *wanted)
{
    uint64_t block = model->link.block;
    bool change = wanted->type == NBD_CMD_WRITE || wanted->type == NBD_CMD_TRIM ||
                  wanted->type == NBD_CMD_WRITE_ZEROES;
    TRACE("request type %u flags %u %lu+%lu\n", wanted->type, wanted->flags, (unsigned long)wanted->offset,
          (unsigned long)wanted->length);
    CHECK(known_command(model, wanted->type) && !(change && can(model, NBD_FLAG_READ_ONLY)));
    CHECK(!(wanted->flags & ~allowed_flags(model, wanted->type)));
    CHECK(!extended(model) || (wanted->type == NBD_CMD_WRITE) == !!(wanted->flags & NBD_CMD_FLAG_PAYLOAD_LEN));
    if (wanted->type == NBD_CMD_FLUSH) {
        CHECK(!wanted->offset && !wanted->length);
        return;
    }
    CHECK(wanted->length && bt_range_ok(wanted->offset, wanted->length, MODEL_SIZE));
    CHECK(wanted->offset % block == 0 && wanted->length % block == 0);
    if (wanted->type == NBD_CMD_READ || wanted->type == NBD_CMD_WRITE)
        CHECK(wanted->length <= model->link.max_payload);
    for (unsigned i = 0; i < model->count; i++)
        CHECK(!model->wanted[i].open || model->wanted[i].cookie != wanted->cookie);
}

static struct wanted *room(struct server_model *model)
{
    for (unsigned i = 0; i < model->count; i++)
        if (!model->wanted[i].open)
            return &model->wanted[i];
    CHECK(model->count < 512);
    return &model->wanted[model->count++];
}

static bool take_request(struct server_model *model)
{
    const uint8_t *wire = model->in;
    size_t head = extended(model) ? NBD_EXTENDED_BYTES : NBD_REQUEST_BYTES;
    if (model->have < head)
        return false;
    CHECK(nbd_get32(wire) == (extended(model) ? NBD_EXTENDED_REQUEST_MAGIC : NBD_REQUEST_MAGIC));
    struct wanted wanted = {
        .flags = nbd_get16(wire + 4),
        .type = nbd_get16(wire + 6),
        .cookie = nbd_get64(wire + 8),
        .offset = nbd_get64(wire + 16),
        .length = extended(model) ? nbd_get64(wire + 24) : nbd_get32(wire + 24),
        .open = true,
    };
    model->have -= head;
    memmove(model->in, model->in + head, model->have);
    if (wanted.type == NBD_CMD_DISC) {
        model->stopped = true;
        return true;
    }
    check_request(model, &wanted);
    struct wanted *slot = room(model);
    *slot = wanted;
    if (wanted.length <= MODEL_PAYLOAD)
        memset(model->covered[slot - model->wanted], 0, wanted.length);
    if (wanted.type != NBD_CMD_FLUSH && wanted.offset % REGION < 4096) { /* calls begin there: it is made (again) */
        model_good[wanted.offset / REGION] = 0;
        model_failed[wanted.offset / REGION] = false;
    }
    if (wanted.type == NBD_CMD_WRITE) {
        model->payload_left = wanted.length;
        model->payload_at = wanted.offset;
    }
    return true;
}

static bool take_payload(struct server_model *model)
{
    size_t n = bt_min(model->payload_left, model->have);
    bool zeroes = model->payload_at / REGION % 4 == 3; /* regions where the harness makes ZEROES */
    CHECK(memcmp(model->in, zeroes ? zeros : model_disk + model->payload_at, n) == 0);
    model->payload_left -= n;
    model->payload_at += n;
    model->have -= n;
    memmove(model->in, model->in + n, model->have);
    return n;
}

bool model_read(struct server_model *model)
{
    bool some = false;
    while (model->fd >= 0 && !model->stopped) {
        ssize_t n = recv(model->fd, model->in + model->have, sizeof model->in - model->have, MSG_DONTWAIT);
        if (n == 0 || (n < 0 && errno == ECONNRESET))
            model->stopped = true;
        if (n <= 0)
            break;
        some = true;
        model->have += (size_t)n;
        while (model->payload_left ? take_payload(model) : take_request(model))
            ;
    }
    return some;
}

/* ---- answers ---- */

static uint8_t *put(struct server_model *model, size_t length)
{
    static uint8_t nowhere[MODEL_PAYLOAD + 4096];
    if (sizeof model->out - model->out_length < length) {
        model->illegal = model->lied = true; /* it does not fit: the client gets half of it */
        CHECK(length <= sizeof nowhere);
        return nowhere;
    }
    uint8_t *at = model->out + model->out_length;
    model->out_length += length;
    return at;
}

bool model_write(struct server_model *model, size_t most)
{
    size_t n = bt_min(most, model->out_length - model->out_sent);
    if (model->fd < 0 || !n)
        return false;
    ssize_t sent = send(model->fd, model->out + model->out_sent, n, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent <= 0)
        return false;
    model->out_sent += (size_t)sent;
    if (model->out_sent == model->out_length)
        model->out_sent = model->out_length = 0;
    return true;
}

void model_raw(struct server_model *model, struct input *in, size_t length)
{
    length = bt_min(length, in->left);
    memcpy(put(model, length), in->at, length);
    in->at += length;
    in->left -= length;
    model->illegal = model->lied = true;
}

static uint8_t *chunk(struct server_model *model, const struct wanted *wanted, uint16_t type, uint64_t length,
                      bool done)
{
    size_t head = extended(model) ? NBD_EXTENDED_BYTES : NBD_CHUNK_BYTES;
    uint8_t *wire = put(model, head + length);
    nbd_put32(wire, extended(model) ? NBD_EXTENDED_REPLY_MAGIC : NBD_STRUCTURED_REPLY_MAGIC);
    nbd_put16(wire + 4, done ? NBD_REPLY_FLAG_DONE : 0);
    nbd_put16(wire + 6, type);
    nbd_put64(wire + 8, wanted->cookie);
    if (extended(model)) {
        nbd_put64(wire + 16, wanted->offset);
        nbd_put64(wire + 24, length);
    } else {
        nbd_put32(wire + 16, (uint32_t)length);
    }
    return wire + head;
}

static void cover(struct server_model *model, struct wanted *wanted, uint64_t at, uint64_t length)
{
    uint8_t *covered = model->covered[wanted - model->wanted];
    uint64_t before = 0;
    for (uint64_t i = at; i < at + length; i++)
        before += covered[i];
    memset(covered + at, 1, length);
    wanted->covered += length - before;
    model->illegal |= before;
}

/* The reply is over. An honest server has told all, or an error. */
static void over(struct server_model *model, struct wanted *wanted)
{
    bool whole = wanted->type != NBD_CMD_READ || wanted->covered == wanted->length;
    wanted->open = false;
    if (!wanted->failed && !whole)
        model->illegal = true;
    if (wanted->type == NBD_CMD_FLUSH)
        return;
    if (wanted->failed)
        model_failed[wanted->offset / REGION] = true;
    else
        model_good[wanted->offset / REGION] += wanted->length;
}

static void simple(struct server_model *model, struct wanted *wanted, uint32_t error)
{
    bool data = wanted->type == NBD_CMD_READ && !error;
    uint8_t *wire = put(model, NBD_SIMPLE_BYTES + (data ? wanted->length : 0));
    nbd_put32(wire, NBD_SIMPLE_REPLY_MAGIC);
    nbd_put32(wire + 4, error);
    nbd_put64(wire + 8, wanted->cookie);
    if (data) {
        memcpy(wire + NBD_SIMPLE_BYTES, model_disk + wanted->offset, wanted->length);
        cover(model, wanted, 0, wanted->length);
    }
    wanted->failed = error;
    over(model, wanted);
}

static void data_chunk(struct server_model *model, struct wanted *wanted, uint64_t at, uint64_t length, bool done)
{
    uint8_t *wire = chunk(model, wanted, NBD_REPLY_TYPE_OFFSET_DATA, 8 + length, done);
    nbd_put64(wire, wanted->offset + at);
    memcpy(wire + 8, model_disk + wanted->offset + at, length);
    cover(model, wanted, at, length);
}

static void hole_chunk(struct server_model *model, struct wanted *wanted, uint64_t at, uint64_t length)
{
    uint8_t *wire = chunk(model, wanted, NBD_REPLY_TYPE_OFFSET_HOLE, 12, false);
    nbd_put64(wire, wanted->offset + at);
    nbd_put32(wire + 8, (uint32_t)length);
    if (memcmp(model_disk + wanted->offset + at, zeros, length))
        model->lied = true;
    cover(model, wanted, at, length);
}

static void error_chunk(struct server_model *model, struct wanted *wanted, uint8_t how)
{
    uint16_t text = how & 0x70 ? how : 0;
    bool offset = how & 8 && wanted->type == NBD_CMD_READ;
    uint8_t *wire = chunk(model, wanted, offset ? NBD_REPLY_TYPE_ERROR_OFFSET : NBD_REPLY_TYPE_ERROR,
                          6u + text + (offset ? 8 : 0), how & 1);
    nbd_put32(wire, how & 2 ? NBD_EIO : how & 4 ? 4242 : NBD_ENOSPC);
    nbd_put16(wire + 4, text);
    memset(wire + 6, 'e', text);
    if (offset)
        nbd_put64(wire + 6 + text, wanted->offset);
    wanted->failed = true;
    if (how & 1)
        over(model, wanted);
}

static void status_chunk(struct server_model *model, struct wanted *wanted, uint64_t length, bool done)
{
    bool wide = extended(model);
    uint8_t *wire = chunk(model, wanted, wide ? NBD_REPLY_TYPE_BLOCK_STATUS_EXT : NBD_REPLY_TYPE_BLOCK_STATUS,
                          wide ? 24 : 12, done);
    nbd_put32(wire, MODEL_CONTEXT);
    if (wide) {
        nbd_put32(wire + 4, 1);
        nbd_put64(wire + 8, length);
        nbd_put64(wire + 16, 0);
    } else {
        nbd_put32(wire + 4, (uint32_t)length);
        nbd_put32(wire + 8, 0);
    }
    if (done)
        over(model, wanted);
}

static void honest(struct server_model *model, struct wanted *wanted)
{
    if (model->link.mode == BT_NBDC_SIMPLE) {
        simple(model, wanted, 0);
    } else if (wanted->type == NBD_CMD_BLOCK_STATUS) {
        status_chunk(model, wanted, bt_min(wanted->length, 1u << 20), true);
    } else if (wanted->type == NBD_CMD_READ) {
        const uint8_t *covered = model->covered[wanted - model->wanted];
        for (uint64_t at = 0, end; at < wanted->length; at = end) {
            for (end = at; end < wanted->length && covered[end] == covered[at]; end++)
                ;
            if (!covered[at])
                data_chunk(model, wanted, at, end - at, false);
        }
        chunk(model, wanted, NBD_REPLY_TYPE_NONE, 0, true);
        over(model, wanted);
    } else {
        chunk(model, wanted, NBD_REPLY_TYPE_NONE, 0, true);
        over(model, wanted);
    }
}

void model_answer_all(struct server_model *model)
{
    for (unsigned i = 0; i < model->count; i++)
        /* a write's reply comes when all of it was read, and what was told of a status is all */
        if (model->wanted[i].open && sizeof model->out - model->out_length > 2 * MODEL_PAYLOAD)
            honest(model, &model->wanted[i]);
}

static struct wanted *choose(struct server_model *model, uint8_t which)
{
    unsigned open = 0;
    for (unsigned i = 0; i < model->count; i++)
        open += model->wanted[i].open;
    if (!open)
        return NULL;
    which %= open;
    for (unsigned i = 0;; i++)
        if (model->wanted[i].open && !which--)
            return &model->wanted[i];
}

/* A part of a read: where, and how much, not nothing. */
static void part_of(const struct wanted *wanted, struct input *in, uint64_t *at, uint64_t *length)
{
    *at = take16(in) * 8u % wanted->length;
    *length = 1 + take16(in) * 4u % (wanted->length - *at);
}

/* Some field of an honest answer is another one. */
static void spoil(struct server_model *model, struct wanted *wanted, struct input *in)
{
    size_t before = model->out_length;
    honest(model, wanted);
    size_t length = bt_min(model->out_length - before, 64);
    model->illegal = model->lied = true;
    if (length)
        model->out[before + take8(in) % length] ^= (uint8_t)(1 + take8(in));
}

static void answer_read(struct server_model *model, struct wanted *wanted, struct input *in, uint8_t how)
{
    uint64_t at, length;
    part_of(wanted, in, &at, &length);
    if (how & 0x40)
        hole_chunk(model, wanted, at, length);
    else
        data_chunk(model, wanted, at, length, how & 0x20);
    if (!(how & 0x40) && how & 0x20)
        over(model, wanted);
}

void model_answer(struct server_model *model, struct input *in)
{
    uint8_t which = take8(in), how = take8(in);
    struct wanted *wanted = choose(model, which);
    bool chunks = model->link.mode != BT_NBDC_SIMPLE;
    if (model->fd < 0 || !wanted || sizeof model->out - model->out_length < 2 * MODEL_PAYLOAD)
        return;
    if (how % 8 < 3) {
        honest(model, wanted);
    } else if (how % 8 == 3) {
        spoil(model, wanted, in);
    } else if (how % 8 == 4 && !chunks) {
        simple(model, wanted, NBD_ENOSPC);
    } else if (how % 8 == 4) {
        error_chunk(model, wanted, take8(in));
    } else if (chunks && wanted->type == NBD_CMD_READ) {
        answer_read(model, wanted, in, how);
    } else if (chunks && wanted->type == NBD_CMD_BLOCK_STATUS) {
        bool again = wanted->covered++ || !(how & 0x20);
        model->illegal |= again; /* twice, or not done: an honest answer would come behind it */
        status_chunk(model, wanted, 1 + take16(in) * 16u, how & 0x20);
    } else {
        honest(model, wanted);
    }
}
