# SPDX-License-Identifier: Apache-2.0
"""Random use of a disk by NBD clients, many requests in flight, against a flat model of its content."""

from __future__ import annotations

import asyncio
import random

from target.exports.nbd.protocol import CommandFlag
from target.peers.nbd_client import NbdClient

MIB = 1 << 20


class Model:
    """A flat copy of the disk; no two operations in flight overlap, unless both are reads."""

    def __init__(self, clients: list[NbdClient], data: bytearray, seed: int) -> None:
        self.clients = clients
        self.data = data
        self.random = random.Random(seed)
        self.busy: set[int] = set()
        self.discarded: set[int] = set()  # sectors whose content is not promised any more

    async def step(self) -> None:
        size = len(self.data)
        length = min(self.random.choice((512, 4096, 4096, 10_240, 65_536, 200_192, 1_500_160)), size)
        offset = self.random.randrange((size - length) // 512 + 1) * 512
        sectors = range(offset // 512, (offset + length) // 512)
        if not self.busy.isdisjoint(sectors):
            return
        self.busy.update(sectors)
        try:
            await self._operate(self.random.choice(self.clients), offset, length, sectors)
        finally:
            self.busy.difference_update(sectors)

    async def _operate(self, client: NbdClient, offset: int, length: int, sectors: range) -> None:
        operation = self.random.randrange(10)
        fua = CommandFlag.FUA if self.random.random() < 0.05 else 0
        if operation < 4:
            expected = bytes(self.data[offset : offset + length])
            found = await client.read(offset, length)
            if self.discarded.isdisjoint(sectors):
                assert found == expected, f"{length} bytes at {offset}"
            return
        if operation < 7:
            data = self.random.randbytes(512) * (length // 512)
            await client.write(offset, data, fua)
            self.data[offset : offset + length] = data
        elif operation < 9:
            hole = CommandFlag.NO_HOLE if self.random.random() < 0.3 else 0
            await client.write_zeroes(offset, length, fua | hole)
            self.data[offset : offset + length] = bytes(length)
        else:
            await client.trim(offset, length, fua)
            self.discarded.update(sectors)
            return
        self.discarded.difference_update(sectors)

    async def run(self, steps: int, depth: int) -> None:
        async def worker() -> None:
            for number in range(steps // depth):
                await self.step()
                if number % 40 == 0:
                    await self.random.choice(self.clients).flush()

        await asyncio.gather(*(worker() for _ in range(depth)))

    async def check_all(self) -> None:
        """The whole disk, through one client; also its map: what is told to be zero is."""
        client = self.clients[0]
        for offset in range(0, len(self.data), MIB):
            length = min(MIB, len(self.data) - offset)
            found = await client.read(offset, length)
            for sector in range(offset // 512, (offset + length) // 512):
                at = sector * 512
                if sector not in self.discarded:
                    assert found[at - offset : at - offset + 512] == self.data[at : at + 512], (
                        f"sector {sector}"
                    )
        offset = 0
        for length, flags in await client.map():
            sectors = set(range(offset // 512, (offset + length) // 512)) - self.discarded
            if flags & 2:
                assert not any(any(self.data[s * 512 : s * 512 + 512]) for s in sectors), f"zeros at {offset}"
            offset += length
        assert offset == len(self.data)
