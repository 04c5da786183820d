# SPDX-License-Identifier: Apache-2.0
"""The way from what runs to what a file asks for: actions of one transaction, or reasons why there is none.

What clients would notice is refused unless it is forced: an export that goes or begins anew while it has
clients, data that would be exchanged under them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import msgspec

from target.declarative.data import Sources, keeps
from target.declarative.state import Entry, State

if TYPE_CHECKING:
    from target.graph.node import Node


class Facts(msgspec.Struct, kw_only=True):
    """What the plan has to know of what runs, beside its state. Each tells why not, or ""."""

    reopen: Callable[[Entry], str]
    """whether a node can get these options while it is used"""
    settable: Callable[[Entry], str]
    """whether an object can get these options while it is used"""
    default: Callable[[str, str], Any]
    """the value of a property of a type of objects that was not given"""
    clients: Callable[[str], int]
    """of an export"""
    server_clients: Callable[[str], int]
    """of the NBD server with this address"""
    exports_above: Callable[[str], list[str]]
    """the exports whose data come from a node"""
    users: Callable[[str], list[str]]
    """the named nodes that use a node"""
    node: Callable[[str], Node | None]
    """the node of this name, if it runs"""


class Phase(IntEnum):
    """Steps in the order in which they go. Permissions matter at the end only."""

    OBJECTS = 0
    IMAGES = 1
    SERVERS = 2
    EXPORT_DEL = 3
    RECREATE = 4
    ADD = 5
    THREADS = 6  # before anything holds clients' requests, as it waits for those under way
    REOPEN = 7
    MOVE = 8
    EXPORT_ADD = 9
    REMOVE = 10
    SERVERS_DEL = 11
    OBJECTS_DEL = 12


class Step(msgspec.Struct, frozen=True):
    """One action, and the line that tells it."""

    phase: Phase
    text: str
    type: str
    data: dict[str, Any]


class Plan(msgspec.Struct, kw_only=True):
    """``refused``: reasons; with one there is no way."""

    steps: list[Step] = msgspec.field(default_factory=list)
    refused: list[str] = msgspec.field(default_factory=list)

    def add(self, phase: Phase, text: str, type: str, data: dict[str, Any]) -> None:
        self.steps.append(Step(phase, text, type, data))


class Planner:
    """Makes one plan."""

    def __init__(self, now: State, wanted: State, facts: Facts, force: bool = False) -> None:
        self.now = now
        self.wanted = wanted
        self.facts = facts
        self.force = force
        self.plan = Plan()

    def make(self) -> Plan:
        self._objects()
        self._images()
        self._servers()
        self._exports()
        self._nodes()
        self._data()
        self.plan.steps.sort(key=lambda step: step.phase)
        return self.plan

    def _refuse(self, reason: str) -> None:
        self.plan.refused.append(reason)

    # ---- objects and images ----

    def _objects(self) -> None:
        add = self.plan.add
        for id, entry in self.wanted.objects.items():
            before = self.now.objects.get(id)
            if before is None:
                add(Phase.OBJECTS, f"+ object '{id}' ({entry['qom-type']})", "object-add", entry)
            elif before != entry:
                self._change_object(id, before, entry)
        for id in reversed(list(self.now.objects)):
            if id not in self.wanted.objects:
                add(Phase.OBJECTS_DEL, f"- object '{id}'", "object-del", {"id": id})

    def _change_object(self, id: str, before: Entry, entry: Entry) -> None:
        if reason := self.facts.settable(entry):
            self._refuse(f"object '{id}': {reason}")
            return
        for key in sorted(_keys(before, entry)):
            default = self.facts.default(entry["qom-type"], key)
            value = entry.get(key, default)
            if isinstance(default, dict):  # what is not given would keep its value
                value = default | value
            text = f"~ object '{id}': {key} {_brief(before.get(key, ...))} -> {_brief(entry.get(key, ...))}"
            data = {"path": f"/objects/{id}", "property": key, "value": value}
            self.plan.add(Phase.OBJECTS, text, "qom-set", data)

    def _images(self) -> None:
        for entry in self.wanted.images:
            text = f"+ image '{entry['filename']}' ({entry['driver']}), if there is none"
            self.plan.add(Phase.IMAGES, text, "x-image-create", entry)

    # ---- NBD servers ----

    def _servers(self) -> None:
        for key, entry in self.wanted.nbd_servers.items():
            before = self.now.nbd_servers.get(key)
            if before is None:
                self.plan.add(Phase.SERVERS, f"+ NBD server at {_place(entry)}", "x-nbd-server-start", entry)
            elif before != entry:
                what = _difference(before, entry)
                self._refuse(f"NBD server at {_place(entry)}: {what} cannot change while it runs")
        for key, entry in self.now.nbd_servers.items():
            if key in self.wanted.nbd_servers:
                continue
            clients = self.facts.server_clients(key)
            if clients and not self.force:
                self._refuse(f"NBD server at {_place(entry)}: it has {_count(clients, 'client')}")
            data = {"addr": entry["addr"]}
            self.plan.add(Phase.SERVERS_DEL, f"- NBD server at {_place(entry)}", "x-nbd-server-stop", data)

    # ---- exports ----

    def _exports(self) -> None:
        for id, entry in self.wanted.exports.items():
            before = self.now.exports.get(id)
            if before is None:
                text = f"+ export '{id}' ({entry['type']} of node '{entry['node-name']}')"
                self.plan.add(Phase.EXPORT_ADD, text, "block-export-add", entry)
            elif before != entry:
                self._change_export(id, before, entry)
        for id in self.now.exports:
            if id not in self.wanted.exports and self._may_end(id, "to remove it would cut them off"):
                self.plan.add(Phase.EXPORT_DEL, f"- export '{id}'", "block-export-del", self._end(id))

    def _change_export(self, id: str, before: Entry, entry: Entry) -> None:
        different = _keys(before, entry)
        if different - {"node-name", "iothread"}:
            if self._may_end(id, f"{_difference(before, entry)} cannot change without cutting them off"):
                text = f"! export '{id}' begins anew: {_difference(before, entry)}"
                self.plan.add(Phase.EXPORT_DEL, text, "block-export-del", self._end(id))
                self.plan.add(Phase.EXPORT_ADD, f"+ export '{id}' again", "block-export-add", entry)
            return
        if "node-name" in different:
            self._move(id, before["node-name"], entry["node-name"])
        if "iothread" in different:
            threads = entry.get("iothread")
            text = f"~ export '{id}': iothread {before.get('iothread')} -> {threads}"
            self.plan.add(Phase.THREADS, text, "x-export-set-iothread", {"id": id, "iothread": threads})

    def _move(self, id: str, old: str, new: str) -> None:
        overlay = self.wanted.blockdevs.get(new, {})
        how = " (a snapshot)" if overlay.get("backing") == old else ""
        text = f"~ export '{id}': node '{old}' -> '{new}'{how}"
        self.plan.add(Phase.MOVE, text, "x-blockdev-replace", {"export": id, "new-child": new})

    def _may_end(self, id: str, why: str) -> bool:
        clients = self.facts.clients(id)
        if clients and not self.force:
            self._refuse(f"export '{id}': it has {_count(clients, 'client')}, and {why}")
            return False
        return True

    def _end(self, id: str) -> dict[str, Any]:
        return {"id": id, "mode": "hard" if self.force else "safe"}

    # ---- nodes ----

    def _nodes(self) -> None:
        recreate = self._changed_nodes()
        for name in self._upward(recreate):
            self._recreate_del(name)
        for name in _in_order(self.wanted):
            entry = self.wanted.blockdevs[name]
            if name not in self.now.blockdevs:
                text = f"+ node '{name}' ({_sketch(entry)})"
                self.plan.add(Phase.ADD, text, "blockdev-add", entry)
            elif name in recreate:
                self.plan.add(Phase.ADD, f"+ node '{name}' again", "blockdev-add", entry)
        for name in reversed(_in_order(self.now)):
            node = self.facts.node(name)
            # What was opened for another node goes with that, or with its last user.
            if name not in self.wanted.blockdevs and (node is None or node.owned):
                self.plan.add(Phase.REMOVE, f"- node '{name}'", "blockdev-del", {"node-name": name})

    def _changed_nodes(self) -> set[str]:
        """Plans to reopen what can be; returns what has to be made anew."""
        recreate: set[str] = set()
        for name, entry in self.wanted.blockdevs.items():
            before = self.now.blockdevs.get(name)
            if before is None or before == entry:
                continue
            reason = self.facts.reopen(entry)
            if not reason:
                text = f"~ node '{name}': {_difference(before, entry)}"
                self.plan.add(Phase.REOPEN, text, "blockdev-reopen", {"options": [entry]})
            elif exports := self._exports_that_stay_above(name):
                users = ", ".join(f"'{id}'" for id in exports)
                self._refuse(f"node '{name}': {reason}, and it is used by export {users}")
            else:
                recreate |= {name, *self.facts.users(name)}
        return recreate

    def _exports_that_stay_above(self, name: str) -> list[str]:
        ended = {step.data["id"] for step in self.plan.steps if step.type == "block-export-del"}
        return [id for id in self.facts.exports_above(name) if id not in ended]

    # ---- what clients read ----

    def _data(self) -> None:
        """Refuses what would put other data under clients."""
        if self.force or self.plan.refused:
            return
        before, after = Sources(self.now, self.facts.node), Sources(self.wanted, self.facts.node)
        for id in self.now.exports:
            if id not in self.wanted.exports or not self.facts.clients(id):
                continue
            old, new = (state.exports[id]["node-name"] for state in (self.now, self.wanted))
            if keeps(after.of(new), before.of(old)):
                continue
            why = f"export '{id}': node '{new}' has other data than '{old}'"
            if old == new:
                why = f"export '{id}': node '{new}' would have other data: {self._causes(new)}"
            self._refuse(f"{why}, and clients would see that")

    def _causes(self, name: str) -> str:
        found = [step.text for step in self.plan.steps if step.phase is Phase.REOPEN]
        return "; ".join(text.removeprefix("~ ") for text in found) or name

    def _upward(self, names: Iterable[str]) -> list[str]:
        """Users first."""
        chosen = set(names)
        return [name for name in reversed(_in_order(self.now)) if name in chosen]

    def _recreate_del(self, name: str) -> None:
        what = f"! node '{name}' is made anew"
        if name in self.wanted.blockdevs:
            what += f": {_difference(self.now.blockdevs[name], self.wanted.blockdevs[name])}"
        data = {"node-name": name, "x-now": True}
        self.plan.add(Phase.RECREATE, what, "blockdev-del", data)


def inline_names(entry: Entry) -> list[str]:
    """The names of the nodes that an entry describes inside."""
    inside = (item for value in entry.values() for item in (value if isinstance(value, list) else [value]))
    return [
        name
        for item in inside
        if isinstance(item, dict) and "driver" in item
        for name in (item.get("node-name"), *inline_names(item))
        if name is not None
    ]


def names_in(entry: Entry) -> list[str]:
    """The nodes that an entry names as children, its inline children's too."""
    found: list[str] = []
    for key, value in entry.items():
        if key in CHILDREN and isinstance(value, str):
            found.append(value)
        elif isinstance(value, dict) and "driver" in value:
            found += names_in(value)
        elif isinstance(value, list):
            for item in value:
                if key in CHILDREN and isinstance(item, str):
                    found.append(item)
                elif isinstance(item, dict) and "driver" in item:
                    found += names_in(item)
    return found


CHILDREN = {"file", "backing", "data-file", "children", "target", "image", "test", "raw", "log", "header"}


def _in_order(state: State) -> list[str]:
    """Node names, children before parents."""
    order: dict[str, None] = {}

    def visit(name: str, path: tuple[str, ...] = ()) -> None:
        if name in order or name in path:
            return
        for child in names_in(state.blockdevs[name]):
            if child in state.blockdevs:
                visit(child, (*path, name))
        order[name] = None

    for name in state.blockdevs:
        visit(name)
    return list(order)


def _keys(before: Entry, after: Entry) -> set[str]:
    """Members that differ."""
    return {key for key in before.keys() | after.keys() if before.get(key, ...) != after.get(key, ...)}


def _difference(before: Entry, after: Entry) -> str:
    parts = [
        f"{key} {_brief(before.get(key, ...))} -> {_brief(after.get(key, ...))}"
        for key in sorted(_keys(before, after))
    ]
    return ", ".join(parts)


def _brief(value: Any) -> str:
    if value is ...:
        return "(default)"
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "{...}" if "driver" not in value else f"{{{_sketch(value)}}}"
    return str(value)


def _sketch(entry: Entry) -> str:
    """The driver, and what it is made of."""
    names = names_in(entry)
    where = entry.get("filename")
    over = f" over {', '.join(names)}" if names else f" {where}" if where else ""
    return f"{entry['driver']}{over}"


def _place(server: Entry) -> str:
    addr = server["addr"]
    return str(addr.get("path") or addr.get("str") or f"{addr.get('host')}:{addr.get('port')}")


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
