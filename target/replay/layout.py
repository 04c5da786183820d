# SPDX-License-Identifier: Apache-2.0
"""Layout of a log of writes: the format of Linux's dm-log-writes, version 1, which is blklogwrites' too.

Source: Linux, Documentation/admin-guide/device-mapper/log-writes.rst and drivers/md/dm-log-writes.c. All
numbers are little-endian. The superblock takes the first sector; each entry takes a sector of its own, and
the data that it logs, in whole sectors, follows it. A mark's name lies in the sector of its entry.
"""

from __future__ import annotations

import struct
from enum import IntFlag
from typing import NamedTuple

MAGIC = 0x6A736677736872
VERSION = 1
MIN_SECTOR = 512
MAX_SECTOR = 1 << 23  # QEMU's bound

_SUPER = struct.Struct("<QQQI")  # magic, version, nr_entries, sectorsize
_ENTRY = struct.Struct("<QQQQ")  # sector, nr_sectors, flags, data_len
ENTRY_SIZE = _ENTRY.size
SUPER_SIZE = _SUPER.size


class Flag(IntFlag):
    """What an entry is, beside a write."""

    NONE = 0
    FLUSH = 1
    FUA = 2
    DISCARD = 4
    MARK = 8
    METADATA = 16  # Linux sets it on writes of metadata; it changes nothing


_KNOWN = sum(Flag)


class Super(NamedTuple):
    """The superblock. ``sector_size`` in bytes."""

    entries: int
    sector_size: int

    def pack(self) -> bytes:
        """A whole sector."""
        return _SUPER.pack(MAGIC, VERSION, *self).ljust(self.sector_size, b"\0")


class Head(NamedTuple):
    """An entry without its data. ``sector`` and ``sectors`` in sectors of the log."""

    sector: int
    sectors: int
    flags: Flag
    data_length: int = 0

    def pack(self, sector_size: int, inline: bytes = b"") -> bytes:
        """A whole sector; ``inline`` is a mark's name."""
        return (_ENTRY.pack(*self) + inline).ljust(sector_size, b"\0")

    @property
    def data_sectors(self) -> int:
        """How many sectors of data follow the entry's own."""
        return 0 if self.flags & Flag.DISCARD else self.sectors


def unpack_super(data: bytes) -> Super:
    """ValueError says what is wrong with it."""
    if len(data) < SUPER_SIZE:
        raise ValueError("Could not read log superblock")
    magic, version, entries, sector_size = _SUPER.unpack_from(data)
    if magic != MAGIC:
        raise ValueError("Invalid log superblock magic")
    if version != VERSION:
        raise ValueError(f"Unsupported log version {version}")
    check_sector_size(sector_size)
    return Super(entries, sector_size)


def check_sector_size(size: int) -> None:
    """ValueError when a log cannot have sectors of that many bytes."""
    if not MIN_SECTOR <= size <= MAX_SECTOR or size & (size - 1):
        raise ValueError(f"Invalid log sector size {size}")


def unpack_head(data: bytes, index: int) -> Head:
    """The entry with that number. ValueError when it has flags that nobody knows."""
    sector, count, flags, length = _ENTRY.unpack_from(data)
    if flags & ~_KNOWN:
        raise ValueError(f"Invalid flags {flags:#x} in log entry {index}")
    return Head(sector, count, Flag(flags), length)
