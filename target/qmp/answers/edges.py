# SPDX-License-Identifier: Apache-2.0
"""XDbgBlockGraph: nodes, the users of nodes, and the edges between them with their permissions."""

from __future__ import annotations

from typing import Literal

from target.graph.edge import Edge, RootEdge
from target.graph.graph import Graph
from target.graph.permissions import Perm
from target.qmp.registry import Answer

BlockPermission = Literal["consistent-read", "write", "write-unchanged", "resize"]
_WORDS: dict[Perm, BlockPermission] = {
    Perm.CONSISTENT_READ: "consistent-read",
    Perm.WRITE: "write",
    Perm.WRITE_UNCHANGED: "write-unchanged",
    Perm.RESIZE: "resize",
}


class XDbgBlockGraphNode(Answer):
    """A node, or a user of one outside the graph: an export is a block backend, and has no name."""

    id: int
    type: Literal["block-backend", "block-job", "block-driver"]
    name: str


class XDbgBlockGraphEdge(Answer):
    """``parent`` uses ``child`` as its child ``name``."""

    parent: int
    child: int
    name: str
    perm: list[BlockPermission]
    shared_perm: list[BlockPermission]


class XDbgBlockGraph(Answer):
    nodes: list[XDbgBlockGraphNode]
    edges: list[XDbgBlockGraphEdge]


def block_graph(graph: Graph) -> XDbgBlockGraph:
    """The graph now; ids hold within one answer."""
    nodes: list[XDbgBlockGraphNode] = []
    ids: dict[object, int] = {}

    def number(what: object, type: Literal["block-backend", "block-driver"], name: str) -> None:
        ids[what] = len(ids) + 1
        nodes.append(XDbgBlockGraphNode(id=ids[what], type=type, name=name))

    edges = [edge for node in graph.nodes.values() for edge in node.parents]
    for node in graph.nodes.values():
        number(node, "block-driver", node.name)
    for edge in edges:
        if isinstance(edge, RootEdge):
            number(edge, "block-backend", "")
    return XDbgBlockGraph(nodes=nodes, edges=[_edge(edge, ids) for edge in edges])


def _edge(edge: Edge, ids: dict[object, int]) -> XDbgBlockGraphEdge:
    return XDbgBlockGraphEdge(
        parent=ids[edge if edge.parent is None else edge.parent],
        child=ids[edge.node],
        name=edge.name,
        perm=words(edge.perm),
        shared_perm=words(edge.shared),
    )


def words(perm: Perm) -> list[BlockPermission]:
    return [word for bit, word in _WORDS.items() if bit in perm]
