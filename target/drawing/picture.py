# SPDX-License-Identifier: Apache-2.0
"""What is to be drawn, in no particular form: boxes, lines from users down to what they use, words."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

LETTERS = {"consistent-read": "r", "write": "w", "write-unchanged": "u", "resize": "s"}
LEGEND = "r consistent read, w write, u write unchanged, s resize"


class Kind(Enum):
    """What a box stands for."""

    CLIENT = "client"
    EXPORT = "export"
    USER = "other user"
    FILTER = "filter"
    FORMAT = "format"
    STORAGE = "storage"


PALE = {
    Kind.CLIENT: "#e2e8f0",
    Kind.EXPORT: "#ddd6fe",
    Kind.USER: "#e7e5e4",
    Kind.FILTER: "#fde68a",
    Kind.FORMAT: "#bfdbfe",
    Kind.STORAGE: "#a7f3d0",
}


@dataclass(frozen=True)
class Traffic:
    """A second's worth."""

    reads: float = 0
    read_bytes: float = 0
    writes: float = 0
    written_bytes: float = 0

    @property
    def bytes(self) -> float:
        return self.read_bytes + self.written_bytes

    @property
    def words(self) -> list[str]:
        """A text for reads, and one for writes; none for what there is none of."""
        both = (("read", self.reads, self.read_bytes), ("write", self.writes, self.written_bytes))
        return [f"{what} {size(amount)}/s, {count(n)}/s" for what, n, amount in both if n]


@dataclass
class Box:
    """``notes``: lines of text, the most important first. ``whole``: what a line of them was cut from."""

    key: str
    kind: Kind
    name: str
    what: str
    notes: list[str] = field(default_factory=list)
    whole: str = ""
    traffic: Traffic | None = None  # None: not measured

    @property
    def rows(self) -> list[str]:
        """What is told beside the name."""
        return [*self.notes, *(self.traffic.words if self.traffic else [])]


@dataclass
class Line:
    """``above`` uses ``below``: for what (``role``), with which permissions (None: it has none)."""

    above: str
    below: str
    role: str = ""
    perm: frozenset[str] | None = None
    shared: frozenset[str] | None = None

    @property
    def terms(self) -> str:
        """What it needs, and what others may do: "rw-- / r-u-"."""
        if self.perm is None or self.shared is None:
            return ""
        return f"{letters(self.perm)} / {letters(self.shared)}"

    @property
    def rows(self) -> list[str]:
        """What is told beside the line."""
        return [row for row in (self.role, self.terms) if row]

    @property
    def reads_only(self) -> bool:
        return self.perm is not None and "write" not in self.perm


@dataclass
class Picture:
    """``seconds``: the time that traffic was measured over; 0: it was not."""

    boxes: dict[str, Box]
    lines: list[Line]
    seconds: float = 0

    def below(self, key: str) -> list[Line]:
        return [line for line in self.lines if line.above == key]

    def traffic_of(self, line: Line) -> Traffic:
        """What goes down a line: not more than its upper end does, or its lower end is asked for."""
        ends = [self.boxes[line.above].traffic, self.boxes[line.below].traffic]
        known = [end for end in ends if end is not None]
        return min(known, key=lambda traffic: traffic.bytes, default=Traffic())


def letters(perm: frozenset[str]) -> str:
    """ "rw-s": one letter for each permission."""
    return "".join(letter if name in perm else "-" for name, letter in LETTERS.items())


def size(amount: float) -> str:
    """ "20 GiB", "1.5 MiB", "512 B"."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if amount < 1024 or unit == "PiB":
            break
        amount /= 1024
    return f"{_short(amount)} {unit}"


def count(number: float) -> str:
    """ "12.3k", "7"."""
    for unit in ("", "k", "M", "G"):
        if number < 1000 or unit == "G":
            break
        number /= 1000
    return _short(number) + unit


def _short(number: float) -> str:
    return f"{number:.0f}" if number >= 100 or number == int(number) else f"{number:.1f}"


def shorten(text: str, most: int) -> str:
    """The text without control characters; its middle is left out when it is longer."""
    text = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
    if len(text) <= most:
        return text
    tail = (most - 1) * 2 // 3
    return f"{text[: most - 1 - tail]}…{text[-tail:]}"
