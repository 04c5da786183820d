# SPDX-License-Identifier: Apache-2.0
"""The base class of exports: what offers a node to clients outside.

An export type registers by being defined (``class NbdExport(Export, type="nbd")``). The service has checked
the options, found the node and its I/O threads, and attached a root edge; its gate is where requests enter.
How an export leaves, step by step and undoable: see target.exports.removal.
"""

from __future__ import annotations

import asyncio
import builtins
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import msgspec
from msgspec import UNSET, UnsetType

from target.config.options import Notation, OptionError, expected, member, parse
from target.events import Event
from target.graph.permissions import Perm

if TYPE_CHECKING:
    from target.datapath import Datapath
    from target.graph.edge import RootEdge
    from target.graph.node import Node

_types: dict[str, type[Export]] = {}

# How the clients of an export end. hard: at once, without the replies to what is under way. soft: with them,
# and what they ask later is refused. stop: with them, and what they ask later is not read. hide: when they
# please.
End = Literal["hard", "soft", "stop", "hide"]
# How long soft waits for clients that leave something half done (seconds).
SOFT_SECONDS = 3.0


class ExportDeleted(Event):
    """An export is gone: its id may be used again."""

    name = "BLOCK_EXPORT_DELETED"
    id: str


class ExportOptions(msgspec.Struct, rename="kebab", kw_only=True, forbid_unknown_fields=True):
    """Options of every export, named as in QMP's BlockExportOptions (``type`` chooses the class)."""

    id: str
    node_name: str
    writable: bool = False
    writethrough: bool = False
    iothread: str | list[str] | UnsetType = UNSET
    fixed_iothread: bool = False
    allow_inactive: bool = False

    def on(self, names: list[str]) -> Self:
        """The same with other I/O threads."""
        given: str | list[str] | UnsetType = names[0] if len(names) == 1 else names or UNSET
        return msgspec.structs.replace(self, iothread=given)

    def iothreads(self) -> list[str]:
        """Names of I/O thread objects; none means the default thread."""
        if self.iothread is UNSET:
            return []
        return [self.iothread] if isinstance(self.iothread, str) else list(self.iothread)


class ExportClient(msgspec.Struct, rename="kebab", kw_only=True, omit_defaults=True):
    """A client that is attached. ``peer`` says who; requests include those that failed or were refused.

    Bytes are those on an NBD connection; kicks and notifications are a virtqueue's, to here and from here.
    """

    peer: str
    pid: int | None = None  # of a process of this machine
    since: float  # seconds since the epoch
    requests: int
    failed: int
    bytes_received: int | None = None
    bytes_sent: int | None = None
    kicks: int | None = None
    notifications: int | None = None


class Export(ABC):
    """One export, from its creation to its removal.

    ``edge.gate`` takes the requests; ``threads`` are the indices of the I/O threads to spread them over (at
    least one). ``writethrough`` is the export's to honour: each write then has FUA.
    """

    type: ClassVar[str]
    Options: ClassVar[builtins.type[ExportOptions]] = ExportOptions
    # What the export lets other users of the node do.
    shared: ClassVar[Perm] = Perm.ALL
    # Whether it can serve a node that is inactive.
    serves_inactive: ClassVar[bool] = False
    # It takes no clients any more, for good.
    shutting_down = False

    def __init_subclass__(cls, *, type: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if type is not None:
            assert type not in _types, f"two exports have the type {type}"
            cls.type = type
            _types[type] = cls

    def __init__(
        self, options: ExportOptions, node: Node, edge: RootEdge, threads: list[int], datapath: Datapath
    ) -> None:
        self.options = options
        self.edge = edge
        self.threads = threads
        self.datapath = datapath
        self.gone = asyncio.Event()  # set at the end

    @property
    def node(self) -> Node:
        """What it offers now: another node may have taken the place of the one it was made for."""
        return self.edge.node

    @abstractmethod
    async def start(self) -> None:
        """Begins to serve. BlockError or OSError when it cannot; then nothing is left behind."""

    @abstractmethod
    def suspend(self) -> None:
        """New clients wait, until ``resume`` or ``finish``; those that are attached stay."""

    def make_way(self, other: Export) -> None:
        """While it is suspended: gives up what the other one needs, until ``resume``. OSError."""
        return None

    @abstractmethod
    async def drain(self, deadline: float) -> None:
        """Waits for what clients have asked, while what they ask next waits for ``resume`` or ``finish``.

        TimeoutError after so many seconds; then they go on.
        """

    @abstractmethod
    def resume(self) -> None:
        """Undoes ``suspend`` and ``drain``."""

    @abstractmethod
    async def finish(self, how: End) -> None:
        """Takes no new clients, and returns when none is left, nothing is under way and the sockets are gone.

        The caller detaches the edge.
        """

    async def stop(self) -> None:
        """``finish`` as the target ends."""
        await self.finish("stop")

    @abstractmethod
    async def move(self, threads: list[int], deadline: float) -> None:
        """To other I/O threads (at least one), with the clients that are attached, who notice nothing.

        TimeoutError when what is under way takes longer (seconds): then nothing has changed.
        """

    @abstractmethod
    def clients(self) -> list[ExportClient]:
        """Those that are attached now."""

    @abstractmethod
    def describe(self) -> list[str]:
        """Command lines, ready to run, by which a client attaches."""

    def uri(self) -> dict[str, str]:
        """Variables for ``--run``: uri, unixsocket, port, exportname; those that apply."""
        return {}

    def counters(self) -> dict[str, Any]:
        """For the line that SIGUSR1 prints."""
        return self.edge.gate.counters()


def types() -> dict[str, type[Export]]:
    """All export types by name, sorted."""
    return dict(sorted(_types.items()))


def parse_export(
    value: Any, notation: Notation = Notation.JSON, path: str = ""
) -> tuple[type[Export], ExportOptions]:
    """The export's class and its typed options. OptionError says which member is wrong."""
    if not isinstance(value, dict):
        raise expected(path or "export", "object")
    tag = member(path, "type")
    if "type" not in value:
        raise OptionError(f"Parameter '{tag}' is missing")
    kind = value["type"]
    if not isinstance(kind, str):
        raise expected(tag, "string")
    if kind not in _types:
        raise OptionError(f"Parameter '{tag}' does not accept value '{kind}'")
    rest = {key: item for key, item in value.items() if key != "type"}
    return _types[kind], parse(rest, _types[kind].Options, notation, path=path)
