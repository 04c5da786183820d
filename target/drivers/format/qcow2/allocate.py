# SPDX-License-Identifier: Apache-2.0
"""Allocates host clusters: free ones below the end of use, then new ones past the end of the file.

A cluster is allocated by giving it reference count 1 in memory; refcount blocks and the refcount table grow
as needed, and are written by flush.py. Cluster numbers, not offsets, unless a name says otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from typing import NamedTuple

import numpy as np

from target.drivers.format.qcow2 import spec
from target.drivers.format.qcow2.clusterset import Metadata
from target.drivers.format.qcow2.errors import CorruptError
from target.drivers.format.qcow2.header import Header
from target.drivers.format.qcow2.refcount import Block, Place, Refcounts, too_large
from target.drivers.format.qcow2.store import Entries, Store

_SCAN_BLOCKS = 16  # refcount blocks looked at in one search before the file grows instead, if it can
_MAX_OFFSET = 1 << 56  # of a data cluster, by the L2 entry's format


class Run(NamedTuple):
    """``length`` clusters from ``first`` on. ``zeroed``: they read as zeros."""

    first: int
    length: int
    zeroed: bool


class Allocator:
    """Clusters of one image that is open for writing. Every method that awaits takes or needs ``lock``."""

    def __init__(self, store: Store, header: Header, refcounts: Refcounts, metadata: Metadata) -> None:
        self.store = store
        self.header = header
        self.refcounts = refcounts
        self.metadata = metadata
        self.check_overlap = True
        self.broken = False  # growing the refcount table failed half-way: nothing may be allocated or written
        self.lock = asyncio.Lock()
        self.hint = 0  # no free cluster is known below it
        # Clusters from here on have not been used since the image was opened.
        self.fresh = 0
        self.limit = 0
        self.fit()

    def fit(self) -> None:
        """The store is new, or another one."""
        bits = self.header.cluster_bits
        self.limit = _MAX_OFFSET >> bits
        self.fresh = max(self.fresh, -(-self.store.size >> bits))
        if not self.store.growable:
            self.limit = min(self.limit, self.store.size >> bits)
            self.fresh = 0

    # ---- taking ----

    async def take(self, want: int) -> Run:
        """At most ``want`` clusters in a row. OSError: ENOSPC, EFBIG, or what the file reports."""
        self.store.event("cluster_alloc")
        async with self.lock:
            self._check()
            return await self._recycle(want) or await self._bump(want)

    def _check(self) -> None:
        if self.broken:
            raise OSError(errno.EIO, "growing the refcount table has failed")

    async def take_table(self) -> int:
        """The offset of a cluster for an L2 table; the file has room for it."""
        run = await self.take(1)
        try:
            await self._occupy(run.first, 1)
        except BaseException:
            await self.give(run.first, 1)
            raise
        self.metadata.l2_tables.add(run.first)
        return run.first << self.header.cluster_bits

    async def _occupy(self, first: int, count: int, event: str = "") -> None:
        """Writes the clusters once, so that a full disk fails now and not when metadata must go there."""
        bits = self.header.cluster_bits
        await self.store.write(first << bits, bytes(count << bits), event)

    async def take_span(self, count: int) -> int:
        """The first of ``count`` clusters in a row for metadata; the file has room for them. OSError."""
        run = await self.take(count)
        if run.length == count:
            try:
                await self._occupy(run.first, count)
            except BaseException:
                await self.give(run.first, count)
                raise
            self.metadata.fixed.add(run.first, count)
            return run.first
        await self.give(run.first, run.length)
        async with self.lock:
            return await self._add_span(count)

    async def _add_span(self, count: int) -> int:
        """The same past all that is in use, with the refcount blocks that are missing there."""
        while True:
            self._check()
            start = await self._end_of_use()
            missing, end = self._missing_blocks(start, start + count)
            entries = (end - 1 >> self.refcounts.bits) + 1
            if entries <= self.refcounts.table.size:
                break
            await self._grow_table(entries)
        if end > self.limit:
            raise OSError(errno.ENOSPC, "no cluster is left")
        await self._occupy(start, end - start)
        await self._count_metadata(start, end, missing, start + count)
        return start

    async def _recycle(self, want: int) -> Run | None:
        """Free clusters below ``fresh``, from ``hint`` on."""
        looked_at = 0
        while self.hint < self.fresh and (looked_at < _SCAN_BLOCKS or self.fresh >= self.limit):
            index = self.hint >> self.refcounts.bits
            block = await self.refcounts.load(index)
            run = self._zeros(block, self.hint, self.fresh, want) if block else None
            if run:
                self.hint = run[0] + run[1]
                return self._mark(block, *run, zeroed=False)
            self.hint = index + 1 << self.refcounts.bits
            looked_at += 1
        return None

    def _zeros(self, block: Block, start: int, end: int, want: int) -> tuple[int, int] | None:
        """The first run of free clusters of the block within [start, end), at most ``want`` long."""
        base = block.index << self.refcounts.bits
        stop = min(end - base, block.counts.size)
        free = np.flatnonzero(block.counts[start - base : stop] == 0)
        if not free.size:
            return None
        head = free[:want]
        breaks = np.flatnonzero(np.diff(head) != 1)
        count = int(breaks[0]) + 1 if breaks.size else int(head.size)
        return start + int(head[0]), count

    def _mark(self, block: Block | None, first: int, count: int, zeroed: bool) -> Run:
        assert block is not None
        if self.check_overlap and self.metadata.overlaps(first, count):
            raise CorruptError(f"metadata lies in clusters from {first} on that are counted as free")
        at = first - (block.index << self.refcounts.bits)
        block.counts[at : at + count] = 1
        block.dirty = True
        return Run(first, count, zeroed)

    async def _bump(self, want: int) -> Run:
        """Clusters that were never used."""
        while True:
            if self.fresh >= self.limit:
                raise OSError(errno.ENOSPC, "no cluster is left")
            index = self.fresh >> self.refcounts.bits
            block = await self.refcounts.load(index)
            if block is None:
                await self._add_block(index)
                continue
            run = self._zeros(block, self.fresh, self.limit, want)
            if run is None:
                self.fresh = index + 1 << self.refcounts.bits
                continue
            self.fresh = run[0] + run[1]
            return self._mark(block, *run, zeroed=self.store.growable)

    # ---- growing the reference counts ----

    async def _add_block(self, index: int) -> None:
        """A block that counts itself, at ``fresh``, which lies in its range."""
        if index >= self.refcounts.table.size:
            await self._grow_table(index + 1)
            return
        self.store.event("refblock_alloc")
        first = self.fresh
        await self._occupy(first, 1, "refblock_alloc_write")
        self.fresh += 1
        block = await self.refcounts.add_block(index, first << self.header.cluster_bits)
        self._mark(block, first, 1, zeroed=True)
        self.metadata.fixed.add(first)

    async def _grow_table(self, entries: int) -> None:
        """Places a larger table, and the blocks that are missing to count it, past all that is in use."""
        self.store.event("reftable_grow")
        start = await self._end_of_use()
        clusters, missing = self._plan_growth(start, entries)
        end = start + clusters + len(missing)
        if end > self.limit:
            raise OSError(errno.ENOSPC, "no cluster is left for the refcount table")
        await self._occupy(start, end - start, "refblock_alloc_write_blocks")
        self.refcounts.resize_table(clusters, Place(start << self.header.cluster_bits, clusters))
        await self._count_metadata(start, end, missing, start + clusters)

    async def _count_metadata(self, start: int, end: int, blocks: list[int], first_block: int) -> None:
        """Counts [start, end), in which new blocks lie, from ``first_block`` on."""
        self.fresh = max(self.fresh, end)
        self.broken = True  # until the blocks' own clusters are counted
        for number, index in enumerate(blocks, first_block):
            await self.refcounts.add_block(index, number << self.header.cluster_bits)
        await self.refcounts.set_run(start, end - start, 1)
        self.metadata.fixed.add(start, end - start)
        self.broken = False

    def _plan_growth(self, start: int, entries: int) -> tuple[int, list[int]]:
        """The new table's clusters and the indices of blocks to be added, each counting for the other."""
        per_cluster_bits = self.header.cluster_bits - 3
        limit = spec.MAX_REFCOUNT_TABLE_BYTES >> self.header.cluster_bits
        table = self.refcounts.table
        clusters = -(-max(entries, table.size * 3 // 2) >> per_cluster_bits)
        while True:
            clusters = min(clusters, limit)
            missing, end = self._missing_blocks(start, start + clusters)
            index = (end - 1 >> self.refcounts.bits) + 1
            if max(index, entries) <= clusters << per_cluster_bits:
                return clusters, missing
            if clusters >= limit:
                raise too_large()
            clusters = -(-max(index, entries) >> per_cluster_bits)

    def _missing_blocks(self, start: int, end: int) -> tuple[list[int], int]:
        """Indices of the blocks that do not count [start, end) yet, and the end with them behind it."""
        table = self.refcounts.table
        missing: list[int] = []
        index = start >> self.refcounts.bits
        while index << self.refcounts.bits < end:
            if index >= table.size or not table[index]:
                missing.append(index)
                end += 1
            index += 1
        return missing, end

    async def _end_of_use(self) -> int:
        """The first cluster from which on nothing is counted, not even what a crash left past the end."""
        end = self.fresh
        used = np.flatnonzero(self.refcounts.table)
        for index in used[used >= self.fresh >> self.refcounts.bits].tolist():
            block = await self.refcounts.load(index)
            counted = np.flatnonzero(block.counts) if block else np.zeros(0)
            if counted.size:
                end = max(end, (index << self.refcounts.bits) + int(counted[-1]) + 1)
        return end

    # ---- giving back ----

    async def give(self, first: int, count: int) -> None:
        """Frees a run that nothing on disk points to."""
        await self.lower(np.arange(first, first + count, dtype=np.uint64))

    async def give_offset(self, offset: int) -> None:
        """Frees a metadata cluster that nothing on disk points to."""
        await self.give(offset >> self.header.cluster_bits, 1)

    async def lower(self, clusters: Entries, discard: Entries | None = None) -> None:
        """Takes one reference for each element; those of ``discard`` that become free are discarded below."""
        self.store.event("cluster_free")
        async with self.lock:
            freed = await self.refcounts.lower(clusters)
            if discard is not None and discard.size:
                await self._discard(np.intersect1d(freed, discard))
        if freed.size:
            self.hint = min(self.hint, int(freed.min()))
            self.metadata.forget(freed)

    async def trim(self, least: int = 0) -> None:
        """Cuts off what is free at the end of the file, but keeps ``least`` bytes. OSError, BlockError."""
        if not self.store.growable:
            return
        async with self.lock:
            elsewhere = await self._drop_last_blocks()
        await self.write_back()
        await self.lower(np.array(elsewhere, dtype=np.uint64))
        async with self.lock:
            size = max(await self._last_counted() + 1 << self.header.cluster_bits, least)
            if size < self.store.size:
                await self.store.truncate(size)

    async def _drop_last_blocks(self) -> list[int]:
        """Takes the last refcount blocks out of the table that count nothing, or just themselves.

        Returns those that another block counts. What a block counts after the table is durable is free.
        """
        elsewhere = []
        for index in np.flatnonzero(self.refcounts.table)[::-1].tolist():
            block = await self.refcounts.load(int(index))
            assert block is not None
            cluster = block.offset >> self.header.cluster_bits
            counted = np.flatnonzero(block.counts) + (block.index << self.refcounts.bits)
            if (counted != cluster).any():
                break
            if not counted.size:
                elsewhere.append(cluster)
            self.refcounts.drop_block(block)
            self.metadata.forget(np.array([cluster], dtype=np.uint64))
        return elsewhere

    async def _last_counted(self) -> int:
        for index in np.flatnonzero(self.refcounts.table)[::-1].tolist():
            block = await self.refcounts.load(int(index))
            counted = np.flatnonzero(block.counts) if block else np.zeros(0)
            if counted.size:
                return (int(index) << self.refcounts.bits) + int(counted[-1])
        return 0

    async def _discard(self, clusters: Entries) -> None:
        bits = self.header.cluster_bits
        for run in np.split(clusters, np.flatnonzero(np.diff(clusters) != 1) + 1):
            if run.size:
                with contextlib.suppress(OSError):  # a discard is a hint
                    await self.store.discard(int(run[0]) << bits, run.size << bits)

    async def write_back(self) -> None:
        """Makes the counts durable, table and all (step 2 of a flush)."""
        async with self.lock:
            self._check()
            plan = self.refcounts.plan_table()
            await self.refcounts.write_blocks()
        await self.store.flush()
        if plan is None:
            return
        async with self.lock:
            places = await self.refcounts.write_table(plan)
        for place in places:
            await self.give(place.offset >> self.header.cluster_bits, place.clusters)
