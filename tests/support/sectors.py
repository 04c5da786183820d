# SPDX-License-Identifier: Apache-2.0
"""A model of a disk under requests that overlap in time: which contents each sector may have.

Requests on one sector that are in flight together may take any order, sector by sector; one that began after
another had ended comes after it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

SECTOR = 512
ZEROS = bytes(SECTOR)


@dataclass(eq=False)
class Running:
    """A request in flight. ``value`` by sector is what it writes; None for a read."""

    first: int
    value: list[bytes] | None
    count: int
    may_keep: bool = False  # a discard: the old content may stay
    seen: dict[int, set[bytes]] = field(default_factory=dict)

    def sectors(self) -> range:
        return range(self.first, self.first + self.count)


class SectorModel:
    """``possible`` holds the contents that a sector may have when nothing is in flight on it."""

    def __init__(self, content: bytes) -> None:
        self.possible: list[set[bytes]] = [
            {content[at : at + SECTOR]} for at in range(0, len(content), SECTOR)
        ]
        self.active: dict[int, set[Running]] = defaultdict(set)

    def begin(self, offset: int, length: int, data: bytes | None, may_keep: bool = False) -> Running:
        """``data`` None: a read. Offset and length in bytes, whole sectors."""
        value = None if data is None else [data[at : at + SECTOR] for at in range(0, length, SECTOR)]
        request = Running(offset // SECTOR, value, length // SECTOR, may_keep)
        for i, sector in enumerate(request.sectors()):
            others = self.active[sector]
            request.seen[sector] = {o.value[sector - o.first] for o in others if o.value is not None}
            if request.value is None:
                request.seen[sector] |= self.possible[sector]
            else:
                for other in others:
                    other.seen[sector].add(request.value[i])
            others.add(request)
        return request

    def end_write(self, request: Running) -> None:
        assert request.value is not None
        for sector, value in zip(request.sectors(), request.value, strict=True):
            kept = self.possible[sector] if request.may_keep else set()
            self.possible[sector] = {value} | request.seen[sector] | kept
        self._leave(request)

    def end_read(self, request: Running, data: bytes) -> None:
        """Asserts that the answer is one that the requests before and meanwhile permit."""
        for i, sector in enumerate(request.sectors()):
            assert data[i * SECTOR : (i + 1) * SECTOR] in request.seen[sector], f"sector {sector}"
        self._leave(request)

    def _leave(self, request: Running) -> None:
        for sector in request.sectors():
            self.active[sector].discard(request)

    def settle(self, content: bytes) -> None:
        """Nothing is in flight: this is the content, if it may be."""
        for sector, possible in enumerate(self.possible):
            value = content[sector * SECTOR : (sector + 1) * SECTOR]
            assert value in possible, f"sector {sector}"
            self.possible[sector] = {value}
