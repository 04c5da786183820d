# SPDX-License-Identifier: Apache-2.0
"""A sparse disk in memory, for mock servers: any size, and only what was written takes memory."""

from __future__ import annotations

from collections.abc import Iterator

PAGE = 65536
DENSE = 64 << 20  # up to so many bytes a request that wants no hole gets none


class SparseDisk:
    """Bytes in pages; a page that was never written, or was zeroed or trimmed as a whole, is a hole."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.pages: dict[int, bytearray] = {}

    def _parts(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Page, start in it and number of bytes."""
        end = offset + length
        while offset < end:
            start = offset % PAGE
            part = min(PAGE - start, end - offset)
            yield offset // PAGE, start, part
            offset += part

    def read(self, offset: int, length: int) -> bytes:
        parts = []
        for page, start, part in self._parts(offset, length):
            data = self.pages.get(page)
            parts.append(bytes(part) if data is None else data[start : start + part])
        return b"".join(parts)

    def write(self, offset: int, data: bytes) -> None:
        at = 0
        for page, start, part in self._parts(offset, len(data)):
            self.pages.setdefault(page, bytearray(PAGE))[start : start + part] = data[at : at + part]
            at += part

    def zero(self, offset: int, length: int, hole: bool = True) -> None:
        """Zeros; whole pages become holes, unless ``hole`` is false and the range is not huge."""
        if not hole and length <= DENSE:
            self.write(offset, bytes(length))
            return
        first, last = -(-offset // PAGE), (offset + length) // PAGE
        if first >= last:
            self._zero_inside(offset, length)
            return
        for page in [page for page in self.pages if first <= page < last]:
            del self.pages[page]
        self._zero_inside(offset, first * PAGE - offset)
        self._zero_inside(last * PAGE, offset + length - last * PAGE)

    def _zero_inside(self, offset: int, length: int) -> None:
        for page, start, part in self._parts(offset, length):
            if page in self.pages:
                self.pages[page][start : start + part] = bytes(part)

    def extents(self, offset: int, length: int) -> Iterator[tuple[int, bool]]:
        """Runs (length, whether data) that cover the range, none empty, neighbours different."""
        end = offset + length
        first, last = offset // PAGE, -(-end // PAGE)
        present = sorted(page for page in self.pages if first <= page < last)
        at = offset
        for begin, stop in _runs(present):
            if begin * PAGE > at:
                yield begin * PAGE - at, False
                at = begin * PAGE
            until = min(stop * PAGE, end)
            yield until - at, True
            at = until
        if at < end:
            yield end - at, False


def _runs(pages: list[int]) -> Iterator[tuple[int, int]]:
    """Consecutive numbers as (first, one past the last)."""
    begin = previous = -2
    for page in pages:
        if page != previous + 1:
            if begin >= 0:
                yield begin, previous + 1
            begin = page
        previous = page
    if begin >= 0:
        yield begin, previous + 1
