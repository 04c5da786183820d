# SPDX-License-Identifier: Apache-2.0
"""A thousand NBD clients that come, get half-way and leave at random, while one client verifies its data.

    python -m target.peers.nbd_churn SOCKET|HOST:PORT EXPORT [--clients 1000] [--seconds 120] [--seed 1]

The export is written to: the verifying client's part is the first MiB, the others write behind it. Exits 1
when the verifying client gets an error, wrong data, or no answer in time.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import random
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from target.exports.nbd.protocol import (
    CLIENT_FLAGS,
    Command,
    Option,
    encode_info_request,
    encode_option,
    encode_request,
)
from target.peers.nbd_client import NbdClient
from target.peers.nbd_raw import Address, OptionFailed, RawClient, ServerError

MIB = 1 << 20
PATIENCE = 10.0  # seconds that the verifying client waits for one round


@dataclass
class Result:
    """visits: by how far clients came. slowest: the verifying client's longest round in seconds."""

    visits: collections.Counter[str] = field(default_factory=collections.Counter)
    rounds: int = 0
    slowest: float = 0.0

    def __str__(self) -> str:
        stages = ", ".join(f"{name} {count}" for name, count in sorted(self.visits.items()))
        total = sum(self.visits.values())
        return f"{total} visits ({stages}); {self.rounds} verified rounds, slowest {self.slowest:.2f} s"


class Churn:
    """``run`` does all of it."""

    def __init__(self, address: Address, export: str, seed: int = 1) -> None:
        self.address = address
        self.export = export
        self.random = random.Random(seed)
        self.result = Result()
        self._until = 0.0
        self._go = encode_option(Option.GO, encode_info_request(export))

    async def run(self, clients: int, seconds: float) -> Result:
        """Raises what the verifying client met: TimeoutError, OSError, EOFError, ServerError, ValueError."""
        verifier = await NbdClient.connect(self.address, self.export)
        self._until = time.monotonic() + seconds
        visitors = [asyncio.create_task(self._visitor()) for _ in range(clients)]
        try:
            await self._verify(verifier)
        finally:
            for task in visitors:
                task.cancel()
            await asyncio.wait(visitors)
            await verifier.close()
        for task in visitors:
            if not task.cancelled() and (error := task.exception()) is not None:
                raise error
        return self.result

    # ---- the one that verifies ----

    async def _verify(self, client: NbdClient) -> None:
        while time.monotonic() < self._until:
            begun = time.monotonic()
            async with asyncio.timeout(PATIENCE):
                await self._round(client)
            self.result.slowest = max(self.result.slowest, time.monotonic() - begun)
            self.result.rounds += 1
            await asyncio.sleep(0.005)

    async def _round(self, client: NbdClient) -> None:
        length = self.random.choice([512, 4096, 70_000])
        offset = self.random.randrange(MIB - length)
        data = self.random.randbytes(length)
        await client.write(offset, data)
        if self.random.random() < 0.1:
            await client.flush()
        if await client.read(offset, length) != data:
            raise ValueError(f"what was read at {offset} is not what was written")

    # ---- those that come and go ----

    async def _visitor(self) -> None:
        stages: list[tuple[str, Callable[[RawClient], Awaitable[None]]]] = [
            ("at once", self._at_once),
            ("greeting", self._greeting),
            ("half an option", self._half_an_option),
            ("silent", self._silent),
            ("unread replies", self._unread_replies),
            ("half a write", self._half_a_write),
            ("garbage", self._garbage),
            ("proper", self._proper),
        ]
        while time.monotonic() < self._until:
            name, visit = self.random.choice(stages)
            # A server that closes first is in its rights.
            with contextlib.suppress(OSError, EOFError, ServerError, OptionFailed):
                raw = await RawClient.connect(self.address)
                try:
                    await visit(raw)
                finally:
                    await self._leave(raw)
            self.result.visits[name] += 1
            await asyncio.sleep(self.random.random() * 0.2)

    async def _leave(self, raw: RawClient) -> None:
        if self.random.random() < 0.5:
            raw.writer.transport.abort()
        await raw.close()

    async def _pause(self) -> None:
        await asyncio.sleep(self.random.random() * 0.3)

    async def _at_once(self, raw: RawClient) -> None:
        pass

    async def _greeting(self, raw: RawClient) -> None:
        await raw.receive(self.random.randrange(19))
        await self._pause()

    async def _half_an_option(self, raw: RawClient) -> None:
        data = CLIENT_FLAGS.pack(3) + self._go
        await raw.send(data[: self.random.randrange(len(data))])
        await self._pause()

    async def _enter(self, raw: RawClient) -> int:
        await raw.greet()
        return (await raw.info(self.export)).size

    async def _silent(self, raw: RawClient) -> None:
        await self._enter(raw)
        await self._pause()

    async def _unread_replies(self, raw: RawClient) -> None:
        await self._enter(raw)
        length = self.random.choice([512, 65536, MIB])
        await raw.send(b"".join(encode_request(Command.READ, i, 0, length) for i in range(20)))
        await self._pause()

    async def _half_a_write(self, raw: RawClient) -> None:
        await self._enter(raw)
        length = self.random.choice([4096, 65536, MIB])
        await raw.send(encode_request(Command.WRITE, 1, 2 * MIB, length) + bytes(length // 2))
        await self._pause()

    async def _garbage(self, raw: RawClient) -> None:
        if self.random.random() < 0.5:
            await self._enter(raw)
        await raw.send(self.random.randbytes(self.random.randrange(1, 300)))
        await self._pause()

    async def _proper(self, raw: RawClient) -> None:
        size = await self._enter(raw)
        offset = self.random.randrange(MIB, size - 4096)
        await raw.request(Command.WRITE, 1, offset, 4096, payload=b"c" * 4096)
        await raw.message()
        await raw.request(Command.DISC, 2, 0, 0)


def parse_address(text: str) -> Address:
    host, colon, port = text.rpartition(":")
    return (host, int(port)) if colon and port.isdigit() else text


def main() -> int:
    parser = argparse.ArgumentParser(prog="nbd_churn", description="NBD clients that come and go.")
    parser.add_argument("address", help="path of a unix socket, or HOST:PORT")
    parser.add_argument("export")
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    churn = Churn(parse_address(options.address), options.export, options.seed)
    try:
        print(asyncio.run(churn.run(options.clients, options.seconds)))
    except (TimeoutError, OSError, EOFError, ServerError, ValueError) as error:
        print(f"{churn.result}; the verifying client: {error or type(error).__name__}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
