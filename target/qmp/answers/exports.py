# SPDX-License-Identifier: Apache-2.0
"""BlockExportInfo: an export and, of our own, its clients and its traffic."""

from __future__ import annotations

from target.exports.base import Export, ExportClient
from target.qmp.answers.traffic import BlockDeviceStats, device_stats
from target.qmp.registry import Answer


class BlockExportInfo(Answer):
    """``shutting-down``: it takes no new clients, and goes when those there are have gone."""

    id: str
    type: str
    node_name: str
    shutting_down: bool
    x_writable: bool
    x_clients: list[ExportClient]
    x_stats: BlockDeviceStats


def export_info(export: Export) -> BlockExportInfo:
    return BlockExportInfo(
        id=export.options.id,
        type=export.type,
        node_name=export.node.name,
        shutting_down=export.shutting_down,
        x_writable=export.options.writable,
        x_clients=export.clients(),
        x_stats=device_stats(export.edge.gate.counters()),
    )
