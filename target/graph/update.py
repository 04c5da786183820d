# SPDX-License-Identifier: Apache-2.0
"""A change of permissions in the graph, all or nothing.

From some nodes down, what each node's users need and share decides what the node needs of its children. The
new state is computed beside the old one, checked for conflicts, prepared by the nodes (file locks), and
only then put in force. What only the old state needed is released when the whole change has succeeded.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from target.graph import permissions
from target.graph.errors import BlockError
from target.graph.permissions import Perm

if TYPE_CHECKING:
    from target.graph.edge import Edge
    from target.graph.node import Node


class PermissionUpdate:
    """Recomputes the permissions below ``tops``, as the edges are now."""

    def __init__(self, tops: Iterable[Node]) -> None:
        self.nodes = _topological(tops)
        self.planned: dict[Edge, tuple[Perm, Perm]] = {}

    def run(self, loosen: bool = False, check: bool = True) -> None:
        """Puts the new permissions in force, or raises BlockError and changes none.

        To loosen takes no preparation, and so cannot fail. check: the users of a node agree with one another.
        """
        states = [(node, *self._plan(node, check and not loosen)) for node in self.nodes]
        if not loosen:
            for node, perm, shared in states:
                node.prepare_permissions(perm, shared)
        for edge, (perm, shared) in self.planned.items():
            edge.perm, edge.shared = perm, shared

    def _plan(self, node: Node, check: bool) -> tuple[Perm, Perm]:
        """Checks the users of a node against one another and plans the edges to its children."""
        perm, shared = Perm.NONE, Perm.ALL
        for edge in node.parents:
            if edge.fixed is not None:
                self.planned[edge] = self._shared_with_force(edge, *edge.fixed)
            if not node.active:
                self.planned[edge] = Perm.NONE, Perm.ALL
            needs, lets = self._of(edge)
            perm, shared = perm | needs, shared & lets
        if check:
            self._check_conflicts(node)
            if node.read_only and perm & (Perm.WRITE | Perm.WRITE_UNCHANGED):
                raise node.error("Block node is read-only")
        for edge in node.children.values():
            wanted = edge.wanted(perm, shared) if node.active else (Perm.NONE, Perm.ALL)
            self.planned[edge] = self._shared_with_force(edge, *wanted)
        return perm, shared

    @staticmethod
    def _shared_with_force(edge: Edge, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        forced = edge.parent is not None and edge.node.settings.force_share
        return perm, Perm.ALL if forced else shared

    def _of(self, edge: Edge) -> tuple[Perm, Perm]:
        return self.planned.get(edge, (edge.perm, edge.shared))

    def _check_conflicts(self, node: Node) -> None:
        users = [edge for edge in node.parents if edge.parent is None or not edge.parent.leaving]
        for a in users:
            for b in users:
                refused = self._of(b)[0] & ~self._of(a)[1]
                if a is not b and refused:
                    raise conflict(a, b, refused)


def cumulative(node: Node) -> tuple[Perm, Perm]:
    """What the users of a node need together, and what all of them share, now."""
    perm, shared = Perm.NONE, Perm.ALL
    for edge in node.parents:
        perm, shared = perm | edge.perm, shared & edge.shared
    return perm, shared


def conflict(a: Edge, b: Edge, refused: Perm) -> BlockError:
    """b needs what a does not share."""
    name = a.node.name
    return BlockError(
        f"Permission conflict on node '{name}': permissions '{permissions.describe(refused)}' are both"
        f" required by {b.user} (uses node '{name}' as '{b.name}' child) and unshared"
        f" by {a.user} (uses node '{name}' as '{a.name}' child)."
    )


def _topological(tops: Iterable[Node]) -> list[Node]:
    """tops and all nodes below them, every parent before its children."""
    order: list[Node] = []
    seen: set[Node] = set()

    def visit(node: Node) -> None:
        if node not in seen:
            seen.add(node)
            for edge in node.children.values():
                visit(edge.node)
            order.append(node)

    for top in tops:
        visit(top)
    return order[::-1]
