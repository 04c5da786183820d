# SPDX-License-Identifier: Apache-2.0
"""What qemu-storage-daemon's graph does, as a model: names, children, permissions, read-only, exports.

A command either changes the state or raises Refused; then nothing has changed. Nodes without a name are known
by the name of the node that they were made for, and their role in it: "disk/file".
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

CR, WRITE, WU, RESIZE = 1, 2, 4, 8
ALL = CR | WRITE | WU | RESIZE
WORDS = {CR: "consistent-read", WRITE: "write", WU: "write-unchanged", RESIZE: "resize"}
NAME = re.compile(r"[A-Za-z][A-Za-z0-9._-]*\Z")
PROTOCOLS = ("file", "null-co")
FILTERS = ("throttle", "copy-on-read")
GENERIC = {"node-name", "driver", "read-only", "discard", "detect-zeroes", "cache"}
BACKING = ("qcow2",)

Options = dict[str, Any]


class Refused(Exception):
    """The command is an error."""


@dataclass
class File:
    """An image. ``backing``: the name in its header."""

    format: str
    size: int
    backing: str | None = None


@dataclass
class MNode:
    """``options`` are those that it was made with, or reopened with."""

    key: str
    driver: str
    options: Options
    read_only: bool
    size: int
    owned: bool = False
    children: dict[str, str] = field(default_factory=dict)
    inline: set[str] = field(default_factory=set)  # roles whose node was made for this one


@dataclass
class MExport:
    node: str
    writable: bool
    name: str


@dataclass(frozen=True)
class Use:
    """An edge: ``user`` is a node's key, or an export."""

    user: str
    role: str
    node: str


@dataclass(frozen=True)
class Policy:
    """Where the two programs differ on purpose; the defaults are the peer's."""

    # A node with NBD clients may get another size: they see it when they connect again.
    nbd_follows_resize: bool = False
    # Two programs, or two nodes, never write one file here, unless locking=off says so.
    one_writer_of_a_file: bool = False


OURS = Policy(nbd_follows_resize=True, one_writer_of_a_file=True)


@dataclass
class State:
    policy: Policy
    nodes: dict[str, MNode] = field(default_factory=dict)
    exports: dict[str, MExport] = field(default_factory=dict)
    files: dict[str, File] = field(default_factory=dict)
    server: bool = False
    resizing: str | None = None  # the node that is given another size now

    # ---- topology ----

    def uses(self) -> Iterator[Use]:
        for node in self.nodes.values():
            for role, child in node.children.items():
                yield Use(node.key, role, child)
        for id, export in self.exports.items():
            yield Use(f"export {id}", "root", export.node)
        if self.resizing is not None:
            yield Use("a resize", "root", self.resizing)

    def users(self, key: str) -> list[Use]:
        return [use for use in self.uses() if use.node == key]

    def below(self, key: str) -> set[str]:
        found = {key}
        for child in self.nodes[key].children.values():
            found |= self.below(child)
        return found

    def order(self) -> list[str]:
        """Parents before children."""
        done: list[str] = []

        def visit(key: str) -> None:
            if key not in done:
                for child in self.nodes[key].children.values():
                    visit(child)
                done.append(key)

        for key in self.nodes:
            visit(key)
        return done[::-1]

    def named(self, name: str) -> MNode:
        node = self.nodes.get(name)
        if node is None or "/" in name:
            raise Refused(f"no node {name}")
        return node

    # ---- permissions ----

    def permissions(self) -> dict[Use, tuple[int, int]]:
        """Of all edges: what is needed, and what is shared. Refused when they conflict."""
        found: dict[Use, tuple[int, int]] = {}
        if self.resizing is not None:
            found[Use("a resize", "root", self.resizing)] = RESIZE, ALL
        for id, export in self.exports.items():
            follows = self.policy.nbd_follows_resize and self.resizing is not None
            shared = ALL if follows else ALL & ~RESIZE
            found[Use(f"export {id}", "root", export.node)] = CR | WRITE * export.writable, shared
        for key in self.order():
            self._check(key, found)
            node = self.nodes[key]
            mine = [found[use] for use in self.users(key)]
            perm, shared = 0, ALL
            for needs, lets in mine:
                perm, shared = perm | needs, shared & lets
            for role, child in node.children.items():
                found[Use(key, role, child)] = self._child(node, role, perm, shared)
        self._check_locks(found)
        return found

    def _check(self, key: str, found: dict[Use, tuple[int, int]]) -> None:
        users = self.users(key)
        for a in users:
            if self.nodes[key].read_only and found[a][0] & (WRITE | WU):
                raise Refused(f"{key} is read-only")
            for b in users:
                if a != b and found[a][0] & ~found[b][1]:
                    raise Refused(f"permission conflict on {key}")

    @staticmethod
    def _child(node: MNode, role: str, perm: int, shared: int) -> tuple[int, int]:
        if role == "backing":
            return perm & CR, (WRITE | RESIZE if shared & WRITE else 0) | CR | WU
        if node.driver == "qcow2":
            return perm | CR | (0 if node.read_only else WRITE | RESIZE), shared & ~(WRITE | RESIZE)
        if node.driver == "copy-on-read":
            return perm | (0 if node.read_only else WU), shared
        if node.driver == "raw" and {"offset", "size"} & set(node.options):
            return perm | (WRITE if perm & WU else 0), shared & ~RESIZE
        return perm, shared

    def _check_locks(self, found: dict[Use, tuple[int, int]]) -> None:
        """Nodes over one file exclude each other as processes do."""
        files = [node for node in self.nodes.values() if node.driver == "file"]
        for a in files:
            for b in files:
                if a is not b and a.options["filename"] == b.options["filename"]:
                    perm, _ = self._cumulative(a.key, found)
                    _, shared = self._cumulative(b.key, found)
                    others, _ = self._cumulative(b.key, found)
                    if self.policy.one_writer_of_a_file and others & WRITE:
                        shared &= ~WRITE
                    if perm & ~shared:
                        raise Refused(f"lock of {a.options['filename']}")

    def _cumulative(self, key: str, found: dict[Use, tuple[int, int]]) -> tuple[int, int]:
        perm, shared = 0, ALL
        for use in self.users(key):
            perm, shared = perm | found[use][0], shared & found[use][1]
        return perm, shared

    # ---- content ----

    def content(self, key: str) -> str:
        """The format of what reading the node gives."""
        node = self.nodes[key]
        if node.driver == "file":
            return self.files[node.options["filename"]].format
        if node.driver in ("raw", *FILTERS) and not node.options.get("offset"):
            return self.content(node.children["file"])
        return "raw"

    def image(self, key: str) -> File:
        """The file that a format's child leads to."""
        node = self.nodes[key]
        return (
            self.files[node.options["filename"]]
            if node.driver == "file"
            else self.image(node.children["file"])
        )


class Model:
    """The state, and commands that change it or raise Refused."""

    def __init__(self, files: dict[str, File], policy: Policy) -> None:
        self.state = State(policy, files=copy.deepcopy(files))
        self._before = self.state

    def run(self, command: str, arguments: Options) -> str | None:
        """Why it is refused, or None."""
        self._before = copy.deepcopy(self.state)
        try:
            getattr(self, command.replace("-", "_"))(**{k.replace("-", "_"): v for k, v in arguments.items()})
            self.state.permissions()
        except Refused as error:
            self.state = self._before
            return str(error)
        return None

    def take_back(self) -> None:
        """As if the last command had not been."""
        self.state = self._before

    # ---- commands ----

    def blockdev_add(self, **given: Any) -> None:
        options = {key.replace("_", "-"): value for key, value in given.items()}
        name = options.get("node-name")
        if name is None:
            raise Refused("no node-name")
        self._open(options, name, read_only=False)
        self.state.nodes[name].owned = True

    def blockdev_del(self, node_name: str) -> None:
        node = self.state.named(node_name)
        if not node.owned or self.state.users(node_name):
            raise Refused("in use")
        node.owned = False
        self._collect(node_name)

    def blockdev_reopen(self, options: list[Options]) -> None:
        for given in options:
            self._reopen(given)
        self._sort_out()

    def block_resize(self, node_name: str, size: int) -> None:
        node = self.state.named(node_name)
        if size < 0:
            raise Refused("size")
        if self._blocked(node_name):
            raise Refused("used as backing node")
        self.state.resizing = node_name
        self.state.permissions()
        self.state.resizing = None
        if node.read_only:
            raise Refused("read-only")
        self._resize(node_name, size)

    def nbd_server_start(self) -> None:
        if self.state.server:
            raise Refused("running")
        self.state.server = True

    def nbd_server_stop(self) -> None:
        if not self.state.server:
            raise Refused("not running")
        self.state.server = False
        for id in list(self.state.exports):
            self._remove_export(id)

    def block_export_add(
        self, id: str, node_name: str, type: str = "nbd", name: str | None = None, writable: bool = False
    ) -> None:
        state = self.state
        node = state.named(node_name)
        name = node_name if name is None else name
        if not NAME.match(id) or id in state.exports or not state.server:
            raise Refused("id")
        if any(export.name == name for export in state.exports.values()):
            raise Refused("name")
        if writable and node.read_only:
            raise Refused("read-only")
        state.exports[id] = MExport(node_name, writable, name)

    def nbd_server_add(self, device: str, name: str | None = None, writable: bool = False) -> None:
        node = self.state.named(device)
        name = device if name is None else name
        self.block_export_add(name, device, "nbd", name, writable and not node.read_only)

    def block_export_del(self, id: str, mode: str = "safe") -> None:
        if id not in self.state.exports:
            raise Refused("no such export")
        self._remove_export(id)

    def nbd_server_remove(self, name: str, mode: str = "safe") -> None:
        self.block_export_del(name)

    def blockdev_snapshot(self, node: str, overlay: str) -> None:
        state = self.state
        old, new = state.named(node), state.named(overlay)
        if self._blocked(node):
            raise Refused("busy")
        if state.users(overlay) or self._blocked(overlay):
            raise Refused("the overlay is in use")
        if "backing" in new.children or new.driver not in BACKING:
            raise Refused("the overlay cannot have a backing node")
        if node in state.below(overlay):
            raise Refused("cycle")
        for use in state.users(node):
            if use.user.startswith("export "):
                state.exports[use.user.removeprefix("export ")].node = overlay
            else:
                state.nodes[use.user].children[use.role] = overlay
                state.nodes[use.user].inline.discard(use.role)
        new.children["backing"] = node
        self._set_read_only(old, True)
        self._sort_out()

    def block_set_write_threshold(self, node_name: str, write_threshold: int) -> None:
        self.state.named(node_name)

    # ---- opening ----

    def _open(self, options: Options, key: str, read_only: bool) -> None:
        state = self.state
        name = options.get("node-name")
        if name is not None and (not NAME.match(name) or name in state.nodes or len(name) > 31):
            raise Refused("name")
        if key in state.nodes:
            raise Refused("name")
        driver = options["driver"]
        if options.get("detect-zeroes") == "unmap" and options.get("discard") != "unmap":
            raise Refused("detect-zeroes")
        node = MNode(key, driver, dict(options), options.get("read-only", read_only), 0)
        for role in ("file", "backing"):
            if options.get(role) is not None:
                self._open_child(node, role, options[role])
        state.nodes[key] = node
        node.size = self._size(node)
        if driver == "qcow2" and state.content(node.children["file"]) != "qcow2":
            raise Refused("not qcow2")
        if driver == "qcow2" and "backing" not in options and (backing := state.image(key).backing):
            below = {"driver": "qcow2", "file": {"driver": "file", "filename": backing}}
            self._open_child(node, "backing", below)
        node.size = self._size(node)

    def _open_child(self, node: MNode, role: str, given: str | Options) -> None:
        if isinstance(given, str):
            if given not in self.state.nodes or "/" in given or given == node.key:
                raise Refused(f"no node {given}")
            node.children[role] = given
            return
        key = given.get("node-name") or f"{node.key}/{role}"
        self._open(given, key, True if role == "backing" else node.read_only)
        node.children[role] = key
        node.inline.add(role)

    def _size(self, node: MNode) -> int:
        state = self.state
        if node.driver == "file":
            name = node.options["filename"]
            if name not in state.files:
                raise Refused("no such file")
            return state.files[name].size if state.files[name].format == "raw" else 0
        if node.driver == "null-co":
            return int(node.options.get("size", 1 << 30))
        if node.driver == "qcow2":
            return 0 if node.key not in state.nodes else self._image_size(node)
        child = state.nodes[node.children["file"]]
        if node.driver != "raw":
            return child.size
        offset, size = node.options.get("offset", 0), node.options.get("size")
        if state.content(child.key) != "qcow2" and (
            offset > child.size or (size is not None and (size % 512 or size > child.size - offset))
        ):
            raise Refused("window")
        return child.size - offset if size is None else int(size)

    def _image_size(self, node: MNode) -> int:
        return self.state.image(node.key).size if self.state.content(node.children["file"]) == "qcow2" else 0

    # ---- changing ----

    def _reopen(self, given: Options) -> None:
        name = given.get("node-name")
        if name is None:
            raise Refused("no node-name")
        node = self.state.named(name)
        self._reopen_node(node, given, node.options, False)

    def _reopen_node(self, node: MNode, given: Options, old: Options, read_only: bool) -> None:
        if given["driver"] != node.driver:
            raise Refused("driver")
        for role in ("file", "backing"):
            self._reopen_child(node, role, given, given.get("read-only", read_only))
        changed = {key for key in {*given, *old} - {"file", "backing"} if given.get(key) != old.get(key)}
        if node.driver == "raw":
            changed -= {"offset", "size"}
        if changed - {"read-only", "discard", "detect-zeroes", "cache"}:
            raise Refused(f"cannot change {changed}")
        if given.get("detect-zeroes") == "unmap" and given.get("discard") != "unmap":
            raise Refused("detect-zeroes")
        node.options = dict(given)
        node.read_only = given.get("read-only", read_only)
        self._size(node)

    def _reopen_child(self, node: MNode, role: str, given: Options, read_only: bool) -> None:
        state = self.state
        old = node.children.get(role)
        if role not in given:
            if old is not None:
                raise Refused(f"{role} is missing")
            return
        new = given[role]
        if isinstance(new, dict):
            if role not in node.inline or old is None:
                raise Refused(f"cannot change {role}")
            child = state.nodes[old]
            self._reopen_node(child, new, child.options, True if role == "backing" else read_only)
            return
        if new == old:
            return
        if new is not None and (new not in state.nodes or "/" in new):
            raise Refused(f"no node {new}")
        if new is not None and node.key in state.below(new):
            raise Refused("cycle")
        node.inline.discard(role)
        if new is None:
            if role == "file":
                raise Refused("file is missing")
            node.children.pop(role, None)
        else:
            node.children[role] = new
        if old is not None:
            self._collect(old)

    def _set_read_only(self, node: MNode, read_only: bool) -> None:
        node.read_only = read_only
        node.options["read-only"] = read_only
        for role in node.inline:
            child = state_child = self.state.nodes[node.children[role]]
            if role != "backing" and "read-only" not in state_child.options:
                self._inherit(child, read_only)

    def _inherit(self, node: MNode, read_only: bool) -> None:
        node.read_only = read_only
        for role in node.inline - {"backing"}:
            child = self.state.nodes[node.children[role]]
            if "read-only" not in child.options:
                self._inherit(child, read_only)

    def _resize(self, key: str, size: int) -> None:
        node = self.state.nodes[key]
        if node.read_only:
            raise Refused("read-only")
        if node.driver == "file":
            node.size = -(-size // 512) * 512
            self.state.files[node.options["filename"]].size = node.size
        elif node.driver == "raw" and "size" not in node.options:
            self._resize(node.children["file"], size + node.options.get("offset", 0))
        elif node.driver in FILTERS:
            self._resize(node.children["file"], size)
        elif node.driver == "qcow2":
            if size % 512:
                raise Refused("not a multiple of 512")
            node.size = self.state.image(key).size = size
        else:
            raise Refused("resize is not supported")
        self._sort_out()

    def _sort_out(self) -> None:
        """Sizes follow from below."""
        for key in reversed(self.state.order()):
            node = self.state.nodes[key]
            if node.driver in ("raw", *FILTERS):
                child = self.state.nodes[node.children["file"]]
                given = node.options.get("size")
                offset = node.options.get("offset", 0)
                node.size = int(given) if given is not None else max(child.size - offset, 0)

    def _remove_export(self, id: str) -> None:
        export = self.state.exports.pop(id)
        self._collect(export.node)

    def _collect(self, key: str) -> None:
        """Nodes that nobody uses or owns go."""
        node = self.state.nodes.get(key)
        if node is None or node.owned or self.state.users(key):
            return
        del self.state.nodes[key]
        for child in node.children.values():
            self._collect(child)

    def _blocked(self, key: str) -> bool:
        """A node that is behind another is not resized, and no snapshot is taken of it."""
        return any(use.role == "backing" for use in self.state.users(key))
