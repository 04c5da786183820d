# SPDX-License-Identifier: Apache-2.0
"""The parts of commands in the model: nodes are opened, get options and sizes, and go."""

from __future__ import annotations

import copy

from tests.support.qmp_state import FILTERS, NAME, File, MNode, Options, Policy, Refused, State

GROUPS = ("tg0", "tg1")


class Parts:
    """Changes of a state. Refused leaves it half changed."""

    def __init__(self, files: dict[str, File], policy: Policy) -> None:
        self.state = State(policy, files=copy.deepcopy(files))

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
        if driver == "throttle" and options["throttle-group"] not in GROUPS:
            raise Refused("no such group")
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
        if node.driver == "copy-on-read" and not self.state.policy.reopens_copy_on_read:
            raise Refused("this driver does not reopen")
        for role in ("file", "backing"):
            self._reopen_child(node, role, given, given.get("read-only", read_only))
        changed = {key for key in {*given, *old} - {"file", "backing"} if given.get(key) != old.get(key)}
        if node.driver == "raw":
            changed -= {"offset", "size"}
        if node.driver == "throttle" and given["throttle-group"] in GROUPS:
            changed -= {"throttle-group"}
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
        if any(each.driver == "copy-on-read" for each in self._inheriting(node)):
            return  # it cannot be; nobody minds
        node.read_only = read_only
        node.options["read-only"] = read_only
        for role in node.inline:
            child = state_child = self.state.nodes[node.children[role]]
            if role != "backing" and "read-only" not in state_child.options:
                self._inherit(child, read_only)

    def _inheriting(self, node: MNode) -> list[MNode]:
        found = [node]
        for role in node.inline - {"backing"}:
            child = self.state.nodes[node.children[role]]
            if "read-only" not in child.options:
                found += self._inheriting(child)
        return found

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
        self.state.removed.append(id)
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
