/* SPDX-License-Identifier: Apache-2.0 */
/* Header digests: CRC32C (RFC 7143 section 13.1), four bits at a time. */
#include "internal.h"

void header_digest(const unsigned char header[BHS], unsigned char digest[DIGEST])
{
    static const uint32_t table[16] = {
        0x00000000, 0x105ec76f, 0x20bd8ede, 0x30e349b1, 0x417b1dbc, 0x5125dad3, 0x61c69362, 0x7198540d,
        0x82f63b78, 0x92a8fc17, 0xa24bb5a6, 0xb21572c9, 0xc38d26c4, 0xd3d3e1ab, 0xe330a81a, 0xf36e6f75,
    };
    uint32_t crc = UINT32_MAX;
    for (int i = 0; i < BHS; i++) {
        crc ^= header[i];
        crc = table[crc & 15] ^ crc >> 4;
        crc = table[crc & 15] ^ crc >> 4;
    }
    crc = ~crc;
    for (int i = 0; i < DIGEST; i++)
        digest[i] = (unsigned char)(crc >> 8 * i);
}
