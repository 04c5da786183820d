# SPDX-License-Identifier: Apache-2.0
"""A client that writes and verifies random blocks of an empty disk, like a guest, during what a test does."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable
from typing import Protocol

BLOCK = 4096


class Disk(Protocol):
    """A gate, or an NBD client."""

    def read(self, offset: int, length: int, /) -> Awaitable[bytes]: ...

    def write(self, offset: int, data: bytes, /) -> Awaitable[object]: ...


class VerifyingClient:
    """Works until it is closed. ``size`` in bytes, whole blocks."""

    def __init__(self, disk: Disk, size: int, seed: int = 7) -> None:
        self.disk = disk
        self.blocks = size // BLOCK
        self.random = random.Random(seed)
        self.model: dict[int, bytes] = {}
        self.done = 0
        self.stopping = False
        self.task = asyncio.ensure_future(self._run())

    async def _run(self) -> None:
        while not self.stopping:
            block = self.random.randrange(self.blocks)
            if self.random.random() < 0.5:
                data = self.random.randbytes(16) * (BLOCK // 16)
                await self.disk.write(block * BLOCK, data)
                self.model[block] = data
            else:
                await self._check(block)
            self.done += 1

    async def _check(self, block: int) -> None:
        found = await self.disk.read(block * BLOCK, BLOCK)
        assert found == self.model.get(block, bytes(BLOCK)), f"wrong data in block {block}"

    async def some(self, count: int = 20) -> None:
        """Returns when it has done some more."""
        until = self.done + count
        async with asyncio.timeout(20):
            while self.done < until:
                assert not self.task.done(), self.task.exception()
                await asyncio.sleep(0.001)

    async def verify(self) -> None:
        """Ends it; all that it wrote must be there."""
        self.stopping = True
        await self.task
        for block in self.model:
            await self._check(block)
