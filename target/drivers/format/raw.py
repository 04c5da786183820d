# SPDX-License-Identifier: Apache-2.0
"""raw: the child's bytes as they are, or a window of them (``offset``, ``size``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import UNSET, UnsetType

from target.config.options import Size
from target.datapath import Object
from target.graph import permissions
from target.graph.describe import Description
from target.graph.edge import Edge
from target.graph.node import BlockdevRef, ImageOptions, Node, NodeOptions, Settings
from target.graph.permissions import Perm

if TYPE_CHECKING:
    from target.graph.change import Change

SECTOR = 512
OPEN_END = 1 << 62


class Raw(Node, driver="raw"):
    """Without ``size`` it ends where the child ends, and follows its size."""

    class Options(NodeOptions):
        file: BlockdevRef
        offset: Size = 0
        size: Size | UnsetType = UNSET

    options: Options
    reopenable = frozenset({"offset", "size"})
    may_be_inactive = True

    CreateOptions = ImageOptions

    @classmethod
    async def create(cls, options: ImageOptions) -> None:
        """An empty file of that size, without blocks."""
        with open(options.filename, "xb") as file:
            file.truncate(options.size)

    async def open(self) -> None:
        child = await self.attach("file", self.options.file)
        self.features = child.features
        self._check_window()

    def _check_window(self) -> None:
        offset, size, real = self.options.offset, self.options.size, self.children["file"].node.size
        if offset > real:
            raise self.error(f"Offset ({offset}) cannot be greater than size of the containing file ({real})")
        if size is UNSET:
            return
        if size % SECTOR:
            raise self.error(f"Specified size is not multiple of {SECTOR}")
        if size > real - offset:
            raise self.error(
                f"The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the"
                f" actual size of the containing file ({real})"
            )

    def make_object(self) -> Object:
        # Without a size the window has no end of its own: a format above may grow the child by writing.
        size = OPEN_END if self.options.size is UNSET else self.options.size
        return self.datapath.window(self.children["file"].node.object, self.options.offset, size)

    @property
    def size(self) -> int:
        size = self.options.size
        return max(self.children["file"].node.size - self.options.offset, 0) if size is UNSET else size

    def describe(self) -> Description:
        return self.describe_like(self.children["file"].node)

    def relink(self, role: str, old: Object | None, new: Object | None) -> None:
        super().relink(role, old, new)
        self.features = self.children["file"].node.features

    async def reopen(self, change: Change, options: NodeOptions, settings: Settings) -> None:
        before = self.options.offset, self.options.size
        change.undo(self.resized)
        await super().reopen(change, options, settings)
        if (self.options.offset, self.options.size) != before:
            self._check_window()
            await change.replace_object(self, self.make_object())
            self.resized()

    def child_permissions(self, role: str, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        perm, shared = permissions.for_filter(perm, shared)
        if self.options.offset or self.options.size is not UNSET:
            shared &= ~Perm.RESIZE
            if Perm.WRITE_UNCHANGED in perm:
                perm |= Perm.WRITE
        return perm, shared

    def child_resized(self, edge: Edge) -> None:
        if self.options.size is UNSET:
            self.resized()

    async def resize(self, change: Change, size: int) -> None:
        await self._resizable().resize(change, size + self.options.offset)

    async def truncate(self, size: int) -> None:
        await self._resizable().truncate(size + self.options.offset)

    def _resizable(self) -> Node:
        if self.options.size is not UNSET:
            raise self.error("Cannot resize fixed-size raw disks")
        return self.children["file"].node
