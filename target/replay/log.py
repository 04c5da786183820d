# SPDX-License-Identifier: Apache-2.0
"""Reads a log of writes from a file: its entries in order, their data, and its marks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from target.replay import layout
from target.replay.layout import Flag, Head


class LogError(Exception):
    """The log cannot be used, in words for the user."""


class Entry(NamedTuple):
    """One logged request. ``offset`` and ``length`` in bytes of the image; ``name`` of a mark."""

    number: int
    flags: Flag
    offset: int
    length: int
    data_offset: int
    """where the data lies in the log; without meaning for a discard"""
    name: str

    @property
    def is_write(self) -> bool:
        return bool(self.length) and not self.flags & (Flag.DISCARD | Flag.MARK)

    @property
    def is_discard(self) -> bool:
        return bool(self.flags & Flag.DISCARD)

    @property
    def is_flush(self) -> bool:
        return bool(self.flags & Flag.FLUSH)

    def __str__(self) -> str:
        flags = "+".join(str(flag.name).lower() for flag in self.flags)
        words = [str(self.number), "write" if self.is_write else "", flags]
        if self.length:
            words.append(f"{self.offset} {self.length}")
        return " ".join(word for word in [*words, self.name] if word)


class WriteLog:
    """An open log; a context manager. Raises LogError."""

    def __init__(self, path: str | Path) -> None:
        self.path = os.fspath(path)
        try:
            self._file = open(self.path, "rb")  # noqa: SIM115 (closed by close)
        except OSError as error:
            raise LogError(f"{self.path}: Could not open: {error.strerror}") from None
        try:
            self._super = layout.unpack_super(self._file.read(layout.SUPER_SIZE))
            self.size = os.fstat(self._file.fileno()).st_size
            self.entries = list(self._entries())
        except ValueError as error:
            self._file.close()
            raise LogError(f"{self.path}: {error}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    @property
    def sector_size(self) -> int:
        return self._super.sector_size

    def data(self, entry: Entry) -> bytes:
        """What a write wrote."""
        assert entry.is_write
        self._file.seek(entry.data_offset)
        return self._file.read(entry.length)

    def flushes(self) -> list[int]:
        """Numbers of the entries with which all before them became durable."""
        return [entry.number for entry in self.entries if entry.is_flush]

    def mark(self, name: str) -> int:
        """The number of the first mark of that name."""
        for entry in self.entries:
            if entry.flags & Flag.MARK and entry.name == name:
                return entry.number
        raise LogError(f"{self.path}: there is no mark '{name}'")

    def _entries(self) -> Iterator[Entry]:
        at = self.sector_size
        for index in range(self._super.entries):
            self._file.seek(at)
            sector = self._file.read(self.sector_size)
            if len(sector) < layout.ENTRY_SIZE:
                raise ValueError(f"it ends before log entry {index} of {self._super.entries}")
            head = layout.unpack_head(sector, index)
            yield self._entry(index, head, at, sector)
            at += (1 + head.data_sectors) * self.sector_size
            if at > self.size:
                raise ValueError(f"the data of log entry {index} lies past the end")

    def _entry(self, number: int, head: Head, at: int, sector: bytes) -> Entry:
        size = self.sector_size
        name = b""
        if head.flags & Flag.MARK:
            name = sector[layout.ENTRY_SIZE :][: head.data_length]
        text = name.decode("utf-8", errors="replace")
        return Entry(number, head.flags, head.sector * size, head.sectors * size, at + size, text)
