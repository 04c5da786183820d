/* SPDX-License-Identifier: Apache-2.0 */
/* A VFIO container of type 1 (linux/vfio.h) as an IOMMU domain: gives out I/O addresses, the kernel maps them. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/vfio.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "nvme_dma.h"

#define MAX_RANGES 64
#define LARGE_PAGE (2u << 20) /* an IOMMU maps such pages at once when addresses agree */

struct span {
    uint64_t iova, length;
};

struct vfio {
    int container;
    pthread_mutex_t lock; /* below */
    struct bt_iova_range ranges[MAX_RANGES];
    int range_count;
    struct span *used; /* sorted */
    size_t count, capacity;
};

/* The lowest address from at on that may begin a span for this memory. False when that wraps. */
static bool align(uint64_t *at, uint64_t address, uint64_t length)
{
    uint64_t page = length >= LARGE_PAGE ? LARGE_PAGE : DMA_PAGE;
    return !__builtin_add_overflow(*at, (address - *at) & (page - 1), at);
}

static bool fits(uint64_t at, uint64_t length, uint64_t last) { return at <= last && last - at >= length - 1; }

/* The first free place in range; *index: where it goes in used. */
static bool find_in(const struct vfio *vfio, const struct bt_iova_range *range, uint64_t address, uint64_t length,
                    uint64_t *iova, size_t *index)
{
    uint64_t at = range->first ? range->first : DMA_PAGE; /* 0 is what broken hardware and drivers use */
    for (size_t i = 0; i <= vfio->count; i++) {
        bool end = i == vfio->count;
        if (!end && vfio->used[i].iova + (vfio->used[i].length - 1) < at)
            continue;
        if (!align(&at, address, length))
            return false;
        uint64_t last = end ? range->last : bt_min(range->last, vfio->used[i].iova - 1);
        if (fits(at, length, last)) {
            *iova = at;
            *index = i;
            return true;
        }
        if (end || vfio->used[i].iova > range->last ||
            __builtin_add_overflow(vfio->used[i].iova, vfio->used[i].length, &at))
            return false;
    }
    return false;
}

static bool grow(struct vfio *vfio)
{
    if (vfio->count < vfio->capacity)
        return true;
    size_t capacity = vfio->capacity ? vfio->capacity * 2 : 64;
    struct span *used = realloc(vfio->used, capacity * sizeof *used);
    if (!used)
        return false;
    vfio->used = used;
    vfio->capacity = capacity;
    return true;
}

static int allocate(struct vfio *vfio, uint64_t address, uint64_t length, uint64_t *iova)
{
    int ret = -ENOSPC;
    size_t index;
    pthread_mutex_lock(&vfio->lock);
    if (!grow(vfio))
        ret = -ENOMEM;
    for (int i = 0; i < vfio->range_count && ret == -ENOSPC; i++)
        if (find_in(vfio, &vfio->ranges[i], address, length, iova, &index))
            ret = 0;
    if (ret == 0) {
        memmove(vfio->used + index + 1, vfio->used + index, (vfio->count - index) * sizeof *vfio->used);
        vfio->used[index] = (struct span){*iova, length};
        vfio->count++;
    }
    pthread_mutex_unlock(&vfio->lock);
    return ret;
}

static int give_back(struct vfio *vfio, uint64_t iova, uint64_t length)
{
    int ret = -ENOENT;
    pthread_mutex_lock(&vfio->lock);
    for (size_t i = 0; i < vfio->count && ret < 0; i++) {
        if (vfio->used[i].iova != iova || vfio->used[i].length != length)
            continue;
        memmove(vfio->used + i, vfio->used + i + 1, (vfio->count - i - 1) * sizeof *vfio->used);
        vfio->count--;
        ret = 0;
    }
    pthread_mutex_unlock(&vfio->lock);
    return ret;
}

static int map(void *opaque, void *address, uint64_t length, uint64_t *iova)
{
    struct vfio *vfio = opaque;
    int ret = allocate(vfio, (uintptr_t)address, length, iova);
    if (ret < 0)
        return ret;
    struct vfio_iommu_type1_dma_map request = {
        .argsz = sizeof request,
        .flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
        .vaddr = (uintptr_t)address,
        .iova = *iova,
        .size = length,
    };
    if (ioctl(vfio->container, VFIO_IOMMU_MAP_DMA, &request) == 0)
        return 0;
    ret = -errno;
    give_back(vfio, *iova, length);
    return ret;
}

/* An address whose unmapping failed is not given out again. */
static int unmap(void *opaque, uint64_t iova, uint64_t length)
{
    struct vfio *vfio = opaque;
    struct vfio_iommu_type1_dma_unmap request = {.argsz = sizeof request, .iova = iova, .size = length};
    if (ioctl(vfio->container, VFIO_IOMMU_UNMAP_DMA, &request) < 0)
        return -errno;
    return request.size == length ? give_back(vfio, iova, length) : -EIO;
}

static void vfio_close(void *opaque)
{
    struct vfio *vfio = opaque;
    close(vfio->container);
    pthread_mutex_destroy(&vfio->lock);
    free(vfio->used);
    free(vfio);
}

static bool ranges_ok(const struct bt_iova_range *ranges, int count)
{
    if (count < 1 || count > MAX_RANGES)
        return false;
    for (int i = 0; i < count; i++)
        if (ranges[i].first > ranges[i].last || (i && ranges[i].first <= ranges[i - 1].last))
            return false;
    return true;
}

bt_dma *bt_dma_vfio_new(bt_datapath *dp, int container, const struct bt_iova_range *ranges, int count,
                        const struct bt_dma_limits *limits)
{
    static const struct bt_dma_ops ops = {.map = map, .unmap = unmap, .close = vfio_close};
    struct vfio *vfio = ranges_ok(ranges, count) ? calloc(1, sizeof *vfio) : NULL;
    if (!vfio) {
        errno = EINVAL;
        return NULL;
    }
    memcpy(vfio->ranges, ranges, (size_t)count * sizeof *ranges);
    vfio->range_count = count;
    pthread_mutex_init(&vfio->lock, NULL);
    vfio->container = fcntl(container, F_DUPFD_CLOEXEC, 3);
    bt_dma *dma = vfio->container < 0 ? NULL : bt_dma_new(dp, &ops, vfio, limits);
    if (!dma) {
        int error = errno;
        vfio_close(vfio);
        errno = error;
    }
    return dma;
}
