# SPDX-License-Identifier: Apache-2.0
"""What filters that see every request in Python share: passing it on, and making whole blocks of it.

For laboratories, not for speed: each request costs a turn of the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Protocol

from target.datapath import POPULATE, Extent, Fault, Object
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

    async def serve(self, fault: Fault) -> None:
        if fault.flags & POPULATE:
            await self.below.object.populate(fault.offset, fault.length)
        await super().serve(fault)

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
    ``event`` hears what is done, in the words of QEMU's events.
    """

    def __init__(self, below: Blocks, align: int, event: Callable[[str], None] = lambda name: None) -> None:
        self.below = below
        self.align = align
        self._event = event
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
                data = await self._with_edges(first, end, offset, data)
            self._event("pwritev")
            await self.below.write(first, data, flags)
        self._event("pwritev_done")

    async def _with_edges(self, first: int, end: int, offset: int, data: bytes) -> bytes:
        """Puts what else is in the first and the last block around the data."""
        after = offset + len(data)
        names = ["pwritev_rmw_head"] if offset > first else []
        names += ["pwritev_rmw_tail"] if after < end else []
        if end - first <= self.align * len(names):  # nothing but edges: one read
            old = await self._read_edge(first, end - first, names)
            return old[: offset - first] + data + old[after - first :]
        head = tail = b""
        if offset > first:
            head = await self._read_edge(first, self.align, ["pwritev_rmw_head"])
        if after < end:
            tail = await self._read_edge(end - self.align, self.align, ["pwritev_rmw_tail"])
        return head[: offset - first] + data + tail[len(tail) - (end - after) :]

    async def _read_edge(self, offset: int, length: int, names: list[str]) -> bytes:
        for name in names:
            self._event(name)
        data = await self.below.read(offset, length)
        for name in names:
            self._event(name.replace("_rmw_", "_rmw_after_"))
        return data

    async def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        first, end = self._within(offset, length)
        if first >= end:
            await self.write(offset, bytes(length), flags)
            return
        if offset < first:
            await self.write(offset, bytes(first - offset), flags)
        async with self._changing(first, end, False):
            self._event("pwritev_zero")
            await self.below.write_zeroes(first, end - first, flags)
        self._event("pwritev_done")
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


class AlignedFilter(PassingFilter):
    """Changes go through ``aligned``, which ``open`` makes."""

    aligned: Aligned

    async def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        await self.aligned.write(offset, data, flags)

    async def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        await self.aligned.write_zeroes(offset, length, flags)

    async def discard(self, offset: int, length: int) -> None:
        await self.aligned.discard(offset, length)


class _Change:
    """A change of the blocks in [first, end) that is under way."""

    def __init__(self, first: int, end: int, alone: bool) -> None:
        self.first = first
        self.end = end
        self.alone = alone
        self.done = asyncio.Event()

    def hinders(self, later: _Change) -> bool:
        return self.first < later.end and later.first < self.end and (self.alone or later.alone)
