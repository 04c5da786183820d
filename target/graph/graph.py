# SPDX-License-Identifier: Apache-2.0
"""The graph of block nodes: the only owner of topology and permissions. Drivers never reach around it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import re
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import UNSET, UnsetType

from target.events import EventBus
from target.fdsets import Descriptors
from target.graph import registry
from target.graph.change import Change
from target.graph.edge import Edge, RootEdge
from target.graph.errors import BlockError
from target.graph.options import BlockdevRef, NodeOptions, Ref, Settings, inherit, resolve
from target.graph.permissions import Perm

if TYPE_CHECKING:
    from target.datapath import Datapath
    from target.graph.node import Node
    from target.objects import UserObject

log = logging.getLogger("blocktarget")

NAME = re.compile(r"[A-Za-z][A-Za-z0-9._-]*\Z")
NAME_MAX = 31
DEPTH_MAX = 200  # of nodes opened for one another, such as a backing chain


class Graph:
    """Nodes by name. Public coroutines change the graph one at a time."""

    def __init__(
        self,
        datapath: Datapath,
        objects: Mapping[str, UserObject] | None = None,
        events: EventBus | None = None,
        fds: Descriptors | None = None,
    ) -> None:
        self.datapath = datapath
        self.objects = {} if objects is None else objects  # that options of nodes name
        self.events = EventBus() if events is None else events
        self.fds = Descriptors() if fds is None else fds
        self.nodes: dict[str, Node] = {}
        # What a driver calls, with the last words for the user, when the process must not go on.
        self.fatal: Callable[[str], None] = log.critical
        self._lock = asyncio.Lock()
        self._numbers = itertools.count(1)
        self._changing: Change | None = None

    # ---- for users ----

    def get(self, name: str) -> Node:
        """The node of that name. BlockError when there is none."""
        try:
            return self.nodes[name]
        except KeyError:
            raise BlockError(f"Cannot find device='' nor node-name='{name}'") from None

    def lookup(self, device: str | UnsetType, node_name: str | UnsetType) -> Node:
        """The node that a command means. There are no device names here; messages have both, as QEMU's."""
        node = self.nodes.get(node_name) if node_name is not UNSET else None
        if node is None:
            names = f"device='{device or ''}' nor node-name='{node_name or ''}'"
            raise BlockError(f"Cannot find {names}")
        return node

    @contextlib.asynccontextmanager
    async def change(self) -> AsyncIterator[Change]:
        """One change at a time, all or nothing: see Change."""
        async with self._lock:
            self._changing = change = Change(self)
            try:
                try:
                    yield change
                except BaseException:
                    await change.roll_back()
                    raise
                await change.finish()
            finally:
                self._changing = None

    async def add(self, options: dict[str, Any] | BlockdevRef | NodeOptions, driver: str = "") -> Node:
        """Opens a node that stays until it is removed. See Change.add."""
        async with self.change() as change:
            return await change.add(options, driver)

    async def remove(self, name: str) -> None:
        """Closes a node that was added, and the inline children that only it used."""
        async with self.change() as change:
            change.remove(name)
        change.raise_failure()

    async def attach_root(self, user: str, node: Node, perm: Perm, shared: Perm) -> RootEdge:
        """Gives a user outside the graph (named in messages) the use of a node, through a gate."""
        async with self.change() as change:
            return change.attach_root(user, node, perm, shared)

    async def detach_root(self, edge: RootEdge) -> None:
        """Ends the use. The user has drained the gate before."""
        async with self.change() as change:
            edge.gate.release()
            change.unlink_root(edge)
        change.raise_failure()

    async def resize(self, node: Node, size: int) -> None:
        """Changes the size of a node, if its users permit it, and tells them."""
        async with self.change() as change:
            await change.resize(node, size)
        change.raise_failure()

    async def close(self) -> None:
        """Closes all nodes, users first, after all root edges. Raises the first error, at the end."""
        async with self.change() as change:
            errors: list[Exception] = []
            for node in list(self.nodes.values()):
                node.owned = False
            while self.nodes:
                top = next(node for node in self.nodes.values() if not node.parents)
                try:
                    await self.collect(top)
                except (BlockError, OSError) as error:
                    errors.append(error)
            errors += change.failures
            if errors:
                raise errors[0]

    # ---- for nodes and edges ----

    def tell_size(self, edge: RootEdge) -> None:
        """A user's node has a new size."""
        if self._changing is not None:
            self._changing.tell_size(edge)
        else:
            edge.take_size()

    @property
    def changing(self) -> Change:
        """The change that is under way: whatever changes the graph is a part of one."""
        assert self._changing is not None
        return self._changing

    async def attach_child(
        self, parent: Node, role: str, ref: Ref, fixed: tuple[Perm, Perm] | None, defaults: dict[str, Any]
    ) -> Node:
        """See Node.attach. Runs inside an operation that holds the lock."""
        assert role not in parent.children
        if isinstance(ref, str):
            ref = BlockdevRef(name=ref)
        if isinstance(ref, dict):
            ref = self.ref(ref, "", role)
        if ref.name is not None:
            node = self.child(parent, ref.name)
        else:
            settings = msgspec.structs.replace(inherit(parent.settings, role), **defaults)
            node = await self.open(ref, settings, (parent, role))
        edge = Edge(parent, role, node, fixed)
        try:
            if node.opener is not None and node.opener.parent is parent and node.opener.role == role:
                node.opener = edge
            if role == "file" and node.read_only and parent.settings.auto_read_only:
                parent.read_only = True
            self.changing.insert(edge)
        except BaseException:
            await self.collect(node)
            raise
        return node

    def child(self, parent: Node, name: str) -> Node:
        node = self.nodes.get(name)
        if node is None or not node.opened:  # one that is still being opened is this parent, or above it
            raise BlockError(f"{parent.label}: Cannot find device='{name}' nor node-name='{name}'")
        return node

    # ---- opening and closing ----

    @staticmethod
    def ref(options: dict[str, Any] | BlockdevRef | NodeOptions, driver: str, path: str = "") -> BlockdevRef:
        if isinstance(options, NodeOptions):
            return BlockdevRef(driver=driver, options=options)
        if isinstance(options, dict):
            try:
                return registry.parse_blockdev(options, path=path)
            except ValueError as error:
                raise BlockError(str(error)) from None
        return options

    def _new_name(self, options: NodeOptions) -> str:
        name = options.node_name
        if name is None:
            return next(n for n in (f"#block{i:03d}" for i in self._numbers) if n not in self.nodes)
        if not NAME.match(name):
            raise BlockError(f"Invalid node-name: '{name}'")
        if name in self.nodes:
            raise BlockError(f"Duplicate nodes with node-name='{name}'")
        if len(name) > NAME_MAX:
            raise BlockError("Node name too long")
        return name

    async def open(self, ref: BlockdevRef, defaults: Settings, opener: tuple[Node, str] | None) -> Node:
        assert ref.options is not None
        name = self._new_name(ref.options)
        node = registry.driver(ref.driver)(self, name, ref.options, resolve(ref.options, defaults))
        node.driver = ref.driver
        if opener is not None:
            node.opener = Edge(*opener, node)
            self._check_depth(node)
        if node.settings.detect_zeroes == "unmap" and node.settings.discard != "unmap":
            raise node.error(
                "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap"
            )
        if not (node.active or node.may_be_inactive):
            raise node.error(f"a node of driver '{node.driver}' cannot be inactive")
        self.nodes[name] = node
        try:
            await node.open()
            self._check_loop(node)
            node.object = node.make_object() or self.datapath.upcall(node.size, node.serve)
            node.opened = True
            node.object.set_policy(node.settings.discard == "unmap", node.settings.detect_zeroes)
        except BaseException as error:
            with contextlib.suppress(BlockError, OSError):
                await self._abandon(node)
            if isinstance(error, OSError):
                raise BlockError.from_os(node.label, error) from None
            raise
        return node

    async def _abandon(self, node: Node) -> None:
        """Undoes an open that failed; its own error is the one to report."""
        node.closed = True
        del self.nodes[node.name]
        if node.opened:
            node.release()
        with contextlib.suppress(BlockError, OSError):
            await node.close()
        await self._detach_children(node)

    @staticmethod
    def _ancestors(node: Node) -> Iterable[tuple[Node, str]]:
        """The nodes for which this one is being opened, nearest first, each with the role."""
        while node.opener is not None and node.opener.parent is not None:
            yield node.opener.parent, node.opener.role
            node = node.opener.parent

    def _check_depth(self, node: Node) -> None:
        ancestors = list(self._ancestors(node))
        if len(ancestors) > DEPTH_MAX:
            raise BlockError(f"{_top_label(ancestors)}: the chain of nodes is deeper than {DEPTH_MAX}")

    def _check_loop(self, node: Node) -> None:
        """Refuses a file that an overlay above it, in the same chain, is stored in."""
        if node.storage is None:
            return
        ancestors = list(self._ancestors(node))
        crossed = False
        for ancestor, role in ancestors:
            crossed |= role == "backing"
            files = (edge.node.storage for edge in ancestor.children.values() if edge.role != "backing")
            if crossed and node.storage in files:
                filename = getattr(node.options, "filename", node.name)
                raise BlockError(f"{_top_label(ancestors)}: the backing chain has a loop at '{filename}'")

    async def collect(self, node: Node) -> None:
        """Closes a node that nobody uses or owns, and then its children so."""
        if node.parents or node.owned or node.closed:
            return
        node.closed = True
        try:
            await node.close()
        finally:
            node.release()
            if self.nodes.get(node.name) is node:
                del self.nodes[node.name]
            await self._detach_children(node)

    async def _detach_children(self, node: Node) -> None:
        failures: list[BlockError | OSError] = []
        for edge in reversed(list(node.children.values())):
            self.changing.take_out(edge)
            try:
                await self.collect(edge.node)
            except (BlockError, OSError) as error:
                failures.append(error)
        if failures:
            raise failures[0]


def _top_label(ancestors: list[tuple[Node, str]]) -> str:
    return ancestors[-1][0].label
