# SPDX-License-Identifier: Apache-2.0
"""A graph in the test's own process, and random work on a node against a model in memory."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from target import drivers
from target.datapath import FUA, UNMAP, Datapath
from target.graph.graph import Graph
from target.graph.node import Node
from target.objects import UserObject

SECTOR = 512


@asynccontextmanager
async def running_graph(
    threads: int = 1, objects: Mapping[str, UserObject] | None = None
) -> AsyncIterator[Graph]:
    """A graph on a datapath of its own. Both are closed at the end, whatever happens."""
    drivers.load()
    datapath = Datapath()
    datapath.start(asyncio.get_running_loop())
    for _ in range(threads):
        datapath.add_thread()
    graph = Graph(datapath, objects)
    try:
        yield graph
    finally:
        try:
            await graph.close()
        finally:
            await datapath.close()


def qcow2_options(path: Path, **options: Any) -> dict[str, Any]:
    """Options of the node `disk`: qcow2 over a file; underscores in names stand for dashes."""
    file = {"driver": "file", "filename": str(path)}
    rest = {name.replace("_", "-"): value for name, value in options.items()}
    return {"driver": "qcow2", "node-name": "disk", "discard": "unmap", "file": file} | rest


async def content(node: Node) -> bytes:
    return b"".join(
        [await node.read(at, min(1 << 20, node.size - at)) for at in range(0, node.size, 1 << 20)]
    )


class Workload:
    """Random requests with many in flight; two of them never touch the same sector at a time.

    ``model`` holds what must be read. A discarded sector may keep its content or read as zeros.
    """

    def __init__(self, node: Node, model: bytearray, seed: int, largest: int = 200_000) -> None:
        self.node = node
        self.model = model
        self.random = random.Random(seed)
        self.largest = largest
        self.busy: list[tuple[int, int]] = []
        self.left = 0

    async def run(self, operations: int, in_flight: int) -> None:
        self.left = operations
        await asyncio.gather(*(self._worker() for _ in range(in_flight)))

    async def _worker(self) -> None:
        while self.left > 0:
            self.left -= 1
            offset, length = self._range()
            self.busy.append((offset, length))
            try:
                await self._one(offset, length)
            finally:
                self.busy.remove((offset, length))

    def _range(self) -> tuple[int, int]:
        while True:
            length = (
                min(int(self.largest ** self.random.random()), len(self.model)) // SECTOR * SECTOR or SECTOR
            )
            offset = self.random.randrange(0, len(self.model) - length + 1) // SECTOR * SECTOR
            if self.random.random() < 0.3:  # often the same places
                offset %= max(SECTOR, len(self.model) // 16 // SECTOR * SECTOR)
            free = all(offset + length <= at or at + size <= offset for at, size in self.busy)
            if free and offset + length <= len(self.model):
                return offset, length

    async def _one(self, offset: int, length: int) -> None:
        kind = self.random.random()
        end = offset + length
        if kind < 0.40:
            data = self.random.randbytes(length)
            await self.node.write(offset, data, FUA if kind < 0.02 else 0)
            self.model[offset:end] = data
        elif kind < 0.70:
            assert await self.node.read(offset, length) == self.model[offset:end], (offset, length)
        elif kind < 0.84:
            await self.node.write_zeroes(offset, length, UNMAP if kind < 0.77 else 0)
            self.model[offset:end] = bytes(length)
        elif kind < 0.95:
            await self._discard(offset, length)
        elif kind < 0.97:
            await self.node.flush()
        else:
            extents = await self.node.block_status(offset, length)
            assert 0 < sum(extent.length for extent in extents) <= length

    async def _discard(self, offset: int, length: int) -> None:
        await self.node.discard(offset, length)
        data = await self.node.read(offset, length)
        for at in range(0, length, SECTOR):
            sector = data[at : at + SECTOR]
            old = self.model[offset + at : offset + at + SECTOR]
            assert sector in (old, bytes(SECTOR)), (offset, at)
        self.model[offset : offset + length] = data
