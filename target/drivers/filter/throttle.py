# SPDX-License-Identifier: Apache-2.0
"""throttle: lets requests through as fast as a throttle-group permits, which several nodes may share.

Requests pass in the datapath. Reads count as reads; writes, zeroes and discards as writes; flushes and
questions about allocation pass freely, and a drain lets all go that waits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from target.datapath import Object, lib
from target.datapath.throttle import Throttle, make_throttle
from target.graph.edge import Edge
from target.graph.node import BlockdevRef, Node, NodeOptions, Settings
from target.graph.permissions import Perm
from target.throttle_group import ThrottleGroup

if TYPE_CHECKING:
    from target.graph.change import Change

MAX_NESTED: int = lib.BT_THROTTLE_MAX_NESTED


def throttles_below(node: Node) -> int:
    """The most that a request meets below the node."""
    below = (edge.node for edge in node.children.values())
    return max((throttles_below(child) + isinstance(child, ThrottleNode) for child in below), default=0)


def throttles_above(node: Node) -> int:
    """The same above it."""
    above = (edge.parent for edge in node.parents if edge.parent is not None)
    return max((throttles_above(parent) + isinstance(parent, ThrottleNode) for parent in above), default=0)


class ThrottleNode(Node, driver="throttle"):
    """A member of ``throttle-group``, in front of ``file``."""

    class Options(NodeOptions):
        throttle_group: str
        file: BlockdevRef

    is_filter = True
    reopenable = frozenset({"throttle-group"})
    options: Options
    group: ThrottleGroup | None = None
    object: Throttle

    async def open(self) -> None:
        child = await self.attach("file", self.options.file)
        self.features = child.features
        self._check_nesting()
        self._use(self._find_group(self.options.throttle_group))

    def _check_nesting(self) -> None:
        if throttles_above(self) + throttles_below(self) >= MAX_NESTED:
            raise self.error(f"there are more than {MAX_NESTED} throttle nodes on one way")

    def prepare_permissions(self, perm: Perm, shared: Perm) -> None:
        """Also called where another node has come above or below."""
        self._check_nesting()

    def _use(self, group: ThrottleGroup) -> None:
        group.users += 1
        if self.group is not None:
            self.group.users -= 1
        self.group = group

    async def reopen(self, change: Change, options: NodeOptions, settings: Settings) -> None:
        assert isinstance(options, ThrottleNode.Options) and self.group is not None
        before, group = self.group, self._find_group(options.throttle_group)
        self._move(group)
        change.undo(lambda: self._move(before))
        await super().reopen(change, options, settings)

    def _move(self, group: ThrottleGroup) -> None:
        self.object.move(group.group)
        self._use(group)

    async def close(self) -> None:
        if self.group is not None:
            self.group.users -= 1

    def _find_group(self, name: str) -> ThrottleGroup:
        found = self.graph.objects.get(name)
        if not isinstance(found, ThrottleGroup):
            raise self.error(f"Throttle group '{name}' does not exist")
        return found

    def make_object(self) -> Object:
        assert self.group is not None
        return make_throttle(self.datapath, self.children["file"].node.object, self.group.group)

    @property
    def size(self) -> int:
        return self.children["file"].node.size

    async def truncate(self, size: int) -> None:
        await self.children["file"].node.truncate(size)

    def child_resized(self, edge: Edge) -> None:
        self.resized()

    def counters(self) -> dict[str, Any]:
        return super().counters() | {"throttled": self.object.waited}
