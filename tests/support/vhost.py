# SPDX-License-Identifier: Apache-2.0
"""A vhost-user-blk export inside the test's process, over a device that the test serves in Python.

It runs on a loop of its own thread, so that a blocking front end can talk to it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, cast

from target.config.options import Notation
from target.datapath import Datapath, Fault, Op
from target.exports.base import parse_export
from target.exports.vhost_user_blk import VhostUserBlkExport

T = TypeVar("T")
SECONDS = 20


class Disk:
    """Serves every request from a bytearray, and records it. ``hold`` keeps requests waiting."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)
        self.seen: list[tuple[Op, int, int, int]] = []  # op, flags, offset, length
        self.error: OSError | None = None
        self.gate = asyncio.Event()
        self.gate.set()

    async def handle(self, fault: Fault) -> None:
        self.seen.append((fault.op, fault.flags, fault.offset, fault.length))
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        end = fault.offset + fault.length
        if fault.op == Op.READ:
            fault.put_data(0, bytes(self.data[fault.offset : end]))
        elif fault.op == Op.WRITE:
            self.data[fault.offset : end] = fault.get_data()
        elif fault.op == Op.ZEROES:
            self.data[fault.offset : end] = bytes(fault.length)
        fault.done()


class Target:
    """The export at ``path``. The loop lives as long as this does."""

    def __init__(self, path: Path, size: int = 1 << 20, threads: int = 1, **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.call(self._start(path, size, threads, options))

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs it on the loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(SECONDS)

    async def _start(self, path: Path, size: int, threads: int, options: dict[str, Any]) -> None:
        self.disk = Disk(size)
        self._datapath = Datapath()
        self._datapath.start(self._loop)
        indices = [self._datapath.add_thread() for _ in range(threads)]
        self._object = self._datapath.upcall(size, self.disk.handle)
        self._gate = self._datapath.gate(self._object, True)
        given = {"type": "vhost-user-blk", "id": "e", "node-name": "n", "writable": True}
        given |= {"addr": {"type": "unix", "path": str(path)}} | options
        kind, parsed = parse_export(given, Notation.JSON)
        node: Any = SimpleNamespace(size=size, graph=SimpleNamespace(fds=None))
        self.edge = SimpleNamespace(gate=self._gate, on_resize=None, node=node)
        made = kind(
            parsed,
            node,
            cast(Any, self.edge),
            indices,
            self._datapath,
        )
        assert isinstance(made, VhostUserBlkExport)
        self.export = made
        await self.export.start()

    async def _stop(self) -> None:
        self.disk.gate.set()
        await self.export.stop()
        self._gate.release()
        self._object.release()
        await self._datapath.close()

    async def hold(self) -> None:
        """Requests from now on wait."""
        self.disk.gate.clear()

    async def let_go(self) -> None:
        self.disk.gate.set()

    async def resize(self, size: int) -> None:
        self.disk.data += bytes(size - len(self.disk.data))
        self._object.size = self._gate.size = size
        self.edge.on_resize(size)

    def close(self) -> None:
        try:
            self.call(self._stop())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
