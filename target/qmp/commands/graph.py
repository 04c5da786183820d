# SPDX-License-Identifier: Apache-2.0
"""Single nodes: thresholds for writes, I/O threads. What a transaction can do, too, is in transaction.py."""

from __future__ import annotations

from msgspec import UNSET

from target.config.options import Unsigned
from target.events import Event
from target.graph.errors import BlockError
from target.qmp.answers.nodes import chain
from target.qmp.registry import Arguments, Context, command


class BlockWriteThreshold(Event):
    """A write went ``amount-exceeded`` bytes past the threshold, which is off now."""

    name = "BLOCK_WRITE_THRESHOLD"
    node_name: str
    amount_exceeded: int
    write_threshold: int


class BlockSetWriteThreshold(Arguments):
    node_name: str
    write_threshold: Unsigned


@command("block-set-write-threshold", BlockSetWriteThreshold)
async def block_set_write_threshold(context: Context, given: BlockSetWriteThreshold) -> None:
    """An event tells once of a write that ends behind the threshold (bytes). 0: none."""
    service = context.service
    node = service.graph.nodes.get(given.node_name)
    if node is None:
        raise BlockError(f"Device '{given.node_name}' not found")
    name = node.name

    def exceeded(threshold: int, amount: int) -> None:
        event = BlockWriteThreshold(node_name=name, amount_exceeded=amount, write_threshold=threshold)
        service.events.send(event)

    node.object.on_threshold = exceeded
    node.object.write_threshold = given.write_threshold or None


class ChangeBackingFile(Arguments):
    device: str
    image_node_name: str
    backing_file: str


@command("change-backing-file", ChangeBackingFile)
async def change_backing_file(context: Context, given: ChangeBackingFile) -> None:
    """What an image names as its backing file changes; the nodes stay as they are."""
    graph = context.service.graph
    async with graph.change() as change:
        root = graph.lookup(given.device, given.device)
        if any(edge.parent is not None for edge in root.parents):
            raise BlockError("Need a root block node")
        image = graph.lookup(UNSET, given.image_node_name)
        backing = image.children.get("backing")
        if backing is None:
            raise BlockError("not allowing backing file change on an image without a backing file")
        if image not in chain(root):
            raise BlockError(f"'{given.device}' and image file are not in the same chain")
        if image.read_only:
            raise image.error("Image is read-only")
        await change.drain(image)
        await image.change_backing_file(change, given.backing_file, backing.node.driver)


class BlockdevSetIothread(Arguments):
    """``iothread``: null for the thread of what names none; a list is our own."""

    node_name: str
    iothread: str | list[str] | None
    force: bool = False


@command("x-blockdev-set-iothread", BlockdevSetIothread)
async def blockdev_set_iothread(context: Context, given: BlockdevSetIothread) -> None:
    """What serves the node moves to other threads; its clients notice nothing."""
    await context.service.set_iothread(given.node_name, given.iothread, given.force)
