# SPDX-License-Identifier: Apache-2.0
"""Keeps aligned requests within blkdebug's limits: cuts them into parts, each of which meets the rules."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from target.drivers.filter.blkdebug.node import BlkDebug


class Limited:
    """Takes whole blocks (see Aligned)."""

    def __init__(self, node: BlkDebug) -> None:
        self.node = node
        self.options = node.options

    async def read(self, offset: int, length: int) -> bytes:
        parts: list[bytes] = []
        for at, n in pieces(offset, length, self.options.max_transfer):
            await self.node.inject("read", at, n)
            parts.append(await self.node.below.read(at, n))
        return b"".join(parts)

    async def write(self, offset: int, data: bytes, flags: int) -> None:
        for at, n in pieces(offset, len(data), self.options.max_transfer):
            part = data[at - offset : at - offset + n]
            await self.node.inject("write", at, n, part)
            await self.node.below.write(at, part, flags)

    async def write_zeroes(self, offset: int, length: int, flags: int) -> None:
        """What is smaller than the preferred unit becomes data."""
        unit = self.options.opt_write_zero or 1
        for at, n in split(offset, length, unit):
            if at % unit or n % unit:
                await self.write(at, bytes(n), flags)
                continue
            for first, part in pieces(at, n, self.options.max_write_zero):
                await self.node.inject("write-zeroes", first, part)
                await self.node.below.write_zeroes(first, part, flags)

    async def discard(self, offset: int, length: int) -> None:
        """What is smaller than the preferred unit is left alone."""
        unit = self.options.opt_discard or 1
        for at, n in split(offset, length, unit):
            if at % unit or n % unit:
                continue
            for first, part in pieces(at, n, self.options.max_discard):
                await self.node.inject("discard", first, part)
                await self.node.below.discard(first, part)


def pieces(offset: int, length: int, most: int) -> list[tuple[int, int]]:
    """The range in pieces of at most so many bytes; 0: whole."""
    most = most or max(length, 1)
    return [(offset + at, min(most, length - at)) for at in range(0, length, most)]


def split(offset: int, length: int, unit: int) -> list[tuple[int, int]]:
    """The head, the whole units, and the tail of a range, without those that are empty."""
    end = offset + length
    first, last = -(-offset // unit) * unit, end // unit * unit
    if first >= last:
        return [(offset, length)] if length else []
    parts = [(offset, first - offset), (first, last - first), (last, end - last)]
    return [(at, n) for at, n in parts if n]
