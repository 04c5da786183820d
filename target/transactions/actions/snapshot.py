# SPDX-License-Identifier: Apache-2.0
"""External snapshots: an overlay takes the place of a node, which becomes what is behind it."""

from __future__ import annotations

from target.graph.change import refuse_backing
from target.graph.errors import BlockError
from target.graph.node import Node
from target.qmp.registry import Arguments
from target.transactions.action import Action


class Snapshot(Action, type="blockdev-snapshot"):
    """The overlay is a node that exists, without a backing node, and nobody uses it."""

    class Data(Arguments):
        node: str
        overlay: str

    data: Data

    async def prepare(self) -> None:
        node = self.graph.lookup(self.data.node, self.data.node)
        overlay = self.graph.lookup(self.data.overlay, self.data.overlay)
        refuse_backing(node)
        await self.take(node, overlay)

    async def take(self, node: Node, overlay: Node) -> None:
        """Puts the overlay above the node: what is behind it is complete, on disk, and written by nobody."""
        _check_overlay(overlay)
        await self.change.drain(node)
        if not node.read_only:
            try:
                await node.flush()
            except OSError:
                raise BlockError("An IO error has occurred") from None
        edge = await self.change.attach(overlay, "backing", node)
        await self.change.replace_node(node, overlay, keep=[edge])
        await self.change.make_read_only(node)


def _check_overlay(overlay: Node) -> None:
    if overlay.parents:
        users = ", ".join(edge.user for edge in overlay.parents)
        raise BlockError(f"The overlay is already in use: by {users}")
    if "backing" in overlay.children:
        raise BlockError("The overlay already has a backing image")
    if not overlay.supports_backing:
        raise BlockError("The overlay does not support backing images")
