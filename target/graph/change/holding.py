# SPDX-License-Identifier: Apache-2.0
"""What is so while a change is under way: requests held above what it touches, permissions that follow.

Locks of files hold what is needed before and after, until it is certain which of the two it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from target.graph.change.steps import Steps
from target.graph.change.walk import link, nodes_above, unlink
from target.graph.edge import Edge, RootEdge
from target.graph.errors import BlockError
from target.graph.update import PermissionUpdate, cumulative

if TYPE_CHECKING:
    from target.graph.node import Node

log = logging.getLogger("blocktarget")

DRAIN_SECONDS = 30.0  # that requests have to finish before what needs them to is refused


class Holding(Steps):
    """See above."""

    def __init__(self) -> None:
        super().__init__()
        # Whether users of a node may disagree until ``settle``: the way to a state that is right may lead
        # through some that are not.
        self.lenient = False
        self._drained: list[RootEdge] = []
        self._quiet: list[Node] = []
        self._sizes: dict[RootEdge, None] = {}  # whose users have to hear of a new size
        self._touched: dict[Node, None] = {}  # whose locks may hold more than is needed now

    # ---- permissions ----

    def refresh(self, tops: Iterable[Node], loosen: bool = False) -> None:
        """The permissions below these nodes follow from the edges as they are. BlockError for a conflict."""
        update = PermissionUpdate(tops)
        self._touched.update(dict.fromkeys(update.nodes))
        update.run(loosen, check=not self.lenient)

    @contextlib.contextmanager
    def _strict(self) -> Iterator[None]:
        lenient, self.lenient = self.lenient, False
        try:
            yield
        finally:
            self.lenient = lenient

    def settle(self) -> None:
        """From here on all have to agree. BlockError names who does not."""
        self.lenient = False
        self.refresh([node for node in self._touched if not node.closed])

    def insert(self, edge: Edge) -> None:
        """Puts the edge in with its permissions, or leaves everything as it was.

        The undo is the caller's: a node that is being opened, or closed, takes its edges with it.
        """
        link(edge)
        try:
            self.refresh([edge.parent or edge.node])
        except BaseException:
            unlink(edge)
            raise

    def take_out(self, edge: Edge) -> None:
        """The opposite of ``insert``."""
        unlink(edge)
        self.refresh([edge.node], loosen=True)

    # ---- holding requests ----

    async def drain(self, *nodes: Node) -> None:
        """Holds the requests of all users above these nodes to the end, and what nodes do by themselves."""
        above = nodes_above(nodes)
        roots = [edge for node in above for edge in node.parents if isinstance(edge, RootEdge)]
        await self._drain_edges(roots)
        for node in above:
            if node not in self._quiet:
                self._quiet.append(node)  # first: one that fails half way is resumed, too
                await node.quiesce()

    async def _drain_edges(self, edges: Iterable[Edge]) -> None:
        edges = list(edges)
        parents = [edge.parent for edge in edges if edge.parent is not None]
        if parents:
            await self.drain(*parents)
        roots = [edge for edge in edges if isinstance(edge, RootEdge) and edge not in self._drained]
        results = await asyncio.gather(*map(self._hold, roots), return_exceptions=True)
        for edge, result in zip(roots, results, strict=True):
            if isinstance(result, TimeoutError):
                raise BlockError(
                    f"node '{edge.node.name}': requests of {edge.user} did not finish"
                    f" in {DRAIN_SECONDS:.0f} s"
                )
            if isinstance(result, BaseException):
                raise result

    def holds(self, edge: RootEdge) -> bool:
        """Whether this change holds the requests of that user, so that it is no use to wait for them."""
        return edge in self._drained

    async def _hold(self, edge: RootEdge) -> None:
        await edge.hold(DRAIN_SECONDS)
        self._drained.append(edge)

    def tell_size(self, edge: RootEdge) -> None:
        """A user's node has another size; the user hears of it at the end."""
        self._sizes[edge] = None

    # ---- the end, called by the graph ----

    async def roll_back(self) -> None:
        """Undoes all steps, the last first. What an undo leaves for ``later`` is done when requests go on."""
        await self._undo_all()
        alive = [node for node in self._touched if not node.closed]
        PermissionUpdate(alive).run(loosen=True)
        await self._resume()
        await self._do_later()
        for failure in self.failures:
            log.error("while a change of the graph was undone: %s", failure)

    async def finish(self) -> None:
        """All steps have succeeded: requests go on, then what cannot be undone is done. Failures are kept."""
        self._undo.clear()
        for edge in self._sizes:
            if edge in edge.node.parents:
                await self._try(edge.take_size)
        await self._resume()
        await self._do_later()
        self._release_locks()

    def _release_locks(self) -> None:
        for node in self._touched:
            if not node.closed:
                node.commit_permissions(*cumulative(node))
        self._touched.clear()

    async def _resume(self) -> None:
        try:
            self._release_locks()
            for node in self._quiet:
                if not node.closed:
                    await self._try(node.resume)
        finally:
            while self._drained:
                self._drained.pop().let_go()
