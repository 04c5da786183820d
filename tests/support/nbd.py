# SPDX-License-Identifier: Apache-2.0
"""What the NBD tests share: a client that works while others misbehave, and the target's use of resources."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import Self

from target.exports.nbd.protocol import Info, Option
from target.peers.nbd_client import NbdClient
from target.peers.nbd_raw import Address, Export, RawClient

MIB = 1 << 20
SETTLE_SECONDS = 5
# Of anonymous memory, for what the interpreter keeps; a sanitizer keeps what was freed.
SLACK = (256 if "ASAN_OPTIONS" in os.environ else 4) * MIB


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def anonymous_memory(pid: int) -> int:
    """RssAnon in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no RssAnon")


async def settles(pid: int, base_descriptors: int, base_memory: int) -> None:
    """Asserts that descriptors and memory come back to their base soon."""
    end = time.monotonic() + SETTLE_SECONDS
    while descriptors(pid) > base_descriptors or anonymous_memory(pid) > base_memory + SLACK:
        assert time.monotonic() < end, (
            f"descriptors {base_descriptors} -> {descriptors(pid)}, "
            f"RssAnon {base_memory >> 10} -> {anonymous_memory(pid) >> 10} KiB"
        )
        await asyncio.sleep(0.05)


class Usage(threading.Thread):
    """Looks at a process's descriptors and anonymous memory from time to time."""

    def __init__(self, pid: int, interval: float = 0.05) -> None:
        super().__init__()
        self.pid = pid
        self.interval = interval
        self.descriptors: list[int] = []
        self.memory: list[int] = []
        self._leave = threading.Event()

    def run(self) -> None:
        while not self._leave.wait(self.interval):
            self.descriptors.append(descriptors(self.pid))
            self.memory.append(anonymous_memory(self.pid))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave.set()
        self.join()


class Bystander:
    """A client that writes, reads back and flushes in a part of an export that is its own."""

    def __init__(self, client: NbdClient, base: int) -> None:
        self.client = client
        self.base = base
        self.rounds = 0
        self.slowest = 0.0
        self.task = asyncio.create_task(self._work())

    async def _work(self) -> None:
        while True:
            before = time.monotonic()
            data = self.rounds.to_bytes(8, "big") * 512
            await self.client.write(self.base, data)
            assert await self.client.read(self.base, len(data)) == data
            if self.rounds % 16 == 0:
                await self.client.flush()
            self.rounds += 1
            self.slowest = max(self.slowest, time.monotonic() - before)
            await asyncio.sleep(0.002)

    async def goes_on(self) -> None:
        """Asserts that it still works."""
        rounds = self.rounds
        async with asyncio.timeout(SETTLE_SECONDS):
            while self.rounds < rounds + 3 and not self.task.done():
                await asyncio.sleep(0.01)
        assert not self.task.done(), self.task.exception()

    async def stop(self) -> None:
        if self.task.done():
            await self.task  # raises what went wrong
        self.task.cancel()
        await asyncio.wait([self.task])
        await self.client.close()


@contextlib.asynccontextmanager
async def undisturbed(
    pid: int, address: Address, name: str = "disk", base: int = 0
) -> AsyncIterator[Bystander]:
    """While the body misbehaves another client goes on; afterwards nothing is left of the body's clients."""
    before = descriptors(pid), anonymous_memory(pid)
    bystander = Bystander(await NbdClient.connect(address, name), 0)
    try:
        yield bystander
        await bystander.goes_on()
    finally:
        await bystander.stop()
    assert bystander.slowest < 3, f"the other client waited {bystander.slowest:.1f} s"
    await settles(pid, *before)


@contextlib.asynccontextmanager
async def raw_client(address: Address) -> AsyncIterator[RawClient]:
    raw = await RawClient.connect(address)
    try:
        yield raw
    finally:
        await raw.close()


async def enter(raw: RawClient, name: str = "disk", structured: bool = False) -> Export:
    """Greeting to transmission."""
    await raw.greet()
    if structured:
        await raw.request_structured()
        await raw.meta_contexts(name, ["base:allocation"])
    return await raw.info(name, [Info.BLOCK_SIZE], Option.GO)


def never_reads(raw: RawClient) -> None:
    """From now on it takes nothing from the socket."""
    transport = raw.writer.transport
    assert isinstance(transport, asyncio.Transport)  # to the stream it is a writer only
    transport.pause_reading()


async def closes(raw: RawClient, seconds: float = 5) -> bool:
    """Whether the server closes the connection in time."""
    async with asyncio.timeout(seconds):
        return await raw.at_end()
