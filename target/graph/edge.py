# SPDX-License-Identifier: Apache-2.0
"""Edges of the graph: from a parent's role, or from a user such as an export, to a node."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from target.graph.permissions import Perm

if TYPE_CHECKING:
    from target.datapath import Gate, Object
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
        self.frozen = 0  # so many want it to lead to this node and no other

    @property
    def name(self) -> str:
        """The role, as users know it."""
        return self.role if self.parent is None else self.parent.option_of(self.role)

    @property
    def user(self) -> str:
        """Who uses the node, for messages."""
        assert self.parent is not None
        return self.parent.label

    @property
    def leaving(self) -> bool:
        """Whether the user is about to go: it is in nobody's way."""
        return self.parent is not None and self.parent.leaving

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

    def relink(self, old: Object, new: Object) -> None:
        """The node has another datapath object, or another node has taken its place."""
        assert self.parent is not None
        self.parent.relink(self.role, old, new)


class RootEdge(Edge):
    """Use of a node by an export, a job, or another user outside the graph.

    ``gate`` is the datapath object that requests of the user enter through.
    """

    def __init__(self, user: str, node: Node, perm: Perm, shared: Perm) -> None:
        super().__init__(None, "root", node, (perm, shared))
        self._user = user
        self.gate: Gate
        self.on_resize: Callable[[int], None] | None = None
        self.allow_inactive = False  # the user does not mind that the node is inactive
        self.given_up = False  # in this change, by a user who goes by itself when it can
        self._holds = 0
        self._drained: asyncio.Future[int]

    @property
    def user(self) -> str:
        return self._user

    @property
    def leaving(self) -> bool:
        return self.given_up

    async def hold(self, deadline: float | None = None) -> None:
        """Holds new requests until ``let_go``; returns when none is left inside. Several may hold.

        TimeoutError after ``deadline`` seconds; then it is as if it had not been called.
        """
        self._holds += 1
        if self._holds == 1:
            self._drained = self.gate.start_drain()
        try:
            async with asyncio.timeout(deadline):
                await asyncio.shield(self._drained)
        except BaseException:
            self.let_go()
            raise

    def let_go(self) -> None:
        """The last one to let go lets requests go on."""
        self._holds -= 1
        if self._holds == 0:
            self._drained.cancel()
            self.gate.resume()

    def relink(self, old: Object, new: Object) -> None:
        self.gate.set_child(0, new if self.node.active else self.node.front)

    def resized(self) -> None:
        """The user is told when the change is made: it does not see a size that is taken back."""
        self.node.graph.tell_size(self)

    def take_size(self) -> None:
        """Tells the user the size that the node has now."""
        size = self.node.size
        self.gate.size = size
        if self.on_resize is not None:
            self.on_resize(size)
