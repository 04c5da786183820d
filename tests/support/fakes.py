# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for a file node and a map, which note in one journal what is done to them, in order."""

from __future__ import annotations

import asyncio

import numpy as np

from target.datapath import Grant
from target.drivers.format.qcow2.store import Entries
from target.drivers.format.qcow2.table import DATA_OWN, entry


class FakeFile:
    """A file in memory. ``journal`` gets "write OFFSET LENGTH", "flush", "discard OFFSET LENGTH"."""

    def __init__(self, data: bytes = b"", journal: list[str] | None = None) -> None:
        self.data = bytearray(data)
        self.journal: list[str] = [] if journal is None else journal
        self.fail: OSError | None = None  # the next write or flush raises it
        self.reads = 0

    @property
    def size(self) -> int:
        return len(self.data)

    def _maybe_fail(self) -> None:
        if self.fail is not None:
            error, self.fail = self.fail, None
            raise error

    async def read(self, offset: int, length: int) -> bytes:
        assert offset + length <= self.size
        self.reads += 1
        await asyncio.sleep(0)
        return bytes(self.data[offset : offset + length])

    async def write(self, offset: int, data: bytes) -> None:
        await asyncio.sleep(0)
        self._maybe_fail()
        self.journal.append(f"write {offset:#x} {len(data)}")
        if self.size < offset + len(data):
            self.data.extend(bytes(offset + len(data) - self.size))
        self.data[offset : offset + len(data)] = data

    async def write_zeroes(self, offset: int, length: int) -> None:
        await self.write(offset, bytes(length))

    async def discard(self, offset: int, length: int) -> None:
        self.journal.append(f"discard {offset:#x} {length}")

    async def flush(self) -> None:
        await asyncio.sleep(0)
        self._maybe_fail()
        self.journal.append("flush")

    async def truncate(self, size: int) -> None:
        self.journal.append(f"truncate {size:#x}")
        del self.data[size:]

    def debug_event(self, event: str) -> None:
        pass


class FakeMap:
    """The control side of a map, without I/O threads. ``claims`` is for tests to set."""

    def __init__(self, slice_bits: int, journal: list[str]) -> None:
        self.slice_bits = slice_bits
        self.journal = journal
        self.slices: dict[int, Entries] = {}
        self.writable: dict[int, bool] = {}
        self.dirt: set[int] = set()
        self.pool: list[Grant] = []
        self.low_water = 0
        self.held = False
        self.claims = 0
        self.size = 0

    @property
    def bytes(self) -> int:
        return len(self.slices) * (8 << self.slice_bits)

    @property
    def granted(self) -> int:
        return sum(grant.granules for grant in self.pool)

    def load(self, slice: int, entries: Entries, writable: bool) -> bool:
        if slice in self.slices:
            return False
        assert entries.size == 1 << self.slice_bits
        self.slices[slice] = entries.copy()
        self.writable[slice] = writable
        return True

    def set_writable(self, slice: int, writable: bool) -> None:
        if slice not in self.slices:
            raise KeyError(slice)
        self.writable[slice] = writable

    def get(self, granule: int, count: int = 1) -> Entries | None:
        found = self.slices.get(granule >> self.slice_bits)
        at = granule & (1 << self.slice_bits) - 1
        return None if found is None else found[at : at + count].copy()

    def set(self, granule: int, expected: int, entry: int, dirty: bool = True) -> bool:
        slice = granule >> self.slice_bits
        entries, at = self.slices[slice], granule & (1 << self.slice_bits) - 1
        if int(entries[at]) != expected:
            return False
        entries[at] = entry
        if dirty:
            self.dirt.add(slice)
        return True

    def reserve(self, size: int) -> None:
        return None

    def fill(self, granule: int, count: int, entry: int, dirty: bool = True) -> int:
        for done in range(count):
            slice, at = divmod(granule + done, 1 << self.slice_bits)
            if slice not in self.slices:
                return done
            if int(self.slices[slice][at]) != entry:
                self.slices[slice][at] = entry
                self.dirt |= {slice} if dirty else set()
        return count

    def loaded(self) -> list[int]:
        return sorted(self.slices)

    def dirty(self) -> list[int]:
        return sorted(self.dirt)

    def clean(self, slice: int) -> Entries:
        self.journal.append(f"clean {slice}")
        self.dirt.discard(slice)
        return self.slices[slice].copy()

    def redirty(self, slice: int) -> None:
        assert slice in self.slices
        self.dirt.add(slice)

    def hold_flush(self, hold: bool) -> None:
        self.held = hold

    def shrink(self, bytes: int) -> int:
        for slice in list(self.slices):
            if self.bytes > bytes and slice not in self.dirt:
                del self.slices[slice]
        return self.bytes

    def grant(self, host_offset: int, count: int, zeroed: bool) -> None:
        self.pool.append(Grant(host_offset, count, zeroed))

    def revoke(self) -> list[Grant]:
        pool, self.pool = self.pool, []
        return pool

    def set_low_water(self, granules: int) -> None:
        self.low_water = granules

    async def synchronize(self) -> None:
        self.journal.append("synchronize")

    # ---- what the datapath would do ----

    def place(self, granule: int, cluster_bits: int) -> int:
        """A first write: takes a cluster of the pool for the granule; returns its host offset."""
        grant = self.pool.pop(0)
        if grant.granules > 1:
            rest = Grant(grant.host_offset + (1 << cluster_bits), grant.granules - 1, grant.zeroed)
            self.pool.insert(0, rest)
        slice = granule >> self.slice_bits
        assert self.writable[slice]
        at = granule & (1 << self.slice_bits) - 1
        self.slices[slice][at] = np.uint64(entry(grant.host_offset, DATA_OWN))
        self.dirt.add(slice)
        return grant.host_offset
