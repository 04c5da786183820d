/* SPDX-License-Identifier: Apache-2.0 */
/* Digests of iSCSI (RFC 7143 sections 7.2.3, 11.2.3 and 13.1): CRC32C, on the wire with its lowest byte first. */
#ifndef BT_ISCSI_DIGEST_H
#define BT_ISCSI_DIGEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define DIGEST 4

/* The CRC of what has the CRC `crc`, and then of these bytes; 0 is that of nothing. */
uint32_t crc32c(uint32_t crc, const void *data, size_t length);
/* The same without the CPU's instruction. */
uint32_t crc32c_portable(uint32_t crc, const void *data, size_t length);

static inline void digest_put(uint32_t crc, unsigned char digest[DIGEST])
{
    for (int i = 0; i < DIGEST; i++)
        digest[i] = (unsigned char)(crc >> 8 * i);
}

static inline bool digest_is(uint32_t crc, const unsigned char digest[DIGEST])
{
    unsigned char right[DIGEST];
    digest_put(crc, right);
    return !memcmp(right, digest, DIGEST);
}

#endif
