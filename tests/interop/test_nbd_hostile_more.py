# SPDX-License-Identifier: Apache-2.0
"""Lines of the list of hostile NBD clients that need an image or a server of their own: block status of a
fragmented image, and exports and servers that end under live requests and half-open handshakes."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from target.config.options import Notation
from target.config.parse import parse_blockdev, parse_export, parse_nbd_server
from target.exports.nbd.protocol import (
    CLIENT_FLAGS,
    Command,
    Option,
    encode_info_request,
    encode_option,
    encode_request,
)
from target.peers.nbd_client import NbdClient
from target.peers.nbd_raw import RawClient
from target.service import Service
from tests.support.daemon import Daemon, blockdev, nbd_export, nbd_server_unix
from tests.support.nbd import MIB, SLACK, Bystander, Usage, anonymous_memory, descriptors, enter, undisturbed
from tests.support.tools import create_image

FORMATS = pytest.mark.parametrize("format", ["raw", "qcow2"])
SIZE = 5 << 30  # more than one BLOCK_STATUS can ask for
PIECES = 3000
STRIDE = 128 << 10
U32 = 0xFFFFFFFF


class Target:
    """Two exports in this process: `disk`, and `other` for a client that goes on."""

    def __init__(self, service: Service, address: str) -> None:
        self.service = service
        self.address = address

    async def serve(self, format: str, directory: Path, size: int) -> None:
        service = self.service
        for name in ("disk", "other"):
            image = create_image(directory / name, str(size), format=format)
            file = {"driver": "file", "filename": str(image), "discard": "unmap"}
            node: Any = {"driver": format, "node-name": name, "file": file}
            await service.add_blockdev(parse_blockdev(node, Notation.JSON))
        addr = {"type": "unix", "path": self.address}
        await service.start_nbd_server(parse_nbd_server({"addr": addr}, Notation.JSON))
        for name in ("disk", "other"):
            export = {"type": "nbd", "id": name, "node-name": name, "writable": True}
            await service.add_export(*parse_export(export, Notation.JSON))


@contextlib.asynccontextmanager
async def target(scratch: Path, format: str, size: int) -> AsyncIterator[Target]:
    before = descriptors(os.getpid())
    service = Service()
    try:
        made = Target(service, str(scratch / "nbd"))
        await made.serve(format, scratch, size)
        yield made
    finally:
        assert await service.close() == []
    assert descriptors(os.getpid()) <= before + 1


class Worker(Bystander):
    """A bystander whose export may end."""

    async def end(self) -> BaseException | None:
        """Ends it; what it met, if anything."""
        self.task.cancel()
        await asyncio.wait([self.task])
        await self.client.abort()
        return None if self.task.cancelled() else self.task.exception()


@FORMATS
async def test_17_status_of_a_fragmented_image(
    scratch: Path, start: Callable[..., Daemon], format: str
) -> None:
    """4 GiB - 1 bytes in thousands of extents: each reply is bounded, and what they say adds up."""
    address = str(scratch / "nbd")
    argv = nbd_server_unix(Path(address))
    for name in ("disk", "other"):
        image = create_image(scratch / name, str(SIZE), format=format)
        file = {"driver": "file", "filename": str(image)}
        argv += blockdev(driver=format, node_name=name, file=file) + nbd_export(node=name, name=name)
    pid = start(*argv).process.pid
    client = await NbdClient.connect(address, "disk")
    await asyncio.gather(*(client.write(i * STRIDE, b"d" * 4096) for i in range(PIECES)))
    assert await fragments(client) >= 2 * PIECES - 20
    await asyncio.sleep(1)  # buffers of what was written go after a while
    with Usage(pid, 0.005) as usage:
        async with undisturbed(pid, address, "other"):
            for _ in range(5):
                await fragments(client)
    assert max(usage.memory) < usage.memory[0] + SLACK
    await client.close()


async def fragments(client: NbdClient) -> int:
    """The number of extents in the first 4 GiB - 1 bytes."""
    at, replies, kinds = 0, 0, []
    while at < U32:
        extents = await client.block_status(at, U32 - at)
        assert 0 < len(extents) <= 2048 and all(length > 0 for length, _ in extents)
        kinds += [flags for _, flags in extents]
        at += sum(length for length, _ in extents)
        replies += 1
    assert at == U32 and replies < 10
    return len(kinds)


async def half_open(address: str, count: int) -> list[RawClient]:
    """Clients at every point of the handshake, and some with requests whose replies nobody reads."""
    made = []
    go = encode_option(Option.GO, encode_info_request("disk"))
    for i in range(count):
        raw = await RawClient.connect(address)
        made.append(raw)
        if i % 4 == 1:
            await raw.send(CLIENT_FLAGS.pack(3))
        elif i % 4 == 2:
            await raw.send((CLIENT_FLAGS.pack(3) + go)[: 5 + i % 20])
        elif i % 4 == 3:
            await enter(raw)
            await raw.send(b"".join(encode_request(Command.READ, n, 0, MIB) for n in range(100)))
    return made


async def leave(clients: list[RawClient]) -> None:
    for raw in clients:
        raw.writer.transport.abort()
        await raw.close()


def memory() -> int:
    """What this process, and the target in it, hold."""
    gc.collect()
    return anonymous_memory(os.getpid())


@FORMATS
async def test_22_export_that_ends_under_live_requests(scratch: Path, format: str) -> None:
    """Its clients are answered or cut off, and clients of another export do not notice; nothing is left."""
    held = []
    for _ in range(2):  # what is made on first use belongs to the base
        async with target(scratch, format, 64 * MIB) as made:
            await end_export(made)
        held.append(memory())
    assert held[1] < held[0] + SLACK


async def end_export(made: Target) -> None:
    other = Worker(await NbdClient.connect(made.address, "other"), 0)
    live = [Worker(await NbdClient.connect(made.address, "disk"), i * MIB) for i in range(8)]
    clients = await half_open(made.address, 20)
    await live[0].goes_on()
    async with asyncio.timeout(40):
        # Those that never read their replies are cut off; they hold nobody up for longer.
        await made.service.remove_export("disk", "soft")
    await other.goes_on()
    for worker in live:
        assert isinstance(await worker.end(), OSError | EOFError)
    late = await RawClient.connect(made.address)
    await late.greet()
    assert (await late.option(Option.GO, encode_info_request("disk")))[-1].is_error
    await leave([*clients, late])
    assert await other.end() is None
    assert other.slowest < 3


@FORMATS
async def test_22_server_that_ends_under_half_open_handshakes(scratch: Path, format: str) -> None:
    """CVE-2024-7409: nothing of them is left, and the exports can be offered again."""
    held = []
    for _ in range(2):
        async with target(scratch, format, 64 * MIB) as made:
            await end_server(made)
        held.append(memory())
    assert held[1] < held[0] + SLACK


async def end_server(made: Target) -> None:
    live = [Worker(await NbdClient.connect(made.address, "disk"), i * MIB) for i in range(8)]
    clients = await half_open(made.address, 40)
    await live[0].goes_on()
    (server,) = made.service.nbd_servers
    async with asyncio.timeout(40):
        await server.stop()
    made.service.nbd_servers.clear()
    for worker in live:
        assert isinstance(await worker.end(), OSError | EOFError)
    await leave(clients)
    addr = {"type": "unix", "path": made.address}
    await made.service.start_nbd_server(parse_nbd_server({"addr": addr}, Notation.JSON))
    again = Worker(await NbdClient.connect(made.address, "disk"), 0)
    await again.goes_on()
    assert await again.end() is None
