# SPDX-License-Identifier: Apache-2.0
"""How an export leaves, in two steps: what may fail and can be undone, then what cannot.

``prepare`` refuses, or lets no new client in (they wait) and, for the mode "soft", waits for the requests
that are under way. ``undo`` brings the export back, with its clients; ``finish`` ends it.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Literal

from target.exports.base import Export, ExportDeleted
from target.graph.errors import BlockError

if TYPE_CHECKING:
    from target.service import Service

# safe: refused while there are clients. The others: see target.exports.base.End.
RemoveMode = Literal["safe", "hard", "soft", "hide"]

DRAIN_SECONDS = 30.0  # how long "soft" waits for requests under way before it refuses
HARD_SECONDS = 1.0  # how long a "hard" removal is waited for: it goes on by itself


class Removal:
    """Of the export with that id. yielding: between the steps its id and names may be another one's."""

    def __init__(
        self, service: Service, id: str, mode: RemoveMode | Literal["stop"], *, yielding: bool = False
    ) -> None:
        self._service = service
        self._mode = mode
        self._yielding = yielding
        self.export = self._find(id)

    def _find(self, id: str) -> Export:
        export = self._service.exports.get(id)
        if export is not None:
            return export
        if any(leaving.options.id == id for leaving in self._service.leaving):
            raise BlockError(f"Export '{id}' is already shutting down")
        raise BlockError(f"Export '{id}' is not found")

    async def prepare(self, deadline: float = DRAIN_SECONDS) -> None:
        """BlockError when it has clients ("safe"), or its requests take too long ("soft", in seconds)."""
        export = self.export
        id = export.options.id
        if self._mode == "safe" and export.clients():
            raise BlockError(f"export '{id}' still in use")
        del self._service.exports[id]
        self._service.leaving.append(export)
        export.yielding = self._yielding
        export.suspend()
        if self._mode != "soft":
            return
        try:
            await export.drain(deadline)
        except BaseException as error:
            self.undo()
            if isinstance(error, TimeoutError):
                late = f"export '{id}': requests are still under way after {deadline:g} s"
                raise BlockError(late) from None
            raise

    def undo(self) -> None:
        """The export is as it was before ``prepare``."""
        self._service.leaving.remove(self.export)
        self._service.exports[self.export.options.id] = self.export
        self.export.yielding = False
        self.export.resume()

    def finish(self) -> asyncio.Task[None]:
        """``end`` in a task, which goes on by itself."""
        return self._service.keep(self.end())

    async def end(self) -> None:
        """Returns when the export is gone; BLOCK_EXPORT_DELETED tells of it. BlockError, OSError."""
        export = self.export
        export.yielding = False
        export.shutting_down = True
        try:
            await export.finish("hard" if self._mode == "safe" else self._mode)
        finally:
            try:
                await self._service.graph.detach_root(export.edge)
            finally:
                self._service.leaving.remove(export)
                self._service.events.send(ExportDeleted(id=export.options.id))
