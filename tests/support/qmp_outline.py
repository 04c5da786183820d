# SPDX-License-Identifier: Apache-2.0
"""What a model knows of a graph, of a program and of itself, to be compared."""

from __future__ import annotations

from typing import Any

from tests.support.qmp_model import Model
from tests.support.qmp_pair import Json
from tests.support.qmp_state import WORDS


def outline(graph: Json) -> Json:
    """Of a program's graph, what the model knows."""
    return {
        "nodes": {name: [node["drv"], node["ro"]] for name, node in graph["nodes"].items()},
        "edges": graph["edges"],
        "exports": {id: export[1] for id, export in graph["exports"].items()},
    }


def outline_of(model: Model) -> Json:
    state = model.state
    edges = [
        ["backend" if use.role == "root" else use.user, use.role, use.node, words(perm), words(shared)]
        for use, (perm, shared) in state.permissions().items()
    ]
    return {
        "nodes": {node.key: [node.driver, node.read_only] for node in state.nodes.values()},
        "edges": sorted(edges),
        "exports": {id: export.node for id, export in state.exports.items()},
    }


def words(perm: int) -> list[str]:
    return sorted(word for bit, word in WORDS.items() if perm & bit)


def differing(a: Any, b: Any, where: str = "") -> str:
    """Where two values differ, one place a line."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted({*a, *b})
        return "".join(differing(a.get(key), b.get(key), f"{where}.{key}") for key in keys)
    return "" if a == b else f"{where}:\n  {a}\n  {b}\n"
