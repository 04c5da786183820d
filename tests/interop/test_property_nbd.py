# SPDX-License-Identifier: Apache-2.0
"""Random requests that overlap one another, through NBD on two connections and two I/O threads, on qcow2.

Nothing tells the clients' requests apart: the model permits any order of those in flight together, sector by
sector. At the end qemu-img finds the same content, no error and no leak; snapshots, and the images below, are
as they were.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from target import drivers
from target.config.options import Notation
from target.drivers.format.qcow2 import Qcow2
from target.exports.address import UnixAddress
from target.exports.base import parse_export
from target.exports.nbd import NbdServerOptions
from target.exports.nbd.protocol import CommandFlag
from target.graph.registry import parse_blockdev
from target.objects import parse_object
from target.peers.nbd_client import NbdClient
from target.service import Service
from tests.interop.test_property import CASES, below_digests, flat, snapshot_digests
from tests.support.qcow2 import qcow2_options
from tests.support.sectors import SECTOR, SectorModel
from tests.support.tools import check_image

NAMES = (
    "64k",
    "4k-one-slice",
    "512-refcount-64-one-slice",
    "v2",
    "compressed",
    "chain-64k",
    "chain-one-slice",
    "chain-512",
    "snapshots-64k",
    "snapshots-4k-one-slice",
    "snapshots-512",
    "snapshots-compressed",
    "chain-snapshots-512-one-slice",
    "chain-snapshots-64k-one-slice",
)
OPERATIONS = 600
CONNECTIONS = 2
IN_FLIGHT = 12


@asynccontextmanager
async def served(path: Path, socket: Path, options: dict[str, Any]) -> AsyncIterator[Service]:
    """The image on an NBD server whose connections are spread over two I/O threads."""
    drivers.load()
    service = Service()
    try:
        for name in ("io0", "io1"):
            service.add_object(*parse_object({"qom-type": "iothread", "id": name}, Notation.JSON))
        await service.add_blockdev(parse_blockdev(qcow2_options(path, **options)))
        await service.start_nbd_server(NbdServerOptions(addr=UnixAddress(str(socket))))
        export = {"type": "nbd", "id": "e", "node-name": "disk", "name": "disk", "writable": True}
        await service.add_export(*parse_export({**export, "iothread": ["io0", "io1"]}))
        yield service
    finally:
        errors = await service.close()
    assert not errors


class Clients:
    """Workers over several connections, all on the same model."""

    def __init__(self, clients: list[NbdClient], model: SectorModel, seed: int, largest: int) -> None:
        self.clients = clients
        self.model = model
        self.random = random.Random(seed)
        self.largest = largest
        self.left = OPERATIONS

    async def run(self) -> None:
        await asyncio.gather(*(self._worker(client) for client in self.clients * IN_FLIGHT))

    async def _worker(self, client: NbdClient) -> None:
        while self.left > 0:
            self.left -= 1
            await self._one(client)

    def _range(self) -> tuple[int, int]:
        size = len(self.model.possible)
        count = min(max(1, int(self.largest ** self.random.random()) // SECTOR), size)
        # Half of the requests meet in a small part of the disk.
        reach = size if self.random.random() < 0.5 else min(size, 2 * count + 64)
        return self.random.randrange(reach - count + 1) * SECTOR, count * SECTOR

    async def _one(self, client: NbdClient) -> None:
        kind = self.random.random()
        offset, length = self._range()
        if kind < 0.35:
            await self._read(client, offset, length)
        elif kind < 0.70:
            await self._write(client, offset, length)
        elif kind < 0.83:
            request = self.model.begin(offset, length, bytes(length))
            await client.write_zeroes(offset, length, CommandFlag.NO_HOLE if kind < 0.76 else 0)
            self.model.end_write(request)
        elif kind < 0.93:
            request = self.model.begin(offset, length, bytes(length), may_keep=True)
            await client.trim(offset, length)
            self.model.end_write(request)
        elif kind < 0.96:
            await client.flush()
        else:
            await client.block_status(offset, length)

    async def _read(self, client: NbdClient, offset: int, length: int) -> None:
        request = self.model.begin(offset, length, None)
        self.model.end_read(request, await client.read(offset, length))

    async def _write(self, client: NbdClient, offset: int, length: int) -> None:
        data = self.random.randbytes(length)
        request = self.model.begin(offset, length, data)
        await client.write(offset, data, CommandFlag.FUA if self.random.random() < 0.05 else 0)
        self.model.end_write(request)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", NAMES)
async def test_random_requests_through_nbd(
    scratch: Path, name: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    monkeypatch.setattr(Qcow2, "grant_limit", case.grants)
    path = case.make(scratch)
    before, below = snapshot_digests(path, scratch), below_digests(scratch)
    assert ("snapshots" in name, "chain" in name) == (bool(before), bool(below))
    model = SectorModel(flat(path, scratch))
    socket = scratch / "nbd.sock"
    async with served(path, socket, case.options):
        clients = [await NbdClient.connect(str(socket), "disk") for _ in range(CONNECTIONS)]
        await Clients(clients, model, seed, case.largest).run()
        size = len(model.possible) * SECTOR
        model.settle(
            b"".join([await clients[0].read(at, min(1 << 20, size - at)) for at in range(0, size, 1 << 20)])
        )
        for client in clients:
            await client.close()
    check_image(path)
    model.settle(flat(path, scratch))
    assert snapshot_digests(path, scratch) == before
    assert below_digests(scratch) == below
