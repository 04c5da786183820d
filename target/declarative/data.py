# SPDX-License-Identifier: Apache-2.0
"""What data a node shows, told from options: whether clients would notice that another takes its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from target.declarative.state import Entry, State, describe
from target.graph import registry
from target.graph.options import NodeOptions, names_child

if TYPE_CHECKING:
    from target.graph.node import Node

GENERIC = frozenset(NodeOptions.__struct_fields__)
SHOWN = ("file", "image", "test", "children")  # by filters


class Source(NamedTuple):
    """A node that is no filter: which runs, the options that decide what data it has, its children's sources.

    Another node with the same file is another: it would be opened while this one is still in use.
    """

    node: Node | None
    options: Entry
    children: dict[str, list[Source]]


def keeps(new: list[Source], old: list[Source]) -> bool:
    """Whether who reads the new sees what the old had: the same below filters, or an overlay above it.

    From an overlay down to what is behind it is not: what the overlay holds would be missing. Several
    sources are replicas of one another.
    """
    if not old:
        return not new
    return any(_same(a, b) for a in new for b in old) or any(
        keeps(a.children["backing"], old) for a in new if "backing" in a.children
    )


def _same(new: Source, old: Source) -> bool:
    return (
        new.node is old.node
        and new.options == old.options
        and new.children.keys() == old.children.keys()
        and all(keeps(new.children[role], old.children[role]) for role in new.children)
    )  # fmt: skip


class Sources:
    """Those of the nodes of a state. ``find``: the node that runs with a name, as that of the file."""

    def __init__(self, state: State, find: Callable[[str], Node | None]) -> None:
        self.find = find
        self.entries = {name: entry for top in state.blockdevs.values() for name, entry in _named(top)}

    def of(self, ref: Any, node: Node | None = None, path: tuple[str, ...] = ()) -> list[Source]:
        """``ref``: a name or options; ``node``: which runs in this place."""
        if ref is None:
            return []
        if isinstance(ref, str):
            if ref in path or ref not in self.entries:
                return [Source(None, {"node-name": ref}, {})]
            return self.of(self.entries[ref], self.find(ref), (*path, ref))
        options = registry.driver(ref["driver"]).Options
        fields = {field.encode_name: field for field in msgspec.structs.fields(options)}
        roles = [name for name, field in fields.items() if names_child(field.type)]
        if registry.is_transparent(ref["driver"]) and not {"offset", "size"} & ref.keys():
            shown = [role for role in roles if role in SHOWN]
            return [source for role in shown for source in self._children(ref, role, node, path)]
        skipped = {name for name, field in fields.items() if field.name in GENERIC}
        skipped |= {
            name for name, field in fields.items() if field.name in registry.driver(ref["driver"]).tuning
        }
        own = {key: value for key, value in ref.items() if key not in skipped and key not in roles}
        return [Source(node, own, {role: self._children(ref, role, node, path) for role in roles})]

    def _children(self, entry: Entry, role: str, node: Node | None, path: tuple[str, ...]) -> list[Source]:
        given = entry.get(role)
        if isinstance(given, list):  # of a quorum
            below = [] if node is None else [edge.node for edge in node.children.values()]
            nodes = [*below, *[None] * len(given)]
            found = [self.of(ref, nodes[i], path) for i, ref in enumerate(given)]
            return (
                found[0] if entry.get("read-pattern") == "fifo" else [each for list in found for each in list]
            )
        edge = None if node is None else node.children.get(node.role_of(role))
        if role in entry:
            return self.of(given, None if edge is None else edge.node, path)
        if edge is not None:  # the image's own header names it
            return self.of(describe(edge.node), edge.node, path)
        unknown = role == "backing" and node is None
        return [Source(None, {"driver": "as the image says"}, {})] if unknown else []


def _named(entry: Entry) -> Iterator[tuple[str, Entry]]:
    """The nodes with a name that an entry describes."""
    if "node-name" in entry:
        yield entry["node-name"], entry
    for value in entry.values():
        for item in value if isinstance(value, list) else (value,):
            if isinstance(item, dict) and "driver" in item:
                yield from _named(item)
