/* SPDX-License-Identifier: Apache-2.0 */
/* Keys of the login (RFC 7143 sections 6.2 and 13), as far as the guard has to do with them. */
#include "guard.h"

#define CRC32C_ONLY 3 /* of the offers: ISCSI_HEADER_DIGEST_CRC32C */

static const char *const data_offers[] = {
    "DataDigest=None",
    "DataDigest=None,CRC32C",
    "DataDigest=CRC32C,None",
    "DataDigest=CRC32C",
};

const char *guard_data_offer(const struct guard *guard) { return data_offers[guard->data_offer & 3]; }

uint32_t text_without(char *text, uint32_t length, const char *key)
{
    size_t key_length = strlen(key);
    for (uint32_t at = 0; at < length;) {
        uint32_t size = (uint32_t)bt_min(strlen(text + at) + 1, length - at);
        if (strncmp(text + at, key, key_length)) {
            at += size;
            continue;
        }
        memmove(text + at, text + at + size, length - at - size);
        length -= size;
        text[length] = 0;
    }
    return length;
}

/* A key of the login that libiscsi would take as it is. */
static bool text_number_ok(const char *text, const char *key, long low, long high)
{
    size_t length = strlen(key);
    if (strncmp(text, key, length))
        return true;
    char *end;
    long value = strtol(text + length, &end, 10);
    return end != text + length && !*end && value >= low && value <= high;
}

int guard_check_text(struct guard *guard, const char *text, uint32_t length)
{
    for (const char *at = text; at < text + length; at += strlen(at) + 1) {
        if (!text_number_ok(at, "MaxRecvDataSegmentLength=", 512, (1 << 24) - 1) ||
            !text_number_ok(at, "FirstBurstLength=", 512, (1 << 24) - 1) ||
            !text_number_ok(at, "MaxBurstLength=", 512, (1 << 24) - 1))
            return guard_refuse(guard, "the target negotiates '%.60s'", at);
        if (!strncmp(at, "HeaderDigest=", 13))
            guard->header_digests = !strcmp(at + 13, "CRC32C");
        if (!strncmp(at, "DataDigest=", 11))
            guard->data_digests = !strcmp(at + 11, "CRC32C");
    }
    return 0;
}

static int check_digest(struct guard *guard, const char *name, int offer, bool agreed)
{
    if (offer == CRC32C_ONLY && !agreed)
        return guard_refuse(guard, "%s digests are demanded, and the target does not agree to them", name);
    if (!offer && agreed)
        return guard_refuse(guard, "the target wants %s digests, which were not offered", name);
    return 0;
}

int guard_check_digests(struct guard *guard)
{
    int ret = check_digest(guard, "header", guard->header_offer, guard->header_digests);
    return ret < 0 ? ret : check_digest(guard, "data", guard->data_offer, guard->data_digests);
}
