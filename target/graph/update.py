# SPDX-License-Identifier: Apache-2.0
"""A change of permissions in the graph, all or nothing.

From one node down, what each node's users need and share decides what the node needs of its children. The
new state is computed beside the old one, checked for conflicts, prepared by the nodes (file locks), and
only then put in force.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from target.graph import permissions
from target.graph.errors import BlockError
from target.graph.permissions import Perm

if TYPE_CHECKING:
    from target.graph.edge import Edge
    from target.graph.node import Node


class PermissionUpdate:
    """Recomputes the permissions below ``top``; ``new`` is an edge that comes into force with it."""

    def __init__(self, top: Node, new: Edge | None = None) -> None:
        self.top = top
        self.planned: dict[Edge, tuple[Perm, Perm]] = {}
        if new is not None and new.fixed is not None:
            self.planned[new] = new.fixed

    def run(self, loosen: bool = False) -> None:
        """Puts the new permissions in force, or raises BlockError and changes nothing.

        To loosen takes no preparation, and so cannot fail.
        """
        nodes = _topological(self.top)
        states = [(node, *self._plan(node)) for node in nodes]
        if not loosen:
            _prepare(states)
        for edge, (perm, shared) in self.planned.items():
            edge.perm, edge.shared = perm, shared
        for node, perm, shared in states:
            node.commit_permissions(perm, shared)

    def _of(self, edge: Edge) -> tuple[Perm, Perm]:
        return self.planned.get(edge, (edge.perm, edge.shared))

    def _plan(self, node: Node) -> tuple[Perm, Perm]:
        """Checks the users of a node against one another and plans the edges to its children."""
        perm, shared = Perm.NONE, Perm.ALL
        for edge in node.parents:
            needs, lets = self._of(edge)
            perm, shared = perm | needs, shared & lets
        self._check_conflicts(node)
        if node.read_only and perm & (Perm.WRITE | Perm.WRITE_UNCHANGED):
            raise node.error("Block node is read-only")
        for edge in node.children.values():
            needs, lets = edge.wanted(perm, shared)
            self.planned[edge] = needs, Perm.ALL if edge.node.settings.force_share else lets
        return perm, shared

    def _check_conflicts(self, node: Node) -> None:
        for a in node.parents:
            for b in node.parents:
                refused = self._of(b)[0] & ~self._of(a)[1]
                if a is not b and refused:
                    raise conflict(a, b, refused)


def _prepare(states: list[tuple[Node, Perm, Perm]]) -> None:
    prepared: list[Node] = []
    try:
        for node, perm, shared in states:
            node.prepare_permissions(perm, shared)
            prepared.append(node)
    except BaseException:
        for node in prepared:
            node.commit_permissions(*cumulative(node))
        raise


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
        f" required by {b.user} (uses node '{name}' as '{b.role}' child) and unshared"
        f" by {a.user} (uses node '{name}' as '{a.role}' child)."
    )


def _topological(top: Node) -> list[Node]:
    """top and all nodes below it, every parent before its children."""
    order: list[Node] = []
    seen: set[Node] = set()

    def visit(node: Node) -> None:
        if node not in seen:
            seen.add(node)
            for edge in node.children.values():
                visit(edge.node)
            order.append(node)

    visit(top)
    return order[::-1]
