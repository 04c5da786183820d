# SPDX-License-Identifier: Apache-2.0
"""Reference counts: the refcount table in memory, its blocks in a small cache, both written back on request.

What is in memory is always safe to write: counts are raised before anything points to a cluster, and lowered
after the last pointer is durably gone (flush.py keeps that order). Callers hold the allocator's lock.
"""

from __future__ import annotations

import errno
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from target.drivers.format.qcow2 import spec
from target.drivers.format.qcow2.errors import CorruptError, ImageError
from target.drivers.format.qcow2.header import Header
from target.drivers.format.qcow2.store import Entries, Store
from target.drivers.format.qcow2.table import from_disk, to_disk

Counts = NDArray[Any]  # unsigned, the smallest type that holds a count

_DISK_TYPES = {3: "u1", 4: ">u2", 5: ">u4", 6: ">u8"}
_SECTOR_ENTRIES = 64


def unpack(data: bytes, order: int) -> Counts:
    """Counts of a refcount block, one an element. Widths below 8 bits start at the least significant bit."""
    if order >= 3:
        raw = np.frombuffer(data, dtype=_DISK_TYPES[order])
        return raw.astype(raw.dtype.newbyteorder("="))
    raw8 = np.frombuffer(data, dtype=np.uint8)
    width = 1 << order
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    return ((raw8[:, None] >> shifts) & np.uint8((1 << width) - 1)).reshape(-1)


def pack(counts: Counts, order: int) -> bytes:
    if order >= 3:
        return counts.astype(_DISK_TYPES[order]).tobytes()
    width = 1 << order
    parts = counts.reshape(-1, 8 >> order)
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    packed: Counts = np.bitwise_or.reduce(parts << shifts, axis=1).astype(np.uint8)
    return packed.tobytes()


@dataclass(eq=False)
class Block:
    """A refcount block in memory: the counts of the clusters from ``index`` * its entries on."""

    index: int
    offset: int
    counts: Counts
    dirty: bool = False


@dataclass
class TablePlan:
    """The table as one write-back makes it durable, after the blocks it points to."""

    offset: int
    clusters: int
    entries: Entries
    dirty: set[int]
    moved: bool


@dataclass
class Place:
    """Clusters that the refcount table occupies, or did."""

    offset: int
    clusters: int


@dataclass
class Refcounts:
    """The counts of one image that is open for writing."""

    store: Store
    header: Header
    cache_bytes: int
    table: Entries = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))
    blocks: OrderedDict[int, Block] = field(default_factory=OrderedDict)
    dirty_table: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.place = Place(self.header.refcount_table_offset, self.header.refcount_table_clusters)
        self.durable_offset = self.place.offset
        self.old_places: list[Place] = []
        self.bits = self.header.refcount_block_bits
        self.entries = 1 << self.bits

    # ---- opening ----

    async def open(self) -> None:
        """Reads and checks the table. ImageError when a pointer in it cannot be right."""
        size = self.place.clusters << self.header.cluster_bits
        self.table = from_disk(await self.store.read(self.place.offset, size, "reftable_load"))
        used = self.table[self.table != 0]
        cluster = np.uint64(self.header.cluster_size - 1)
        if bool(((used & cluster) != 0).any()):
            raise ImageError("the refcount table has a pointer that is not aligned to a cluster")
        if bool((used >= np.uint64(self.store.size + self.header.cluster_size - 1) & ~cluster).any()):
            raise ImageError("the refcount table points past the end of the file")
        if np.unique(used).size != used.size:
            raise ImageError("two entries of the refcount table point to the same block")

    # ---- blocks ----

    async def load(self, index: int) -> Block | None:
        """The block, or None when none is allocated there: then its counts are all 0."""
        block = self.blocks.get(index)
        if block is not None:
            self.blocks.move_to_end(index)
            return block
        if index >= self.table.size or not self.table[index]:
            return None
        offset = int(self.table[index])
        data = await self.store.read(offset, self.header.cluster_size, "refblock_load")
        counts = unpack(data, self.header.refcount_order)
        return await self._insert(Block(index, offset, counts))

    async def _insert(self, block: Block) -> Block:
        limit = max(2, self.cache_bytes // max(1, block.counts.nbytes))
        while len(self.blocks) >= limit:
            await self._evict()
        self.blocks[block.index] = block
        return block

    async def _evict(self) -> None:
        victim = next((block for block in self.blocks.values() if not block.dirty), None)
        if victim is None:
            victim = next(iter(self.blocks.values()))
            await self._write(victim)
        del self.blocks[victim.index]

    async def add_block(self, index: int, offset: int) -> Block:
        """Enters a new block, with all counts 0, at an offset that the caller accounts for."""
        data = bytes(self.header.cluster_size)
        block = await self._insert(Block(index, offset, unpack(data, self.header.refcount_order), dirty=True))
        self.table[index] = offset
        self.dirty_table.add(index)
        return block

    def drop_block(self, block: Block) -> None:
        """Takes out a block whose counts are not needed any more."""
        self.blocks.pop(block.index, None)
        self.table[block.index] = 0
        self.dirty_table.add(block.index)

    async def get(self, cluster: int) -> int:
        block = await self.load(cluster >> self.bits)
        return int(block.counts[cluster & (self.entries - 1)]) if block else 0

    async def set_run(self, first: int, count: int, value: int) -> None:
        """Sets the counts of a run whose blocks exist."""
        end = first + count
        while first < end:
            at = first & (self.entries - 1)
            n = min(self.entries - at, end - first)
            block = await self.load(first >> self.bits)
            assert block is not None
            block.counts[at : at + n] = value
            block.dirty = True
            first += n

    async def lower(self, clusters: Entries) -> Entries:
        """Takes one reference for each element (a cluster number, may repeat). Returns those now free.

        A count that is 0 already belongs to a corrupted image; it stays 0, which can only leak.
        """
        freed = []
        for index, numbers in group(clusters, self.bits):
            block = await self.load(index)
            if block is None:
                continue
            at, times = np.unique(numbers & np.uint64(self.entries - 1), return_counts=True)
            before = block.counts[at].astype(np.uint64)
            after = before - np.minimum(before, times.astype(np.uint64))
            block.counts[at] = after.astype(block.counts.dtype)
            block.dirty = True
            freed.append(at[(after == 0) & (before > 0)] + np.uint64(index << self.bits))
        return np.concatenate(freed) if freed else np.zeros(0, dtype=np.uint64)

    # ---- table ----

    def resize_table(self, clusters: int, place: Place) -> None:
        """The table is larger and elsewhere from now on; the old place is freed after the header's change."""
        entries = clusters << self.header.cluster_bits >> 3
        assert entries >= self.table.size
        self.table = np.concatenate([self.table, np.zeros(entries - self.table.size, dtype=np.uint64)])
        self.old_places.append(self.place)
        self.place = place

    # ---- writing back ----

    async def _write(self, block: Block) -> None:
        block.dirty = False
        try:
            data = pack(block.counts, self.header.refcount_order)
            await self.store.write(block.offset, data, "refblock_update_part")
        except BaseException:
            block.dirty = True
            raise

    async def write_blocks(self) -> None:
        """Writes every dirty block. On an error the rest stays dirty."""
        for block in list(self.blocks.values()):
            if block.dirty:
                await self._write(block)

    def plan_table(self) -> TablePlan | None:
        """What ``write_table`` is to write, or None; take it before ``write_blocks``."""
        moved = self.place.offset != self.durable_offset
        if not moved and not self.dirty_table:
            return None
        dirty = set(self.dirty_table)
        return TablePlan(self.place.offset, self.place.clusters, self.table.copy(), dirty, moved)

    async def write_table(self, plan: TablePlan) -> list[Place]:
        """Makes the plan durable; its blocks are so already. Returns places of the table now free."""
        if plan.moved:
            await self.store.write(plan.offset, to_disk(plan.entries), "refblock_alloc_write_table")
            await self.store.flush()
            at = spec.HEADER_V2.offsets["refcount_table_offset"]
            pointer = plan.offset.to_bytes(8, "big") + plan.clusters.to_bytes(4, "big")
            await self.store.write(at, pointer, "refblock_alloc_switch_table")
        else:
            for first, end in sector_runs(plan.dirty):
                data = to_disk(plan.entries[first:end])
                await self.store.write(plan.offset + first * 8, data, "refblock_alloc_hookup")
        await self.store.flush()
        self.dirty_table -= plan.dirty
        self.durable_offset = plan.offset
        free = [place for place in self.old_places if place.offset != plan.offset]
        self.old_places = [place for place in self.old_places if place.offset == plan.offset]
        return free


def group(clusters: Entries, bits: int) -> Iterator[tuple[int, Entries]]:
    """The elements by their upper bits: (element >> bits, elements)."""
    if not clusters.size:
        return
    clusters = np.sort(clusters)
    numbers, starts = np.unique(clusters >> np.uint64(bits), return_index=True)
    for number, part in zip(numbers, np.split(clusters, starts[1:]), strict=True):
        yield int(number), part


def sector_runs(indices: set[int]) -> list[tuple[int, int]]:
    """Half-open ranges of 8-byte entries, whole 512-byte sectors, that cover the indices."""
    runs: list[tuple[int, int]] = []
    for sector in sorted({index // _SECTOR_ENTRIES for index in indices}):
        first = sector * _SECTOR_ENTRIES
        if runs and runs[-1][1] == first:
            runs[-1] = (runs[-1][0], first + _SECTOR_ENTRIES)
        else:
            runs.append((first, first + _SECTOR_ENTRIES))
    return runs


def too_large() -> OSError:
    return OSError(errno.EFBIG, "the refcount table cannot grow beyond 8 MiB")


__all__ = ["Block", "CorruptError", "Place", "Refcounts", "TablePlan", "group", "pack", "unpack"]
