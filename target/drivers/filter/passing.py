# SPDX-License-Identifier: Apache-2.0
"""What filters that see every request in Python share: passing it on, and making whole blocks of it.

For laboratories, not for speed: each request costs a turn of the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Protocol

from target.datapath import Extent, Object
from target.graph.change import Change
from target.graph.edge import Edge
from target.graph.node import Node

if TYPE_CHECKING:
    from target.graph.change import Change

OPEN_END = 1 << 62


class PassingFilter(Node):
    """Requests go to the child ``file``. A filter overrides what it wants to see."""

    is_filter = True

    @property
    def below(self) -> Node:
        return self.children["file"].node

    def make_object(self) -> Object:
        # Without an end of its own: a format above may grow the child by writing.
        return self.datapath.upcall(OPEN_END, self.serve)

    @property
    def size(self) -> int:
        return self.below.size

    async def read(self, offset: int, length: int) -> bytes:
        return await self.below.read(offset, length)

    async def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        await self.below.write(offset, data, flags)

    async def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        await self.below.write_zeroes(offset, length, flags)

    async def discard(self, offset: int, length: int) -> None:
        await self.below.discard(offset, length)

    async def flush(self) -> None:
        await self.below.flush()

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        return await self.below.block_status(offset, length)

    async def truncate(self, size: int) -> None:
        await self.below.truncate(size)

    async def resize(self, change: Change, size: int) -> None:
        await self.below.resize(change, size)

    def relink(self, role: str, old: Object | None, new: Object | None) -> None:
        if old is None or new is None:
            super().relink(role, old, new)  # else: requests find the child by its edge

    def child_resized(self, edge: Edge) -> None:
        if edge.role == "file":
            self.resized()


class Blocks(Protocol):
    """What takes requests in whole blocks."""

    async def read(self, offset: int, length: int) -> bytes: ...
    async def write(self, offset: int, data: bytes, flags: int) -> None: ...
    async def write_zeroes(self, offset: int, length: int, flags: int) -> None: ...
    async def discard(self, offset: int, length: int) -> None: ...


class Aligned:
    """Makes requests of whole blocks of ``align`` bytes (a power of two) out of any.

    A part of a block is read, changed and written, while no other change of the same block is under way.
    """

    def __init__(self, below: Blocks, align: int) -> None:
        self.below = below
        self.align = align
        self._changes: list[_Change] = []

    async def read(self, offset: int, length: int) -> bytes:
        first, end = self._around(offset, length)
        data = await self.below.read(first, end - first)
        return data[offset - first : offset - first + length]

    async def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        first, end = self._around(offset, len(data))
        partial = end - first != len(data)
        async with self._changing(first, end, partial):
            if partial:
                blocks = bytearray(await self.below.read(first, end - first))
                blocks[offset - first : offset - first + len(data)] = data
                data = bytes(blocks)
            await self.below.write(first, data, flags)

    async def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        first, end = self._within(offset, length)
        if first >= end:
            await self.write(offset, bytes(length), flags)
            return
        if offset < first:
            await self.write(offset, bytes(first - offset), flags)
        async with self._changing(first, end, False):
            await self.below.write_zeroes(first, end - first, flags)
        if end < offset + length:
            await self.write(end, bytes(offset + length - end), flags)

    async def discard(self, offset: int, length: int) -> None:
        """Parts of blocks stay as they are."""
        first, end = self._within(offset, length)
        if first < end:
            async with self._changing(first, end, False):
                await self.below.discard(first, end - first)

    def _around(self, offset: int, length: int) -> tuple[int, int]:
        return offset & -self.align, (offset + length + self.align - 1) & -self.align

    def _within(self, offset: int, length: int) -> tuple[int, int]:
        return (offset + self.align - 1) & -self.align, (offset + length) & -self.align

    @contextlib.asynccontextmanager
    async def _changing(self, first: int, end: int, alone: bool) -> AsyncIterator[None]:
        """Waits for changes of the same blocks that came before, if one of the two must be alone."""
        change = _Change(first, end, alone)
        before = [other for other in self._changes if other.hinders(change)]
        self._changes.append(change)
        try:
            for other in before:
                await other.done.wait()
            yield
        finally:
            self._changes.remove(change)
            change.done.set()


class _Change:
    """A change of the blocks in [first, end) that is under way."""

    def __init__(self, first: int, end: int, alone: bool) -> None:
        self.first = first
        self.end = end
        self.alone = alone
        self.done = asyncio.Event()

    def hinders(self, later: _Change) -> bool:
        return self.first < later.end and later.first < self.end and (self.alone or later.alone)
