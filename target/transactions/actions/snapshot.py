# SPDX-License-Identifier: Apache-2.0
"""External snapshots: an overlay takes the place of a node, which becomes what is behind it."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, UnsetType

from target.config.parse import parse_blockdev
from target.graph.change import Change
from target.graph.change.walk import refuse_backing
from target.graph.errors import BlockError
from target.graph.node import Node
from target.images import create_overlay
from target.qmp.registry import Arguments
from target.transactions.action import Action


class Snapshot(Action, type="blockdev-snapshot"):
    """The overlay is a node that exists, without a backing node, and nobody uses it."""

    features = ("allow-write-only-overlay",)

    class Data(Arguments):
        node: str
        overlay: str

    data: Data

    async def prepare(self) -> None:
        node = self.graph.lookup(self.data.node, self.data.node)
        refuse_backing(node)
        overlay = self.graph.lookup(self.data.overlay, self.data.overlay)
        await take(self.change, node, overlay)


async def take(change: Change, node: Node, overlay: Node) -> None:
    """Puts the overlay above the node: what is behind it is complete, on disk, and written by nobody."""
    refuse_backing(node)
    _check_overlay(overlay)
    await change.drain(node)
    if not node.read_only:
        try:
            await node.flush()
        except OSError:
            raise BlockError("An IO error has occurred") from None
    edge = await change.attach(overlay, "backing", node)
    await change.replace_node(node, overlay, keep=[edge])
    await change.make_read_only(node)


def _check_overlay(overlay: Node) -> None:
    if overlay.parents:
        users = ", ".join(edge.user for edge in overlay.parents)
        raise BlockError(f"The overlay is already in use: by {users}")
    if "backing" in overlay.children:
        raise BlockError("The overlay already has a backing image")
    if overlay.is_filter:
        raise BlockError("Filters cannot be used as overlays")
    if not overlay.supports_backing:
        raise BlockError("The overlay does not support backing images")


class SnapshotSync(Action, type="blockdev-snapshot-sync"):
    """Makes the overlay's image, or takes one that exists, and opens it."""

    class Data(Arguments):
        snapshot_file: str
        device: str | UnsetType = UNSET
        node_name: str | UnsetType = UNSET
        snapshot_node_name: str | UnsetType = UNSET
        format: str = "qcow2"
        mode: Literal["existing", "absolute-paths"] = "absolute-paths"

    data: Data

    async def prepare(self) -> None:
        data = self.data
        node = self.graph.lookup(data.device, data.node_name)
        refuse_backing(node)
        name = data.snapshot_node_name
        if name is UNSET:
            raise BlockError("New overlay node-name missing")
        if name in self.graph.nodes:
            raise BlockError("New overlay node-name already in use")
        if data.mode == "absolute-paths":
            await create_overlay(self.change, data.format, data.snapshot_file, node)
        await take(self.change, node, await self._open(node, name))

    async def _open(self, node: Node, name: str) -> Node:
        options = {
            "driver": self.data.format,
            "node-name": name,
            "backing": None,
            "read-only": node.read_only,
            "file": {"driver": "file", "filename": self.data.snapshot_file},
            "discard": node.settings.discard,
            "detect-zeroes": node.settings.detect_zeroes,
            "cache": {"direct": node.settings.direct, "no-flush": node.settings.no_flush},
        }
        return await self.change.add(parse_blockdev(options))
