# SPDX-License-Identifier: Apache-2.0
"""How an export leaves, as a part of a change of the graph: what can be undone, then what cannot.

It lets no new client in (they wait) and, for the mode "soft", waits for the requests that are under way. If
the change is undone it is back, with its clients; else it ends. Modes: see ``End``, and "safe".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from target.exports.base import Export, ExportDeleted
from target.exports.placing import HELD_SECONDS
from target.graph.errors import BlockError

if TYPE_CHECKING:
    from target.exports.serving import Exporting
    from target.graph.change import Change

RemoveMode = Literal["safe", "hard", "soft", "hide"]  # safe: refused while there are clients

DRAIN_SECONDS = 30.0  # how long "soft" waits for requests under way before it refuses


class Removal:
    """Of the export with that id; ``prepare`` does it.

    With "safe", "soft" and "stop" it is gone at the end of the change: the same change may close its node.
    With the others it goes by itself, and uses its node until then.
    """

    def __init__(self, service: Exporting, id: str, mode: RemoveMode | Literal["stop"]) -> None:
        self._service = service
        self._mode = mode
        self._at_once = mode in ("safe", "soft", "stop")
        self.export = self._find(id)

    def _find(self, id: str) -> Export:
        export = self._service.exports.get(id)
        if export is not None:
            return export
        if any(leaving.options.id == id for leaving in self._service.leaving):
            raise BlockError(f"Export '{id}' is already shutting down")
        raise BlockError(f"Export '{id}' is not found")

    async def prepare(self, change: Change, deadline: float = DRAIN_SECONDS) -> None:
        """BlockError when it has clients ("safe"), or its requests take too long ("soft", in seconds)."""
        export = self.export
        if self._mode == "safe" and export.clients():
            raise BlockError(f"export '{export.options.id}' still in use")
        del self._service.exports[export.options.id]
        self._service.leaving.append(export)
        export.suspend()
        change.undo(self._undo)
        if self._mode == "soft":
            await self._drain(min(deadline, HELD_SECONDS) if change.holds(export.edge) else deadline)
        change.later(self._finish)  # before its node closes, if nobody else uses that
        if self._at_once:
            change.unlink_root(export.edge)

    async def _drain(self, deadline: float) -> None:
        try:
            await self.export.drain(deadline)
        except TimeoutError:
            late = f"requests are still under way after {deadline:g} s"
            raise BlockError(f"export '{self.export.options.id}': {late}") from None

    def _undo(self) -> None:
        self._service.leaving.remove(self.export)
        self._service.exports[self.export.options.id] = self.export
        self.export.resume()

    async def _finish(self) -> None:
        self.export.shutting_down = True
        if self._at_once:
            await self._end()
        else:
            self._service.keep(self._end())

    async def _end(self) -> None:
        """Returns when the export is gone; BLOCK_EXPORT_DELETED tells of it."""
        export = self.export
        try:
            await export.finish("hard" if self._mode == "safe" else self._mode)
        finally:
            try:
                if self._at_once:
                    export.edge.gate.release()
                else:
                    await self._service.graph.detach_root(export.edge)
            finally:
                self._service.leaving.remove(export)
                export.gone.set()
                self._service.graph.events.send(ExportDeleted(id=export.options.id))
