# SPDX-License-Identifier: Apache-2.0
"""Edges of the graph: from a parent's role, or from a user such as an export, to a node."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from target.graph.permissions import Perm

if TYPE_CHECKING:
    from target.datapath import Gate
    from target.graph.node import Node


class Edge:
    """Use of ``node`` in ``role``, by ``parent`` or (a root edge) by a user outside the graph.

    ``perm`` and ``shared`` are in force now. ``fixed`` holds them when the parent stated them; without it
    they follow from what the parent's own users need (``Node.child_permissions``).
    """

    def __init__(
        self, parent: Node | None, role: str, node: Node, fixed: tuple[Perm, Perm] | None = None
    ) -> None:
        self.parent = parent
        self.role = role
        self.node = node
        self.fixed = fixed
        self.perm = Perm.NONE
        self.shared = Perm.ALL

    @property
    def user(self) -> str:
        """Who uses the node, for messages."""
        assert self.parent is not None
        return self.parent.label

    def wanted(self, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        """The permissions of this edge when the parent's users together need perm and share shared."""
        if self.fixed is not None:
            return self.fixed
        assert self.parent is not None
        return self.parent.child_permissions(self.role, perm, shared)

    def resized(self) -> None:
        """The node has a new size."""
        assert self.parent is not None
        self.parent.child_resized(self)


class RootEdge(Edge):
    """Use of a node by an export, a job, or another user outside the graph.

    ``gate`` is the datapath object that requests of the user enter through.
    """

    def __init__(self, user: str, node: Node, perm: Perm, shared: Perm) -> None:
        super().__init__(None, "root", node, (perm, shared))
        self._user = user
        self.gate: Gate
        self.on_resize: Callable[[int], None] | None = None

    @property
    def user(self) -> str:
        return self._user

    def resized(self) -> None:
        size = self.node.size
        self.gate.size = size
        if self.on_resize is not None:
            self.on_resize(size)
