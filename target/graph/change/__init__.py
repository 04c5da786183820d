# SPDX-License-Identifier: Apache-2.0
"""One change of the graph, all or nothing, while clients use it.

Each step takes effect at once and says how it is undone; when a later step fails, all are undone in reverse
order. What cannot be undone (closing files, cutting them) waits until every step has succeeded. Requests are
held only above what is rewired, from the first rewiring to the end.

    async with graph.change() as change:
        node = await change.add(options)
        await change.replace_node(old, node)
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from target.graph.change.members import Members
from target.graph.change.walk import check_frozen, link, nodes_below, size_followers, unlink
from target.graph.edge import Edge, RootEdge
from target.graph.errors import BlockError
from target.graph.options import BlockdevRef
from target.graph.permissions import Perm
from target.graph.reopen import Reopen

if TYPE_CHECKING:
    from target.datapath import Object
    from target.graph.node import Node


class Change(Members):
    """See above. Made by ``Graph.change``, which holds the graph's lock meanwhile."""

    # ---- rewiring ----

    async def replace(self, edge: Edge, node: Node) -> None:
        """The edge leads to another node from here on."""
        await self.replace_all([edge], node)

    async def replace_node(self, old: Node, new: Node, *, keep: Collection[Edge] = ()) -> None:
        """All users of old use new, but those kept, and new itself and what it is made of.

        A frozen user refuses; one that needs nothing of the node, such as snapshot-access, stays with it.
        """
        below = set(nodes_below(new))
        tied = [edge for edge in old.parents if edge.frozen and edge.perm is Perm.NONE]
        edges = [edge for edge in old.parents if edge not in (*keep, *tied) and edge.parent not in below]
        await self.replace_all(edges, new)

    async def replace_all(self, edges: Iterable[Edge], node: Node) -> None:
        edges = [edge for edge in edges if edge.node is not node]
        for edge in edges:
            check_frozen(edge)
            if edge.parent is not None and edge.parent in nodes_below(node):
                name, user = node.name, edge.parent.name
                raise BlockError(f"Making '{name}' a {edge.name} child of '{user}' would create a cycle")
        await self._drain_edges(edges)
        old_nodes = [edge.node for edge in edges]
        for edge in edges:
            self._point(edge, node)
        self.refresh([*old_nodes, node, *(edge.parent for edge in edges if edge.parent is not None)])
        for edge, old in zip(edges, old_nodes, strict=True):
            if old.size != node.size:
                edge.resized()
                self.undo(edge.resized)
            self._leave_if_unused(old)

    def _point(self, edge: Edge, node: Node) -> None:
        old = edge.node
        self.bind(old, node)

        def point(to: Node) -> None:
            if edge.node is not to:
                edge.node.parents.remove(edge)
                before, edge.node = edge.node, to
                to.parents.append(edge)
                edge.relink(before.object, to.object)

        self.undo(lambda: point(old))  # first: relink may refuse half way
        point(node)

    async def attach(self, parent: Node, role: str, node: Node) -> Edge:
        """Makes node one more child of parent, which must have a place for it."""
        if parent in nodes_below(node):
            raise BlockError(f"Making '{node.name}' a {role} child of '{parent.name}' would create a cycle")
        await self.drain(parent)
        self.bind(parent, node)
        edge = Edge(parent, role, node)
        self.insert(edge)
        self.undo(lambda: unlink(edge))
        parent.relink(role, None, node.object)
        self.undo(lambda: parent.relink(role, node.object, None))
        parent.child_resized(edge)
        return edge

    async def detach(self, edge: Edge) -> None:
        """Takes a child away from its parent."""
        parent = edge.parent
        assert parent is not None
        check_frozen(edge)
        await self.drain(parent)
        node = edge.node
        self.bind(parent, node)
        parent.relink(edge.role, node.object, None)
        self.undo(lambda: parent.relink(edge.role, None, node.object))
        self.take_out(edge)
        self.undo(lambda: link(edge))
        self._leave_if_unused(node)

    async def replace_object(self, node: Node, made: Object) -> None:
        """A node has another datapath object, such as one over a new descriptor; all above it use that."""
        await self.drain(node)
        self.bind(node)
        old = node.object
        made.set_policy(node.settings.discard == "unmap", node.settings.detect_zeroes)

        def use(new: Object) -> None:
            new.succeed(node.object)
            before, node.object = node.object, new
            for edge in node.parents:
                edge.relink(before, new)

        async def release_old() -> None:
            await old.synchronize()
            old.release()

        async def release_made() -> None:
            use(old)
            await made.synchronize()
            made.release()

        self.undo(release_made)
        use(made)
        self.later(release_old)

    async def reopen(self, refs: Iterable[BlockdevRef]) -> None:
        """Gives nodes new options, as blockdev-reopen does."""
        await Reopen(self.graph).run(self, refs)

    async def make_read_only(self, node: Node) -> None:
        """The same options, but read-only, where the driver can and nobody writes to the node."""
        await Reopen(self.graph).make_read_only(self, node)

    async def resize(self, node: Node, size: int) -> None:
        """Changes the size of a node, if its users permit it, and tells them."""
        self.bind(*nodes_below(node))
        followers = size_followers(node)
        self._share_resize(followers, True)
        with self._strict():  # it is over before all have to agree
            edge = self.attach_root("a resize", node, Perm.RESIZE, Perm.ALL)
        self.later(lambda: self._release_gate(edge))
        self.undo(node.resized)
        if node.read_only:
            raise node.error("Image is read-only")
        if size < node.size:
            await self.drain(node)  # nobody may meet an end that is taken back
        await node.resize(self, size)
        self.take_out(edge)
        self.undo(lambda: link(edge))
        node.resized()
        self._share_resize(followers, False)

    def _share_resize(self, edges: list[RootEdge], share: bool) -> None:
        """Users who follow their node's size permit a resize that is ours, and no other."""

        def set_shared(share: bool) -> None:
            for edge in edges:
                assert edge.fixed is not None
                perm, shared = edge.fixed
                edge.fixed = perm, shared | Perm.RESIZE if share else shared & ~Perm.RESIZE

        self.undo(lambda: set_shared(not share))
        set_shared(share)
        self.refresh([edge.node for edge in edges], loosen=share)
