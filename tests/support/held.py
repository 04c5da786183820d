# SPDX-License-Identifier: Apache-2.0
"""A disk in memory whose requests a test holds back, and a service with such disks in the test's own loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from target import drivers, exports
from target.config.options import Notation
from target.config.parse import parse_export, parse_nbd_server, parse_object
from target.datapath import Fault
from target.events import Event
from target.exports.base import Export, ExportDeleted
from target.graph.node import Node, NodeOptions
from target.peers.nbd_client import NbdClient
from target.service import Service

drivers.load()
exports.load()


class Held(Node, driver="test-held"):
    """``hold`` keeps requests waiting until ``let_go``."""

    class Options(NodeOptions):
        size: int

    options: Options

    async def open(self) -> None:
        self.data = bytearray(self.options.size)
        self.waiting = 0
        self._go = asyncio.Event()
        self._go.set()

    async def close(self) -> None:
        self._go.set()

    @property
    def size(self) -> int:
        return len(self.data)

    def hold(self) -> None:
        self._go.clear()

    def let_go(self) -> None:
        self._go.set()

    async def serve(self, fault: Fault) -> None:
        self.waiting += 1
        await self._go.wait()
        self.waiting -= 1
        await super().serve(fault)

    async def read(self, offset: int, length: int) -> bytes:
        return bytes(self.data[offset : offset + length])

    async def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        self.data[offset : offset + len(data)] = data

    async def truncate(self, size: int) -> None:
        self.data = self.data[:size].ljust(size, b"\0")
        self.object.size = size

    async def has(self, waiting: int) -> None:
        """Returns when so many requests wait."""
        async with asyncio.timeout(10):
            while self.waiting < waiting:
                await asyncio.sleep(0.005)


class Live:
    """A service with the disk `disk`, I/O threads `io0` and `io1`, and an NBD server at ``address``."""

    def __init__(self, service: Service, directory: Path) -> None:
        self.service = service
        self.directory = directory
        self.address = str(directory / "nbd")
        self.events: list[Event] = []
        service.events.listen(self.events.append)
        self.disk: Held

    async def start(self, size: int) -> None:
        for id in ("io0", "io1"):
            self.service.add_object(*parse_object({"qom-type": "iothread", "id": id}))
        await self.service.start_nbd_server(
            parse_nbd_server({"addr": {"type": "unix", "path": self.address}}, Notation.JSON)
        )
        node = await self.service.graph.add({"driver": "test-held", "node-name": "disk", "size": size})
        assert isinstance(node, Held)
        self.disk = node

    async def export(self, id: str = "e", type: str = "nbd", **options: Any) -> Export:
        given = {"type": type, "id": id, "node-name": "disk", "writable": True}
        if type == "vhost-user-blk":
            given["addr"] = {"type": "unix", "path": str(self.directory / id)}
        given |= {name.replace("_", "-"): value for name, value in options.items()}
        return await self.service.add_export(*parse_export(given, Notation.JSON))

    async def client(self, name: str = "disk", **options: Any) -> NbdClient:
        return await NbdClient.connect(self.address, name, **options)

    def deleted(self) -> list[str]:
        """Ids in BLOCK_EXPORT_DELETED so far."""
        return [event.id for event in self.events if isinstance(event, ExportDeleted)]


@contextlib.asynccontextmanager
async def live(directory: Path, size: int = 1 << 20) -> AsyncIterator[Live]:
    service = Service()
    made = Live(service, directory)
    try:
        await made.start(size)
        yield made
    finally:
        if hasattr(made, "disk"):
            made.disk.let_go()
        assert await service.close() == []
