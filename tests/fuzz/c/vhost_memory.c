/* SPDX-License-Identifier: Apache-2.0 */
/* Fuzz target: the memory tables of a vhost-user front end: regions are added, removed and looked up, against a list
 * that is searched byte by byte. Where a look-up gives memory, it must show the right bytes of the file. With
 * some inputs the file is truncated meanwhile, and the bytes behind its end are touched.
 *
 * Input: operations of 1 + 8 to 33 bytes. */
#define _GNU_SOURCE
#include <sys/mman.h>
#include <unistd.h>

#include "fuzz.h"
#include "vhost.h"

#define PAGE 4096u
#define PAGES 12u
#define FILE_SIZE (PAGES * PAGE + 512) /* its last page is not whole */
#define PARTS 8

static int fd = -1;
static struct vhost_memory memory;
static struct bt_vhost_region known[BT_VHOST_MAX_REGIONS];
static uint32_t known_count;
static bool truncated;

static uint8_t pattern(uint64_t file_offset) { return (uint8_t)(file_offset / 512 * 7 + file_offset % 251 + 1); }

static void make_file(void)
{
    if (fd < 0)
        fd = memfd_create("guest", MFD_CLOEXEC);
    CHECK(ftruncate(fd, FILE_SIZE) == 0);
    if (!truncated && known_count == 0 && lseek(fd, 0, SEEK_CUR) > 0)
        return; /* as the last input left it */
    uint8_t *content = mmap(NULL, FILE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHECK(content != MAP_FAILED);
    for (uint64_t i = 0; i < FILE_SIZE; i++)
        content[i] = pattern(i);
    munmap(content, FILE_SIZE);
    CHECK(lseek(fd, 1, SEEK_SET) == 1);
    truncated = false;
}

/* Small numbers mostly, and those at which sums wrap. */
static uint64_t take_number(struct input *in)
{
    static const uint64_t bases[] = {0, 1ull << 32, UINT64_MAX - 3 * PAGE + 1, 1ull << 63, 0x7f0000000000, 0};
    uint8_t kind = take8(in);
    uint64_t offset = (uint64_t)take16(in) * (kind & 0x40 ? 1 : 512);
    if ((kind & 7) == 7)
        return take64(in);
    return bases[kind % 6] + (kind & 0x80 ? -offset : offset);
}

static bool wraps(uint64_t start, uint64_t length)
{
    uint64_t end;
    return __builtin_add_overflow(start, length, &end);
}

static bool acceptable(const struct bt_vhost_region *region)
{
    if (!region->size || known_count == BT_VHOST_MAX_REGIONS || wraps(region->guest_address, region->size) ||
        wraps(region->user_address, region->size) || wraps(region->file_offset, region->size))
        return false;
    if (region->file_offset + region->size > FILE_SIZE)
        return false;
    for (uint32_t i = 0; i < known_count; i++)
        if (known[i].guest_address - region->guest_address < region->size ||
            region->guest_address - known[i].guest_address < known[i].size)
            return false;
    return true;
}

static void add(const struct bt_vhost_region *region)
{
    if (truncated)
        return;
    bool good = acceptable(region);
    int ret = vhost_memory_add(&memory, region, fd);
    CHECK((ret == 0) == good);
    if (good)
        known[known_count++] = *region;
}

static void remove_region(struct input *in, struct bt_vhost_region region)
{
    uint32_t found = known_count;
    if (known_count && take8(in) & 1)
        region = known[take8(in) % known_count];
    for (uint32_t i = 0; i < known_count; i++)
        if (known[i].guest_address == region.guest_address && known[i].user_address == region.user_address &&
            known[i].size == region.size)
            found = i;
    CHECK((vhost_memory_remove(&memory, &region) == 0) == (found < known_count));
    if (found < known_count)
        known[found] = known[--known_count];
}

static const struct bt_vhost_region *region_at(uint64_t address)
{
    for (uint32_t i = 0; i < known_count; i++)
        if (address - known[i].guest_address < known[i].size)
            return &known[i];
    return NULL;
}

static void check_bytes(const uint8_t *got, uint64_t file_offset, uint64_t length)
{
    if (truncated)
        return;
    CHECK(got[0] == pattern(file_offset) && got[length - 1] == pattern(file_offset + length - 1));
}

/* Whether all of [guest, guest + length) is known, region by region. */
static bool mapped(uint64_t guest, uint64_t length)
{
    while (length) {
        const struct bt_vhost_region *region = region_at(guest);
        if (!region)
            return false;
        uint64_t part = bt_min(length, region->size - (guest - region->guest_address));
        length -= part;
        if (length && guest + part < guest)
            return false;
        guest += part;
    }
    return true;
}

static void look_up(uint64_t guest, uint64_t length, int max)
{
    struct iovec out[PARTS];
    int n = length ? vhost_memory_iov(&memory, guest, length, out, max) : 0;
    if (n == -E2BIG)
        return;
    CHECK(!length || (n > 0) == mapped(guest, length));
    CHECK(n > 0 || !length || n == -EFAULT);
    for (int i = 0; i < n; i++) {
        const struct bt_vhost_region *region = region_at(guest);
        CHECK(region && out[i].iov_len && out[i].iov_len <= length);
        check_bytes(out[i].iov_base, region->file_offset + (guest - region->guest_address), out[i].iov_len);
        guest += out[i].iov_len;
        length -= out[i].iov_len;
    }
    CHECK(n <= 0 || !length);
}

static void look_up_user(uint64_t user, uint64_t length)
{
    const uint8_t *got = vhost_memory_at_user(&memory, user, length);
    bool found = false, right = truncated || !length;
    for (uint32_t i = 0; i < known_count; i++) {
        const struct bt_vhost_region *region = &known[i];
        if (user < region->user_address || !bt_range_ok(user - region->user_address, length, region->size))
            continue;
        found = true;
        if (got && !right)
            right = got[0] == pattern(region->file_offset + (user - region->user_address));
    }
    CHECK(found == (got != NULL) && (right || !got));
}

/* As a hostile front end does; what was mapped there reads as zeros from then on. */
static void truncate_file(uint64_t size)
{
    if (ftruncate(fd, (off_t)(size % FILE_SIZE)))
        return;
    truncated = true;
    for (uint32_t i = 0; i < memory.count; i++) {
        volatile uint8_t *host = memory.regions[i].host;
        host[memory.regions[i].size - 1] = (uint8_t)(host[0] + 1);
    }
}

static void step(struct input *in)
{
    uint8_t op = take8(in) % 8;
    struct bt_vhost_region region = {.guest_address = take_number(in), .size = take_number(in)};
    if (op == 3 || op == 4) {
        look_up(region.guest_address, region.size, 1 + take8(in) % PARTS);
    } else if (op == 5) {
        look_up_user(region.guest_address, region.size);
    } else if (op == 6 && take8(in) % 16 == 0) {
        truncate_file(region.size);
    } else {
        region.user_address = take_number(in);
        region.file_offset = take_number(in);
        if (op == 7)
            remove_region(in, region);
        else
            add(&region);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, size};
    make_file();
    for (int i = 0; i < 40 && in.left; i++) {
        step(&in);
        CHECK(memory.count == known_count);
        for (uint32_t n = 1; n < memory.count; n++)
            CHECK(memory.regions[n - 1].guest < memory.regions[n].guest);
    }
    vhost_memory_clear(&memory);
    CHECK(memory.count == 0 && (truncated || !atomic_load(&memory.broken)));
    known_count = 0;
    atomic_store(&memory.broken, false);
    return 0;
}
