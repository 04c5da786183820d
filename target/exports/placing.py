# SPDX-License-Identifier: Apache-2.0
"""Which I/O threads serve an export: chosen when it is made, and changed while clients are attached."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from target.exports.base import Export, ExportOptions
from target.graph.edge import Edge, RootEdge
from target.graph.errors import BlockError
from target.objects import IoThread, UserObject

if TYPE_CHECKING:
    from target.graph.change import Change
    from target.graph.node import Node

MAIN_THREAD = 0  # serves what names no I/O thread, and requests of the control plane
MOVE_SECONDS = 30.0  # that requests under way have to finish before a move is refused
HELD_SECONDS = 1.0  # the same where the change holds requests: some of them do not finish before it does


class Placing:
    """Finds threads by the names of objects. What a node was given is for exports of it that name none."""

    def __init__(self, objects: Mapping[str, UserObject]) -> None:
        self._objects = objects
        self._given: WeakKeyDictionary[Node, list[str]] = WeakKeyDictionary()

    def of(self, options: ExportOptions, node: Node) -> tuple[list[str], list[int]]:
        """Names and threads for a new export. BlockError."""
        names = options.iothreads() or self._given.get(node, [])
        if options.fixed_iothread and len(names) > 1:
            raise BlockError("Cannot use fixed-iothread for a multi-threaded export")
        return names, self._threads(names, 'iothread "{}" not found')

    def _threads(self, names: list[str], missing: str) -> list[int]:
        found = [self._objects.get(name) for name in names]
        for name, thread in zip(names, found, strict=True):
            if not isinstance(thread, IoThread):
                raise BlockError(missing.format(name))
        return [thread.thread for thread in found if isinstance(thread, IoThread)] or [MAIN_THREAD]

    async def place(
        self, change: Change, exports: list[Export], node: Node, names: list[str], force: bool
    ) -> None:
        """Moves the exports that serve the node, or what it is a part of. No name: the main thread.

        force: also where exports are attached to the node itself. BlockError.
        """
        if not force and any(isinstance(edge, RootEdge) for edge in node.parents):
            hint = "use force=true to override this check"
            raise BlockError(
                f"Node {node.name} is associated with a BlockBackend and could be in use ({hint})"
            )
        edges = _root_edges(node)
        await self.move(change, [export for export in exports if export.edge in edges], names)
        self._give(change, node, names)

    async def move(self, change: Change, exports: list[Export], names: list[str]) -> None:
        """Moves these exports. BlockError."""
        threads = self._threads(names, "Cannot find iothread {}")
        if any(export.options.fixed_iothread for export in exports):
            raise BlockError("Cannot change iothread of active block backend")
        for export in exports:
            await self._move(change, export, names, threads)

    def _give(self, change: Change, node: Node, names: list[str]) -> None:
        before = self._given.get(node, [])
        self._given[node] = names
        change.undo(lambda: self._given.update({node: before}))

    async def _move(self, change: Change, export: Export, names: list[str], threads: list[int]) -> None:
        if change.holds(export.edge):
            self._move_later(change, export, names, threads)
            return
        before = export.options.iothreads(), export.threads

        async def move(names: list[str], threads: list[int]) -> None:
            await _move_now(export, threads)
            export.options = export.options.on(names)

        await move(names, threads)
        # What is under way may be held by what came after this, until all of it is undone.
        change.undo(lambda: change.later(lambda: move(*before)))

    @staticmethod
    def _move_later(change: Change, export: Export, names: list[str], threads: list[int]) -> None:
        """What is under way is held by this very change, and finishes when it is made."""
        before = export.options

        def restore() -> None:
            export.options = before

        async def move() -> None:
            try:
                await _move_now(export, threads)
            except BlockError:
                restore()
                raise

        change.undo(restore)
        export.options = before.on(names)
        change.later(move)


async def _move_now(export: Export, threads: list[int]) -> None:
    try:
        await export.move(threads, MOVE_SECONDS)
    except TimeoutError:
        late = f"requests are still under way after {MOVE_SECONDS:g} s"
        raise BlockError(f"export '{export.options.id}': {late}") from None


def _root_edges(node: Node) -> set[Edge]:
    """Of the users outside the graph whose requests may reach the node."""
    found: set[Edge] = set()
    seen: set[Node] = set()

    def visit(node: Node) -> None:
        if node in seen:
            return
        seen.add(node)
        for edge in node.parents:
            if edge.parent is None:
                found.add(edge)
            else:
                visit(edge.parent)

    visit(node)
    return found
