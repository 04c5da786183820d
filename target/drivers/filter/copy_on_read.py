# SPDX-License-Identifier: Apache-2.0
"""copy-on-read: what is read for the first time is copied from the backing chain into the top image.

The datapath does it, whole clusters at a time; once all is there it costs nothing. Where the child has no
table of its own, such as a raw file, all is there from the start.
"""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import UNSET, UnsetType

from target.datapath import Object, ffi, lib
from target.graph.edge import Edge
from target.graph.node import BlockdevRef, Node, NodeOptions
from target.graph.permissions import Perm

PASSED = Perm.CONSISTENT_READ | Perm.WRITE | Perm.RESIZE


class CopyOnRead(Node, driver="copy-on-read"):
    """With ``bottom``, a node of the chain, data from below that one stay where they are."""

    class Options(NodeOptions):
        file: BlockdevRef
        bottom: str | UnsetType = UNSET

    is_filter = True
    copies_by_itself = True
    options: Options

    async def open(self) -> None:
        child = await self.attach("file", self.options.file)
        self.features = child.features
        if self.options.bottom is not UNSET:
            await self._attach_bottom(self.options.bottom)

    async def _attach_bottom(self, name: str) -> None:
        bottom = self.graph.nodes.get(name)
        if bottom is None:
            raise self.error(f"Bottom node '{name}' not found")
        if bottom.is_filter:
            raise self.error(f"Bottom node '{name}' is a filter")
        chain = list(_chain(self))
        if bottom not in (edge.node for edge in chain):
            raise self.error(f"Bottom node '{name}' is not in the backing chain of '{self.name}'")
        await self.attach("bottom", name, perm=Perm.NONE, shared=Perm.ALL)
        self._freeze(1)

    def _freeze(self, by: int) -> None:
        """The way to the bottom stays as it is."""
        bottom = self.children["bottom"].node
        for edge in _chain(self):
            edge.frozen += by
            if edge.node is bottom:
                return

    def make_object(self) -> Object:
        bottom = self.children.get("bottom")
        pointers = (self.children["file"].node.object.ptr, bottom.node.object.ptr if bottom else ffi.NULL)
        made: Object = self.datapath.adopt(lambda tag: lib.bt_cor_new(self.datapath.dp, tag, *pointers))
        return made

    @property
    def size(self) -> int:
        return self.children["file"].node.size

    async def truncate(self, size: int) -> None:
        await self.children["file"].node.truncate(size)

    def child_resized(self, edge: Edge) -> None:
        if edge.role == "file":
            self.resized()

    def child_permissions(self, role: str, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        """It writes what reads the same as before, whoever else uses the child."""
        return perm & PASSED | Perm.WRITE_UNCHANGED, shared & PASSED | Perm.WRITE_UNCHANGED

    async def close(self) -> None:
        if "bottom" in self.children:
            self._freeze(-1)


def _chain(node: Node) -> Iterator[Edge]:
    """The edges from a filter down its backing chain."""
    while True:
        edge = node.children.get("file" if node.is_filter else "backing")
        if edge is None:
            return
        yield edge
        node = edge.node
