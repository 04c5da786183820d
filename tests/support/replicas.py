# SPDX-License-Identifier: Apache-2.0
"""A node in memory for tests of what asks several: it fails, lies, or holds its requests, as it is told."""

from __future__ import annotations

import asyncio
from collections import Counter

from target.config.options import Size
from target.datapath import Extent, Object
from target.graph.node import Node, NodeOptions


class Replica(Node, driver="test-replica"):
    """``failing``: errno by method. While ``holding``, requests wait for the futures in ``held``."""

    class Options(NodeOptions):
        size: Size = 65536

    options: Options

    async def open(self) -> None:
        self.data = bytearray(self.options.size)
        self.failing: dict[str, int] = {}
        self.calls: Counter[str] = Counter()
        self.extents = [Extent(self.options.size, 0)]
        self.holding = False
        self.held: list[asyncio.Future[None]] = []

    def make_object(self) -> Object:
        return self.datapath.upcall(self.options.size, self.serve)

    async def _enter(self, method: str) -> None:
        self.calls[method] += 1
        if self.holding:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self.held.append(future)
            await future
        if method in self.failing:
            raise OSError(self.failing[method], "told to")

    async def read(self, offset: int, length: int) -> bytes:
        await self._enter("read")
        return bytes(self.data[offset : offset + length])

    async def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        await self._enter("write")
        self.data[offset : offset + len(data)] = data

    async def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        await self._enter("write_zeroes")
        self.data[offset : offset + length] = bytes(length)

    async def discard(self, offset: int, length: int) -> None:
        await self._enter("discard")

    async def flush(self) -> None:
        await self._enter("flush")

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        await self._enter("block_status")
        at, found = 0, []
        for extent in self.extents:
            start, end = max(at, offset), min(at + extent.length, offset + length)
            if start < end:
                found.append(Extent(end - start, extent.flags))
            at += extent.length
        return found
