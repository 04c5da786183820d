# SPDX-License-Identifier: Apache-2.0
"""The base class of block drivers: a node of the graph is an instance of one.

A driver states its options, opens its children and its own resources, and either gives a native datapath
object or serves requests in Python. Range, alignment and permission are checked before it is called.
"""

from __future__ import annotations

import errno
import functools
import itertools
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from target.datapath import FAST_ZERO, FUA, Extent, Fault, Object, Op
from target.graph import permissions, registry
from target.graph.describe import BlockStatsSpecific, Description
from target.graph.errors import BlockError
from target.graph.options import BlockdevRef, ImageOptions, NodeOptions, Ref, Settings
from target.graph.permissions import Perm

if TYPE_CHECKING:
    from target.datapath import Datapath
    from target.graph.change import Change
    from target.graph.edge import Edge
    from target.graph.graph import Graph

__all__ = ["BlockError", "BlockdevRef", "ImageOptions", "Node", "NodeOptions", "Perm", "Settings"]

ZEROS_AT_ONCE = 1 << 20  # bytes written at a time where a driver has no write_zeroes


def _path_to(role: str, depth: int) -> str:
    """Steps from a node to a child in messages. A long chain of backing files still fits on the line."""
    return f" child '{role}'" * depth if depth < 4 else f" child '{role}' ({depth} deep)"


class Features(NamedTuple):
    """What an export may promise for a node. What a node does not do itself is emulated or ignored."""

    flush: bool = True
    fua: bool = True
    trim: bool = True
    fast_zero: bool = True
    cache: bool = True
    multi_conn: bool = True
    rotational: bool = False
    description: str = ""


class Node(ABC):
    """A node: ``class Null(Node, driver="null-co"): class Options(NodeOptions): ...``."""

    driver: str = ""  # the name that was asked for, of those that it goes by
    Options: ClassVar[type[NodeOptions]] = NodeOptions
    CreateOptions: ClassVar[type[ImageOptions] | None] = None  # a driver that has ``create`` says so
    is_format: ClassVar[bool] = False
    is_filter: ClassVar[bool] = False
    is_protocol: ClassVar[bool] = False
    # Own options that do not decide what data the node has: how it is cached, locked, reached.
    tuning: ClassVar[frozenset[str]] = frozenset()
    copies_by_itself: ClassVar[bool] = False  # it writes to its child, so that cannot become read-only
    named_as_file: ClassVar[bool] = False  # queries name it as its file, which does not give the same data
    supports_backing: ClassVar[bool] = False
    may_be_inactive: ClassVar[bool] = False
    reopenable: ClassVar[frozenset[str]] = frozenset()  # options that may change while it is used
    features = Features()

    def __init_subclass__(
        cls, *, driver: str | None = None, aliases: tuple[str, ...] = (), **kwargs: Any
    ) -> None:
        super().__init_subclass__(**kwargs)
        if driver is not None:
            cls.driver = driver
            for name in (driver, *aliases):
                registry.register(name, cls)

    def __init__(self, graph: Graph, name: str, options: NodeOptions, settings: Settings) -> None:
        self.graph = graph
        self.datapath: Datapath = graph.datapath
        self.name = name
        self.options = options
        self.settings = settings
        self.read_only = settings.read_only
        self.active = settings.active  # see activity.py
        self.opener: Edge | None = None  # the edge for which this node was made, when it was made inline
        self.owned = False  # by the user who added it: stays without a parent
        self.children: dict[str, Edge] = {}
        self.parents: list[Edge] = []
        self.object: Object
        self.opened = False
        self.leaving = False  # closes at the end of a change: it is in nobody's way
        self.closed = False

    # ---- what a driver implements ----

    @abstractmethod
    async def open(self) -> None:
        """Opens children (``attach``) and own resources. BlockError or OSError when it cannot."""

    @classmethod
    async def create(cls, options: ImageOptions) -> None:
        """Makes a new image. ``options.filename`` does not exist. BlockError or OSError."""
        raise NotImplementedError

    def interrupt(self) -> None:
        """The process is about to end: requests that wait for something outside must not wait for long."""
        return None

    async def close(self) -> None:
        """Writes back and frees. Children are detached by the graph afterwards."""
        return None

    def make_object(self) -> Object | None:
        """The native datapath object, called once after open. None: requests come to the methods below."""
        return None

    @property
    def size(self) -> int:
        """Bytes. A driver without a native object overrides it."""
        return self.object.size

    @property
    def cluster_size(self) -> int | None:
        """Bytes that the image allocates at a time. None: there is no such unit."""
        return self.children["file"].node.cluster_size if self.is_filter and "file" in self.children else None

    async def read(self, offset: int, length: int) -> bytes:
        return await self.object.read(offset, length)

    async def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        await self.object.write(offset, data, flags)

    async def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        await self.object.zeroes(offset, length, flags)

    async def discard(self, offset: int, length: int) -> None:
        await self.object.discard(offset, length)

    async def flush(self) -> None:
        await self.object.flush()

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        """The runs that cover [offset, offset + length), or a beginning of it."""
        return await self.object.status(offset, length)

    async def truncate(self, size: int) -> None:
        """Gives the node a new size in bytes. Call ``graph.resize`` instead, which tells the parents too."""
        raise self.error("Image format driver does not support resize")

    async def resize(self, change: Change, size: int) -> None:
        """The same as a part of a change: says how to undo it, and leaves what cannot be undone for later."""
        if self.is_filter:
            await self.children["file"].node.resize(change, size)
            return
        before = self.size
        await self.truncate(size)
        change.undo(lambda: self.truncate(before))

    async def reopen(self, change: Change, options: NodeOptions, settings: Settings) -> None:
        """Takes new options and settings, which are checked against ``reopenable``; says how to undo it.

        Nothing from above is inside, the node is flushed and quiet, its children are in place. A driver that
        has more to do extends this.
        """
        before = self.options, self.settings, self.read_only

        def use(options: NodeOptions, settings: Settings, read_only: bool) -> None:
            self.options, self.settings, self.read_only = options, settings, read_only
            self.object.set_policy(settings.discard == "unmap", settings.detect_zeroes)

        use(options, settings, settings.read_only)
        change.undo(lambda: use(*before))

    @functools.cached_property
    def front(self) -> Object:
        """What users outside the graph get to while the node is inactive: reads pass, all else is refused."""

        async def serve(fault: Fault) -> None:
            if fault.op != Op.READ:
                raise OSError(errno.EPERM, "the node is inactive")
            fault.put_data(0, await self.object.read(fault.offset, fault.length))
            fault.done()

        return self.datapath.upcall(1 << 62, serve)

    def release(self) -> None:
        """The node is closed."""
        self.object.release()
        if "front" in self.__dict__:
            self.front.release()

    async def inactivate(self, change: Change) -> None:
        """Nothing from above is inside: all goes to disk, and the image is another's from here on."""
        if not self.read_only:
            await self.flush()

    async def activate(self, change: Change) -> None:
        """The image is this node's again, and may have changed."""
        return None

    async def change_backing_file(self, change: Change, name: str, format: str | None) -> None:
        """Writes into the image what it names as its backing file; the nodes stay. BlockError or OSError."""
        raise BlockError(f"Could not change backing file to '{name}': Operation not supported")

    async def quiesce(self) -> None:
        """Stops what the node does of its own accord (write-back, refills), until ``resume``."""
        return None

    async def resume(self) -> None:
        """Ends what ``quiesce`` began."""
        return None

    def relink(self, role: str, old: Object | None, new: Object | None) -> None:
        """The child in that role has another datapath object: none before (attached), or none now (detached).

        Nothing from above is inside. A driver with more objects than its own, or children that come and go,
        extends this.
        """
        if old is not None and new is not None:
            self.object.replace_child(old, new)
        else:
            what = "added to" if old is None else "removed from"
            raise self.error(f"A '{role}' child cannot be {what} a node of driver '{self.driver}'")

    async def add_child(self, change: Change, node: Node) -> None:
        """One more child for a node that takes several, where a user asks for it."""
        raise BlockError(f"The node {self.name} does not support adding a child")

    async def remove_child(self, change: Change, edge: Edge) -> None:
        """One child less."""
        raise BlockError(f"The node {self.name} does not support removing a child")

    def role_of(self, option: str) -> str:
        """The role of the child that an option describes."""
        return option

    def option_of(self, role: str) -> str:
        """The opposite: what users call the child."""
        return role

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The driver's name and its aliases."""
        return registry.names(cls)

    def child_permissions(self, role: str, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        """What the child in ``role`` is needed for, when this node's users need perm and share shared."""
        if role == "backing":
            return permissions.for_backing(perm, shared)
        if self.is_format:
            return permissions.for_format(perm, shared, self.read_only)
        return permissions.for_filter(perm, shared)

    def child_resized(self, edge: Edge) -> None:
        """A child has a new size. A driver whose own size follows calls ``resized``."""
        return None

    def prepare_permissions(self, perm: Perm, shared: Perm) -> None:
        """The users' permissions are about to change: take what both states need. BlockError refuses."""
        return None

    def commit_permissions(self, perm: Perm, shared: Perm) -> None:
        """The change is made: release what only the old state needed."""
        return None

    @property
    def storage(self) -> object | None:
        """Identifies what a protocol node opened (device and inode), to find loops; None when unknown."""
        return None

    def counters(self) -> dict[str, Any]:
        return self.object.counters()

    def debug_event(self, event: str) -> None:
        """A driver above is about to do what QEMU's name says: for a blkdebug node below it."""
        if self.is_filter and "file" in self.children:
            self.children["file"].node.debug_event(event)

    def describe(self) -> Description:
        """What queries show of the image beyond the generic options."""
        edge = self.children.get("file")
        return self.describe_like(edge.node) if self.is_filter and edge is not None else Description()

    @staticmethod
    def describe_like(child: Node) -> Description:
        """Of a node that has what its child has: what is true of it, too."""
        below = child.describe()
        return Description(dirty=below.dirty, cluster_size=below.cluster_size)

    @property
    def filename(self) -> str | None:
        """Of a protocol node: the one string that names its data; None when only its options do."""
        return None

    async def allocated_size(self) -> int | None:
        """Of a protocol node: the bytes that its data occupies; None when unknown."""
        return None

    def driver_statistics(self) -> BlockStatsSpecific | None:
        """Counters that only this driver has."""
        return None

    # ---- what a driver calls ----

    async def attach(
        self,
        role: str,
        ref: Ref,
        *,
        perm: Perm | None = None,
        shared: Perm | None = None,
        read_only: bool | None = None,
        inherit: dict[str, Any] | None = None,
    ) -> Node:
        """Makes or finds the child and puts an edge to it into ``children[role]``.

        Without perm and shared they follow from the users of this node (``child_permissions``). ``read_only``
        and ``inherit`` (fields of Settings) replace what an inline child inherits.
        """
        defaults: dict[str, Any] = dict(inherit or {})
        if read_only is not None:
            defaults["read_only"] = read_only
        fixed = (perm, shared) if perm is not None and shared is not None else None
        return await self.graph.attach_child(self, role, ref, fixed, defaults)

    def resized(self) -> None:
        """Tells the parents that this node has a new size."""
        for edge in list(self.parents):
            edge.resized()

    def error(self, message: str) -> BlockError:
        """An error for the user that names this node."""
        return BlockError(f"{self.label}: {message}")

    @property
    def label(self) -> str:
        """The node in messages: "node 'disk'", or "node 'disk' child 'file'" for one without a name."""
        node: Node = self
        roles: list[str] = []
        while node.options.node_name is None and node.opener is not None and node.opener.parent is not None:
            roles.append(node.opener.role)
            node = node.opener.parent
        runs = ((role, len(list(run))) for role, run in itertools.groupby(reversed(roles)))
        return f"node '{node.name}'" + "".join(_path_to(role, length) for role, length in runs)

    # ---- requests that come from the datapath when there is no native object ----

    async def serve(self, fault: Fault) -> None:
        """Runs one request of the datapath through the methods above.

        Those that a driver does not have: zeroes are written as data, all is data in block status, and a
        discard, a flush or a read-ahead does nothing. The base class's own would come back here.
        """
        match fault.op:
            case Op.READ if self._has("read"):
                fault.put_data(0, await self.read(fault.offset, fault.length))
            case Op.WRITE if self._has("write"):
                await self.write(fault.offset, fault.get_data(), fault.flags)
            case Op.READ | Op.WRITE:
                raise OSError(errno.EOPNOTSUPP, f"driver '{self.driver}' has no {fault.op.name.lower()}")
            case Op.ZEROES if self._has("write_zeroes"):
                await self.write_zeroes(fault.offset, fault.length, fault.flags)
            case Op.ZEROES:
                await self._write_zeros_as_data(fault)
            case Op.DISCARD if self._has("discard"):
                await self.discard(fault.offset, fault.length)
            case Op.FLUSH if self._has("flush"):
                await self.flush()
            case Op.STATUS if self._has("block_status"):
                for extent in await self.block_status(fault.offset, fault.length):
                    if not fault.put_extent(extent.length, extent.flags):
                        break
            case Op.STATUS:
                fault.put_extent(fault.length, 0)
        fault.done()

    def _has(self, method: str) -> bool:
        return getattr(type(self), method) is not getattr(Node, method)

    async def _write_zeros_as_data(self, fault: Fault) -> None:
        if fault.flags & FAST_ZERO or not self._has("write"):
            raise OSError(errno.EOPNOTSUPP, f"driver '{self.driver}' has no fast zeroes")
        for at in range(0, fault.length, ZEROS_AT_ONCE):
            part = min(ZEROS_AT_ONCE, fault.length - at)
            await self.write(fault.offset + at, bytes(part), fault.flags & FUA)
