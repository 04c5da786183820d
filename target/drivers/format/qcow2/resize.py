# SPDX-License-Identifier: Apache-2.0
"""Gives an image a new virtual size while requests are under way.

Growing is done in memory, with room reserved in the file for all it needs; the header's new fields are
written by the next write-back, after what they show is durable. Until then it can be undone without a trace.
Shrinking is a smaller map first; what is past the new end is dropped when the change can no longer fail.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from target.datapath import ENTRY_DATA, ENTRY_KIND, ENTRY_WRITABLE, ENTRY_ZERO
from target.drivers.format.qcow2 import spec
from target.drivers.format.qcow2.errors import ImageError
from target.drivers.format.qcow2.header import Header
from target.drivers.format.qcow2.image import Image
from target.drivers.format.qcow2.space import Space
from target.drivers.format.qcow2.table import DATA_OWN, UNALLOCATED, ZERO_PLAIN, entry, host_of
from target.graph.errors import BlockError

if TYPE_CHECKING:
    from target.graph.change import Change

log = logging.getLogger(__name__)
_DIRTY_SLICES = 256  # are written back before there are more
_TABLES = 64  # dropped at a time
_MAX_SIZE = (1 << 63) - 1


def check_size(header: Header, size: int) -> None:
    """ImageError: the image cannot have this size; worded as QEMU does."""
    if size % 512:
        raise ImageError("The new size must be a multiple of 512")
    if header.nb_snapshots and header.version < 3:
        raise ImageError("Can't resize a v2 image which has snapshots")
    if size > _MAX_SIZE or _l1_entries(header, size) * 8 > spec.MAX_L1_BYTES:
        raise ImageError("Failed to grow the L1 table: File too large")


def _l1_entries(header: Header, size: int) -> int:
    return -(-size >> header.cluster_bits + header.l2_bits)


class Resizer:
    """Resizes one image that is open for writing.

    ``read``: the image's content. ``backing_size``: of what shows through where nothing is allocated, now.
    """

    def __init__(
        self,
        image: Image,
        space: Space,
        read: Callable[[int, int], Awaitable[bytes]],
        backing_size: Callable[[], int],
    ) -> None:
        self.image = image
        self.space = space
        self.write_back = space.write_back
        self.map = self.write_back.map
        self.loader = self.write_back.loader
        self.allocator = space.allocator
        self.read = read
        self.backing_size = backing_size
        self.bits = image.header.cluster_bits
        # What was behind the old end in the last cluster: granule, its entry, offset in the file, bytes.
        self._tail: tuple[int, int, int, bytes] | None = None

    # ---- growing ----

    async def grow(self, change: Change, size: int) -> None:
        """OSError, CorruptError, ImageError."""
        old, file_size = self.image.header, self.image.store.size
        kept = set(self.image.reserved)
        change.undo(lambda: self._undo_growth(old, file_size, kept))
        await self._grow_l1(change, _l1_entries(old, size))
        self.map.reserve(size)
        await self._cover(old.size, size)
        await self._clear_tail(old.size)
        async with self.write_back.lock:
            self.image.header = replace(self.image.header, size=size)
            self.map.hold_flush(True)
        self.map.size = size
        change.later(lambda: self._finish_growth(old))

    async def _grow_l1(self, change: Change, entries: int) -> None:
        """In place where its clusters have room, else in a new place."""
        image, old = self.image, self.image.header
        if entries <= old.l1_size:
            return
        room = self._l1_clusters(old) << self.bits >> 3
        place = old.l1_table_offset
        if entries > room:
            count = -(-entries * 8 >> self.bits)
            image.store.event("l1_grow_alloc_table")
            first = await self.space.take(lambda: self.allocator.take_span(count))
            change.undo(lambda: self.allocator.give(first, count))
            place = first << self.bits
        async with self.write_back.lock:
            more = max(entries - image.l1.size, 0)
            image.l1 = np.concatenate([image.l1, np.zeros(more, dtype=np.uint64)])
            if place == old.l1_table_offset:
                image.dirty_l1.update(range(old.l1_size, entries))
            image.header = replace(image.header, l1_size=entries, l1_table_offset=place)
            self.map.hold_flush(True)

    def _l1_clusters(self, header: Header) -> int:
        return -(-header.l1_size * 8 >> self.bits)

    async def _finish_growth(self, old: Header) -> None:
        await self.write_back.flush()  # when it fails, the next one does it
        if self.image.durable.l1_table_offset != old.l1_table_offset and old.l1_size:
            await self.allocator.give(old.l1_table_offset >> self.bits, self._l1_clusters(old))

    # ---- what the new part shows ----

    async def _cover(self, start: int, end: int) -> None:
        """Makes [start, end) read as zeros: hides a longer backing file, and what an old table still says."""
        first, last = -(-start >> self.bits), -(-end >> self.bits)
        hidden = max(first, -(-min(end, self.backing_size()) >> self.bits))
        if hidden > first:
            if self.image.header.version < 3:
                raise ImageError("Failed to zero out new clusters: Operation not supported")
            await self._set(first, hidden, ZERO_PLAIN)
        for at, table_end in self._tables(hidden, last):
            await self._set(at, table_end, UNALLOCATED)

    def _tables(self, first: int, last: int) -> list[tuple[int, int]]:
        """The parts of the run of granules for which there is an L2 table."""
        bits = self.image.header.l2_bits
        begin, end = first >> bits, -(-last >> bits)
        found = np.flatnonzero(self.image.l1[begin:end]) + begin
        return [(max(first, i << bits), min(last, i + 1 << bits)) for i in found.tolist()]

    async def _set(self, first: int, last: int, entry: int) -> None:
        """Sets a run of entries past the end of what requests reach, slice by slice."""
        per_slice = 1 << self.loader.slice_bits
        for number, at in enumerate(range(first - first % per_slice, last, per_slice)):
            begin, end = max(first, at), min(last, at + per_slice)
            await self._set_in_slice(begin, end - begin, entry)
            if number % _DIRTY_SLICES == _DIRTY_SLICES - 1:
                await self.write_back.flush()

    async def _set_in_slice(self, granule: int, count: int, entry: int) -> None:
        index = granule >> self.image.header.l2_bits
        while True:
            found = self.map.get(granule, count)
            if found is None:
                await self.loader.load(granule >> self.loader.slice_bits)
            elif bool((found == entry).all()):
                return
            elif not self.image.may_change(index):
                await self.space.take(lambda: self.loader.reserve(index))
            else:
                self.map.fill(granule, count, entry)

    # ---- the rest of the cluster in which the old end lies ----

    async def _clear_tail(self, size: int) -> None:
        granule, within = divmod(size, 1 << self.bits)
        while within and not await self._try_tail(granule, within):
            pass

    async def _try_tail(self, granule: int, within: int) -> bool:
        """Whether everything behind the first ``within`` bytes of the cluster now reads as zeros."""
        found = self.map.get(granule)
        if found is None:
            await self.loader.load(granule >> self.loader.slice_bits)
            return False
        value = int(found[0])
        kind = value & ENTRY_KIND
        if kind == ENTRY_ZERO:
            return True
        if value == UNALLOCATED and self.backing_size() <= (granule << self.bits) + within:
            return True
        if kind != ENTRY_DATA:
            return await self._rewrite(granule, within, value)
        at = host_of(value) + within
        rest = await self.image.store.read(at, (1 << self.bits) - within)
        if not any(rest):
            return True
        if not value & ENTRY_WRITABLE:
            return await self._rewrite(granule, within, value)
        if self.map.get(granule) != found:
            return False
        self._tail = granule, value, at, rest
        await self.image.store.write(at, bytes(len(rest)))
        return True

    async def _rewrite(self, granule: int, within: int, value: int) -> bool:
        """Copies the cluster to one of its own, the rest zeros. False: it has changed meanwhile."""
        index = granule >> self.image.header.l2_bits
        if not self.image.may_change(index):
            await self.space.take(lambda: self.loader.reserve(index))
        data = await self.read(granule << self.bits, within)
        run = await self.space.take(lambda: self.allocator.take(1))
        placed = False
        try:
            await self.image.store.write(run.first << self.bits, data.ljust(1 << self.bits, b"\0"))
            placed = self.map.set(granule, value, entry(run.first << self.bits, DATA_OWN))
        except (BlockingIOError, KeyError):
            pass
        finally:
            if placed:
                self.space.grants.outstanding.add(run.first)
            else:
                await self.allocator.give(run.first, 1)
        return placed

    # ---- going back ----

    async def _undo_growth(self, old: Header, file_size: int, kept: set[int]) -> None:
        self.map.size = min(self.map.size, old.size)
        await self.map.synchronize()
        async with self.write_back.lock:
            self.image.dirty_l1.difference_update(range(old.l1_size, self.image.l1.size))
            self.image.header = old
        if self.image.header_changed:
            await self.write_back.flush()
        await self._crop(old.size)
        await self._restore_tail()
        for index in set(self.image.reserved) - kept:
            await self._give_back_place(index)
        await self._trim(file_size)

    async def _restore_tail(self) -> None:
        if self._tail is not None:
            granule, value, at, rest = self._tail
            found = self.map.get(granule)
            if found is not None and int(found[0]) == value:
                await self.image.store.write(at, rest)

    async def _give_back_place(self, index: int) -> None:
        """A place that was reserved for a table, unless somebody needs it by now."""
        reserved = self.image.reserved
        bits = self.image.header.l2_bits - self.loader.slice_bits
        slices = [slice for slice in self.map.loaded() if slice >> bits == index]
        async with self.write_back.lock:
            if index not in reserved:
                return
            offset = reserved.pop(index)
            self._set_writable(slices, False)
            await self.map.synchronize()
            if any(self._in_use(slice) for slice in slices) and index not in reserved:
                reserved[index] = offset
                self._set_writable(slices, True)
            else:
                await self.allocator.give_offset(offset)

    def _in_use(self, slice: int) -> bool:
        per_slice = 1 << self.loader.slice_bits
        entries = self.map.get(slice * per_slice, per_slice)
        return entries is not None and bool((entries != UNALLOCATED).any())

    def _set_writable(self, slices: list[int], writable: bool) -> None:
        for slice in slices:
            with contextlib.suppress(KeyError):  # dropped meanwhile
                self.map.set_writable(slice, writable)

    # ---- shrinking ----

    async def shrink(self, change: Change, size: int) -> None:
        old = self.map.size

        async def back() -> None:
            self.map.size = old

        change.undo(back)
        self.map.size = size
        change.later(lambda: self._shrink(size))

    async def _shrink(self, size: int) -> None:
        """The header first: a crash behind that leaves clusters that nobody sees, and nothing else."""
        await self.map.synchronize()
        async with self.write_back.lock:
            self.image.header = replace(self.image.header, size=size)
            self.map.hold_flush(True)
        await self.write_back.flush()
        try:
            await self._crop(size)
            await self.write_back.reclaim()
            await self._trim(0)
        except OSError as error:
            log.warning("%s: clusters past the new end could not be freed: %s", self.image.label, error)

    async def _crop(self, size: int) -> None:
        """Drops what is mapped past ``size``, where no request is."""
        bits = self.image.header.l2_bits
        first = -(-size >> self.bits)
        whole = -(-first >> bits)
        self.map.reserve(min(whole << bits + self.bits, _MAX_SIZE))
        for at, end in self._tables(first, whole << bits):
            await self._set(at, end, UNALLOCATED)
        self._forget(first, whole << bits)
        await self.write_back.flush()
        self._forget(whole << bits, self.image.l1.size << bits)
        beyond = whole << bits - self.loader.slice_bits
        self._set_writable([slice for slice in self.map.loaded() if slice >= beyond], False)
        for index in [index for index in self.image.reserved if index >= whole]:
            await self.allocator.give_offset(self.image.reserved.pop(index))
        tables = (np.flatnonzero(self.image.l1[whole:]) + whole).tolist()
        for at in range(0, len(tables), _TABLES):
            await self.write_back.drop_tables(tables[at : at + _TABLES])
        await self.write_back.freed()

    def _forget(self, first: int, last: int) -> None:
        """Slices that are loaded say what is then on disk: nothing."""
        per_slice = 1 << self.loader.slice_bits
        for slice in self.map.loaded():
            begin, end = max(first, slice * per_slice), min(last, (slice + 1) * per_slice)
            if begin < end:
                self.map.fill(begin, end - begin, UNALLOCATED)

    async def _trim(self, least: int) -> None:
        try:
            await self.allocator.trim(least)
        except (BlockError, OSError) as error:
            log.debug("%s: the file keeps its length: %s", self.image.label, error)
