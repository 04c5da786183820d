/* SPDX-License-Identifier: Apache-2.0 */
/* CRC32C: with the instruction for it where the CPU has one (SSE 4.2), else eight bytes at a time by tables. */
#include "digest.h"

#define POLYNOMIAL 0x82f63b78u /* of 0x1edc6f41, the lowest bit first */

static uint32_t table[8][256]; /* [n][byte]: the byte, with n bytes of zeros behind it */

static uint64_t load64(const unsigned char *p)
{
    uint64_t word = 0;
    for (int i = 0; i < 8; i++)
        word |= (uint64_t)p[i] << 8 * i;
    return word;
}

static uint32_t by_tables(uint32_t crc, const unsigned char *p, size_t length)
{
    for (; length >= 8; p += 8, length -= 8) {
        uint64_t word = load64(p) ^ crc;
        crc = 0;
        for (int i = 0; i < 8; i++)
            crc ^= table[7 - i][word >> 8 * i & 255];
    }
    for (; length; length--)
        crc = table[0][(crc ^ *p++) & 255] ^ crc >> 8;
    return crc;
}

#ifdef __x86_64__
__attribute__((target("sse4.2"))) static uint32_t by_instruction(uint32_t crc, const unsigned char *p, size_t length)
{
    uint64_t wide = crc, word;
    for (; length >= 8; p += 8, length -= 8) {
        memcpy(&word, p, 8);
        wide = __builtin_ia32_crc32di(wide, word);
    }
    crc = (uint32_t)wide;
    for (; length; length--)
        crc = __builtin_ia32_crc32qi(crc, *p++);
    return crc;
}
#endif

static uint32_t (*update)(uint32_t crc, const unsigned char *p, size_t length) = by_tables;

__attribute__((constructor)) static void prepare(void)
{
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t crc = byte;
        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (crc & 1 ? POLYNOMIAL : 0);
        table[0][byte] = crc;
    }
    for (int n = 1; n < 8; n++)
        for (int byte = 0; byte < 256; byte++)
            table[n][byte] = table[0][table[n - 1][byte] & 255] ^ table[n - 1][byte] >> 8;
#ifdef __x86_64__
    if (__builtin_cpu_supports("sse4.2"))
        update = by_instruction;
#endif
}

uint32_t crc32c(uint32_t crc, const void *data, size_t length) { return ~update(~crc, data, length); }
uint32_t crc32c_portable(uint32_t crc, const void *data, size_t length) { return ~by_tables(~crc, data, length); }
