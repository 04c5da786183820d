/* SPDX-License-Identifier: Apache-2.0 */
/* CRC32C of the iSCSI device: with the CPU's instruction and without, against RFC 3720 appendix B.4 and bit by bit. */
#include <stdio.h>
#include <stdlib.h>

#include "check.h"
#include "iscsi/digest.c"

#define SIZE 4099

static unsigned char data[SIZE];

static void check_vector(const unsigned char *bytes, size_t length, uint32_t crc)
{
    CHECK(crc32c(0, bytes, length) == crc);
    CHECK(crc32c_portable(0, bytes, length) == crc);
}

static void test_vectors(void)
{
    static const unsigned char read_10[48] = {
        0x01, 0xc0, [16] = 0x14, [22] = 0x04, [27] = 0x14, [31] = 0x18, [32] = 0x28, [40] = 0x02,
    };
    unsigned char bytes[32] = {0};
    check_vector(bytes, 0, 0);
    check_vector(bytes, 32, 0x8a9136aa);
    memset(bytes, 0xff, sizeof bytes);
    check_vector(bytes, 32, 0x62a8ab43);
    for (int i = 0; i < 32; i++)
        bytes[i] = (unsigned char)i;
    check_vector(bytes, 32, 0x46dd794e);
    for (int i = 0; i < 32; i++)
        bytes[i] = (unsigned char)(31 - i);
    check_vector(bytes, 32, 0x113fdb5c);
    check_vector(read_10, sizeof read_10, 0xd9963a56);
    check_vector((const unsigned char *)"123456789", 9, 0xe3069283);
    digest_put(0x8a9136aa, bytes);
    CHECK(!memcmp(bytes, "\xaa\x36\x91\x8a", DIGEST) && digest_is(0x8a9136aa, bytes));
    bytes[3] ^= 1;
    CHECK(!digest_is(0x8a9136aa, bytes));
}

static uint32_t bit_by_bit(const unsigned char *p, size_t length)
{
    uint32_t crc = UINT32_MAX;
    for (; length; length--) {
        crc ^= *p++;
        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (crc & 1 ? POLYNOMIAL : 0);
    }
    return ~crc;
}

/* Any length at any alignment, in any pieces. */
static void test_pieces(void)
{
    for (int i = 0; i < 2000; i++) {
        size_t at = (size_t)rand() % 16, length = (size_t)rand() % (i % 4 ? 100 : SIZE - 16);
        size_t first = (size_t)rand() % (length + 1);
        const unsigned char *p = data + at;
        uint32_t right = bit_by_bit(p, length);
        CHECK(crc32c(0, p, length) == right);
        CHECK(crc32c_portable(0, p, length) == right);
        CHECK(crc32c(crc32c(0, p, first), p + first, length - first) == right);
        CHECK(crc32c_portable(crc32c_portable(0, p, first), p + first, length - first) == right);
    }
}

int main(void)
{
    srand(7);
    for (size_t i = 0; i < SIZE; i++)
        data[i] = (unsigned char)rand();
    test_vectors();
    test_pieces();
    puts("ok");
    return 0;
}
