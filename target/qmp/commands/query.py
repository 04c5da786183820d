# SPDX-License-Identifier: Apache-2.0
"""Queries about nodes, their traffic, their users and the exports. They change nothing."""

from __future__ import annotations

import msgspec

from target.qmp.answers import edges, nodes, traffic
from target.qmp.answers.exports import BlockExportInfo, export_info
from target.qmp.registry import Answer, Arguments, Context, command


class QueryNamedBlockNodes(Arguments):
    flat: bool = False


@command("query-named-block-nodes", QueryNamedBlockNodes, returns=list[nodes.BlockDeviceInfo])
async def query_named_block_nodes(
    context: Context, given: QueryNamedBlockNodes
) -> list[nodes.BlockDeviceInfo]:
    """All nodes; those made for an option of another node have a name of the target's making."""
    return await nodes.named_nodes(context.service.graph, given.flat)


class BlockInfo(Answer, kw_only=True):
    """A device of a guest. There are none here."""

    device: str
    qdev: str | None = None
    type: str
    removable: bool
    locked: bool
    inserted: nodes.BlockDeviceInfo | None = None
    tray_open: bool | None = msgspec.field(name="tray_open", default=None)
    io_status: str | None = None


@command("query-block", returns=list[BlockInfo])
async def query_block(context: Context, given: None) -> list[BlockInfo]:
    """Devices of a guest: nothing, as in qemu-storage-daemon."""
    return []


class QueryBlockstats(Arguments):
    query_nodes: bool = False


@command("query-blockstats", QueryBlockstats, returns=list[traffic.BlockStats])
async def query_blockstats(context: Context, given: QueryBlockstats) -> list[traffic.BlockStats]:
    """The counters of all nodes; without ``query-nodes`` those of devices, which there are not."""
    return traffic.node_stats(context.service.graph) if given.query_nodes else []


@command("query-block-exports", returns=list[BlockExportInfo])
async def query_block_exports(context: Context, given: None) -> list[BlockExportInfo]:
    """The exports, the newest first, and those that are going away."""
    service = context.service
    found = [*reversed(service.exports.values()), *service.leaving]
    return [export_info(export) for export in found]


@command("x-debug-query-block-graph", returns=edges.XDbgBlockGraph)
async def query_block_graph(context: Context, given: None) -> edges.XDbgBlockGraph:
    """The graph with the permissions of each edge."""
    return edges.block_graph(context.service.graph)
