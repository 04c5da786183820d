# SPDX-License-Identifier: Apache-2.0
"""Nodes are made inactive, for another process to take their images over, and active again."""

from __future__ import annotations

from msgspec import UNSET, UnsetType

from target.graph.activity import activate, inactivate
from target.graph.errors import BlockError
from target.qmp.registry import Arguments, Context, command


class BlockdevSetActive(Arguments):
    """Without ``node-name``: all nodes."""

    active: bool
    node_name: str | UnsetType = UNSET


@command("blockdev-set-active", BlockdevSetActive)
async def blockdev_set_active(context: Context, given: BlockdevSetActive) -> None:
    graph = context.service.graph
    async with graph.change() as change:
        if given.node_name is UNSET:
            tops = [node for node in graph.nodes.values() if not any(edge.parent for edge in node.parents)]
        elif given.node_name in graph.nodes:
            tops = [graph.nodes[given.node_name]]
        else:
            raise BlockError(f"Failed to find node with node-name='{given.node_name}'")
        for node in tops:
            await (activate if given.active else inactivate)(change, node)
    change.raise_failure()
