/* SPDX-License-Identifier: Apache-2.0 */
/* Memory that a front end shares: checked, mapped, looked up; and what happens when it takes it away again.
 *
 * A front end can truncate its memfd at any time. Then touching the mapping raises SIGBUS, on whichever thread
 * copies from it. The handler puts zero pages in place of the whole region and marks its session broken. */
#define _GNU_SOURCE
#include <linux/magic.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "memory.h"
#include "vhost.h"

/* ---- SIGBUS ----
 * A signal handler has no argument: this registry is the exception to "no globals". Slots are written by control
 * threads under the lock and read by handlers without it. */

#define BUS_SLOTS 8192

struct bus_slot {
    _Atomic uintptr_t start; /* 0: free; written last, cleared first */
    _Atomic uintptr_t end;
    _Atomic(_Atomic bool *) broken;
};

static struct bus_slot bus_slots[BUS_SLOTS];
static _Atomic int bus_used;     /* slots above were never taken */
static _Atomic int bus_handlers; /* running now */
static pthread_mutex_t bus_lock = PTHREAD_MUTEX_INITIALIZER;
static bool bus_installed;
static struct sigaction bus_previous;

static bool bus_replace(uintptr_t address)
{
    int used = atomic_load(&bus_used);
    for (int i = 0; i < used; i++) {
        uintptr_t start = atomic_load(&bus_slots[i].start);
        if (!start || address < start)
            continue;
        uintptr_t end = atomic_load(&bus_slots[i].end);
        if (address >= end)
            continue;
        atomic_store(atomic_load(&bus_slots[i].broken), true);
        return mmap((void *)start, end - start, PROT_READ | PROT_WRITE,
                    MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0) != MAP_FAILED;
    }
    return false;
}

static void bus_handler(int number, siginfo_t *info, void *context)
{
    (void)context;
    int saved = errno;
    atomic_fetch_add(&bus_handlers, 1);
    bool replaced = info->si_code > 0 && bus_replace((uintptr_t)info->si_addr);
    atomic_fetch_sub(&bus_handlers, 1);
    if (!replaced) {
        sigaction(SIGBUS, &bus_previous, NULL);
        if (info->si_code <= 0)
            raise(number); /* sent by somebody: it does not come again by itself */
    }
    errno = saved;
}

static void bus_install(void)
{
    if (bus_installed)
        return;
    struct sigaction action = {.sa_sigaction = bus_handler, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    sigemptyset(&action.sa_mask);
    bus_installed = sigaction(SIGBUS, &action, &bus_previous) == 0;
}

static int bus_register(void *map, size_t length, _Atomic bool *broken)
{
    int slot = -ENOSPC;
    pthread_mutex_lock(&bus_lock);
    bus_install();
    for (int i = 0; i < BUS_SLOTS && slot < 0; i++)
        if (!atomic_load(&bus_slots[i].start))
            slot = i;
    if (slot >= 0) {
        atomic_store(&bus_slots[slot].broken, broken);
        atomic_store(&bus_slots[slot].end, (uintptr_t)map + length);
        atomic_store(&bus_slots[slot].start, (uintptr_t)map);
        if (slot >= atomic_load(&bus_used))
            atomic_store(&bus_used, slot + 1);
    }
    pthread_mutex_unlock(&bus_lock);
    return slot;
}

/* After it no handler touches the region: it may be unmapped. */
static void bus_unregister(int slot)
{
    atomic_store(&bus_slots[slot].start, 0);
    while (atomic_load(&bus_handlers))
        sched_yield();
}

/* ---- regions ---- */

static bool wraps(uint64_t start, uint64_t length)
{
    uint64_t end;
    return __builtin_add_overflow(start, length, &end);
}

static int check_region(const struct vhost_memory *memory, const struct bt_vhost_region *region)
{
    if (!region->size)
        return -EINVAL;
    if (wraps(region->guest_address, region->size) || wraps(region->user_address, region->size) ||
        wraps(region->file_offset, region->size))
        return -ERANGE;
    for (uint32_t i = 0; i < memory->count; i++) {
        const struct vhost_region *other = &memory->regions[i];
        if (region->guest_address < other->guest + other->size &&
            other->guest < region->guest_address + region->size)
            return -EEXIST;
    }
    return memory->count == BT_VHOST_MAX_REGIONS ? -ENOSPC : 0;
}

/* The page size that a mapping of fd must keep to, after the checks of the file; or a negative errno. */
static int64_t check_file(const struct bt_vhost_region *region, int fd)
{
    struct stat st;
    struct statfs fs;
    if (fstat(fd, &st) < 0 || fstatfs(fd, &fs) < 0)
        return -errno;
    if (!S_ISREG(st.st_mode))
        return -EINVAL;
    if (region->file_offset + region->size > (uint64_t)st.st_size)
        return -ERANGE;
    return fs.f_type == HUGETLBFS_MAGIC ? (int64_t)fs.f_bsize : sysconf(_SC_PAGESIZE);
}

static int map_region(struct vhost_region *out, const struct bt_vhost_region *region, int fd)
{
    int64_t page = check_file(region, fd);
    if (page < 0)
        return (int)page;
    uint64_t skip = region->file_offset & (uint64_t)(page - 1), length;
    if (__builtin_add_overflow(region->size, skip + (uint64_t)page - 1, &length) || length > SIZE_MAX / 2)
        return -ERANGE;
    length &= ~(uint64_t)(page - 1);
    void *map = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd,
                     (off_t)(region->file_offset - skip));
    if (map == MAP_FAILED)
        return -errno;
    madvise(map, length, MADV_DONTDUMP);
    madvise(map, length, MADV_DONTFORK);
    *out = (struct vhost_region){.guest = region->guest_address,
                                 .size = region->size,
                                 .user = region->user_address,
                                 .host = (unsigned char *)map + skip,
                                 .map = map,
                                 .map_length = length};
    return 0;
}

int vhost_memory_add(struct vhost_memory *memory, const struct bt_vhost_region *region, int fd)
{
    struct vhost_region mapped;
    int ret = check_region(memory, region);
    if (ret == 0)
        ret = map_region(&mapped, region, fd);
    if (ret < 0)
        return ret;
    mapped.slot = bus_register(mapped.map, mapped.map_length, &memory->broken);
    if (mapped.slot < 0) {
        munmap(mapped.map, mapped.map_length);
        return mapped.slot;
    }
    if (memory->dp)
        bt_memory_add(memory->dp, mapped.map, mapped.map_length);
    uint32_t at = memory->count;
    for (; at > 0 && memory->regions[at - 1].guest > mapped.guest; at--)
        memory->regions[at] = memory->regions[at - 1];
    memory->regions[at] = mapped;
    memory->count++;
    return 0;
}

static void unmap(const struct vhost_memory *memory, struct vhost_region *region)
{
    bus_unregister(region->slot);
    if (memory->dp)
        bt_memory_remove(memory->dp, region->map, region->map_length); /* when devices have let go of it */
    else
        munmap(region->map, region->map_length);
}

int vhost_memory_remove(struct vhost_memory *memory, const struct bt_vhost_region *region)
{
    for (uint32_t i = 0; i < memory->count; i++) {
        struct vhost_region *found = &memory->regions[i];
        if (found->guest != region->guest_address || found->user != region->user_address ||
            found->size != region->size)
            continue;
        unmap(memory, found);
        memory->count--;
        memmove(found, found + 1, (memory->count - i) * sizeof *found);
        return 0;
    }
    return -ENOENT;
}

void vhost_memory_clear(struct vhost_memory *memory)
{
    for (uint32_t i = 0; i < memory->count; i++)
        unmap(memory, &memory->regions[i]);
    memory->count = 0;
}

/* ---- look-up ---- */

void *vhost_memory_at_user(const struct vhost_memory *memory, uint64_t user, uint64_t length)
{
    for (uint32_t i = 0; i < memory->count; i++) {
        const struct vhost_region *region = &memory->regions[i];
        if (user >= region->user && bt_range_ok(user - region->user, length, region->size))
            return region->host + (user - region->user);
    }
    return NULL;
}

/* The region that holds guest, or NULL. */
static const struct vhost_region *find(const struct vhost_memory *memory, uint64_t guest)
{
    uint32_t low = 0, high = memory->count;
    while (low < high) {
        uint32_t middle = (low + high) / 2;
        if (memory->regions[middle].guest <= guest)
            low = middle + 1;
        else
            high = middle;
    }
    const struct vhost_region *region = low ? &memory->regions[low - 1] : NULL;
    return region && guest - region->guest < region->size ? region : NULL;
}

int vhost_memory_iov(const struct vhost_memory *memory, uint64_t guest, uint64_t length, struct iovec *out, int max)
{
    const struct vhost_region *region = find(memory, guest);
    const struct vhost_region *end = memory->regions + memory->count;
    if (!region)
        return -EFAULT;
    for (int n = 0;; n++) {
        if (n == max)
            return -E2BIG;
        uint64_t skip = guest - region->guest;
        uint64_t part = bt_min(length, region->size - skip);
        out[n] = (struct iovec){region->host + skip, part};
        length -= part;
        if (!length)
            return n + 1;
        guest += part; /* the region's end, which does not wrap */
        if (++region == end || region->guest != guest)
            return -EFAULT;
    }
}
