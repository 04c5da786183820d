# SPDX-License-Identifier: Apache-2.0
"""Inactive nodes: open, but not used and not locked, so that another process may have the image.

Users outside the graph may still read; what they read may be old. All else fails with EPERM. When a node
becomes active again its driver looks at the image anew. What is above an inactive node is inactive too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from target.graph.edge import RootEdge
from target.graph.errors import BlockError

if TYPE_CHECKING:
    from target.graph.change import Change
    from target.graph.node import Node


async def inactivate(change: Change, node: Node) -> None:
    """The node, and what only inactive nodes use below it. BlockError when a user does not bear it."""
    if any(edge.parent is not None and edge.parent.active for edge in node.parents):
        raise BlockError("Node has active parent node")
    await _inactivate(change, node)
    change.refresh([node])


async def _inactivate(change: Change, node: Node) -> None:
    if not node.active:
        return
    if not node.may_be_inactive:
        raise node.error(f"a node of driver '{node.driver}' cannot be inactive")
    if any(isinstance(edge, RootEdge) and not edge.allow_inactive for edge in node.parents):
        raise BlockError("Failed to inactivate node: Operation not permitted")
    await change.drain(node)
    try:
        await node.inactivate(change)
    except OSError as error:
        raise BlockError.from_os("Failed to inactivate node", error) from None
    _set(change, node, False)
    for edge in list(node.children.values()):
        if not any(user.parent is not None and user.parent.active for user in edge.node.parents):
            await _inactivate(change, edge.node)


async def activate(change: Change, node: Node) -> None:
    """The node and all below it."""
    if node.active:
        return
    for edge in list(node.children.values()):
        await activate(change, edge.node)
    await change.drain(node)
    _set(change, node, True)
    change.refresh([node])  # locks, before anything is read
    before = node.size
    await node.activate(change)
    if node.size != before:
        change.undo(node.resized)
        node.resized()


def _set(change: Change, node: Node, active: bool) -> None:
    def use(active: bool) -> None:
        node.active = active
        for edge in node.parents:
            if isinstance(edge, RootEdge):
                edge.relink(node.object, node.object)

    before = node.active
    change.bind(node)
    change.undo(lambda: use(before))
    use(active)
