# SPDX-License-Identifier: Apache-2.0
"""Random requests over NBD connections, many in flight, overlapping as they like, noted in a history."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

from target.exports.nbd.protocol import CommandFlag
from target.peers.nbd_client import NbdClient, ServerError
from tests.crash.history import SECTOR, History, Kind

GONE = (ConnectionError, EOFError, ServerError)


class Load:
    """Requests on clients of one export. Stops when the server goes; errors it answers with are counted."""

    def __init__(
        self, clients: list[NbdClient], history: History, seed: object, largest: int = 48 << 10
    ) -> None:
        self.clients = clients
        self.history = history
        self.random = random.Random(str(seed))
        self.largest = largest // SECTOR
        self.left = 0
        self.done = 0
        self.errors: list[int] = []
        self.gone = False
        self.on_durable: Callable[[], None] = lambda: None  # a flush, or a write with FUA, was acknowledged

    async def run(self, requests: int, in_flight: int) -> None:
        """So many requests, each client with so many in flight."""
        self.left = requests
        await asyncio.gather(*(self._worker(client) for client in self.clients for _ in range(in_flight)))

    async def _worker(self, client: NbdClient) -> None:
        while self.left > 0 and not self.gone:
            self.left -= 1
            try:
                await self._one(client)
            except GONE:
                self.gone = True
            except OSError as error:
                self.errors.append(error.errno or 0)
            self.done += 1

    def _range(self) -> tuple[int, int]:
        """Sectors; often the same places, and often whole clusters."""
        count = min(int(self.largest ** self.random.random()), self.history.sectors)
        first = self.random.randrange(self.history.sectors - count + 1)
        if self.random.random() < 0.4:
            first %= max(1, self.history.sectors // 12)
        if self.random.random() < 0.3:
            first &= ~7
            count = max(8, count & ~7)
        return first, min(count, self.history.sectors - first)

    async def _one(self, client: NbdClient) -> None:
        first, count = self._range()
        pick = self.random.random()
        if pick < 0.50:
            await self.change(client, Kind.WRITE, first, count, pick < 0.03)
        elif pick < 0.65:
            await self.change(client, Kind.ZEROES, first, count, pick < 0.51)
        elif pick < 0.75:
            await self.change(client, Kind.DISCARD, first, count)
        elif pick < 0.94:
            await self.read(client, first, count)
        else:
            await self.flush(client)

    async def read(self, client: NbdClient, first: int, count: int) -> None:
        begun = self.history.begin_read(first, count)
        data = await client.read(first * SECTOR, count * SECTOR)
        self.history.check_read(first, data, begun)

    async def change(self, client: NbdClient, kind: Kind, first: int, count: int, fua: bool = False) -> None:
        change = self.history.begin(kind, first, count)
        flags = CommandFlag.FUA if fua else 0
        if kind is Kind.WRITE:
            await client.write(change.offset, change.data(), flags)
        elif kind is Kind.ZEROES:
            no_hole = CommandFlag.NO_HOLE if self.random.random() < 0.5 else 0
            await client.write_zeroes(change.offset, change.length, flags | no_hole)
        else:
            await client.trim(change.offset, change.length)
        self.history.complete(change, fua)
        if fua:
            self.on_durable()

    async def flush(self, client: NbdClient) -> None:
        begun = self.history.begin_flush()
        await client.flush()
        self.history.complete_flush(begun)
        self.on_durable()
