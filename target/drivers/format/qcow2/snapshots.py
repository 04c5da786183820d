# SPDX-License-Identifier: Apache-2.0
"""Reads the table of internal snapshots: where their L1 tables are. It makes, deletes and changes none."""

from __future__ import annotations

from typing import NamedTuple

from target.drivers.format.qcow2 import spec
from target.drivers.format.qcow2.errors import ImageError
from target.drivers.format.qcow2.header import Header
from target.drivers.format.qcow2.store import Store

_CHUNK = 256 << 10


class Snapshot(NamedTuple):
    """Of each snapshot, what the driver needs to leave it unharmed. ``l1_size`` in entries."""

    l1_table_offset: int
    l1_size: int


class SnapshotTable(NamedTuple):
    """All snapshots, and the bytes that their table occupies."""

    snapshots: list[Snapshot]
    length: int


async def read_snapshots(store: Store, header: Header, file_size: int) -> SnapshotTable:
    """The snapshot table. ImageError when an entry is out of bounds."""
    reader = _Reader(store, header.snapshots_offset)
    snapshots = []
    for number in range(header.nb_snapshots):
        entry = spec.SNAPSHOT.unpack(await reader.take(spec.SNAPSHOT.size))
        if entry["extra_data_size"] > spec.MAX_SNAPSHOT_EXTRA:
            raise ImageError(
                f"snapshot {number}: {entry['extra_data_size']} bytes of extra data are too many"
            )
        snapshots.append(_checked(number, entry, header, file_size))
        await reader.take(entry["extra_data_size"] + entry["id_size"] + entry["name_size"])
        await reader.take(-reader.taken % 8)
        if reader.taken > spec.MAX_SNAPSHOT_TABLE_BYTES:
            raise ImageError("the snapshot table is larger than 64 MiB")
    return SnapshotTable(snapshots, reader.taken)


def _checked(number: int, entry: dict[str, int], header: Header, file_size: int) -> Snapshot:
    offset, entries = entry["l1_table_offset"], entry["l1_size"]
    if entries * 8 > spec.MAX_L1_BYTES:
        raise ImageError(f"snapshot {number}: its L1 table is too large ({entries} entries)")
    if offset % header.cluster_size:
        raise ImageError(f"snapshot {number}: its L1 table's offset {offset:#x} is not aligned to a cluster")
    if entries and (not offset or offset + entries * 8 > file_size + header.cluster_size):
        raise ImageError(f"snapshot {number}: its L1 table (offset {offset:#x}) is outside of the file")
    return Snapshot(offset, entries)


class _Reader:
    """Takes bytes one after another, read in larger pieces."""

    def __init__(self, store: Store, offset: int) -> None:
        self._store = store
        self._offset = offset
        self._buffer = b""
        self._at = 0
        self.taken = 0

    async def take(self, length: int) -> bytes:
        """Bytes past the end of the file are zeros."""
        if self._at + length > len(self._buffer):
            start = self._offset + self.taken
            self._buffer = await self._store.read(start, max(_CHUNK, length))
            self._at = 0
        data = self._buffer[self._at : self._at + length]
        self._at += length
        self.taken += length
        return data
