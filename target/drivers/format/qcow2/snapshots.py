# SPDX-License-Identifier: Apache-2.0
"""Reads the table of internal snapshots: what they are and where their L1 tables are. It changes nothing."""

from __future__ import annotations

from typing import NamedTuple

from target.drivers.format.qcow2 import spec
from target.drivers.format.qcow2.errors import ImageError
from target.drivers.format.qcow2.header import Header
from target.drivers.format.qcow2.store import Store
from target.graph.describe import SnapshotInfo

_CHUNK = 256 << 10
_NO_ICOUNT = (1 << 64) - 1


class Snapshot(NamedTuple):
    """Of each snapshot, what the driver needs to leave it unharmed, and what queries show.

    ``l1_size`` in entries.
    """

    l1_table_offset: int
    l1_size: int
    info: SnapshotInfo


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
        offset, entries = _checked(number, entry, header, file_size)
        extra = await reader.take(entry["extra_data_size"])
        id, name = await reader.take(entry["id_size"]), await reader.take(entry["name_size"])
        snapshots.append(Snapshot(offset, entries, _info(entry, extra, id, name)))
        await reader.take(-reader.taken % 8)
        if reader.taken > spec.MAX_SNAPSHOT_TABLE_BYTES:
            raise ImageError("the snapshot table is larger than 64 MiB")
    return SnapshotTable(snapshots, reader.taken)


def _info(entry: dict[str, int], extra: bytes, id: bytes, name: bytes) -> SnapshotInfo:
    icount = int.from_bytes(extra[16:24], "big") if len(extra) >= 24 else _NO_ICOUNT
    return SnapshotInfo(
        id=id.decode(errors="replace"),
        name=name.decode(errors="replace"),
        vm_state_size=int.from_bytes(extra[:8], "big") if len(extra) >= 8 else entry["vm_state_size"],
        date_sec=entry["date_sec"],
        date_nsec=entry["date_nsec"],
        vm_clock_sec=entry["vm_clock_nsec"] // 10**9,
        vm_clock_nsec=entry["vm_clock_nsec"] % 10**9,
        icount=None if icount == _NO_ICOUNT else icount,
    )


def _checked(number: int, entry: dict[str, int], header: Header, file_size: int) -> tuple[int, int]:
    """Where the snapshot's L1 table is, and its entries."""
    offset, entries = entry["l1_table_offset"], entry["l1_size"]
    if entries * 8 > spec.MAX_L1_BYTES:
        raise ImageError(f"snapshot {number}: its L1 table is too large ({entries} entries)")
    if offset % header.cluster_size:
        raise ImageError(f"snapshot {number}: its L1 table's offset {offset:#x} is not aligned to a cluster")
    if entries and (not offset or offset + entries * 8 > file_size + header.cluster_size):
        raise ImageError(f"snapshot {number}: its L1 table (offset {offset:#x}) is outside of the file")
    return offset, entries


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
