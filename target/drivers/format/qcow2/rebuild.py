# SPDX-License-Identifier: Apache-2.0
"""Rebuilds the reference counts of a dirty image from its L1 and L2 tables, before anything is written to it.

It repairs what lazy reference counts leave behind: counts, missing refcount blocks, OFLAG_COPIED. A table
that cannot be right is refused: that is for 'qemu-img check -r all'.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from target.drivers.format.qcow2 import spec
from target.drivers.format.qcow2.errors import ImageError
from target.drivers.format.qcow2.image import Image
from target.drivers.format.qcow2.refcount import Place, Refcounts, group
from target.drivers.format.qcow2.store import Entries
from target.drivers.format.qcow2.table import classify, from_disk, joined, spans, to_disk

_MAX_MEMORY = 192 << 20
_MAX_L1_BYTES = 256 << 20
_NO_ROOM = "the image is dirty and has no room for the reference counts that are missing"
_OFFSET = np.uint64(spec.OFFSET_MASK)
_COPIED = np.uint64(spec.OFLAG_COPIED)


async def rebuild(image: Image, refcounts: Refcounts) -> None:
    """Makes the counts right, durably. ImageError when the image cannot be repaired here."""
    counts = await count_references(image, refcounts)
    _add_blocks(image, refcounts, counts)
    for index, offset in counts.new_blocks:
        await refcounts.add_block(index, offset)
    for index in np.flatnonzero(refcounts.table).tolist():
        block = await refcounts.load(index)
        assert block is not None
        page = counts.page(index)
        if not np.array_equal(block.counts, page):
            block.counts[:] = page
            block.dirty = True
    assert image.allocator is not None
    await image.allocator.write_back()
    await _fix_copied(image, counts)
    await image.store.flush()
    await image.allocator.write_back()


class Counts:
    """Reference counts by cluster number, in pages as large as a refcount block, those not 0."""

    def __init__(self, image: Image, bits: int) -> None:
        self.image = image
        self.bits = bits
        self.order = image.header.refcount_order
        # One kind larger than what is on disk, to see an overflow.
        self.dtype: Any = np.uint32 if self.order <= 4 else np.uint64
        self.pages: dict[int, NDArray[Any]] = {}
        self.new_blocks: list[tuple[int, int]] = []

    def add(self, clusters: Entries, times: int = 1) -> None:
        for index, numbers in group(clusters, self.bits):
            page = self.pages.get(index)
            if page is None:
                page = self.pages[index] = np.zeros(1 << self.bits, dtype=self.dtype)
                if len(self.pages) * page.nbytes > _MAX_MEMORY:
                    raise ImageError("the image is dirty and too large to repair here; use qemu-img check")
            np.add.at(page, numbers & np.uint64((1 << self.bits) - 1), times)

    def add_range(self, offset: int, length: int) -> None:
        """Clusters that ``length`` bytes touch; none when it is 0: then the offset may be anything."""
        if not length:
            return
        bits = self.image.header.cluster_bits
        end = offset + length + self.image.header.cluster_size - 1 >> bits
        self.add(np.arange(offset >> bits, end, dtype=np.uint64))

    def get(self, clusters: Entries) -> NDArray[np.uint64]:
        """The counts of clusters that were added before."""
        out = np.zeros(clusters.shape, dtype=np.uint64)
        index = clusters >> np.uint64(self.bits)
        for number in np.unique(index).tolist():
            at = index == number
            out[at] = self.pages[number][clusters[at] & np.uint64((1 << self.bits) - 1)]
        return out

    def page(self, index: int) -> NDArray[Any]:
        page = self.pages.get(index)
        if page is None:
            return np.zeros(1 << self.bits, dtype=self.dtype)
        if self.order < 6 and int(page.max()) >= 1 << (1 << self.order):
            raise ImageError("the image is dirty and refers to a cluster more often than its counts can hold")
        return page


async def count_references(image: Image, refcounts: Refcounts) -> Counts:
    """Counts every pointer in the image. ImageError when one cannot be right."""
    header = image.header
    counts = Counts(image, refcounts.bits)
    counts.add_range(0, header.cluster_size)
    counts.add_range(header.l1_table_offset, header.l1_size * 8)
    counts.add_range(refcounts.place.offset, refcounts.place.clusters << header.cluster_bits)
    counts.add(refcounts.table[refcounts.table != 0] >> np.uint64(header.cluster_bits))
    counts.add_range(header.snapshots_offset, image.snapshot_table_length)
    tables = [image.l1]
    if sum(snapshot.l1_size * 8 for snapshot in image.snapshots) > _MAX_L1_BYTES:
        raise ImageError("the image is dirty and its snapshots are too large to be repaired here")
    for snapshot in image.snapshots:
        counts.add_range(snapshot.l1_table_offset, snapshot.l1_size * 8)
        tables.append(from_disk(await image.store.read(snapshot.l1_table_offset, snapshot.l1_size * 8)))
    offsets, times = np.unique(joined(tables) & _OFFSET, return_counts=True)
    for offset, n in zip(offsets.tolist(), times.tolist(), strict=True):
        if offset:
            _check(image, np.array([offset], dtype=np.uint64), "an L1 entry")
            counts.add(np.array([offset >> header.cluster_bits], dtype=np.uint64), n)
            await _count_table(image, counts, offset, n)
    return counts


async def _count_table(image: Image, counts: Counts, offset: int, times: int) -> None:
    header = image.header
    raw = from_disk(await image.store.read(offset, header.cluster_size))
    classes = classify(raw, header.version, header.cluster_size)
    if bool(classes.invalid.any()):
        raise ImageError(f"the image is dirty and the L2 table at {offset:#x} has invalid entries")
    hosts = raw[classes.data | classes.zero] & _OFFSET
    hosts = hosts[hosts != 0]
    _check(image, hosts, f"the L2 table at {offset:#x}")
    counts.add(hosts >> np.uint64(header.cluster_bits), times)
    packed = spans(raw[classes.compressed], header.cluster_bits)
    _check(image, packed << np.uint64(header.cluster_bits), f"the L2 table at {offset:#x}")
    counts.add(packed, times)


def _check(image: Image, offsets: Entries, where: str) -> None:
    """Pointers are aligned, inside the file, and not at the header or another fixed structure."""
    size = image.header.cluster_size
    bad = (offsets & np.uint64(size - 1)) != 0
    bad |= offsets >= np.uint64(image.store.size + size - 1 & ~(size - 1))
    bad |= image.metadata.fixed.contains(offsets >> np.uint64(image.header.cluster_bits))
    if bool(bad.any()):
        raise ImageError(f"the image is dirty and {where} has a wrong pointer ({int(offsets[bad][0]):#x})")


def _add_blocks(image: Image, refcounts: Refcounts, counts: Counts) -> None:
    """Places the refcount blocks that are missing, and a larger table if need be, after all in use."""
    assert image.allocator is not None
    allocator, bits = image.allocator, image.header.cluster_bits
    start = max(allocator.fresh, _last(counts) + 1)
    missing, clusters = _plan(refcounts, counts, start, bits)
    end = start + clusters + len(missing)
    if end == start:
        return
    if end > allocator.limit:
        raise ImageError(_NO_ROOM)
    if image.store.growable:
        allocator.fresh = end
    counts.add(np.arange(start, end, dtype=np.uint64))
    image.metadata.fixed.add(start, end - start)
    if clusters:
        refcounts.resize_table(clusters, Place(start << bits, clusters))
    counts.new_blocks = [(index, start + clusters + i << bits) for i, index in enumerate(sorted(missing))]


def _plan(refcounts: Refcounts, counts: Counts, start: int, cluster_bits: int) -> tuple[set[int], int]:
    """The indices of missing blocks, and the clusters of a larger table (0: none), which count themselves.

    ImageError when the table would be larger than the format's readers take.
    """
    missing = {index for index in counts.pages if not _covered(refcounts, index)}
    clusters = 0
    while clusters << cluster_bits <= spec.MAX_REFCOUNT_TABLE_BYTES:
        end = start + clusters + len(missing)
        own = range(start >> counts.bits, (end - 1 >> counts.bits) + 1) if end > start else range(0)
        wanted = missing | {index for index in own if not _covered(refcounts, index)}
        entries = max(wanted, default=-1) + 1
        needed = -(-entries >> cluster_bits - 3) if entries > refcounts.table.size else 0
        if wanted == missing and needed <= clusters:
            return missing, clusters
        missing, clusters = wanted, max(clusters, needed)
    raise ImageError(_NO_ROOM)


def _covered(refcounts: Refcounts, index: int) -> bool:
    return index < refcounts.table.size and bool(refcounts.table[index])


def _last(counts: Counts) -> int:
    """The last cluster in use."""
    index = max(counts.pages)
    return (index << counts.bits) + int(np.flatnonzero(counts.pages[index])[-1])


async def _fix_copied(image: Image, counts: Counts) -> None:
    """OFLAG_COPIED in the active tables exactly where the count is 1."""
    header = image.header
    fixed = _with_copied(image.l1, (image.l1 & _OFFSET) != 0, counts, header.cluster_bits)
    if not np.array_equal(fixed, image.l1):
        image.l1 = fixed
        await image.store.write(header.l1_table_offset, to_disk(fixed))
    for offset in np.unique(image.l1 & _OFFSET).tolist():
        if not offset:
            continue
        raw = from_disk(await image.store.read(offset, header.cluster_size))
        classes = classify(raw, header.version, header.cluster_size)
        hosted = (classes.data | classes.zero) & ((raw & _OFFSET) != 0)
        fixed = _with_copied(raw, hosted, counts, header.cluster_bits)
        if not np.array_equal(fixed, raw):
            await image.store.write(offset, to_disk(fixed))


def _with_copied(raw: Entries, hosted: NDArray[np.bool_], counts: Counts, cluster_bits: int) -> Entries:
    out = raw & ~_COPIED
    own = counts.get((raw[hosted] & _OFFSET) >> np.uint64(cluster_bits)) == 1
    out[hosted] |= np.where(own, _COPIED, np.uint64(0))
    return out
