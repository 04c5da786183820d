# SPDX-License-Identifier: Apache-2.0
"""BlockDeviceInfo and ImageInfo: a node, its image, and the images below it."""

from __future__ import annotations

import asyncio
import errno

import msgspec

from target.graph.describe import ImageInfoSpecific, SnapshotInfo, filename
from target.graph.edge import Edge
from target.graph.graph import Graph
from target.graph.node import Node
from target.graph.options import DetectZeroes
from target.qmp.registry import Answer


class BlockdevCacheInfo(Answer):
    """A node always has ``writeback``: writing through belongs to its users (an export's writethrough)."""

    writeback: bool
    direct: bool
    no_flush: bool


class BlockdevChild(Answer):
    """A child: its role, and the node that has it."""

    child: str
    node_name: str


class ImageInfo(Answer):
    """An image; sizes in bytes. The backing image is that of the node below, also below a filter."""

    filename: str
    format: str
    virtual_size: int
    actual_size: int | None = None
    dirty_flag: bool | None = None
    cluster_size: int | None = None
    encrypted: bool | None = None
    compressed: bool | None = None
    backing_filename: str | None = None
    full_backing_filename: str | None = None
    backing_filename_format: str | None = None
    snapshots: list[SnapshotInfo] | None = None
    format_specific: ImageInfoSpecific | None = None
    backing_image: ImageInfo | None = None


class BlockDeviceInfo(Answer, rename=str, kw_only=True):
    """A node. The limits (bps, iops) are of devices that throttle by themselves, which nodes do not: 0."""

    file: str
    node_name: str = msgspec.field(name="node-name")
    ro: bool
    drv: str
    backing_file: str | None = None
    backing_file_depth: int
    children: list[BlockdevChild]
    active: bool
    encrypted: bool
    detect_zeroes: DetectZeroes
    bps: int
    bps_rd: int
    bps_wr: int
    iops: int
    iops_rd: int
    iops_wr: int
    image: ImageInfo
    cache: BlockdevCacheInfo
    write_threshold: int


async def named_nodes(graph: Graph, flat: bool) -> list[BlockDeviceInfo]:
    """All nodes, the newest first. flat: without the images below each."""
    sizes = await _allocated_sizes(graph)
    images = _Images(sizes)
    nodes = [node for node in reversed(graph.nodes.values()) if node.opened]
    return [_device_info(node, images, flat) for node in nodes]


async def _allocated_sizes(graph: Graph) -> dict[Node, int | None]:
    """Of the protocol nodes. A file system that hangs holds up this query, and nothing else."""
    nodes = [node for node in graph.nodes.values() if node.is_protocol and node.opened]
    return dict(zip(nodes, await asyncio.gather(*(_allocated(node) for node in nodes)), strict=True))


async def _allocated(node: Node) -> int | None:
    try:
        return await node.allocated_size()
    except OSError as error:
        if error.errno == errno.EBADF:  # closed meanwhile
            return None
        raise


class _Images:
    """ImageInfo of nodes, each made once."""

    def __init__(self, sizes: dict[Node, int | None]) -> None:
        self._sizes = sizes
        self._alone: dict[Node, ImageInfo] = {}
        self._chains: dict[Node, ImageInfo] = {}

    def alone(self, node: Node) -> ImageInfo:
        if node not in self._alone:
            self._alone[node] = self._make(node)
        return self._alone[node]

    def chain(self, node: Node) -> ImageInfo:
        """With the images below it, bottom first, as a chain can be deep."""
        for member in reversed(chain(node)):
            if member not in self._chains:
                below = next_image(member)
                backing = None if below is None else self._chains[below]
                self._chains[member] = msgspec.structs.replace(self.alone(member), backing_image=backing)
        return self._chains[node]

    def _make(self, node: Node) -> ImageInfo:
        found = node.describe()
        return ImageInfo(
            filename=filename(node),
            format=node.driver,
            virtual_size=node.size,
            actual_size=self._actual(node),
            dirty_flag=found.dirty,
            cluster_size=found.cluster_size,
            encrypted=found.encrypted or None,
            backing_filename=found.backing_filename,
            full_backing_filename=found.full_backing_filename,
            backing_filename_format=found.backing_format,
            snapshots=found.snapshots or None,
            format_specific=found.specific,
        )

    def _actual(self, node: Node) -> int | None:
        """The sum of what the node's own files occupy; of a filter, what it filters."""
        if node.is_protocol:
            return self._sizes.get(node)
        below = next_image(node) if node.is_filter else None
        children = (edge.node for role, edge in node.children.items() if role != "backing")
        sizes = [self._actual(child) for child in ([below] if below else children)]
        known = [size for size in sizes if size is not None]
        return sum(known) if known and len(known) == len(sizes) else None


def next_image(node: Node) -> Node | None:
    """What a filter filters, or the backing node of an overlay."""
    edge = node.children.get("file" if node.is_filter else "backing")
    return None if edge is None else edge.node


def chain(node: Node) -> list[Node]:
    """The node and the images below it, the node first."""
    found = [node]
    while (below := next_image(found[-1])) is not None:
        found.append(below)
    return found


def _child(edge: Edge) -> BlockdevChild:
    return BlockdevChild(child=edge.name, node_name=edge.node.name)


def _device_info(node: Node, images: _Images, flat: bool) -> BlockDeviceInfo:
    settings = node.settings
    backing = node.children.get("backing")
    return BlockDeviceInfo(
        file=filename(node),
        node_name=node.name,
        ro=node.read_only,
        drv=node.driver,
        backing_file=None if backing is None else filename(backing.node),
        backing_file_depth=0 if flat else len(chain(node)) - 1,
        children=[_child(edge) for edge in node.children.values()],
        active=node.active,
        encrypted=node.describe().encrypted,
        detect_zeroes=settings.detect_zeroes,
        bps=0,
        bps_rd=0,
        bps_wr=0,
        iops=0,
        iops_rd=0,
        iops_wr=0,
        image=images.alone(node) if flat else images.chain(node),
        cache=BlockdevCacheInfo(writeback=True, direct=settings.direct, no_flush=settings.no_flush),
        write_threshold=node.object.write_threshold or 0,
    )
