# SPDX-License-Identifier: Apache-2.0
"""Finds nodes by what commands name them by."""

from __future__ import annotations

from target.graph.errors import BlockError
from target.graph.graph import Graph
from target.graph.node import Node


def lookup(graph: Graph, device: str | None, node_name: str | None) -> Node:
    """A node by name. ``device`` names a guest's disk, of which there are none here: it finds nothing."""
    node = graph.nodes.get(node_name or "")
    if node is None:
        raise BlockError(f"Cannot find device='{device or ''}' nor node-name='{node_name or ''}'")
    return node


def named_node(graph: Graph, name: str) -> Node:
    """A node by name, where only nodes are meant."""
    node = graph.nodes.get(name)
    if node is None:
        raise BlockError(f"Failed to find node with node-name='{name}'")
    return node
