# SPDX-License-Identifier: Apache-2.0
"""The part of a service that offers nodes to clients: exports and NBD servers, which come and go.

Each method that ends in ``_in`` is a part of a change of the graph, undone with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Coroutine
from typing import Any, Literal

from target.exports.base import Export, ExportOptions
from target.exports.failures import tell_failures
from target.exports.nbd.server import NbdServer, NbdServerOptions
from target.exports.placing import Placing
from target.exports.removal import DRAIN_SECONDS, Removal, RemoveMode
from target.graph.activity import activate
from target.graph.change import Change
from target.graph.errors import BlockError
from target.graph.graph import NAME, Graph
from target.graph.permissions import Perm

log = logging.getLogger("blocktarget")


class Exporting:
    """``exports`` by id, ``leaving``: those on their way out, ``nbd_servers``; ``failures`` of the end."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.exports: dict[str, Export] = {}
        self.leaving: list[Export] = []
        self.nbd_servers: list[NbdServer] = []
        self.failures: list[Exception] = []
        self._placing = Placing(graph.objects)
        self._tasks: set[asyncio.Task[None]] = set()

    # ---- NBD servers ----

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
        server = NbdServer(self.graph.datapath, options, id)
        self.nbd_servers.append(server)
        try:
            await server.start(self.graph.fds)
        except BaseException:
            self.nbd_servers.remove(server)
            raise
        return server

    async def stop_nbd_server(self, id: str = "") -> None:
        """Ends a listener, and cuts its clients off; with the last one all NBD exports go."""
        async with self.graph.change() as change:
            going = await self.stop_nbd_server_in(change, id)
        await asyncio.gather(*(export.gone.wait() for export in going))

    async def stop_nbd_server_in(self, change: Change, id: str) -> list[Export]:
        """The exports that go with it, after the change by themselves."""
        server = next((server for server in self.nbd_servers if server.id == id), None)
        if server is None:
            raise BlockError(f"NBD server '{id}' not running" if id else "NBD server not running")
        self.nbd_servers.remove(server)
        change.undo(lambda: self.nbd_servers.append(server))
        change.later(server.close)
        change.later(lambda: self._cut_off(server))
        if self.nbd_servers:
            return []
        leaving = [export for export in self.leaving if export.type == "nbd"]
        for export in leaving:
            change.later(functools.partial(self._end_hard, export))
        going = [export for export in self.exports.values() if export.type == "nbd"]
        for export in going:
            await self.remove_export_in(change, export.options.id, "hard")
        return leaving + going

    def _end_hard(self, export: Export) -> None:
        self.keep(export.finish("hard"))

    def _cut_off(self, server: NbdServer) -> None:
        server.cut()
        self.keep(server.stop("hard"))

    async def drop_nbd_server(self, server: NbdServer) -> None:
        """Undoes ``start_nbd_server``; the exports stay."""
        self.nbd_servers.remove(server)
        await server.stop("hard")

    async def stop_nbd_servers(self) -> None:
        """All, as the process ends."""
        for server in self.nbd_servers:
            await self._try(server.stop())
        self.nbd_servers.clear()

    # ---- exports ----

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
        if options.allow_inactive and not kind.serves_inactive:
            raise BlockError("Export type does not support inactive exports")
        if not options.allow_inactive:
            await activate(change, node)
        names, threads = self._placing.of(options, node)
        perm = Perm.CONSISTENT_READ | (Perm.WRITE if options.writable else Perm.NONE)
        edge = change.attach_root(f"block export '{options.id}'", node, perm, kind.shared)
        edge.allow_inactive = options.allow_inactive
        export = kind(options.on(names), node, edge, threads, self.graph.datapath)
        for leaving in self.leaving:
            if not leaving.shutting_down:
                leaving.make_way(export)
        await export.start()
        tell_failures(export)
        self.exports[options.id] = export
        export.suspend()

        async def undo() -> None:
            del self.exports[options.id]
            await export.finish("hard")

        change.undo(undo)
        change.later(export.resume)
        return export

    async def set_iothread(
        self, node_name: str, iothread: str | list[str] | None, force: bool = False
    ) -> None:
        """Moves what serves a node to other I/O threads, with the clients that are attached. See Placing."""
        names = [iothread] if isinstance(iothread, str) else iothread or []
        async with self.graph.change() as change:
            node = self.graph.nodes.get(node_name)
            if node is None:
                raise BlockError(f"Failed to find node with node-name='{node_name}'")
            await self._placing.place(change, [*self.exports.values(), *self.leaving], node, names, force)

    async def set_export_iothread_in(self, change: Change, id: str, iothread: str | list[str] | None) -> None:
        """Moves one export."""
        if id not in self.exports:
            raise BlockError(f"Export '{id}' is not found")
        names = [iothread] if isinstance(iothread, str) else iothread or []
        await self._placing.move(change, [self.exports[id]], names)

    async def remove_exports(self) -> None:
        """All of them, as the first part of the end; ``close`` returns what goes wrong."""
        for id in list(self.exports):
            await self._try(self._stop_export(id))
        for export in list(self.leaving):
            await self._try(export.stop())
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _stop_export(self, id: str) -> None:
        async with self.graph.change() as change:
            await self.remove_export_in(change, id, "stop")
        self.failures += change.failures

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

    async def _try(self, step: Awaitable[object]) -> None:
        try:
            await step
        except (BlockError, OSError) as error:
            self.failures.append(error)

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
