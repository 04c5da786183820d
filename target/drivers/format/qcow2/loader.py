# SPDX-License-Identifier: Apache-2.0
"""Loads slices of L2 tables into the map, checks what they point to, and keeps the map within its budget."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable

import numpy as np

from target.datapath import ENTRY_FAULT
from target.drivers.format.qcow2 import spec
from target.drivers.format.qcow2.errors import CorruptError
from target.drivers.format.qcow2.image import Image
from target.drivers.format.qcow2.store import Entries, MapFace
from target.drivers.format.qcow2.table import UNALLOCATED, decode, from_disk, hosted, hosts_of

# A slice stays at least that long, so that the requests it was loaded for come to use it even when the budget
# is one slice; unless more than this has piled up meanwhile.
_TRIM_SECONDS = 0.002
_TRIM_SLACK = 4 << 20


class Loader:
    """The read side of one image's tables. ``slice_bits``: log2 of the entries in a slice."""

    def __init__(self, image: Image, map: MapFace, slice_bits: int, budget: int) -> None:
        self.image = image
        self.map = map
        self.slice_bits = slice_bits
        self.budget = budget
        self.on_pressure: Callable[[], None] = lambda: None  # dirty slices fill the budget
        self.quiet = False  # nothing is dropped meanwhile
        self._loading: dict[int, asyncio.Future[None]] = {}
        self._outdated: set[int] = set()  # of those: written since they were read
        self._empty = np.full(1 << slice_bits, UNALLOCATED, dtype=np.uint64)
        self._trimming: asyncio.TimerHandle | None = None

    # ---- places ----

    def l1_index(self, slice: int) -> int:
        return slice << self.slice_bits >> self.image.header.l2_bits

    def byte_in_table(self, slice: int) -> int:
        """Where the slice begins in its L2 table."""
        per_table = self.image.header.l2_bits - self.slice_bits
        return (slice & (1 << per_table) - 1) << self.slice_bits << 3

    @property
    def slice_bytes(self) -> int:
        return 8 << self.slice_bits

    # ---- loading ----

    async def load(self, slice: int) -> None:
        """Puts the slice into the map; callers that come meanwhile share one load. OSError, CorruptError."""
        running = self._loading.get(slice)
        if running is not None:
            await asyncio.shield(running)
            return
        entries = self._at_hand(slice)
        if entries is not None:
            self._install(slice, entries)
            return
        future = self._loading[slice] = asyncio.get_running_loop().create_future()
        try:
            self._install(slice, await self._read_current(slice))
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)
            future.exception()  # taken note of, in case nobody else waits
            raise
        finally:
            del self._loading[slice]
            self._outdated.discard(slice)

    def taken(self, slices: Iterable[int]) -> None:
        """These are being written from now on."""
        self._outdated.update(slice for slice in slices if slice in self._loading)

    def _at_hand(self, slice: int) -> Entries | None:
        """The slice, where it need not be read."""
        if not self.image.table_offset(self.l1_index(slice)):
            return self.image.writing.get(slice, self._empty)
        return self.image.writing.get(slice)

    async def _read_current(self, slice: int) -> Entries:
        """A load may come late, when the slice is in the map, and changed; it may then be written and dropped
        while it is read here: what was read is what it was before."""
        while True:
            self._outdated.discard(slice)
            entries = await self._read(slice)
            if slice not in self._outdated:
                return entries
            at_hand = self._at_hand(slice)
            if at_hand is not None:
                return at_hand

    def _install(self, slice: int, entries: Entries) -> None:
        self.map.load(slice, entries, self.image.may_change(self.l1_index(slice)))
        if self.map.bytes > self.budget:
            self._trim_soon()

    async def _read(self, slice: int) -> Entries:
        index = self.l1_index(slice)
        header = self.image.header
        while True:
            seen = int(self.image.l1[index])
            raw = await self.read_raw(slice)
            if int(self.image.l1[index]) == seen:
                break
        entries = decode(raw, header.version, header.cluster_size, shared=not self.image.is_own(index))
        self._check_targets(raw, entries)
        return entries

    async def read_raw(self, slice: int) -> Entries:
        """The slice as it is on disk; zeros where there is no table. CorruptError: the pointer is wrong."""
        index = self.l1_index(slice)
        offset = self.check_table(index)
        if not offset:
            return np.zeros(1 << self.slice_bits, dtype=np.uint64)
        at = offset + self.byte_in_table(slice)
        return from_disk(await self.image.store.read(at, self.slice_bytes, "l2_load"))

    def check_table(self, index: int) -> int:
        """The L2 table's offset, 0 when there is none. CorruptError when there can be no table there."""
        raw = int(self.image.l1[index])
        offset = raw & spec.OFFSET_MASK
        header = self.image.header
        if raw & spec.L1_RESERVED or offset & header.cluster_size - 1:
            raise CorruptError(f"L1 entry {index} is invalid ({raw:#x})")
        if offset >= self.image.store.size:
            raise CorruptError(f"L1 entry {index} points past the end of the file ({offset:#x})")
        if offset and self.image.metadata.fixed.overlaps(offset >> header.cluster_bits, 1):
            raise CorruptError(f"L1 entry {index} points to other metadata ({offset:#x})")
        return offset

    def _check_targets(self, raw: Entries, entries: Entries) -> None:
        """Entries that point past the end of the file or, in a writable image, at metadata become FAULT."""
        bits = np.uint64(self.image.header.cluster_bits)
        has_host = ((raw & np.uint64(spec.OFLAG_COMPRESSED)) == 0) & (
            (raw & np.uint64(spec.OFFSET_MASK)) != 0
        )
        at = np.flatnonzero(has_host)
        hosts = raw[at] & np.uint64(spec.OFFSET_MASK)
        bad = hosts >= np.uint64(self.image.store.size)
        if self.image.allocator is not None:
            bad |= self.image.metadata.contains(hosts >> bits)
        if bool(bad.any()):
            entries[at[bad]] = 0

    def check_loaded(self) -> None:
        """The image becomes writable: what its metadata is in is known now, and no entry may point there."""
        per_slice = 1 << self.slice_bits
        bits = np.uint64(self.image.header.cluster_bits)
        for slice in self.map.loaded():
            entries = self.map.get(slice * per_slice, per_slice)
            assert entries is not None
            at = np.flatnonzero(hosted(entries))
            bad = at[self.image.metadata.contains(hosts_of(entries[at]) >> bits)]
            for index in bad.tolist():
                self.map.fill(slice * per_slice + index, 1, ENTRY_FAULT, dirty=False)

    # ---- making tables changeable ----

    async def reserve(self, index: int) -> None:
        """Takes a cluster for an L2 table that is missing or shared: now its slices may change. OSError."""
        image = self.image
        assert image.allocator is not None
        if not image.may_change(index):
            offset = await image.allocator.take_table()
            if image.may_change(index):
                await image.allocator.give_offset(offset)
            else:
                image.reserved[index] = offset
        per_table = image.header.l2_bits - self.slice_bits
        for slice in range(index << per_table, (index + 1) << per_table):
            with contextlib.suppress(KeyError):  # not loaded, or past the end
                self.map.set_writable(slice, image.may_change(index))

    # ---- staying within the budget ----

    def _trim_soon(self) -> None:
        if self.map.bytes > self.budget + _TRIM_SLACK:
            self.trim()
        elif self._trimming is None:
            self._trimming = asyncio.get_running_loop().call_later(_TRIM_SECONDS, self.trim)

    def trim(self) -> None:
        """Drops clean slices beyond the budget; asks for a write-back when dirty ones are in the way."""
        if self._trimming is not None:
            self._trimming.cancel()
            self._trimming = None
        if self.quiet:
            return
        if self.map.shrink(self.budget - self.budget // 8) > self.budget:
            self.on_pressure()

    def close(self) -> None:
        if self._trimming is not None:
            self._trimming.cancel()
            self._trimming = None
