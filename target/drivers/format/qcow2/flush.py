# SPDX-License-Identifier: Apache-2.0
"""Writes changed metadata back, in the order that a crash can interrupt anywhere (docs/architecture.md).

1. Copy the dirty slices. 2. Write reference counts and new or copied L2 tables; fdatasync, which also makes
the data durable; then the refcount table where it changed; fdatasync. 3. Write the changed entries and L1;
fdatasync. What a resize has changed in the header follows, and another fdatasync. Only after that are the
clusters that were dropped freed, once nobody reads them any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeVar

import numpy as np

from target.drivers.format.qcow2 import spec
from target.drivers.format.qcow2.grants import Grants
from target.drivers.format.qcow2.image import Image
from target.drivers.format.qcow2.loader import Loader
from target.drivers.format.qcow2.refcount import sector_runs
from target.drivers.format.qcow2.store import Entries, MapFace
from target.drivers.format.qcow2.table import (
    Merge,
    classify,
    combined,
    from_disk,
    joined,
    merge,
    spans,
    to_disk,
)

_BATCH = 256  # slices in one round of write-back
_PARALLEL = 16  # metadata requests at a time
_COPIED = np.uint64(spec.OFLAG_COPIED)
T = TypeVar("T")


class Discard(Enum):
    """Which clusters that become free are discarded in the file."""

    NONE = "none"
    REQUEST = "request"  # those that a user zeroed or discarded
    ALL = "all"


@dataclass
class Settled:
    """What follows from entries being durable: clusters seen in use, and clusters dropped. Host offsets."""

    came: list[Entries] = field(default_factory=list)
    dropped: list[Entries] = field(default_factory=list)
    zeroed: list[Entries] = field(default_factory=list)
    compressed: list[Entries] = field(default_factory=list)
    tables: list[int] = field(default_factory=list)

    def add(self, merged: Merge) -> None:
        self.came.append(merged.came)
        self.dropped.append(merged.dropped)
        self.zeroed.append(merged.zeroed)
        self.compressed.append(merged.compressed)


class WriteBack:
    """Flushes one image. One write-back runs at a time; requests that come meanwhile share the next."""

    def __init__(self, image: Image, map: MapFace, loader: Loader, grants: Grants, discard: Discard) -> None:
        assert image.allocator is not None
        self.image = image
        self.allocator = image.allocator
        self.map = map
        self.loader = loader
        self.grants = grants
        self.discard = discard
        self.lock = asyncio.Lock()  # held while one runs; a resize takes it to keep them out
        self._audit = False  # in the next write-back
        self._reclaim = False  # in the next write-back: what the pool holds goes back too
        self._current: asyncio.Task[None] | None = None
        self._next: asyncio.Task[None] | None = None
        self._freeing: asyncio.Task[None] | None = None
        # From a write-back that failed: of tables whose L1 entry is not durable; the next commit makes it so.
        self._pending = Settled()
        # Of slices that may have been written in place: each is settled when it is durable itself.
        self._attempts: dict[int, list[Merge]] = {}

    # ---- coalescing ----

    async def flush(self) -> None:
        """Makes everything durable that was complete before the call. OSError."""
        await asyncio.shield(self._join())

    def request(self) -> None:
        """Asks for a write-back that nobody waits for; an error keeps the slices dirty for the next flush."""
        if self._next is None and self._current is None and not self.grants.quiet:
            self._join().add_done_callback(lambda task: task.cancelled() or task.exception())

    async def quiesce(self) -> None:
        """Nothing is done from here on, until ``resume``, but on request; what has begun is finished."""
        self.grants.quiet = True
        await self.grants.idle()
        running = [task for task in (self._current, self._next, self._freeing) if task is not None]
        if running:
            await asyncio.wait(running)

    def resume(self) -> None:
        self.grants.quiet = False

    async def reclaim(self) -> None:
        """Frees all that can be freed, when there is no space left. OSError."""
        self._audit = self._reclaim = True
        await self.flush()
        await self.freed()

    def _join(self) -> asyncio.Task[None]:
        if self._next is None:
            self._next = asyncio.ensure_future(self._run(self._current))
        return self._next

    async def _run(self, previous: asyncio.Task[None] | None) -> None:
        if previous is not None:
            await asyncio.wait([previous])
        self._current, self._next = self._next, None
        self.map.hold_flush(True)
        try:
            async with self.lock:
                await self._write_all()
        finally:
            self._current = None
            self.map.hold_flush(self._pointers_wait())

    def _pointers_wait(self) -> bool:
        return bool(self.image.dirty_l1) or self.image.header_changed

    async def close(self) -> None:
        """The last write-back: returns grants, frees what was dropped. OSError: then clusters may leak."""
        try:
            await self.grants.close()
            suspects = await self.grants.audit(give_back=True)
            await self.flush()
            if not self.image.broken:
                await self._free_all(suspects)
        finally:
            if self._freeing is not None:
                await asyncio.wait([self._freeing])

    async def _free_all(self, suspects: set[int]) -> None:
        self._free_lost(suspects)
        await self.freed()
        for offset in self.image.reserved.values():
            await self.allocator.give_offset(offset)
        self.image.reserved.clear()
        await self.allocator.write_back()

    # ---- one write-back ----

    async def _write_all(self) -> None:
        self.image.store.event("flush_to_os")
        audit, give_back, self._audit, self._reclaim = self._audit, self._reclaim, False, False
        suspects = await self.grants.audit(give_back) if audit else set()
        slices = self.map.dirty()
        if not slices and not self._pointers_wait():
            await self.image.store.flush()
        for at in range(0, max(len(slices), self._pointers_wait()), _BATCH):
            await self._write_batch(slices[at : at + _BATCH])
        if self.image.header_changed:  # what a new size shows is durable
            await self.image.write_header(size=self.image.header.size)
        self._free_lost(suspects)
        self._audit = self._audit or self.grants.needs_audit()

    def _free_lost(self, suspects: set[int]) -> None:
        """Frees clusters that were placed and dropped again without ever being in a table on disk."""
        lost = self.grants.lost(suspects)
        if lost:
            clusters = np.array(lost, dtype=np.uint64)
            self._free_later(clusters, clusters)

    async def _write_batch(self, slices: list[int]) -> None:
        copies = {slice: self.map.clean(slice) for slice in slices}
        self.image.writing = copies
        self.loader.taken(copies)
        try:
            settled = await self._commit(copies)
        except BaseException:
            self._undo(copies)
            raise
        finally:
            self.image.writing = {}
        self._settle(settled)

    def _undo(self, copies: dict[int, Entries]) -> None:
        """The slices are dirty again; one that was dropped meanwhile comes back as it was taken."""
        for slice, entries in copies.items():
            self.map.load(slice, entries, self.image.may_change(self.loader.l1_index(slice)))
            self.map.redirty(slice)

    async def _commit(self, copies: dict[int, Entries]) -> Settled:
        merges = dict(zip(copies, await limited(self._merge(*item) for item in copies.items()), strict=True))
        in_place = {slice: m for slice, m in merges.items() if self.image.is_own(self.loader.l1_index(slice))}
        await self._write_tables({slice: m for slice, m in merges.items() if slice not in in_place})
        await self.allocator.write_back()
        # From here on entries may be on disk: a retry would not see what came and what was dropped.
        for slice, merged in in_place.items():
            self._attempts.setdefault(slice, []).append(merged)
        await limited(self._write_slice(slice, merged) for slice, merged in in_place.items())
        await self._write_l1()
        await self.image.store.flush()
        if self.image.l1_moved:
            await self.image.write_header(size=self.image.durable.size)
        settled, self._pending = self._pending, Settled()
        for slice in in_place:
            settled.add(combined(self._attempts.pop(slice)))
        return settled

    async def _merge(self, slice: int, entries: Entries) -> Merge:
        header = self.image.header
        old = await self.loader.read_raw(slice)
        own = self.image.is_own(self.loader.l1_index(slice))
        if not own:
            old = without_copied(old)
        return merge(old, entries, header.version, header.cluster_size, shared=not own)

    async def _write_slice(self, slice: int, merged: Merge) -> None:
        """Writes the sectors that changed, in place."""
        offset = self.image.table_offset(self.loader.l1_index(slice)) + self.loader.byte_in_table(slice)
        for first, end in sector_runs(set(merged.changed.tolist())):
            await self.image.store.write(offset + first * 8, to_disk(merged.raw[first:end]), "l2_update")

    async def _write_l1(self) -> None:
        """The sectors that changed; all of it when it has a new place."""
        dirty, header = set(self.image.dirty_l1), self.image.header
        runs = [(0, header.l1_size)] if self.image.l1_moved else sector_runs(dirty)
        for first, end in runs:
            data = to_disk(self.image.l1[first:end])
            event = "l1_grow_write_table" if self.image.l1_moved else "l1_update"
            await self.image.store.write(header.l1_table_offset + first * 8, data, event)
        self.image.dirty_l1 -= dirty

    # ---- tables that are new, or shared and therefore copied ----

    async def _write_tables(self, merges: dict[int, Merge]) -> None:
        by_table: dict[int, dict[int, Merge]] = {}
        for slice, merged in merges.items():
            if merged.changed.size:
                by_table.setdefault(self.loader.l1_index(slice), {})[slice] = merged
        for index, parts in by_table.items():
            await self._write_table(index, parts)

    async def _write_table(self, index: int, parts: dict[int, Merge]) -> None:
        """Writes a whole table to a new place and points L1, in memory, to it."""
        old = self.image.table_offset(index)
        raw = await self._old_table(old)
        for slice, merged in parts.items():
            at = self.loader.byte_in_table(slice) >> 3
            raw[at : at + merged.raw.size] = merged.raw
        offset = self.image.reserved[index]
        await self.image.store.write(offset, to_disk(raw), "l2_alloc_write")
        del self.image.reserved[index]
        self.image.l1[index] = offset | spec.OFLAG_COPIED
        self.image.dirty_l1.add(index)
        for merged in parts.values():
            self._pending.add(merged)
        if old:
            self._pending.tables.append(old)

    async def _old_table(self, offset: int) -> Entries:
        size = self.image.header.cluster_size
        if not offset:
            return np.zeros(size // 8, dtype=np.uint64)
        return without_copied(from_disk(await self.image.store.read(offset, size, "l2_alloc_cow_read")))

    # ---- tables that go, as their part of the image does ----

    async def drop_tables(self, indices: list[int]) -> None:
        """Takes L2 tables off L1, whose slices are clean and out of reach, and frees what they hold."""
        async with self.lock:
            self.image.store.event("l1_shrink_free_l2_clusters")
            for index in indices:
                await self._drop_table(index)
            self.image.store.event("l1_shrink_write_table")
            self._settle(await self._commit({}))

    async def _drop_table(self, index: int) -> None:
        image, header = self.image, self.image.header
        offset = self.loader.check_table(index)
        raw = from_disk(await image.store.read(offset, header.cluster_size))
        classes = classify(raw, header.version, header.cluster_size)
        hosts = raw[classes.data | classes.zero] & np.uint64(spec.OFFSET_MASK)
        hosts = hosts[(hosts != 0) & (hosts < np.uint64(image.store.size))]
        hosts = hosts[~image.metadata.contains(hosts >> np.uint64(header.cluster_bits))]
        self._pending.dropped.append(hosts)
        self._pending.zeroed.append(hosts)
        self._pending.compressed.append(raw[classes.compressed])
        self._pending.tables.append(offset)
        image.l1[index] = 0
        image.dirty_l1.add(index)

    # ---- afterwards ----

    def _settle(self, settled: Settled) -> None:
        """What came is accounted for; what was dropped is freed, now that no pointer to it is on disk."""
        bits = np.uint64(self.image.header.cluster_bits)
        self.grants.seen(joined(settled.came))
        tables = np.array(settled.tables, dtype=np.uint64)
        packed = spans(joined(settled.compressed), self.image.header.cluster_bits)
        clusters = joined([joined(settled.dropped) >> bits, tables >> bits, packed])
        if clusters.size:
            self._free_later(clusters, joined(settled.zeroed) >> bits)

    def _free_later(self, clusters: Entries, requested: Entries) -> None:
        """Not part of the flush: somebody may read the clusters for as long as he likes."""
        self._freeing = asyncio.ensure_future(self._free(self._freeing, clusters, requested))
        self._freeing.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _free(self, previous: asyncio.Task[None] | None, clusters: Entries, requested: Entries) -> None:
        if previous is not None:
            await asyncio.wait([previous])
        await self.map.synchronize()
        self.image.freed += 1
        await self.allocator.lower(clusters, self._to_discard(clusters, requested))

    async def freed(self) -> None:
        """All that was to be freed is. OSError: the last of it was not."""
        if self._freeing is not None:
            await self._freeing

    def _to_discard(self, freed: Entries, requested: Entries) -> Entries | None:
        match self.discard:
            case Discard.REQUEST:
                return requested
            case Discard.ALL:
                return freed
        return None


def without_copied(raw: Entries) -> Entries:
    """Entries of a table that had another user: their clusters have one too."""
    return raw & ~_COPIED


async def limited(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """As gather, with a bound on how many run at a time; all have ended when it returns or raises."""
    slots = asyncio.Semaphore(_PARALLEL)

    async def one(coroutine: Coroutine[Any, Any, T]) -> T:
        async with slots:
            return await coroutine

    results = await asyncio.gather(*map(one, work), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]
