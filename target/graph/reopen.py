# SPDX-License-Identifier: Apache-2.0
"""blockdev-reopen: nodes get new options while they are used. All options are given anew; what is not given
has its default again. What a driver cannot change while it runs is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from msgspec import UNSET

from target.graph.errors import BlockError
from target.graph.options import BlockdevRef, NodeOptions, Settings, inherit, names_child, resolve
from target.graph.permissions import Perm

if TYPE_CHECKING:
    from target.graph.change import Change
    from target.graph.edge import Edge
    from target.graph.graph import Graph
    from target.graph.node import Node

REPLACEABLE = ("file", "backing")  # children that another node may take the place of
GENERIC = frozenset({"discard", "detect-zeroes", "auto-read-only"})


class Step(NamedTuple):
    """One node with its new options."""

    node: Node
    options: NodeOptions
    settings: Settings


class Reopen:
    """One blockdev-reopen of one or more nodes."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.steps: list[Step] = []
        self.replaced: list[tuple[Node, str, str | None]] = []  # parent, role, the new child's name

    async def run(self, change: Change, refs: Iterable[BlockdevRef]) -> None:
        self.plan(refs)
        await self._run(change)

    def plan(self, refs: Iterable[BlockdevRef]) -> None:
        """What is to be done to which node. BlockError for what a driver cannot change."""
        for ref in refs:
            self._plan_root(ref)
        for step in self.steps:
            self._check(step)

    async def make_read_only(self, change: Change, node: Node) -> None:
        """One node, and what was opened for it, as it is but read-only. Does nothing where that cannot be."""
        writers = any(edge.perm & Perm.WRITE for edge in node.parents)
        if node.read_only or writers or (node.is_protocol and "read-only" not in node.reopenable):
            return
        self._plan_read_only(node)
        if not any(step.node.copies_by_itself for step in self.steps):
            await self._run(change)

    def _plan_read_only(self, node: Node) -> None:
        options = msgspec.structs.replace(node.options, read_only=True)
        self.steps.append(Step(node, options, resolve(options, node.settings)))
        for edge in node.children.values():
            if _opened_for(edge) and edge.role != "backing" and edge.node.options.read_only is UNSET:
                self._plan_read_only(edge.node)

    async def _run(self, change: Change) -> None:
        await change.drain(*(step.node for step in self.steps))
        for node, role, name in self.replaced:
            child = None if name is None else self.graph.child(node, name)
            await _replace_child(change, node, role, child)
        await self._flush()
        change.bind(*(step.node for step in self.steps))
        for step in self._in_order():
            await step.node.reopen(change, step.options, step.settings)
        if not change.lenient:
            for step in self.steps:
                _check_writers(step.node)
        change.refresh([step.node for step in self.steps])

    # ---- what is to be done ----

    def _plan_root(self, ref: BlockdevRef) -> None:
        assert ref.options is not None
        name = ref.options.node_name
        if name is None:
            raise BlockError("node-name not specified")
        node = self.graph.nodes.get(name)
        if node is None:
            raise BlockError(f"Failed to find node with node-name='{name}'")
        defaults = Settings()
        if node.opener is not None and node.opener.parent is not None:
            defaults = inherit(node.opener.parent.settings, node.opener.role)
        self._plan(node, ref, defaults)

    def _plan(self, node: Node, ref: BlockdevRef, defaults: Settings) -> None:
        options = ref.options
        assert options is not None
        if ref.driver not in node.names():
            raise BlockError("Cannot change the option 'driver'")
        settings = resolve(options, defaults)
        self.steps.append(Step(node, options, settings))
        for field in msgspec.structs.fields(options):
            given = getattr(options, field.name)
            role = node.role_of(field.encode_name)
            if isinstance(given, list) and names_child(field.type):
                self._plan_children(node, field.encode_name, given, settings)
            elif names_child(field.type) and (given is not UNSET or role in node.children):
                self._plan_child(node, field.encode_name, role, given, settings)

    def _plan_children(self, node: Node, option: str, given: list[Any], settings: Settings) -> None:
        """Of a list: the same children, whose roles are ``option.N``, in the order of their numbers."""
        roles = [role for role in node.children if role.startswith(f"{option}.")]
        if len(roles) != len(given):
            raise BlockError(f"Cannot change the option '{option}'")
        roles.sort(key=lambda role: int(role.removeprefix(f"{option}.")))
        for role, each in zip(roles, given, strict=True):
            self._plan_child(node, role, role, each, settings)

    def _plan_child(self, node: Node, option: str, role: str, given: Any, settings: Settings) -> None:
        edge = node.children.get(role)
        if given is UNSET:
            if role == "backing":
                raise BlockError(f"backing is missing for '{node.name}'")
            raise BlockError(f"Cannot change the option '{option}'")
        name = given.name if isinstance(given, BlockdevRef) else given
        if edge is not None and _opened_for(edge) and (name is None or name == edge.node.name):
            if given is None:
                self._plan_replacement(node, option, role, None)
            else:
                child = given if name is None else BlockdevRef(None, edge.node.driver, edge.node.options)
                self._plan(edge.node, child, inherit(settings, role))
        elif given is not None and name is None:
            raise BlockError(f"Cannot change the option '{option}'")
        elif name != (edge.node.name if edge is not None else None):
            self._plan_replacement(node, option, role, name)

    def _plan_replacement(self, node: Node, option: str, role: str, name: str | None) -> None:
        if role not in REPLACEABLE or (name is None and role == "file"):
            raise BlockError(f"Cannot change the option '{option}'")
        self.replaced.append((node, role, name))

    @staticmethod
    def _check(step: Step) -> None:
        node, allowed = step.node, GENERIC | step.node.reopenable
        if not node.is_protocol:
            allowed |= {"cache", "read-only"}
        for option in (*_changed_options(step), *_changed_settings(step)):
            if option not in allowed:
                raise BlockError(f"Cannot change the option '{option}'")
        if step.settings.detect_zeroes == "unmap" and step.settings.discard != "unmap":
            raise BlockError(
                "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap"
            )

    # ---- doing it ----

    async def _flush(self) -> None:
        for step in self.steps:
            if step.node.read_only:
                continue
            try:
                await step.node.flush()
            except OSError as error:
                raise BlockError.from_os(f"{step.node.label}: Error flushing drive", error) from None

    def _in_order(self) -> list[Step]:
        """What becomes writable from the bottom up, then what becomes read-only from the top down."""
        writable = [step for step in self.steps if not step.settings.read_only]
        read_only = [step for step in self.steps if step.settings.read_only]
        return sorted(writable, key=lambda step: -_depth(step.node)) + sorted(
            read_only, key=lambda step: _depth(step.node)
        )


async def _replace_child(change: Change, node: Node, role: str, child: Node | None) -> None:
    edge = node.children.get(role)
    if child is None:
        assert edge is not None
        await change.detach(edge)
    elif edge is None:
        await change.attach(node, role, child)
    else:
        await change.replace(edge, child)


def refusal(graph: Graph, ref: BlockdevRef) -> str:
    """Why a node cannot get these options while it is used, as far as that is known without trying; or ""."""
    reopen = Reopen(graph)
    try:
        reopen.plan([ref])
    except BlockError as error:
        return str(error)
    return ""


def _check_writers(node: Node) -> None:
    if not node.read_only:
        return
    for edge in node.parents:
        perm = edge.fixed[0] if edge.fixed is not None else Perm.NONE
        if perm & Perm.WRITE:
            raise BlockError(
                f"Read-only block node '{node.name}' cannot support read-write users: {edge.user}"
            )


def _changed_options(step: Step) -> Iterator[str]:
    """The driver's own options that differ, children left out."""
    generic = {field.name for field in msgspec.structs.fields(NodeOptions)}
    for field in msgspec.structs.fields(step.options):
        old, new = getattr(step.node.options, field.name), getattr(step.options, field.name)
        if field.name not in generic and not names_child(field.type) and old != new:
            yield field.encode_name


def _changed_settings(step: Step) -> Iterator[str]:
    """The generic options whose effect differs, whether given or inherited."""
    for field in msgspec.structs.fields(Settings):
        if getattr(step.node.settings, field.name) != getattr(step.settings, field.name):
            yield "cache" if field.name in ("direct", "no_flush") else field.name.replace("_", "-")


def _opened_for(edge: Edge) -> bool:
    """Whether the child was made inline, for this edge."""
    return edge.node.opener is edge


def _depth(node: Node) -> int:
    """The longest way down from a user."""
    return max((1 + _depth(edge.parent) for edge in node.parents if edge.parent is not None), default=0)
