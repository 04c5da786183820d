# SPDX-License-Identifier: Apache-2.0
"""The NBD export: a node offered under a name by every NBD server of the process.

Its sessions are spread over the export's I/O threads in turn. Dirty bitmaps and allocation depth are not
built; their options are refused by name.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import quote

from target.exports.base import End, Export, ExportClient, ExportOptions
from target.exports.nbd.handshake import Negotiated
from target.exports.nbd.protocol import MAX_STRING, ExportInfo, TransmissionFlag
from target.exports.nbd.server import NbdServer, directory_of, log
from target.exports.nbd.session import Session, end_sessions, pause_all, trouble
from target.exports.peer import Peer
from target.exports.warnings import Warnings
from target.graph.errors import BlockError
from target.graph.permissions import Perm

if TYPE_CHECKING:
    from target.datapath import Datapath
    from target.graph.edge import RootEdge
    from target.graph.node import Node

# By the node's features.
READS = {
    "flush": TransmissionFlag.SEND_FLUSH,
    "fua": TransmissionFlag.SEND_FUA,
    "cache": TransmissionFlag.SEND_CACHE,
    "rotational": TransmissionFlag.ROTATIONAL,
}
WRITES = {"trim": TransmissionFlag.SEND_TRIM, "fast_zero": TransmissionFlag.SEND_FAST_ZERO}


class NbdOptions(ExportOptions):
    """Options of ``type: nbd``. name: the node name unless given."""

    name: str | None = None
    description: str = ""
    bitmaps: list[Any] | None = None
    allocation_depth: bool = False


class NbdExport(Export, type="nbd"):
    """From ``start``, which makes its name known, to ``stop``, which ends its sessions."""

    Options: ClassVar[type[NbdOptions]] = NbdOptions
    # As QEMU's: who resizes the image behind our back is kept off. A resize by ``Change.resize`` is followed.
    shared: ClassVar[Perm] = Perm.ALL & ~Perm.RESIZE
    serves_inactive = True
    options: NbdOptions

    def __init__(
        self, options: NbdOptions, node: Node, edge: RootEdge, threads: list[int], datapath: Datapath
    ) -> None:
        super().__init__(options, node, edge, threads, datapath)
        self.name = options.node_name if options.name is None else options.name
        self.description = options.description or _sendable(node.features.description)
        self._check()
        self.directory = directory_of(datapath)
        self.sessions: set[Session] = set()
        self.warnings = Warnings(log, f"export '{options.id}'")
        self._turn = 0
        self._changing = asyncio.Lock()  # held while sessions are paused
        self._drained = False

    @staticmethod
    def _refuse(option: str, why: str) -> BlockError:
        return BlockError(f"option '{option}': {why}")

    def _check(self) -> None:
        if self.options.bitmaps is not None:
            raise self._refuse("bitmaps", "dirty bitmaps are not built")
        if self.options.allocation_depth:
            raise self._refuse("allocation-depth", "not built")
        for option, text in (("name", self.name), ("description", self.description)):
            if len(text.encode(errors="surrogatepass")) > MAX_STRING:
                raise self._refuse(option, f"longer than {MAX_STRING} bytes")
            if "\0" in text or not _is_utf8(text):
                raise self._refuse(option, "not a text that NBD can carry")

    async def start(self) -> None:
        if not self.directory.servers:
            raise BlockError("NBD server not running")
        if self.name in self.directory.exports:
            raise BlockError(f"NBD server already has export named '{self.name}'")
        self.directory.add(self)
        self.edge.on_resize = self._resized

    def suspend(self) -> None:
        self.directory.suspend(self)

    async def drain(self, deadline: float) -> None:
        await self._changing.acquire()
        try:
            await pause_all(self.sessions, deadline)
        except BaseException:
            self._changing.release()
            raise
        self._drained = True

    def resume(self) -> None:
        self._undrain()
        self.directory.resume(self)

    def _undrain(self) -> None:
        if not self._drained:
            return
        self._drained = False
        for session in self.sessions:
            session.resume()
        self._changing.release()

    async def finish(self, how: End) -> None:
        self.directory.remove(self)
        for session in self.sessions if how == "soft" else ():
            session.shut()
        self._undrain()
        await end_sessions(self.sessions, how)
        self.edge.on_resize = None
        self.warnings.close()

    async def move(self, threads: list[int], deadline: float) -> None:
        async with asyncio.timeout(deadline), self._changing:
            before, self.threads = self.threads, threads  # clients that come now go there at once
            sessions = list(self.sessions)
            try:
                await pause_all(sessions)
            except BaseException:
                self.threads = before
                raise
            for session in sessions:
                session.resume(self._next_thread())

    def _resized(self, size: int) -> None:
        """Clients that are attached keep the size that they know, and may use what is new beyond it."""
        for session in self.sessions:
            session.set_size(size)

    def clients(self) -> list[ExportClient]:
        return [session.client() for session in self.sessions]

    def info(self) -> ExportInfo:
        """As a new client sees it now."""
        flags = TransmissionFlag.HAS_FLAGS | self._features(READS)
        if self.options.writable:
            flags |= TransmissionFlag.SEND_WRITE_ZEROES | self._features(WRITES)
        else:
            flags |= TransmissionFlag.READ_ONLY
        return ExportInfo(self.name, self.node.size, flags, self.description)

    def _features(self, flags: dict[str, TransmissionFlag]) -> TransmissionFlag:
        found = TransmissionFlag(0)
        for name, flag in flags.items():
            if getattr(self.node.features, name):
                found |= flag
        return found

    def is_still(self, told: ExportInfo) -> bool:
        """Whether what a client was told in its handshake holds; the export may have been made anew since."""
        return (self.info().flags ^ told.flags) & TransmissionFlag.READ_ONLY == 0

    def serve(
        self, sock: socket.socket, negotiated: Negotiated, peer: Peer, on_end: Callable[[Session], None]
    ) -> Session:
        """Takes over a client's socket for transmission. OSError when it cannot; then sock is closed."""

        def ended(session: Session) -> None:
            self.sessions.discard(session)
            if why := trouble(session.ended.result()):
                self.warnings.say(f"{peer}: {why}")
            on_end(session)

        session = Session(
            self.datapath,
            self.directory.memory,
            self.edge.gate,
            sock,
            peer,
            self._next_thread(),
            negotiated,
            self.options.writethrough,
            ended,
        )
        session.set_size(self.node.size)
        self.sessions.add(session)
        return session

    def _next_thread(self) -> int:
        self._turn += 1
        return self.threads[self._turn % len(self.threads)]

    def describe(self) -> list[str]:
        return [line for server in self.directory.servers for line in self._describe(server)]

    def _describe(self, server: NbdServer) -> list[str]:
        lines = []
        for listener in server.listeners:
            name = listener.socket.getsockname()
            if isinstance(name, bytes):
                continue  # an abstract one, for which URIs have no form
            uri = shlex.quote(self._uri(listener.socket))
            lines.append(f"nbdinfo {uri}")
            unix = isinstance(name, str)
            where = f"-unix {shlex.quote(os.path.abspath(name))}" if unix else f"{name[0]} {name[1]}"
            lines.append(f"nbd-client {where} -name {shlex.quote(self.name)} /dev/nbd0")
            lines.append(f"qemu-system-x86_64 -drive file={uri},format=raw,if=virtio")
        return lines

    def _uri(self, sock: socket.socket) -> str:
        name = sock.getsockname()
        path = quote(self.name)
        if isinstance(name, str):
            return f"nbd+unix:///{path}?socket={quote(os.path.abspath(name))}"
        host = f"[{name[0]}]" if sock.family == socket.AF_INET6 else name[0]
        return f"nbd://{host}:{name[1]}/{path}"

    def uri(self) -> dict[str, str]:
        """Of several listeners the first one of each kind counts."""
        found: dict[str, str] = {}
        for server in self.directory.servers:
            for listener in server.listeners:
                name = listener.socket.getsockname()
                if isinstance(name, bytes):
                    continue
                unix = isinstance(name, str)
                where = {"unixsocket": os.path.abspath(name)} if unix else {"port": str(name[1])}
                found = {"uri": self._uri(listener.socket), "exportname": self.name, **where, **found}
        return found

    def counters(self) -> dict[str, Any]:
        return {**super().counters(), "sessions": [session.counters() for session in self.sessions]}


def _sendable(text: str) -> str:
    """A node's own description, where NBD can carry it."""
    return text if "\0" not in text and _is_utf8(text) and len(text.encode()) <= MAX_STRING else ""


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
