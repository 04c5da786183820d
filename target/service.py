# SPDX-License-Identifier: Apache-2.0
"""A running target: the datapath, the graph, objects, NBD servers and exports, and their life together.

The command line, the YAML file and (later) QMP call the same methods with the same typed options. Nothing
here knows the notation that the options came in.
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

from target.chardev import base as chardev
from target.chardev.base import Chardev
from target.chardev.command_line import ChardevRequest
from target.datapath import Datapath
from target.events import EventBus
from target.exports.serving import Exporting
from target.fdsets import Descriptors
from target.graph.errors import BlockError
from target.graph.graph import Graph
from target.graph.options import BlockdevRef
from target.objects import IoThread, ObjectOptions, UserObject
from target.qmp.monitor import Monitor, MonitorOptions

FATAL_SECONDS = 10.0  # that an orderly end may take after a fatal error


class Service(Exporting):
    """Everything that one process serves. ``close`` leaves nothing behind, whatever was started."""

    def __init__(self) -> None:
        self.datapath = Datapath()
        self.datapath.start(asyncio.get_running_loop())
        self.datapath.add_thread()
        self.objects: dict[str, UserObject] = {}
        self.events = EventBus()
        self.fds = Descriptors()
        super().__init__(Graph(self.datapath, self.objects, self.events, self.fds))
        self.chardevs: dict[str, Chardev] = {}
        self.monitors: list[Monitor] = []
        self.started = asyncio.Event()  # cleared while the program starts: monitors take no commands yet
        self.started.set()
        self.end = asyncio.Event()  # set when the process is to end; see request_end
        self.end_status = 0
        self.graph.fatal = self._fatal

    def request_end(self, status: int = 0) -> None:
        """Asks the process to end in order. The first reason gives its exit status."""
        if not self.end.is_set():
            self.end_status = status
            self.end.set()

    def _fatal(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)
        self.request_end(1)
        asyncio.get_running_loop().call_later(FATAL_SECONDS, os._exit, 1)

    # ---- objects ----

    def add_object(self, kind: type[UserObject], options: ObjectOptions) -> UserObject:
        if options.id in self.objects:
            raise BlockError(f"attempt to add duplicate property '{options.id}' to object (type 'container')")
        created = kind(options, self.datapath)
        created.start()
        self.objects[options.id] = created
        return created

    def take_object(self, id: str) -> UserObject:
        """Takes out an object that nothing uses; the caller closes it."""
        found = self.objects.get(id)
        if found is None:
            raise BlockError(f"object '{id}' not found")
        serving = isinstance(found, IoThread) and any(
            found.thread in export.threads for export in (*self.exports.values(), *self.leaving)
        )
        if found.in_use or serving:
            raise BlockError(f"object '{id}' is in use, can not be deleted")
        return self.objects.pop(id)

    # ---- character devices ----

    async def add_chardev(self, request: ChardevRequest) -> Chardev:
        """Opens a device. BlockError says what cannot be had."""
        if request.id in self.chardevs:
            raise BlockError(f"Chardev with id '{request.id}' already exists")
        created = chardev.types()[request.type](request.id, request.options, self.fds)
        self.chardevs[request.id] = created
        try:
            await created.open()
        except BaseException as error:
            del self.chardevs[request.id]
            if isinstance(error, BlockError):
                raise BlockError(f"Failed to add chardev '{request.id}': {error}") from None
            raise
        return created

    async def remove_chardev(self, id: str) -> None:
        if id not in self.chardevs:
            raise BlockError(f"Chardev '{id}' not found")
        device = self.chardevs[id]
        if device.front is not None or not device.opened:
            raise BlockError(f"Chardev '{id}' is busy")
        await self.chardevs.pop(id).close()

    # ---- monitors ----

    def add_monitor(self, options: MonitorOptions) -> Monitor:
        """Has a character device's clients give commands. BlockError when it is not there, or in use."""
        monitor = Monitor(self, options)
        monitor.start()
        self.monitors.append(monitor)
        return monitor

    # ---- nodes ----

    async def add_blockdev(self, ref: BlockdevRef) -> None:
        await self.graph.add(ref)

    # ---- all of it ----

    def counters(self) -> dict[str, Any]:
        """Counters of each node and export."""
        nodes = {
            name: {"driver": node.driver, "size": node.size, **node.counters()}
            for name, node in self.graph.nodes.items()
        }
        exports = {
            id: {"type": export.type, "node-name": export.node.name, **export.counters()}
            for id, export in self.exports.items()
        }
        return {"threads": self.datapath.threads, "nodes": nodes, "exports": exports}

    async def close(self) -> list[Exception]:
        """Stops listening, drains the exports, flushes and closes the nodes. Returns what went wrong.

        Monitors stop running commands first, and tell their clients what happens until the last moment.
        """
        for monitor in self.monitors:
            await monitor.stop()
        for node in self.graph.nodes.values():
            node.interrupt()
        await self.stop_nbd_servers()
        await self.remove_exports()
        await self._try(self.graph.close())
        for id in list(self.objects):
            await self._try(self.objects.pop(id).close())
        for id in list(self.chardevs):
            await self._try(self.chardevs.pop(id).close())
        for monitor in self.monitors:
            monitor.close()
        self.fds.close()
        await self.datapath.close()
        return self.failures
