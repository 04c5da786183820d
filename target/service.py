# SPDX-License-Identifier: Apache-2.0
"""A running target: the datapath, the graph, objects, NBD servers and exports, and their life together.

The command line, the YAML file and (later) QMP call the same methods with the same typed options. Nothing
here knows the notation that the options came in.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import AsyncIterator, Coroutine
from typing import Any, Literal

from target.chardev import base as chardev
from target.chardev.base import Chardev
from target.chardev.command_line import ChardevRequest
from target.datapath import Datapath
from target.events import EventBus
from target.exports.base import Export, ExportOptions
from target.exports.nbd.server import NbdServer, NbdServerOptions
from target.exports.removal import DRAIN_SECONDS, Removal, RemoveMode
from target.fdsets import Descriptors
from target.graph.change import Change
from target.graph.errors import BlockError
from target.graph.graph import NAME, Graph
from target.graph.options import BlockdevRef
from target.graph.permissions import Perm
from target.objects import IoThread, ObjectOptions, UserObject
from target.qmp.monitor import Monitor, MonitorOptions

log = logging.getLogger("blocktarget")

FATAL_SECONDS = 10.0  # that an orderly end may take after a fatal error
MAIN_THREAD = 0  # serves the exports that name no I/O thread, and requests of the control plane


class Service:
    """Everything that one process serves. ``close`` leaves nothing behind, whatever was started."""

    def __init__(self) -> None:
        self.datapath = Datapath()
        self.datapath.start(asyncio.get_running_loop())
        self.datapath.add_thread()
        self.objects: dict[str, UserObject] = {}
        self.events = EventBus()
        self.fds = Descriptors()
        self.graph = Graph(self.datapath, self.objects, self.events, self.fds)
        self.exports: dict[str, Export] = {}
        self.leaving: list[Export] = []  # exports that are being removed
        self.chardevs: dict[str, Chardev] = {}
        self.monitors: list[Monitor] = []
        self.nbd_servers: list[NbdServer] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.failures: list[Exception] = []  # of the end
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
            found.thread in export.threads for export in self.exports.values()
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
        if self.chardevs[id].front is not None:
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

    # ---- exports ----

    async def start_nbd_server(self, options: NbdServerOptions, id: str | None = None) -> NbdServer:
        """One more listener; it offers all NBD exports, those that come later too.

        id: "" for the one that QMP starts and stops without a name; None: any that is free.
        """
        taken = {server.id for server in self.nbd_servers}
        if id is None:
            names = ("", *(f"#{number}" for number in range(1, len(taken) + 1)))
            id = next(name for name in names if name not in taken)
        elif id in taken:
            raise BlockError(f"NBD server '{id}' already running" if id else "NBD server already running")
        server = NbdServer(self.datapath, options, id)
        self.nbd_servers.append(server)
        try:
            await server.start(self.fds)
        except BaseException:
            self.nbd_servers.remove(server)
            raise
        return server

    async def stop_nbd_server(self, id: str = "") -> None:
        """Ends a listener, and cuts its clients off; with the last one all NBD exports go."""
        server = next((server for server in self.nbd_servers if server.id == id), None)
        if server is None:
            raise BlockError(f"NBD server '{id}' not running" if id else "NBD server not running")
        self.nbd_servers.remove(server)
        await server.stop("hard")
        if not self.nbd_servers:
            exports = [export for export in (*self.exports.values(), *self.leaving) if export.type == "nbd"]
            await self._end_hard(exports)

    async def _end_hard(self, exports: list[Export]) -> None:
        for export in exports:
            if export in self.leaving:
                self.keep(export.finish("hard"))
                continue
            async with self.graph.change() as change:
                await self.remove_export_in(change, export.options.id, "hard")
        await asyncio.gather(*(export.gone.wait() for export in exports))

    async def add_export(self, kind: type[Export], options: ExportOptions) -> Export:
        """Starts an export. BlockError names the export and what is wrong; then nothing has changed."""
        async with self._named(options.id), self.graph.change() as change:
            return await self.add_export_in(change, kind, options)

    async def remove_export(
        self, id: str, mode: RemoveMode = "safe", deadline: float = DRAIN_SECONDS
    ) -> None:
        """Ends an export; its node stays. BlockError when it is refused: then nothing has changed.

        It is gone on return; but with "hard" and "hide" it goes by itself, and is in ``leaving`` until then.
        deadline (seconds) is for "soft".
        """
        async with self.graph.change() as change:
            await self.remove_export_in(change, id, mode, deadline)
        change.raise_failure()

    async def remove_export_in(
        self, change: Change, id: str, mode: RemoveMode | Literal["stop"], deadline: float = DRAIN_SECONDS
    ) -> None:
        """The same as a part of a change. See Removal."""
        await Removal(self, id, mode).prepare(change, deadline)

    async def add_export_in(self, change: Change, kind: type[Export], options: ExportOptions) -> Export:
        """Starts an export as a part of a change. Clients wait until the change is made."""
        if not NAME.match(options.id):
            raise BlockError("Invalid block export id")
        known = (*self.exports.values(), *(export for export in self.leaving if export.shutting_down))
        if any(export.options.id == options.id for export in known):
            raise BlockError(f"Block export id '{options.id}' is already in use")
        node = self.graph.get(options.node_name)
        if options.writable and node.read_only:
            raise BlockError("Cannot export read-only node as writable")
        threads = self._threads(options.iothreads(), options.fixed_iothread)
        perm = Perm.CONSISTENT_READ | (Perm.WRITE if options.writable else Perm.NONE)
        edge = change.attach_root(f"block export '{options.id}'", node, perm, kind.shared)
        export = kind(options, node, edge, threads, self.datapath)
        await export.start()
        self.exports[options.id] = export
        export.suspend()

        async def undo() -> None:
            del self.exports[options.id]
            await export.finish("hard")

        change.undo(undo)
        change.later(export.resume)
        return export

    def _threads(self, names: list[str], fixed: bool = False) -> list[int]:
        if fixed and len(names) > 1:
            raise BlockError("Cannot use fixed-iothread for a multi-threaded export")
        return [self._thread(name) for name in names] or [MAIN_THREAD]

    def _thread(self, name: str) -> int:
        found = self.objects.get(name)
        if not isinstance(found, IoThread):
            raise BlockError(f'iothread "{name}" not found')
        return found.thread

    @staticmethod
    @contextlib.asynccontextmanager
    async def _named(id: str) -> AsyncIterator[None]:
        """Puts the export's name in front of an error that lacks it."""
        name = f"export '{id}'"
        try:
            yield
        except BlockError as error:
            text = str(error)
            raise BlockError(text if text.startswith(name) else f"{name}: {text}") from None
        except OSError as error:
            raise BlockError.from_os(name, error) from None

    # ---- all of it ----

    def counters(self) -> dict[str, Any]:
        """Counters of each node and export."""
        nodes = {
            name: {"driver": node.driver, "size": node.size, **node.counters()}
            for name, node in self.graph.nodes.items()
        }
        exports = {
            id: {"type": export.type, "node-name": export.options.node_name, **export.counters()}
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
        for server in self.nbd_servers:
            await self._try(server.stop())
        self.nbd_servers.clear()
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

    async def remove_exports(self) -> None:
        """All of them, as the first part of the end; ``close`` returns what goes wrong."""
        for id in list(self.exports):
            async with self.graph.change() as change:
                await self.remove_export_in(change, id, "stop")
            self.failures += change.failures
        for export in list(self.leaving):
            await self._try(export.stop())
        if self._tasks:
            await asyncio.wait(self._tasks)

    def keep(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Runs it, to its end, which ``close`` waits for. What goes wrong is logged."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s", error, exc_info=error if not isinstance(error, (BlockError, OSError)) else None)

    async def _try(self, step: Any) -> None:
        try:
            await step
        except (BlockError, OSError) as error:
            self.failures.append(error)
