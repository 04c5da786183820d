/* SPDX-License-Identifier: Apache-2.0 */
/* Fuzz target: the helpers for I/O vectors against the same done byte by byte. Ranges may lie outside of the vector.
 *
 * Input: the number of vectors, their lengths, then operations. */
#include "fuzz.h"

#define VECTORS 12
#define BYTES 512

static uint8_t content[BYTES], model[BYTES];
static struct iovec iov[VECTORS];
static uint8_t *blocks[VECTORS];
static int count;
static size_t total;

/* Each vector in an allocation of exactly its length, so that the sanitizer sees a byte too many. */
static void make_vectors(struct input *in)
{
    count = take8(in) % (VECTORS + 1);
    total = 0;
    for (int i = 0; i < count; i++) {
        size_t length = take8(in) % 40;
        blocks[i] = malloc(length ? length : 1);
        CHECK(blocks[i]);
        memset(blocks[i], 0, length ? length : 1);
        iov[i] = (struct iovec){length ? blocks[i] : NULL, length};
        for (size_t n = 0; n < length; n++)
            blocks[i][n] = take8(in) & 3 ? 0 : (uint8_t)(n + 1);
        if (length)
            memcpy(model + total, blocks[i], length);
        total += length;
    }
}

static void gather(uint8_t *out)
{
    size_t at = 0;
    for (int i = 0; i < count; at += iov[i++].iov_len)
        if (iov[i].iov_len)
            memcpy(out + at, iov[i].iov_base, iov[i].iov_len);
}

/* The part of [offset, offset + length) that the vectors have. */
static size_t inside(uint64_t offset, uint64_t length)
{
    return offset >= total ? 0 : (size_t)bt_min(length, total - offset);
}

static void check_slice(uint64_t offset, uint64_t length, int max)
{
    struct iovec out[VECTORS + 1];
    size_t n = inside(offset, length), at = 0;
    int used = bt_iov_slice(iov, count, offset, length, out, max);
    if (used == -E2BIG) {
        int parts = 0;
        for (int i = 0, end = 0; i < count; i++) {
            int start = end;
            end += (int)iov[i].iov_len;
            parts += iov[i].iov_len && (uint64_t)end > offset && (uint64_t)start < offset + n && n;
        }
        CHECK(parts > max);
        return;
    }
    CHECK(used >= 0 && used <= max);
    for (int i = 0; i < used; at += out[i++].iov_len) {
        CHECK(out[i].iov_len && at + out[i].iov_len <= n);
        CHECK(!memcmp(out[i].iov_base, model + offset + at, out[i].iov_len));
    }
    CHECK(at == n);
}

static void check_copies(struct input *in, uint64_t offset, uint64_t length)
{
    uint8_t buffer[BYTES + 1];
    size_t n = inside(offset, length);
    memset(buffer, 0xEE, sizeof buffer);
    bt_iov_to_buffer(iov, count, offset, buffer, length);
    CHECK(!n || !memcmp(buffer, model + offset, n));
    CHECK(buffer[n] == 0xEE);
    uint8_t fill = take8(in);
    memset(buffer, fill, sizeof buffer);
    bt_iov_from_buffer(iov, count, offset, buffer, bt_min(length, BYTES));
    memset(model + bt_min(offset, total), fill, inside(offset, bt_min(length, BYTES)));
}

static void step(struct input *in)
{
    uint8_t op = take8(in);
    uint64_t offset = take16(in) % (BYTES + 8), length = op & 0x80 ? take64(in) : take16(in) % (BYTES + 8);
    size_t n = inside(offset, length);
    bool zero = true;
    switch (op & 3) {
    case 0:
        check_slice(offset, length, take8(in) % (VECTORS + 1));
        return;
    case 1:
        bt_iov_zero(iov, count, offset, length);
        memset(model + bt_min(offset, total), 0, n);
        return;
    case 2:
        check_copies(in, offset, length);
        return;
    default:
        for (size_t i = 0; i < n; i++)
            zero = zero && !model[offset + i];
        CHECK(bt_iov_is_zero(iov, count, offset, length) == zero);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, size};
    make_vectors(&in);
    for (int i = 0; i < 64 && in.left; i++)
        step(&in);
    gather(content);
    CHECK(!memcmp(content, model, total));
    for (int i = 0; i < count; i++)
        free(blocks[i]);
    return 0;
}
