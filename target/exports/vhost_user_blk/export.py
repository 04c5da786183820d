# SPDX-License-Identifier: Apache-2.0
"""The export: options, the listening socket, the device that connections share."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from msgspec import UNSET, UnsetType

from target.datapath import lib
from target.exports import address
from target.exports.address import FdAddress, UnixAddress
from target.exports.base import End, Export, ExportClient, ExportOptions
from target.exports.vhost_user_blk.backend import (
    MAX_QUEUES,
    MEMORY_LOST,
    SERIAL_BYTES,
    TROUBLE,
    Backend,
)
from target.exports.vhost_user_blk.device import BlockDevice
from target.exports.vhost_user_blk.server import Server
from target.exports.vhost_user_blk.session import Session
from target.graph.errors import BlockError

if TYPE_CHECKING:
    from target.datapath import Datapath
    from target.graph.edge import RootEdge
    from target.graph.node import Node

MAX_BLOCK_SIZE = 2 << 20


class VhostUserBlkOptions(ExportOptions):
    """QMP's BlockExportOptionsVhostUserBlk, and ``serial``: what GET_ID answers, at most 20 bytes."""

    addr: UnixAddress | FdAddress
    logical_block_size: int = 512
    num_queues: int = 1
    serial: str | UnsetType = UNSET


class VhostUserBlkExport(Export, type="vhost-user-blk"):
    """Serves one front end at a time; others wait in the socket's backlog."""

    Options = VhostUserBlkOptions
    options: VhostUserBlkOptions

    def __init__(
        self, options: VhostUserBlkOptions, node: Node, edge: RootEdge, threads: list[int], datapath: Datapath
    ) -> None:
        super().__init__(options, node, edge, threads, datapath)
        self._check()
        self.device = BlockDevice(
            capacity=self._capacity(node.size),
            block_size=options.logical_block_size,
            queues=options.num_queues,
            writable=options.writable,
            writethrough=options.writethrough,
            seg_max=lib.BT_VHOST_SEG_MAX,
            max_segments=lib.BT_VHOST_MAX_SEGMENTS,
            max_sectors=lib.BT_VHOST_MAX_SECTORS,
        )
        self._server: Server | None = None

    def _check(self) -> None:
        size, queues = self.options.logical_block_size, self.options.num_queues
        if not 512 <= size <= MAX_BLOCK_SIZE or size & (size - 1):
            raise self._error("logical-block-size", size, f"a power of two from 512 to {MAX_BLOCK_SIZE}")
        if not 1 <= queues <= MAX_QUEUES:
            raise self._error("num-queues", queues, f"from 1 to {MAX_QUEUES}")
        serial = self.options.serial
        if serial is not UNSET and (len(serial.encode()) > SERIAL_BYTES or not serial.isascii()):
            raise self._error("serial", repr(serial), f"at most {SERIAL_BYTES} ASCII characters")

    def _error(self, option: str, value: object, expected: str) -> BlockError:
        return BlockError(f"export '{self.options.id}': option '{option}' must be {expected}, not {value}")

    @property
    def serial(self) -> bytes:
        """The option, or as much of the export's name as fits."""
        given = self.options.serial
        return (self.options.id if given is UNSET else given).encode()[:SERIAL_BYTES]

    async def start(self) -> None:
        (listener,) = await address.listen(self.options.addr, self.node.graph.fds)
        self.edge.on_resize = self._resized
        self._server = Server(self.options.id, listener, self._make_session)

    def suspend(self) -> None:
        if self._server is not None:
            self._server.suspend()

    def make_way(self, other: Export) -> None:
        path = self.uri().get("unixsocket")
        if self._server is not None and path is not None and path == other.uri().get("unixsocket"):
            self._server.listener.step_aside()

    async def drain(self, deadline: float) -> None:
        if self._server is not None and self._server.session is not None:
            await self._server.session.drain(deadline)

    def resume(self) -> None:
        if self._server is None:
            return
        self._server.listener.step_back()
        self._server.resume()
        if self._server.session is not None:
            with self._ends_session(self._server):
                self._server.session.undrain()

    async def finish(self, how: End) -> None:
        """All but "hide" are one: a front end must see nothing complete after its connection has ended."""
        if self._server is not None:
            await self._server.stop(wait=how == "hide")
            self._server = None
        self.edge.on_resize = None

    async def move(self, threads: list[int], deadline: float) -> None:
        if self._server is not None and self._server.session is not None:
            with self._ends_session(self._server):
                await self._server.session.move(threads, deadline)
        self.threads = threads

    @staticmethod
    @contextlib.contextmanager
    def _ends_session(server: Server) -> Iterator[None]:
        """A queue that cannot be started again ends the session, not what was asked of the export."""
        try:
            yield
        except TimeoutError:
            raise
        except OSError as error:
            server.end_session(f"a queue cannot go on: {error.strerror}")

    def clients(self) -> list[ExportClient]:
        server = self._server
        if server is None or server.session is None:
            return []
        found = server.session.backend.counters()
        return [
            ExportClient(
                peer=str(server.peer),
                pid=server.peer.pid,
                since=server.since,
                requests=sum(found["requests"].values()) + found["other"],
                failed=found["failed"],
                kicks=found["kicks"],
                notifications=found["notifications"],
            )
        ]

    def describe(self) -> list[str]:
        if not isinstance(self.options.addr, UnixAddress):
            return []
        memory = "-m 512 -object memory-backend-memfd,id=mem,size=512M,share=on -numa node,memdev=mem"
        if self.options.addr.abstract:
            tight = "on" if self.options.addr.tight else "off"
            path = self.options.addr.path.replace(",", ",,") + f",abstract=on,tight={tight}"
        else:
            path = os.path.abspath(self.options.addr.path).replace(",", ",,")
        chardev = f"-chardev {shlex.quote(f'socket,id={self.options.id},path={path},reconnect=1')}"
        device = f"-device vhost-user-blk-pci,chardev={self.options.id},num-queues={self.options.num_queues}"
        return [f"qemu-system-x86_64 {memory} {chardev} {device}"]

    def uri(self) -> dict[str, str]:
        if not isinstance(self.options.addr, UnixAddress) or self.options.addr.abstract:
            return {}
        return {"unixsocket": os.path.abspath(self.options.addr.path)}

    def counters(self) -> dict[str, Any]:
        counters = super().counters()
        if self._server is not None:
            counters["connections"] = self._server.connections
            if self._server.session is not None:
                counters["session"] = self._server.session.backend.counters()
        return counters

    def _capacity(self, size: int) -> int:
        return size - size % self.options.logical_block_size

    def _resized(self, size: int) -> None:
        self.device.capacity = self._capacity(size)
        if self._server is not None and self._server.session is not None:
            self._server.session.resized()

    def _make_session(self) -> Session:
        self.device.reset()
        backend = Backend(
            self.datapath,
            self.edge.gate,
            self.threads,
            queues=self.device.queues,
            capacity=self.device.capacity,
            block_size=self.device.block_size,
            writable=self.device.writable,
            serial=self.serial,
            on_trouble=self._trouble,
        )
        return Session(self.device, backend, self.edge.gate.flush)

    def _trouble(self, queue: int, why: int) -> None:
        if self._server is None:
            return
        if why == MEMORY_LOST:
            self._server.end_session(TROUBLE[why])
        else:
            self._server.warnings.say(f"queue {queue} is stopped: {TROUBLE[why]}")
