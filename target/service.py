# SPDX-License-Identifier: Apache-2.0
"""A running target: the datapath, the graph, objects, NBD servers and exports, and their life together.

The command line, the YAML file and (later) QMP call the same methods with the same typed options. Nothing
here knows the notation that the options came in.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

from target.datapath import Datapath
from target.events import EventBus
from target.exports.base import Export, ExportOptions
from target.exports.nbd.server import NbdServer, NbdServerOptions
from target.graph.errors import BlockError
from target.graph.graph import NAME, Graph
from target.graph.options import BlockdevRef
from target.graph.permissions import Perm
from target.objects import IoThread, ObjectOptions, UserObject

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
        self.graph = Graph(self.datapath, self.objects, self.events)
        self.exports: dict[str, Export] = {}
        self.nbd_servers: list[NbdServer] = []
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
            raise BlockError(f"object '{options.id}': an object with this id exists already")
        created = kind(options, self.datapath)
        created.start()
        self.objects[options.id] = created
        return created

    # ---- nodes ----

    async def add_blockdev(self, ref: BlockdevRef) -> None:
        await self.graph.add(ref)

    # ---- exports ----

    async def start_nbd_server(self, options: NbdServerOptions) -> NbdServer:
        """One more listener; it offers all NBD exports, those that come later too."""
        server = NbdServer(self.datapath, options)
        await server.start()
        self.nbd_servers.append(server)
        return server

    async def add_export(self, kind: type[Export], options: ExportOptions) -> Export:
        """Starts an export. BlockError names the export and what is wrong; then nothing has changed."""
        async with self._named(options.id):
            return await self._add_export(kind, options)

    async def remove_export(self, id: str) -> None:
        """Drains and ends an export; its node stays."""
        if id not in self.exports:
            raise BlockError(f"Export '{id}' is not found")
        export = self.exports.pop(id)
        try:
            await export.stop()
        finally:
            await self.graph.detach_root(export.edge)

    async def _add_export(self, kind: type[Export], options: ExportOptions) -> Export:
        if not NAME.match(options.id):
            raise BlockError("Invalid block export id")
        if options.id in self.exports:
            raise BlockError(f"Block export id '{options.id}' is already in use")
        threads = [self._thread(name) for name in options.iothreads()] or [MAIN_THREAD]
        node = self.graph.get(options.node_name)
        if options.writable and node.read_only:
            raise BlockError("Cannot export read-only node as writable")
        perm = Perm.CONSISTENT_READ | (Perm.WRITE if options.writable else Perm.NONE)
        edge = await self.graph.attach_root(f"block export '{options.id}'", node, perm, kind.shared)
        try:
            export = kind(options, node, edge, threads, self.datapath)
            await export.start()
        except BaseException:
            await self.graph.detach_root(edge)
            raise
        self.exports[options.id] = export
        return export

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
        """Stops listening, drains the exports, flushes and closes the nodes. Returns what went wrong."""
        errors: list[Exception] = []
        for node in self.graph.nodes.values():
            node.interrupt()
        for server in self.nbd_servers:
            await self._try(server.stop(), errors)
        self.nbd_servers.clear()
        for id in list(self.exports):
            await self._try(self.remove_export(id), errors)
        await self._try(self.graph.close(), errors)
        await self.datapath.close()
        return errors

    @staticmethod
    async def _try(step: Any, errors: list[Exception]) -> None:
        try:
            await step
        except (BlockError, OSError) as error:
            errors.append(error)
