/* SPDX-License-Identifier: Apache-2.0 */
/* The I/O addresses that a VFIO container gives out, against a kernel that is this program.
 *
 * test_nvme_vfio [OPERATIONS]. Exits 1 at the first difference. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/vfio.h>
#include <stdarg.h>
#include <stdio.h>

#include "nvme_dma.h"

#include "check.h"

#define SPANS 512u
#define PAGE 4096u

static struct span {
    uint64_t iova, length;
} spans[SPANS];
static unsigned span_count;
static int refusal;
static const struct bt_iova_range ranges[] = {
    {0, 0xFFFF}, {0x200000, 0xFEDFFFFF}, {0xFEF00000, 0x7FFFFFFFFF}, {UINT64_MAX - 0xFFFF, UINT64_MAX}};

static bool inside(uint64_t iova, uint64_t length)
{
    for (size_t i = 0; i < sizeof ranges / sizeof ranges[0]; i++)
        if (iova >= ranges[i].first && iova <= ranges[i].last && ranges[i].last - iova >= length - 1)
            return true;
    return false;
}

static int kernel_map(const struct vfio_iommu_type1_dma_map *map)
{
    CHECK(map->argsz == sizeof *map && map->flags == (VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE));
    CHECK(map->iova && map->size && !((map->iova | map->size | map->vaddr) % PAGE) && inside(map->iova, map->size));
    CHECK(map->size < 2u << 20 || !((map->iova ^ map->vaddr) % (2u << 20)));
    for (unsigned i = 0; i < span_count; i++)
        CHECK(map->iova + (map->size - 1) < spans[i].iova || spans[i].iova + (spans[i].length - 1) < map->iova);
    if (refusal) {
        errno = refusal;
        return -1;
    }
    CHECK(span_count < SPANS);
    spans[span_count++] = (struct span){map->iova, map->size};
    return 0;
}

static int kernel_unmap(struct vfio_iommu_type1_dma_unmap *unmap)
{
    CHECK(unmap->argsz == sizeof *unmap && !unmap->flags);
    for (unsigned i = 0; i < span_count; i++)
        if (spans[i].iova == unmap->iova && spans[i].length == unmap->size) {
            spans[i] = spans[--span_count];
            return 0;
        }
    unmap->size = 0; /* as the kernel says that there was nothing */
    return 0;
}

int __wrap_ioctl(int fd, unsigned long request, ...);
int __wrap_ioctl(int fd, unsigned long request, ...)
{
    va_list arguments;
    va_start(arguments, request);
    void *argument = va_arg(arguments, void *);
    va_end(arguments);
    CHECK(fd >= 0);
    if (request == VFIO_IOMMU_MAP_DMA)
        return kernel_map(argument);
    CHECK(request == VFIO_IOMMU_UNMAP_DMA);
    return kernel_unmap(argument);
}

static uint32_t random_state = 1;

/* Mappings of all sizes come and go; the kernel above looks at each. */
static void test_random(bt_dma *dma, unsigned operations)
{
    struct span held[256];
    unsigned count = 0;
    for (unsigned i = 0; i < operations; i++) {
        if (count < 256 && next_random(&random_state) % 5 < 3) {
            uint64_t most = next_random(&random_state) % 8 ? 8 : 5000;
            uint64_t length = (1 + next_random(&random_state) % most) * PAGE;
            uint64_t address = (uint64_t)(next_random(&random_state) % 1000000) * PAGE;
            CHECK(bt_dma_map(dma, (void *)(uintptr_t)address, length, &held[count].iova) == 0);
            held[count++].length = length;
        } else if (count) {
            unsigned which = next_random(&random_state) % count;
            CHECK(bt_dma_unmap(dma, held[which].iova, held[which].length) == 0);
            held[which] = held[--count];
        }
        CHECK(span_count == count);
    }
    while (count--)
        CHECK(bt_dma_unmap(dma, held[count].iova, held[count].length) == 0);
}

static void test_refusals(bt_dma *dma)
{
    uint64_t iova;
    CHECK(bt_dma_map(dma, NULL, 0, &iova) == -EINVAL && bt_dma_map(dma, (void *)1, PAGE, &iova) == -EINVAL);
    CHECK(bt_dma_map(dma, NULL, PAGE + 1, &iova) == -EINVAL);
    CHECK(bt_dma_map(dma, NULL, 1ull << 40, &iova) == -ENOSPC); /* in no range */
    refusal = ENOMEM;
    for (int i = 0; i < 100; i++)
        CHECK(bt_dma_map(dma, NULL, 15 * PAGE, &iova) == -ENOMEM);
    refusal = 0;
    CHECK(bt_dma_map(dma, NULL, 15 * PAGE, &iova) == 0 && iova == PAGE); /* what was refused is free again */
    CHECK(bt_dma_unmap(dma, iova, PAGE) == -EIO && bt_dma_unmap(dma, iova, 15 * PAGE) == 0);
}

static void test_bad_ranges(bt_datapath *dp, int fd, const struct bt_dma_limits *limits)
{
    static const struct bt_iova_range unsorted[] = {{0x10000, 0x1FFFF}, {0, 0xFFFF}}, reversed[] = {{2, 1}};
    errno = 0;
    CHECK(!bt_dma_vfio_new(dp, fd, unsorted, 2, limits) && errno == EINVAL);
    CHECK(!bt_dma_vfio_new(dp, fd, reversed, 1, limits) && !bt_dma_vfio_new(dp, fd, ranges, 0, limits));
    CHECK(!bt_dma_vfio_new(dp, fd, ranges, 65, limits));
    CHECK(!bt_dma_vfio_new(dp, -1, ranges, 1, limits) && errno == EBADF);
    struct bt_dma_limits odd = *limits;
    odd.piece = 5000;
    CHECK(!bt_dma_vfio_new(dp, fd, ranges, 1, &odd) && errno == EINVAL);
}

int main(int argc, char **argv)
{
    struct bt_dma_limits limits = {.bytes = 1u << 20, .mappings = 10, .piece = 65536};
    bt_datapath *dp = bt_datapath_new();
    int fd = open("/dev/null", O_RDWR | O_CLOEXEC);
    struct bt_event event;
    CHECK(bt_thread_new(dp, 0) == 0 && fd >= 0);
    test_bad_ranges(dp, fd, &limits);
    bt_dma *dma = bt_dma_vfio_new(dp, fd, ranges, 4, &limits);
    CHECK(dma);
    test_refusals(dma);
    test_random(dma, argc > 1 ? (unsigned)atoi(argv[1]) : 20000);
    bt_dma_free(dma, 7);
    while (bt_events(dp, &event, 1) == 0)
        usleep(1000);
    CHECK(event.type == BT_EVENT_DONE && event.tag == 7);
    close(fd);
    bt_datapath_free(dp);
    printf("ok\n");
    return 0;
}
