# SPDX-License-Identifier: Apache-2.0
"""Which nodes there are, and who outside of the graph uses them: they come and go as parts of a change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from target.graph.change.holding import Holding
from target.graph.change.walk import link, nodes_leaving, refuse_backing, unlink
from target.graph.edge import RootEdge
from target.graph.errors import BlockError
from target.graph.options import BlockdevRef, NodeOptions, Settings
from target.graph.permissions import Perm

if TYPE_CHECKING:
    from target.graph.graph import Graph
    from target.graph.node import Node


class Members(Holding):
    """See above."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph
        self._bound: set[Node] = set()  # what an undo does something to: it has to be there then
        self._anew: dict[Node, Node] = {}  # what has been opened again by an undo

    def bind(self, *nodes: Node) -> None:
        """What is about to be done to these nodes is undone on them: they cannot be closed before the end."""
        self._bound.update(nodes)

    # ---- nodes ----

    async def add(self, options: dict[str, Any] | BlockdevRef | NodeOptions, driver: str = "") -> Node:
        """Opens a node that stays until it is removed. NodeOptions need the driver's name beside them."""
        ref = self.graph.ref(options, driver)
        assert ref.options is not None
        if ref.options.node_name is None:
            raise BlockError("'node-name' must be specified for the root node")
        node = await self.graph.open(ref, Settings(), None)
        node.owned = True
        self.bind(node)

        async def close() -> None:
            node.owned = False
            await self.graph.collect(node)

        self.undo(close)
        return node

    def remove(self, name: str) -> None:
        """Takes out a node that was added, and inline children that only it used; they close at the end."""
        node = self._removable(name)
        node.owned = False

        def restore() -> None:
            node.owned = True

        self.undo(restore)
        self._leave(node)

    async def remove_now(self, name: str, options: BlockdevRef) -> None:
        """The same, but it closes now, so that another node can have its file; undone by opening it anew."""
        node = self._removable(name)
        if node.parents or not self._bound.isdisjoint(nodes_leaving(node)):
            raise BlockError(f"Node {name} cannot be closed now: what was done before may have to be undone")
        node.owned = False

        async def open_again() -> None:
            self._anew[node] = await self.graph.open(options, Settings(), None)
            self._anew[node].owned = True

        self.undo(open_again)
        await self.graph.collect(node)

    def _removable(self, name: str) -> Node:
        node = self.graph.nodes.get(name)
        if node is None:
            raise BlockError(f"Failed to find node with node-name='{name}'")
        users = [edge for edge in node.parents if edge.parent is None or not edge.parent.leaving]
        names = ", ".join(f"{edge.user} as '{edge.name}' child" for edge in users)
        if any(edge.parent is None for edge in users):
            raise BlockError(f"Node {name} is in use: by {names}")
        refuse_backing(node)
        if not node.owned:
            raise BlockError(f"Node {name} is not owned by the monitor")
        if users:
            raise BlockError(f"Block device {name} is in use: by {names}")
        return node

    def _leave(self, node: Node) -> None:
        """Frees the names of what closes at the end when nobody uses it: another node may have them now."""
        leaving = [found for found in nodes_leaving(node) if self.graph.nodes.get(found.name) is found]
        for found in leaving:
            del self.graph.nodes[found.name]
            found.leaving = True

        def restore() -> None:
            for found in leaving:
                self.graph.nodes[found.name] = found
                found.leaving = False

        async def close() -> None:
            await self.graph.collect(node)

        self.undo(restore)
        self.later(close)

    def _leave_if_unused(self, node: Node) -> None:
        if not node.parents and not node.owned:
            self._leave(node)

    # ---- users outside the graph ----

    def attach_root(self, user: str, node: Node, perm: Perm, shared: Perm) -> RootEdge:
        """Gives a user outside the graph (named in messages) the use of a node, through a gate."""
        edge = RootEdge(user, node, perm, shared)
        front = node.object if node.active else node.front
        edge.gate = self.graph.datapath.gate(front, bool(perm & Perm.WRITE))
        edge.gate.size = node.size
        self.undo(lambda: self._release_gate(edge))
        self.insert(edge)
        self.undo(lambda: unlink(edge))
        return edge

    def _release_gate(self, edge: RootEdge) -> None:
        if edge in self._drained:
            self._drained.remove(edge)
            edge.let_go()
        edge.gate.release()

    def unlink_root(self, edge: RootEdge) -> None:
        """Ends the use, for permissions and topology. The user has drained its gate, and releases it."""
        self.take_out(edge)
        self.undo(lambda: self._link_root(edge))
        self._leave_if_unused(edge.node)

    def _link_root(self, edge: RootEdge) -> None:
        old = edge.node
        edge.node = self._anew.get(old, old)
        link(edge)
        if edge.node is not old:
            edge.relink(old.object, edge.node.object)
