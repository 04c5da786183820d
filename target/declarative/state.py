# SPDX-License-Identifier: Apache-2.0
"""Objects, nodes, NBD servers and exports as entries of a configuration file, without what is a default.

What runs and what a file asks for come in the same form, so that they can be compared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import NODEFAULT, UNSET

from target.config.options import Notation, OptionError, subject
from target.config.parse import parse_blockdev, parse_export, parse_image, parse_nbd_server, parse_object
from target.graph.options import BlockdevRef, CacheOptions, Settings

if TYPE_CHECKING:
    from target.graph.edge import Edge
    from target.graph.node import Node
    from target.service import Service

Entry = dict[str, Any]


class State(msgspec.Struct, kw_only=True):
    """Entries by what identifies them (id, node name, address), in the order in which they can be made."""

    objects: dict[str, Entry] = msgspec.field(default_factory=dict)
    images: list[Entry] = msgspec.field(default_factory=list)
    blockdevs: dict[str, Entry] = msgspec.field(default_factory=dict)
    nbd_servers: dict[str, Entry] = msgspec.field(default_factory=dict)
    exports: dict[str, Entry] = msgspec.field(default_factory=dict)

    def config(self) -> dict[str, list[Entry]]:
        """As a configuration file; lists that are empty are left out."""
        lists = {
            "objects": list(self.objects.values()),
            "images": self.images,
            "blockdevs": list(self.blockdevs.values()),
            "nbd-servers": list(self.nbd_servers.values()),
            "exports": list(self.exports.values()),
        }
        return {name: entries for name, entries in lists.items() if entries}


# ---- what runs ----


class View(msgspec.Struct, frozen=True, kw_only=True):
    """How what runs is written down. Nodes are a part of their parent's options when they were opened for it
    and have no other user, or where ``inside`` says so, unless ``apart`` does."""

    saved: bool = False  # for a file, in which a name that was made up for a node cannot stand
    inside: frozenset[str] = frozenset()
    apart: frozenset[str] = frozenset()

    def name(self, node: Node) -> str:
        return file_name(node) if self.saved else node.name

    def is_inline(self, edge: Edge) -> bool:
        child = edge.node
        if child.opener is not edge or child.owned or edge not in child.parents or child.name in self.apart:
            return False
        return len(child.parents) == 1 or child.name in self.inside


AS_IT_IS = View()
SAVED = View(saved=True)


def running(service: Service, view: View = SAVED) -> State:
    """What runs now."""
    state = State()
    for id, item in service.objects.items():
        state.objects[id] = {"qom-type": item.type, **encode(item.options)}
    for node in _top_nodes(service, view):
        state.blockdevs[view.name(node)] = _with_name(node, view)
    for server in service.nbd_servers:
        entry = encode(server.options)
        state.nbd_servers[address(entry)] = entry
    for id, export in service.exports.items():
        node_name = view.name(export.edge.node)
        state.exports[id] = {"type": export.type, **encode(export.options), "node-name": node_name}
    return state


def file_name(node: Node) -> str:
    """The node's name in a file: one that was made up for it cannot stand there."""
    name = node.name.replace("#", "auto-")
    while name != node.name and name in node.graph.nodes:
        name = f"auto-{name}"
    return name


def _top_nodes(service: Service, view: View) -> list[Node]:
    """The nodes that have an entry of their own, children before parents."""
    order: list[Node] = []

    def visit(node: Node) -> None:
        for edge in node.children.values():
            visit(edge.node)
        inside = node.opener is not None and view.is_inline(node.opener)
        if node not in order and not inside:
            order.append(node)

    for node in service.graph.nodes.values():
        visit(node)
    return order


def _with_name(node: Node, view: View) -> Entry:
    entry = describe(node, view)
    if node.opener is not None:  # it has inherited what it has to say for itself now
        entry |= generic(node.settings)
    return {"driver": entry.pop("driver"), **entry, "node-name": view.name(node)}


def generic(settings: Settings) -> Entry:
    """The generic options in force, which a node may have from its parent."""
    return {
        "read-only": settings.read_only,
        "auto-read-only": settings.auto_read_only,
        "force-share": settings.force_share,
        "discard": settings.discard,
        "cache": encode(CacheOptions(direct=settings.direct, no_flush=settings.no_flush)),
    }


def describe(node: Node, view: View = AS_IT_IS, parent: Node | None = None) -> Entry:
    """The options of a node as they are now, with those of its inline children.

    ``parent``: whose inline child it is, and from whom it has what is not given.
    """
    entry: Entry = {"driver": node.driver, **encode(node.options)}
    if node.active != entry.get("active", parent is None or parent.active):
        entry["active"] = node.active
    for field in msgspec.structs.fields(node.options):
        given = getattr(node.options, field.name)
        if _is_list_of_children(given):
            roles = sorted(node.children, key=lambda role: int(role.rpartition(".")[2]))
            entry[field.encode_name] = [_child(node.children[role], view) for role in roles]
            continue
        edge = node.children.get(node.role_of(field.encode_name))
        if edge is None or not is_child(field.type):
            continue
        if given is UNSET and edge.node.opener is edge:
            continue  # the image's own header names it
        entry[field.encode_name] = _child(edge, view)
    return entry


def _child(edge: Edge, view: View) -> Any:
    return describe(edge.node, view, edge.parent) if view.is_inline(edge) else view.name(edge.node)


def is_child(kind: Any) -> bool:
    """Whether an option of this type names a child, or describes one."""
    return kind is BlockdevRef or BlockdevRef in getattr(kind, "__args__", ())


def _is_list_of_children(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, BlockdevRef) for item in value)


# ---- what a file asks for ----


def desired(lists: dict[str, list[Any]]) -> State:
    """The state that a file describes (see yaml_file). OptionError names the entry that is wrong."""
    state = State()
    parts = {
        "objects": _add_object,
        "images": _add_image,
        "blockdevs": _add_blockdev,
        "nbd-servers": _add_server,
        "exports": _add_export,
    }
    for name, add in parts.items():
        for i, value in enumerate(lists.get(name, ())):
            try:
                add(state, value)
            except OptionError as error:
                raise OptionError(f"{name}[{i}]: {subject(value)}{error}") from None
    return state


def _add_object(state: State, value: Any) -> None:
    kind, options = parse_object(value, Notation.YAML)
    _put(state.objects, options.id, {"qom-type": kind.type, **encode(options)})


def _add_image(state: State, value: Any) -> None:
    parse_image(value, Notation.YAML)
    state.images.append(value)


def _add_blockdev(state: State, value: Any) -> None:
    ref = parse_blockdev(value, Notation.YAML)
    assert ref.options is not None
    if ref.options.node_name is None:
        raise OptionError("'node-name' must be specified for the root node")
    _put(state.blockdevs, ref.options.node_name, encode_ref(ref))


def _add_server(state: State, value: Any) -> None:
    entry = encode(parse_nbd_server(value, Notation.YAML))
    _put(state.nbd_servers, address(entry), entry)


def _add_export(state: State, value: Any) -> None:
    kind, options = parse_export(value, Notation.YAML)
    _put(state.exports, options.id, {"type": kind.type, **encode(options)})


def _put(entries: dict[str, Entry], key: str, entry: Entry) -> None:
    if key in entries:
        raise OptionError(f"'{key}' is there twice")
    entries[key] = entry


# ---- options as plain values ----


def encode(options: msgspec.Struct) -> Entry:
    """The members that differ from their defaults."""
    entry: Entry = {}
    for field in msgspec.structs.fields(options):
        value = getattr(options, field.name)
        default = field.default
        if field.default_factory is not NODEFAULT:
            default = field.default_factory()
        if value is not UNSET and value != default:
            entry[field.encode_name] = msgspec.to_builtins(value, enc_hook=encode_ref)
    return entry


def encode_ref(ref: Any) -> Any:
    """A child: a name, or its options."""
    assert isinstance(ref, BlockdevRef)
    if ref.name is not None:
        return ref.name
    assert ref.options is not None
    return {"driver": ref.driver, **encode(ref.options)}


def address(server: Entry) -> str:
    """What tells NBD servers apart."""
    return msgspec.json.encode(server["addr"], order="sorted").decode()
