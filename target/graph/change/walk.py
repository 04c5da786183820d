# SPDX-License-Identifier: Apache-2.0
"""Edges and nodes of the graph as they are: the smallest steps, and who is above and below whom."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from target.graph.edge import Edge, RootEdge
from target.graph.errors import BlockError
from target.graph.permissions import Perm

if TYPE_CHECKING:
    from target.graph.node import Node


def link(edge: Edge) -> None:
    edge.node.parents.append(edge)
    if edge.parent is not None:
        edge.parent.children[edge.role] = edge


def unlink(edge: Edge) -> None:
    edge.node.parents.remove(edge)
    if edge.parent is not None:
        del edge.parent.children[edge.role]


def nodes_above(nodes: Iterable[Node]) -> list[Node]:
    """These nodes and all that use them."""
    found: dict[Node, None] = {}

    def visit(node: Node) -> None:
        if node not in found:
            found[node] = None
            for edge in node.parents:
                if edge.parent is not None:
                    visit(edge.parent)

    for node in nodes:
        visit(node)
    return list(found)


def nodes_below(top: Node) -> list[Node]:
    """This node and all that it is made of."""
    found: dict[Node, None] = {}

    def visit(node: Node) -> None:
        if node not in found:
            found[node] = None
            for edge in node.children.values():
                visit(edge.node)

    visit(top)
    return list(found)


def nodes_leaving(top: Node) -> list[Node]:
    """top, which nobody uses, and what only it keeps open."""
    leaving = [top]
    for node in leaving:
        for edge in node.children.values():
            child = edge.node
            gone = all(user.parent in leaving for user in child.parents)
            if gone and not child.owned and child not in leaving:
                leaving.append(child)
    return leaving


def size_followers(node: Node) -> list[RootEdge]:
    """Users of a node, of what it is made of or a part of, who follow its size without sharing a resize."""
    users = [edge for used in {*nodes_above([node]), *nodes_below(node)} for edge in used.parents]
    roots = [edge for edge in users if isinstance(edge, RootEdge) and edge.on_resize is not None]
    return [edge for edge in roots if edge.fixed is not None and Perm.RESIZE not in edge.fixed[1]]


def check_frozen(edge: Edge) -> None:
    if edge.frozen and edge.parent is not None:
        ends = f"from '{edge.parent.name}' to '{edge.node.name}'"
        raise BlockError(f"Cannot change frozen '{edge.name}' link {ends}")


def refuse_backing(node: Node) -> None:
    """Refuses what is not done to a node that is behind another, because its data is that one's, too."""
    for edge in node.parents:
        if edge.role == "backing" and edge.parent is not None and not edge.parent.leaving:
            overlay = edge.parent.name
            raise BlockError(f"Node '{node.name}' is busy: node is used as backing hd of '{overlay}'")
