# SPDX-License-Identifier: Apache-2.0
"""BlockStats: what has gone through a node, an export, or anything else that counts as the datapath does.

Zeroes count as writes, as in QEMU. Not measured, and 0: times, merging (requests are not merged), requests
refused as invalid (they never come so far), zone appends.
"""

from __future__ import annotations

from typing import Any

import msgspec

from target.graph.describe import BlockStatsSpecific
from target.graph.graph import Graph
from target.graph.node import Node
from target.qmp.registry import Answer


class BlockDeviceTimedStats(Answer, rename=str):
    """Statistics of an interval in seconds. Intervals are options of device models: there are none here."""

    interval_length: int


class BlockDeviceStats(Answer, rename=str):
    """Bytes and operations. ``wr_highest_offset``: the end of the write that went farthest."""

    rd_bytes: int
    wr_bytes: int
    zone_append_bytes: int
    unmap_bytes: int
    rd_operations: int
    wr_operations: int
    zone_append_operations: int
    flush_operations: int
    unmap_operations: int
    rd_total_time_ns: int
    wr_total_time_ns: int
    zone_append_total_time_ns: int
    flush_total_time_ns: int
    unmap_total_time_ns: int
    wr_highest_offset: int
    rd_merged: int
    wr_merged: int
    zone_append_merged: int
    unmap_merged: int
    failed_rd_operations: int
    failed_wr_operations: int
    failed_zone_append_operations: int
    failed_flush_operations: int
    failed_unmap_operations: int
    invalid_rd_operations: int
    invalid_wr_operations: int
    invalid_zone_append_operations: int
    invalid_flush_operations: int
    invalid_unmap_operations: int
    account_invalid: bool
    account_failed: bool
    timed_stats: list[BlockDeviceTimedStats]


class BlockStats(Answer):
    """A node. ``parent``, in spite of its name, lies below: a format's file, what a filter filters."""

    node_name: str
    stats: BlockDeviceStats
    driver_specific: BlockStatsSpecific | None = None
    parent: BlockStats | None = None


_OPERATIONS = {"rd": ("read",), "wr": ("write", "zeroes"), "flush": ("flush",), "unmap": ("discard",)}
_NOTHING: dict[str, Any] = {
    **dict.fromkeys(BlockDeviceStats.__struct_fields__, 0),
    "account_invalid": False,
    "account_failed": False,
    "timed_stats": [],
}


def device_stats(counters: dict[str, Any]) -> BlockDeviceStats:
    """From ``Object.counters()``."""
    found = dict(_NOTHING, wr_highest_offset=counters["written_end"])
    for name, operations in _OPERATIONS.items():
        failed = sum(counters["failed"][op] for op in operations)
        found[f"{name}_operations"] = sum(counters["requests"][op] for op in operations) - failed
        found[f"failed_{name}_operations"] = failed
        if name != "flush":
            transferred = sum(counters["bytes"][op] - counters["failed_bytes"][op] for op in operations)
            found[f"{name}_bytes"] = transferred
    return msgspec.convert(found, BlockDeviceStats)


def node_stats(graph: Graph) -> list[BlockStats]:
    """All nodes, the oldest first, each with those below it."""
    made: dict[Node, BlockStats] = {}
    return [_stats(node, made) for node in graph.nodes.values() if node.opened]


def _stats(node: Node, made: dict[Node, BlockStats]) -> BlockStats:
    if node not in made:
        edge = node.children.get("file")
        made[node] = BlockStats(
            node_name=node.name,
            stats=device_stats(node.counters()),
            driver_specific=node.driver_statistics(),
            parent=None if edge is None else _stats(edge.node, made),
        )
    return made[node]
