# SPDX-License-Identifier: Apache-2.0
"""What the parts of the driver share about one open image: its header, its L1 table, its metadata clusters.

A resize changes ``header`` in memory; the next write-back makes it so on disk (flush.py).

Opening reads and checks these; the requests' side is in loader.py, faults.py and flush.py.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace

import numpy as np

from target.drivers.format.qcow2 import spec
from target.drivers.format.qcow2.allocate import Allocator
from target.drivers.format.qcow2.clusterset import Metadata
from target.drivers.format.qcow2.errors import ImageError
from target.drivers.format.qcow2.header import Header, check_places, cluster_size, parse
from target.drivers.format.qcow2.refcount import Refcounts
from target.drivers.format.qcow2.rename import renamed
from target.drivers.format.qcow2.snapshots import Snapshot, read_snapshots
from target.drivers.format.qcow2.store import Entries, Store
from target.drivers.format.qcow2.table import from_disk

log = logging.getLogger(__name__)

_COPIED = np.uint64(spec.OFLAG_COPIED)
_OFFSET = np.uint64(spec.OFFSET_MASK)
_STATE_BITS = spec.INCOMPAT_DIRTY | spec.INCOMPAT_CORRUPT


async def read_header(store: Store) -> Header:
    """The checked header. ImageError when the image cannot be opened."""
    start = await store.read(0, min(store.size, 512))
    size = cluster_size(start)
    return parse(await store.read(0, min(store.size, size)), store.size)


class Image:
    """An open image. ``l1`` is the active L1 table as it is on disk or, for ``dirty_l1``, will be."""

    def __init__(self, label: str, store: Store, header: Header) -> None:
        self.label = label
        self.store = store
        self.header = header
        self.durable = header  # as it is on disk
        self.l1: Entries = np.zeros(0, dtype=np.uint64)
        self.dirty_l1: set[int] = set()
        # Clusters for L2 tables to be made, by L1 index: a slice may change only where it has a place.
        self.reserved: dict[int, int] = {}
        self.snapshots: list[Snapshot] = []
        self.snapshot_table_length = 0
        self.metadata = Metadata()
        self.allocator: Allocator | None = None  # None: read-only
        self.broken = False
        self.on_broken: Callable[[], None] = lambda: None
        self.tell_broken: Callable[[str], None] = lambda message: None
        # Slices that a write-back has taken from the map and not yet written: on disk they are older.
        self.writing: dict[int, Entries] = {}
        self.freed = 0  # counts write-backs that freed clusters

    @property
    def writable(self) -> bool:
        return self.allocator is not None and not self.broken

    # ---- opening ----

    async def open(self) -> None:
        """Reads L1 and the snapshot table. ImageError."""
        header = self.header
        self.l1 = from_disk(await self.store.read(header.l1_table_offset, header.l1_size * 8))
        if header.nb_snapshots:
            table = await read_snapshots(self.store, header, self.store.size)
            self.snapshots = table.snapshots
            self.snapshot_table_length = table.length
            place = ("snapshot table", header.snapshots_offset, table.length)
            check_places([place], header.cluster_size, self.store.size)

    async def open_for_writing(self, refcount_cache: int) -> Refcounts:
        """Reads the refcount table, collects where metadata is. ImageError: it cannot be written safely."""
        header = self.header
        self.metadata = Metadata()
        self._add_fixed(header.snapshots_offset, self.snapshot_table_length)
        self._add_fixed(0, header.cluster_size)
        self._add_fixed(header.l1_table_offset, header.l1_size * 8)
        self._add_fixed(header.refcount_table_offset, header.refcount_table_clusters << header.cluster_bits)
        for snapshot in self.snapshots:
            self._add_fixed(snapshot.l1_table_offset, snapshot.l1_size * 8)
        refcounts = Refcounts(self.store, header, refcount_cache)
        await refcounts.open()
        blocks = refcounts.table[refcounts.table != 0] >> np.uint64(header.cluster_bits)
        if bool(self.metadata.fixed.contains(blocks).any()):
            raise ImageError("a refcount block overlaps other metadata")
        self.metadata.fixed.update(blocks)
        self._add_l2_tables()
        self.allocator = Allocator(self.store, header, refcounts, self.metadata)
        return refcounts

    def _add_fixed(self, offset: int, length: int) -> None:
        bits = self.header.cluster_bits
        self.metadata.fixed.add(offset >> bits, (length + self.header.cluster_size - 1) >> bits)

    def _add_l2_tables(self) -> None:
        """Own tables must be apart; that each pointer is right is checked when its table is read."""
        bits = np.uint64(self.header.cluster_bits)
        own = (self.l1[(self.l1 & _COPIED) != 0] & _OFFSET) >> bits
        if np.unique(own).size != own.size:
            raise ImageError("two entries of the L1 table point to the same L2 table")
        tables = (self.l1[self.l1 != 0] & _OFFSET) >> bits
        tables = tables[(tables != 0) & (tables << bits < np.uint64(self.store.size))]
        if bool(self.metadata.fixed.contains(tables).any()):
            raise ImageError("the L1 table points to clusters that hold other metadata")
        self.metadata.l2_tables.update(tables)

    async def set_features(self, incompatible: int, autoclear: int = 0) -> None:
        """Writes the incompatible and autoclear features of a version 3 header, durably."""
        base = spec.HEADER_V2.size
        offsets = spec.HEADER_V3.offsets
        # Compression type and the like stay as they are.
        bits = incompatible | self.header.incompatible_features & ~_STATE_BITS
        await self.store.write(base + offsets["incompatible_features"], bits.to_bytes(8, "big"))
        await self.store.write(base + offsets["autoclear_features"], autoclear.to_bytes(8, "big"))
        await self.store.flush()
        self.header = replace(self.header, incompatible_features=bits, autoclear_features=autoclear)

    async def rename_backing(self, name: str | None, format: str | None) -> Callable[[], Awaitable[None]]:
        """Another backing file in the header, durably. Returns what takes it back. ImageError, OSError."""
        header = self.header
        before = await self.store.read(0, header.cluster_size)
        steps = renamed(before, header, name, format)
        await self._write_cluster(before, steps)
        self.header = replace(self.header, backing_file=name, backing_format=format)

        async def back() -> None:
            await self._write_cluster(steps[-1], [before[:512] + steps[-1][512:], before])
            self.header = replace(
                self.header, backing_file=header.backing_file, backing_format=header.backing_format
            )

        return back

    async def _write_cluster(self, found: bytes, steps: list[bytes]) -> None:
        """Writes of each step the sectors that differ from the one before."""
        for step in steps:
            for at in range(0, len(step), 512):
                if step[at : at + 512] != found[at : at + 512]:
                    await self.store.write(at, step[at : at + 512])
            await self.store.flush()
            found = step

    # ---- the header's fields that a resize changes ----

    @property
    def l1_moved(self) -> bool:
        return self.header.l1_table_offset != self.durable.l1_table_offset

    @property
    def header_changed(self) -> bool:
        return _resizable(self.header) != _resizable(self.durable)

    async def write_header(self, *, size: int) -> None:
        """Makes the place of L1, which is on disk already, and a virtual size durable, in one write."""
        header = replace(self.header, size=size)
        at = spec.HEADER_V2.offsets["size"]
        fields = _resizable(header)
        data = b"".join(
            value.to_bytes(width, "big") for value, width in zip(fields, (8, 4, 4, 8), strict=True)
        )
        await self.store.write(at, data, "l1_grow_activate_table" if self.l1_moved else "")
        await self.store.flush()
        self.durable = header

    # ---- the active table ----

    def table_offset(self, index: int) -> int:
        """Where the L2 table of an L1 entry is; 0: nowhere."""
        return int(self.l1[index]) & spec.OFFSET_MASK

    def may_change(self, index: int) -> bool:
        """Whether slices of this L1 entry may change now: there is a table, or a place, to write them to."""
        return self.writable and (self.is_own(index) or index in self.reserved)

    def is_own(self, index: int) -> bool:
        """Whether the L2 table belongs to the active L1 table alone and may be changed in place."""
        return bool(int(self.l1[index]) & spec.OFLAG_COPIED)

    def mark_broken(self, message: str) -> None:
        """Metadata cannot be right: nothing is allocated any more, no table loaded from now on is changed."""
        if self.broken:
            return
        self.broken = True
        advice = "the image is not written any more, repair it with 'qemu-img check -r all'"
        log.error("%s: %s; %s", self.label, message, advice)
        self.tell_broken(message)
        self.on_broken()


def _resizable(header: Header) -> tuple[int, int, int, int]:
    """size, crypt_method, l1_size and l1_table_offset: neighbours, in one sector. There is no encryption."""
    return header.size, 0, header.l1_size, header.l1_table_offset
