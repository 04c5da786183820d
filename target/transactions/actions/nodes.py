# SPDX-License-Identifier: Apache-2.0
"""Actions on nodes: add, remove, reopen, resize, children of a node that takes several."""

from __future__ import annotations

from msgspec import UNSET, UnsetType

from target.config.parse import parse_blockdev
from target.declarative.state import describe
from target.graph.change.walk import refuse_backing
from target.graph.edge import Edge
from target.graph.errors import BlockError
from target.graph.options import BlockdevRef
from target.qmp.registry import Arguments
from target.qmp.types import BLOCKDEV_OPTIONS, BlockdevOptions
from target.transactions.action import Action


class BlockdevAdd(Action, type="blockdev-add"):
    """Opens a node."""

    Data = BLOCKDEV_OPTIONS
    data: BlockdevRef

    async def prepare(self) -> None:
        await self.change.add(self.data)


class BlockdevDel(Action, type="blockdev-del"):
    """Takes a node out; it is closed when all has succeeded.

    ``x-now`` (our own): before, so that a later action can open its file; undone by opening it again.
    """

    class Data(Arguments):
        node_name: str
        x_now: bool = False

    data: Data

    async def prepare(self) -> None:
        name = self.data.node_name
        node = self.graph.nodes.get(name)
        if self.data.x_now and node is not None:
            await self.change.remove_now(name, parse_blockdev({**describe(node), "node-name": name}))
        else:
            self.change.remove(name)


class BlockdevReopen(Action, type="blockdev-reopen"):
    """New options for nodes."""

    class Data(Arguments):
        options: list[BlockdevOptions]

    data: Data

    async def prepare(self) -> None:
        await self.change.reopen([given.value for given in self.data.options])


class BlockResize(Action, type="block_resize"):
    """A new size in bytes for a node."""

    class Data(Arguments):
        size: int
        device: str | UnsetType = UNSET
        node_name: str | UnsetType = UNSET

    data: Data

    async def prepare(self) -> None:
        node = self.graph.lookup(self.data.device, self.data.node_name)
        if self.data.size < 0:
            raise BlockError("Parameter 'size' expects a >0 size")
        refuse_backing(node)
        await self.change.resize(node, self.data.size)


class BlockdevChange(Action, type="x-blockdev-change"):
    """A child that comes to a node, or one that leaves it."""

    class Data(Arguments):
        parent: str
        child: str | UnsetType = UNSET
        node: str | UnsetType = UNSET

    data: Data

    async def prepare(self) -> None:
        parent = self.graph.lookup(self.data.parent, self.data.parent)
        given = [name for name in (self.data.child, self.data.node) if name is not UNSET]
        if len(given) == 2:
            raise BlockError("The parameters child and node are in conflict")
        if not given:
            raise BlockError("Either child or node must be specified")
        if self.data.child is not UNSET:
            edge = parent.children.get(self.data.child)
            if edge is None:
                raise BlockError(f"Node '{parent.name}' does not have child '{self.data.child}'")
            await parent.remove_child(self.change, edge)
        elif self.data.node is not UNSET:
            node = self.graph.nodes.get(self.data.node)
            if node is None:
                raise BlockError(f"Node '{self.data.node}' not found")
            await parent.add_child(self.change, node)


class BlockdevReplace(Action, type="x-blockdev-replace"):
    """Another node for an export, or for a node's child in that role. Our own, as QEMU's blockdev-replace."""

    class Data(Arguments):
        new_child: str
        export: str | UnsetType = UNSET
        parent: str | UnsetType = UNSET
        child: str | UnsetType = UNSET

    data: Data

    async def prepare(self) -> None:
        node = self.graph.lookup(self.data.new_child, self.data.new_child)
        await self.change.replace(self._edge(), node)

    def _edge(self) -> Edge:
        data = self.data
        if data.export is not UNSET and data.parent is UNSET and data.child is UNSET:
            if data.export not in self.service.exports:
                raise BlockError(f"Export '{data.export}' is not found")
            return self.service.exports[data.export].edge
        if data.export is UNSET and data.parent is not UNSET and data.child is not UNSET:
            parent = self.graph.lookup(data.parent, data.parent)
            if data.child not in parent.children:
                raise BlockError(f"Node '{parent.name}' does not have child '{data.child}'")
            return parent.children[data.child]
        raise BlockError("Either export, or parent and child must be specified")
