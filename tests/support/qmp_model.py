# SPDX-License-Identifier: Apache-2.0
"""What qemu-storage-daemon does to its graph, as a model. A command changes the state, or is Refused."""

from __future__ import annotations

import copy
from typing import Any

from tests.support.qmp_parts import Parts
from tests.support.qmp_state import BACKING, NAME, File, MExport, Options, Policy, Refused


class Model(Parts):
    """The state, and commands that change it or raise Refused."""

    def __init__(self, files: dict[str, File], policy: Policy) -> None:
        super().__init__(files, policy)
        self._before = self.state

    def run(self, command: str, arguments: Options) -> str | None:
        """Why it is refused, or None."""
        self._before = copy.deepcopy(self.state)
        self.state.removed = []
        try:
            self._call(command, arguments)
            self.state.permissions()
        except Refused as error:
            self.state = self._before
            return str(error)
        return None

    def _call(self, command: str, arguments: Options) -> None:
        named = {name.replace("-", "_"): value for name, value in arguments.items()}
        getattr(self, command.replace("-", "_"))(**named)

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
        for id in [id for id, export in self.state.exports.items() if export.type == "nbd"]:
            self._remove_export(id)

    def block_export_add(
        self,
        id: str,
        node_name: str,
        type: str = "nbd",
        name: str | None = None,
        writable: bool = False,
        addr: Options | None = None,
    ) -> None:
        state = self.state
        node = state.named(node_name)
        name = node_name if name is None else name
        if not NAME.match(id) or id in state.exports:
            raise Refused("id")
        names = [export.name for export in state.exports.values() if export.type == "nbd"]
        if type == "nbd" and (not state.server or name in names):
            raise Refused("no server, or the name is taken")
        if writable and node.read_only:
            raise Refused("read-only")
        state.exports[id] = MExport(node_name, writable, name, type)

    def nbd_server_add(self, device: str, name: str | None = None, writable: bool = False) -> None:
        node = self.state.named(device)
        name = device if name is None else name
        self.block_export_add(name, device, "nbd", name, writable and not node.read_only)

    def block_export_del(self, id: str, mode: str = "safe") -> None:
        if id not in self.state.exports:
            raise Refused("no such export")
        if mode == "safe" and self.state.exports[id].clients:
            raise Refused("it has clients")
        self._remove_export(id)

    def nbd_server_remove(self, name: str, mode: str = "safe") -> None:
        export = self.state.exports.get(name)
        if export is not None and export.type != "nbd":
            raise Refused("not an NBD export")
        self.block_export_del(name, mode)

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

    def blockdev_snapshot_sync(
        self,
        node_name: str,
        snapshot_file: str,
        snapshot_node_name: str,
        format: str = "qcow2",
        mode: str = "absolute-paths",
    ) -> None:
        state = self.state
        old = state.named(node_name)
        if mode == "absolute-paths":
            state.files[snapshot_file] = File("qcow2", old.size)
        image = {"driver": "file", "filename": snapshot_file}
        options: Options = {"driver": format, "node-name": snapshot_node_name, "file": image, "backing": None}
        options["read-only"] = old.read_only
        self._open(options, snapshot_node_name, False)
        self.blockdev_snapshot(node_name, snapshot_node_name)
        state.nodes[snapshot_node_name].owned = state.policy.owns_snapshots
        self._collect(snapshot_node_name)

    def transaction(self, actions: list[Options]) -> None:
        for action in actions:
            if action["type"] == "abort":
                raise Refused("abort")
            self._call(action["type"], action["data"])
            if not self.state.policy.agrees_at_the_end:
                self.state.permissions()

    def block_set_write_threshold(self, node_name: str, write_threshold: int) -> None:
        self.state.named(node_name)
