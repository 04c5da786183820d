# SPDX-License-Identifier: Apache-2.0
"""Rebuilds an image from a log: as it was at some entry, or as a power cut there may have left it.

A disk with a volatile cache promises one thing: what was written before a flush began is there once the flush
has completed. Of what was written after the last flush each sector may be there or not, in any combination.
The image to rebuild must be as it was when the log began.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import BinaryIO

from target.replay.layout import Flag
from target.replay.log import Entry, WriteLog

SECTOR = 512  # the unit that a disk writes whole
_CHUNK = 1 << 20
_TORN = 0.4  # how many of the writes that no flush covers are torn


class Discarded(Enum):
    """What a discarded range reads as; a disk may choose any."""

    KEEP = "keep"
    ZERO = "zero"
    POISON = "poison"
    """bytes 0xdc: shows that somebody still needed it"""


def apply(log: WriteLog, entry: Entry, image: BinaryIO, discarded: Discarded = Discarded.ZERO) -> None:
    """Does one entry to the image, whole."""
    if entry.is_write:
        image.seek(entry.offset)
        image.write(log.data(entry))
    elif entry.is_discard and discarded is not Discarded.KEEP:
        _fill(image, entry.offset, entry.length, b"\xdc" if discarded is Discarded.POISON else b"\0")


def _fill(image: BinaryIO, offset: int, length: int, byte: bytes) -> None:
    image.seek(offset)
    for at in range(0, length, _CHUNK):
        image.write(byte * min(_CHUNK, length - at))


def rebuild(
    log: WriteLog, image: str | Path, until: int | None = None, discarded: Discarded = Discarded.ZERO
) -> None:
    """Does all entries before the one numbered ``until`` (default: all there are), in order."""
    with open(image, "r+b") as file:
        for entry in log.entries[:until]:
            apply(log, entry, file, discarded)


@dataclass
class PowerCut:
    """The power goes just before entry ``at`` is logged.

    ``keep``: the probability that a write that was not flushed is there; the same ``seed`` makes the same
    image. 0 drops all of them, 1 keeps all; in between some are torn: of these each sector is there or not.
    """

    at: int
    keep: float = 0.0
    seed: int = 0
    discarded: Discarded = Discarded.ZERO
    _random: random.Random = field(init=False, repr=False)

    def make(self, log: WriteLog, image: str | Path) -> None:
        """Turns the image of the log's beginning into what the power cut leaves."""
        self._random = random.Random(f"{self.at} {self.keep} {self.seed}")
        flushed = self.last_flush(log)
        with open(image, "r+b") as file:
            for entry in log.entries[: self.at]:
                if entry.number < flushed or entry.flags & Flag.FUA:
                    apply(log, entry, file, self.discarded)
                else:
                    self._apply_unsafe(log, entry, file)

    def last_flush(self, log: WriteLog) -> int:
        """The entry of the last flush before the cut; 0 when there is none."""
        return max((entry.number for entry in log.entries[: self.at] if entry.is_flush), default=0)

    def _apply_unsafe(self, log: WriteLog, entry: Entry, image: BinaryIO) -> None:
        """What is left of an entry that no flush covers."""
        torn = entry.is_write and 0 < self.keep < 1 and self._random.random() < _TORN
        if torn:
            data = log.data(entry)
            for first, end in self._kept(entry.length):
                image.seek(entry.offset + first)
                image.write(data[first:end])
        elif self._random.random() < self.keep:
            apply(log, entry, image, self.discarded)

    def _kept(self, length: int) -> Iterator[tuple[int, int]]:
        """The sectors of a torn write that are there, in bytes from its beginning."""
        for first in range(0, length, SECTOR):
            if self._random.random() < self.keep:
                yield first, min(first + SECTOR, length)
