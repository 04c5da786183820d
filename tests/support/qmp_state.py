# SPDX-License-Identifier: Apache-2.0
"""What the model of a graph knows: names, children, permissions, read-only, exports, image files.

Nodes without a name are known by the name of the node that they were made for, and their role in it:
"disk/file".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

CR, WRITE, WU, RESIZE = 1, 2, 4, 8
ALL = CR | WRITE | WU | RESIZE
WORDS = {CR: "consistent-read", WRITE: "write", WU: "write-unchanged", RESIZE: "resize"}
NAME = re.compile(r"[A-Za-z][A-Za-z0-9._-]*\Z")
FILTERS = ("throttle", "copy-on-read")
BACKING = ("qcow2",)
PASSED = CR | WRITE | RESIZE  # by copy-on-read

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
    type: str = "nbd"
    clients: int = 0


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
    # What blockdev-snapshot-sync makes stays until blockdev-del, and not only while somebody uses it.
    owns_snapshots: bool = False
    # Between the actions of a transaction users of a node may disagree.
    agrees_at_the_end: bool = False
    # Every driver can be given other generic options.
    reopens_copy_on_read: bool = False


OURS = Policy(
    nbd_follows_resize=True,
    one_writer_of_a_file=True,
    owns_snapshots=True,
    agrees_at_the_end=True,
    reopens_copy_on_read=True,
)


@dataclass
class State:
    policy: Policy
    nodes: dict[str, MNode] = field(default_factory=dict)
    exports: dict[str, MExport] = field(default_factory=dict)
    files: dict[str, File] = field(default_factory=dict)
    server: bool = False
    removed: list[str] = field(default_factory=list)  # exports, by the last command
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
            shared = ALL if follows or export.type != "nbd" else ALL & ~RESIZE
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
            return perm & PASSED | WU, shared & PASSED | WU
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

    def readable(self, key: str) -> bool:
        """Whether what a client reads is the same in both programs: no table of an image, no null."""
        node = self.nodes[key]
        if node.driver == "file":
            return self.files[node.options["filename"]].format == "raw"
        if node.driver == "qcow2":
            return "backing" not in node.children or self.readable(node.children["backing"])
        return node.driver in ("raw", *FILTERS) and self.readable(node.children["file"])

    def writable(self, key: str) -> bool:
        """Whether a client may write without destroying an image's tables."""
        node = self.nodes[key]
        if node.driver == "file":
            return self.files[node.options["filename"]].format == "raw"
        return node.driver in ("null-co", "qcow2") or self.writable(node.children["file"])

    def image(self, key: str) -> File:
        """The file that a format's child leads to."""
        node = self.nodes[key]
        return (
            self.files[node.options["filename"]]
            if node.driver == "file"
            else self.image(node.children["file"])
        )
