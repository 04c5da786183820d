# SPDX-License-Identifier: Apache-2.0
"""A graph as a value, to tell whether something has changed."""

from __future__ import annotations

from typing import Any

from target.graph.graph import Graph


def shape(graph: Graph, *, identity: bool = True) -> dict[str, Any]:
    """All that a change may touch, for comparing. identity: the objects of the datapath are the same, too."""
    return {
        name: {
            "children": {
                role: (edge.node.name, edge.perm, edge.shared) for role, edge in node.children.items()
            },
            "parents": sorted(
                (edge.user, edge.role, str(edge.perm), str(edge.shared)) for edge in node.parents
            ),
            "owned": node.owned,
            "options": node.options,
            "settings": node.settings,
            "read_only": node.read_only,
            "size": node.size,
            "object": node.object if identity else type(node.object),
        }
        for name, node in graph.nodes.items()
    }
