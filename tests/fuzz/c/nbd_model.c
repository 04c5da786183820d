/* SPDX-License-Identifier: Apache-2.0 */
#include "nbd_model.h"

void client_reset(struct client *client, uint32_t mode, uint16_t flags)
{
    memset(client, 0, offsetof(struct client, stream));
    memset(&client->sent, 0, offsetof(struct client, calls) - offsetof(struct client, sent));
    memset(&client->count, 0, offsetof(struct client, content) - offsetof(struct client, count));
    client->mode = mode;
    client->flags = flags;
    client->head_need = 4;
}

/* ---- what is sent ---- */

static uint16_t known_flags(const struct client *client, uint16_t type)
{
    uint16_t flags = NBD_CMD_FLAG_FUA;
    if (type == NBD_CMD_READ && client->flags & NBD_FLAG_SEND_DF)
        flags |= NBD_CMD_FLAG_DF;
    if (type == NBD_CMD_WRITE_ZEROES)
        flags |= NBD_CMD_FLAG_NO_HOLE;
    if (type == NBD_CMD_WRITE_ZEROES && client->flags & NBD_FLAG_SEND_FAST_ZERO)
        flags |= NBD_CMD_FLAG_FAST_ZERO;
    if (type == NBD_CMD_BLOCK_STATUS)
        flags |= NBD_CMD_FLAG_REQ_ONE;
    return flags;
}

static bool is_valid(const struct client *client, const struct call *call)
{
    bool change = call->type == NBD_CMD_WRITE || call->type == NBD_CMD_TRIM || call->type == NBD_CMD_WRITE_ZEROES;
    if (call->type > NBD_CMD_BLOCK_STATUS || call->type == NBD_CMD_DISC)
        return false;
    if (call->flags & ~known_flags(client, call->type))
        return false;
    if (call->type == NBD_CMD_FLUSH)
        return !call->offset && !call->length;
    if (change && client->flags & NBD_FLAG_READ_ONLY)
        return false;
    if (call->type == NBD_CMD_BLOCK_STATUS && !(client->mode & BT_NBD_ALLOCATION))
        return false;
    if (!call->length || call->offset > EXPORT_SIZE || call->length > EXPORT_SIZE - call->offset)
        return false;
    if (call->type == NBD_CMD_READ && call->flags & NBD_CMD_FLAG_DF && call->length > NBD_PIECE)
        return false;
    bool moves = call->type != NBD_CMD_BLOCK_STATUS && call->type != NBD_CMD_CACHE;
    return !(moves && call->offset < BAD_END && call->offset + call->length > BAD_START);
}

static bool parse_header(struct client *client)
{
    uint8_t *wire = client->stream + client->parsed;
    if (client->sent - client->parsed < NBD_REQUEST_BYTES)
        return false;
    if (nbd_get32(wire) != NBD_REQUEST_MAGIC || nbd_get16(wire + 6) == NBD_CMD_DISC ||
        client->count == REQUESTS_MAX) {
        if (client->count == REQUESTS_MAX)
            client->sent = client->parsed;
        client->ended = true;
        return false;
    }
    struct call *call = &client->calls[client->count];
    *call = (struct call){.flags = nbd_get16(wire + 4), .type = nbd_get16(wire + 6)};
    call->offset = nbd_get64(wire + 16);
    call->length = nbd_get32(wire + 24);
    call->valid = is_valid(client, call);
    call->complete = call->type != NBD_CMD_WRITE || !call->length;
    nbd_put64(wire + 8, client->count++);
    client->parsed += NBD_REQUEST_BYTES;
    call->payload = client->parsed;
    call->end = client->parsed + (call->complete ? 0 : call->length);
    TRACE("request %u: type %u flags %#x at %#lx length %#x%s\n", client->count - 1, call->type, call->flags,
          call->offset, call->length, call->valid ? "" : ", not valid");
    if (call->complete)
        return true;
    client->payload_left = call->length;
    if (call->length > NBD_MAX_DRAIN)
        client->ended = call->complete = true;
    return !client->ended;
}

void client_parse(struct client *client)
{
    while (!client->ended) {
        if (!client->payload_left) {
            if (!parse_header(client))
                return;
            continue;
        }
        uint32_t n = (uint32_t)bt_min(client->payload_left, client->sent - client->parsed);
        client->parsed += n;
        client->payload_left -= n;
        if (client->payload_left)
            return;
        client->calls[client->count - 1].complete = true;
    }
}

void client_send(struct client *client, const uint8_t *data, size_t length)
{
    length = bt_min(length, STREAM_MAX - client->sent);
    memcpy(client->stream + client->sent, data, length);
    client->sent += length;
    client_parse(client);
}

bool client_wrote(const struct client *client, uint64_t offset, const uint8_t *data, size_t length)
{
    for (unsigned i = 0; i < client->count; i++) {
        const struct call *call = &client->calls[i];
        uint64_t skip = offset - call->offset;
        if (call->type != NBD_CMD_WRITE || call->answered || offset < call->offset || skip >= call->length ||
            length > call->length - skip || call->payload + skip + length > client->sent)
            continue;
        if (!memcmp(client->stream + call->payload + skip, data, length))
            return true;
    }
    return false;
}

/* ---- what comes back ---- */

static struct call *call_of(struct client *client, uint64_t cookie)
{
    CHECK(cookie < client->count);
    struct call *call = &client->calls[cookie];
    CHECK(!call->answered);
    return call;
}

static void finish(struct client *client, struct call *call, uint32_t error)
{
    TRACE("reply %d: error %u\n", (int)(call - client->calls), error);
    CHECK(!error == call->valid);
    CHECK(call->valid ? call->complete : true);
    if (!error && (call->type == NBD_CMD_READ || call->type == NBD_CMD_BLOCK_STATUS))
        CHECK(call->type == NBD_CMD_READ ? call->covered == call->length : call->covered > 0);
    call->answered = true;
    client->answered++;
}

static void expect_data(struct client *client, struct call *call, uint64_t offset, uint32_t length)
{
    CHECK(call->type == NBD_CMD_READ && length);
    CHECK(offset >= call->offset && offset - call->offset <= call->length &&
          length <= call->length - (offset - call->offset));
    CHECK(length <= call->length - call->covered);
    client->reading = call;
    client->at = offset;
    client->left = length;
    call->covered += length;
}

static void simple_reply(struct client *client)
{
    struct call *call = call_of(client, nbd_get64(client->head + 8));
    uint32_t error = nbd_get32(client->head + 4);
    CHECK(!(client->mode & BT_NBD_STRUCTURED) || (call->type != NBD_CMD_READ && !error));
    if (call->type == NBD_CMD_READ && !error) {
        client->chunk_done = true;
        expect_data(client, call, call->offset, call->length);
        return;
    }
    CHECK(call->type != NBD_CMD_BLOCK_STATUS || error);
    finish(client, call, error);
}

static void check_hole(const struct client *client, uint64_t offset, uint32_t length)
{
    for (uint32_t i = 0; i < length; i++)
        CHECK(client->content[offset + i] == 0);
}

/* After the 20 bytes of a chunk's header and what else its type begins with. */
static void chunk(struct client *client)
{
    const uint8_t *head = client->head;
    uint16_t type = nbd_get16(head + 6);
    uint32_t length = nbd_get32(head + 16);
    struct call *call = call_of(client, nbd_get64(head + 8));
    client->chunk_done = nbd_get16(head + 4) & NBD_REPLY_FLAG_DONE;
    client->reading = NULL;
    if (type == NBD_REPLY_TYPE_OFFSET_DATA) {
        expect_data(client, call, nbd_get64(head + 20), length - 8);
    } else if (type == NBD_REPLY_TYPE_OFFSET_HOLE) {
        expect_data(client, call, nbd_get64(head + 20), nbd_get32(head + 28));
        check_hole(client, client->at, client->left);
        client->left = 0;
        if (client->chunk_done)
            finish(client, call, 0);
    } else if (type == NBD_REPLY_TYPE_BLOCK_STATUS) {
        CHECK(call->type == NBD_CMD_BLOCK_STATUS && call->valid && nbd_get32(head + 20) == 1 && length >= 12);
        CHECK((length - 4) % 8 == 0 && client->chunk_done);
        CHECK(!(call->flags & NBD_CMD_FLAG_REQ_ONE) || length == 12);
        client->in_extents = true;
        client->reading = call;
        client->left = length - 4;
    } else {
        CHECK(type == NBD_REPLY_TYPE_ERROR && client->chunk_done);
        client->left = nbd_get16(head + 24); /* the text */
        CHECK(length == 6 + client->left);
        finish(client, call, nbd_get32(head + 20));
    }
}

static unsigned chunk_head(const struct client *client)
{
    switch (nbd_get16(client->head + 6)) {
    case NBD_REPLY_TYPE_OFFSET_DATA:
        return 28;
    case NBD_REPLY_TYPE_OFFSET_HOLE:
        CHECK(nbd_get32(client->head + 16) == 12);
        return 32;
    case NBD_REPLY_TYPE_BLOCK_STATUS:
        return 24;
    default:
        return 26;
    }
}

static void head_complete(struct client *client)
{
    uint32_t magic = nbd_get32(client->head);
    bool structured = magic == NBD_STRUCTURED_REPLY_MAGIC;
    CHECK(magic == NBD_SIMPLE_REPLY_MAGIC || (structured && client->mode & BT_NBD_STRUCTURED));
    unsigned need = client->head_got == 4 ? (structured ? NBD_CHUNK_BYTES : NBD_SIMPLE_BYTES) : client->head_got;
    if (structured && client->head_got == NBD_CHUNK_BYTES)
        need = chunk_head(client);
    if (need > client->head_got) {
        client->head_need = need;
        return;
    }
    client->head_got = 0;
    client->head_need = 4;
    if (structured)
        chunk(client);
    else
        simple_reply(client);
}

static void take_extent(struct client *client, const uint8_t *head)
{
    struct call *call = client->reading;
    uint32_t length = nbd_get32(head);
    CHECK(length && length <= call->length - call->covered);
    call->covered += length;
    client->left -= 8;
    client->head_got = 0;
    client->head_need = 4;
    if (client->left)
        return;
    client->in_extents = false;
    finish(client, call, 0);
}

static size_t take_data(struct client *client, const uint8_t *data, size_t length)
{
    size_t n = bt_min(length, client->left);
    if (client->reading) /* else it is a text */
        CHECK(!memcmp(data, client->content + client->at, n));
    client->at += n;
    client->left -= (uint32_t)n;
    if (!client->left && client->reading && client->chunk_done)
        finish(client, client->reading, 0);
    return n;
}

void client_receive(struct client *client, const uint8_t *data, size_t length)
{
    while (length) {
        size_t n = 1;
        if (client->left && !client->in_extents) {
            n = take_data(client, data, length);
        } else {
            client->head[client->head_got++] = *data;
            if (client->in_extents && client->head_got == 8)
                take_extent(client, client->head);
            else if (!client->in_extents && client->head_got == client->head_need)
                head_complete(client);
        }
        data += n;
        length -= n;
    }
}
