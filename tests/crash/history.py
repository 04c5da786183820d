# SPDX-License-Identifier: Apache-2.0
"""What a disk may hold after requests that overlap, fail, and are cut off: sector by sector.

Every write carries a number of its own in each of its sectors, so that what is read says which write it is
from. A sector may hold the last flushed write or any later one, and a write that was never answered may be
there or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

SECTOR = 512
NEVER = 1 << 62
_WORDS = SECTOR // 8

Numbers = npt.NDArray[np.int64]


class Kind(Enum):
    WRITE = "write"
    ZEROES = "zeroes"
    DISCARD = "discard"
    """the old content may stay"""


@dataclass
class Change:
    """A request that changes sectors [first, end). Times are counted in events of the history."""

    kind: Kind
    number: int
    first: int
    end: int
    began: int
    ended: int = NEVER

    @property
    def offset(self) -> int:
        return self.first * SECTOR

    @property
    def length(self) -> int:
        return (self.end - self.first) * SECTOR

    def data(self) -> bytes:
        return self.number.to_bytes(8, "little") * (self.length // 8)


def numbered(number: int, sectors: int) -> bytes:
    """Sectors for an image that a history begins with, each with its own number."""
    return np.repeat(np.arange(number, number + sectors, dtype=np.int64), _WORDS).tobytes()


def words_of(data: bytes) -> Numbers:
    """The words of each sector, one row for each."""
    return np.frombuffer(data, dtype=np.int64).reshape(-1, _WORDS)


def mixed(words: Numbers) -> Numbers:
    """Which sectors hold more than one number."""
    return np.flatnonzero((words != words[:, :1]).any(axis=1))


def numbers_of(data: bytes) -> Numbers:
    """The number in each sector; AssertionError when a sector is a mixture."""
    words = words_of(data)
    torn = mixed(words)
    assert not torn.size, f"sectors {torn[:10].tolist()} are of no single write"
    return words[:, 0].copy()


class History:
    """``base``: content at time 0. Its numbers, and those of writes, differ; 0 is a sector of zeros.

    ``life``: different for each history of one image, so that what an earlier one wrote and lost is known.
    """

    def __init__(self, base: bytes, life: int = 1) -> None:
        self.base = numbers_of(base)
        self.sectors = self.base.size
        self.next = self.first_number = life << 32
        assert int(self.base.max()) < self.first_number
        self.clock = 0
        self.writes: list[Change] = []  # by number
        self.zeroings: list[Change] = []
        # When the last write that is certainly in effect began: as reads see it, and after a power cut.
        self.visible = np.zeros(self.sectors, np.int64)
        self.durable = np.zeros(self.sectors, np.int64)

    # ---- what happens ----

    def _now(self) -> int:
        self.clock += 1
        return self.clock

    def begin(self, kind: Kind, first: int, count: int) -> Change:
        number = 0
        if kind is Kind.WRITE:
            number, self.next = self.next, self.next + 1
        change = Change(kind, number, first, first + count, self._now())
        (self.writes if kind is Kind.WRITE else self.zeroings).append(change)
        return change

    def complete(self, change: Change, fua: bool = False) -> None:
        """It was answered with success. One that failed is never complete: it may show at any time."""
        change.ended = self._now()
        if change.kind is Kind.DISCARD:
            return
        for times in (self.visible, self.durable) if fua else (self.visible,):
            part = times[change.first : change.end]
            np.maximum(part, change.began, out=part)

    def begin_flush(self) -> Numbers:
        return self.visible.copy()

    def complete_flush(self, begun: Numbers) -> None:
        np.maximum(self.durable, begun, out=self.durable)

    def begin_read(self, first: int, count: int) -> Numbers:
        return self.visible[first : first + count].copy()

    # ---- what may be found ----

    def check_read(self, first: int, data: bytes, begun: Numbers) -> None:
        """A read may meet a write half-way, even within a sector: then each part must be right."""
        words = words_of(data)
        self._check(first, words[:, 0], begun, "read")
        for at in mixed(words).tolist():
            for number in np.unique(words[at]):
                self._check(first + at, np.array([number]), begun[at : at + 1], "read in part")

    def check_content(self, data: bytes, floor: Numbers | None = None) -> None:
        """The whole disk after a crash. ``floor``: what was durable (now, when not given)."""
        assert len(data) == self.sectors * SECTOR
        self._check(0, numbers_of(data), self.durable if floor is None else floor, "found after the crash")

    def _check(self, first: int, found: Numbers, floor: Numbers, what: str) -> None:
        ok = (found == self.base[first : first + found.size]) & (floor <= 0)
        ok |= self._is_write(first, found, floor)
        for change in self.zeroings:
            a, b = max(change.first - first, 0), min(change.end - first, found.size)
            if a < b:
                ok[a:b] |= (found[a:b] == 0) & (change.ended >= floor[a:b])
        wrong = np.flatnonzero(~ok)
        assert not wrong.size, self._explain(first, found, floor, int(wrong[0]), wrong.size, what)

    def _is_write(self, first: int, found: Numbers, floor: Numbers) -> npt.NDArray[np.bool_]:
        """Where a write's number stands that covers the sector and was not certainly overwritten."""
        index = found - self.first_number
        known = (index >= 0) & (index < len(self.writes))
        if not self.writes:
            return known
        rows = np.array([(c.first, c.end, c.ended) for c in self.writes], dtype=np.int64)
        starts, ends, ended = rows[np.where(known, index, 0)].T
        sectors = np.arange(first, first + found.size)
        inside: npt.NDArray[np.bool_] = known & (starts <= sectors) & (sectors < ends) & (ended >= floor)
        return inside

    def _explain(self, first: int, found: Numbers, floor: Numbers, at: int, count: int, what: str) -> str:
        index = int(found[at]) - self.first_number
        where = "the beginning" if found[at] == self.base[first + at] else f"number {found[at]}"
        if 0 <= index < len(self.writes):
            where = f"{self.writes[index]}"
        elif index < 0 and found[at] != self.base[first + at]:
            where = f"number {found[at]} of an earlier life"
        later = [c for c in (*self.writes, *self.zeroings) if c.first <= first + at < c.end]
        needed = next((c for c in later if c.began == floor[at]), None)
        return f"{count} sectors are wrong; sector {first + at} {what}: from {where}, after {needed}"
