# SPDX-License-Identifier: Apache-2.0
"""NBD servers: listening sockets, handshakes with a deadline, and the bound on connections.

Several servers may run at once; all offer the exports of one directory (``directory_of``). A server knows
nothing of nodes: an export takes the socket over when the handshake is done.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import msgspec

from target.datapath import Datapath, ffi, lib
from target.exports.address import FdAddress, InetAddress, Listener, UnixAddress, listen
from target.exports.base import End
from target.exports.nbd.handshake import Negotiated, ProtocolError, negotiate
from target.exports.nbd.protocol import ExportInfo, TransmissionFlag
from target.exports.nbd.session import Session, end_sessions
from target.exports.nbd.stream import SocketStream
from target.exports.peer import Peer, peer_of
from target.exports.warnings import Warnings
from target.fdsets import Descriptors
from target.graph.errors import BlockError

if TYPE_CHECKING:
    from target.exports.nbd.export import NbdExport

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 100
SESSION_MEMORY = 256 << 20  # buffers of all sessions; each may always have a little more (bytes)
HANDSHAKE_SECONDS = 10
SEND_BUFFER = 1 << 20  # asked for on unix sockets; the kernel bounds it (net.core.wmem_max)
ACCEPT_PAUSE = 0.1  # after an accept that failed for want of descriptors or memory
TEMPORARY = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ECONNABORTED, errno.EPROTO}


class NbdServerOptions(msgspec.Struct, rename="kebab", kw_only=True, forbid_unknown_fields=True):
    """Options of ``--nbd-server`` and nbd-server-start. max_connections 0: no bound."""

    addr: UnixAddress | InetAddress | FdAddress
    tls_creds: str | None = None
    tls_authz: str | None = None
    max_connections: int = MAX_CONNECTIONS
    handshake_max_seconds: int = HANDSHAKE_SECONDS

    def check(self) -> None:
        """BlockError for what is not built, or has no meaning."""
        for option, value in (("tls-creds", self.tls_creds), ("tls-authz", self.tls_authz)):
            if value is not None:
                raise BlockError(f"NBD server: option '{option}' is not supported: TLS is not built")
        for option, number in (
            ("max-connections", self.max_connections),
            ("handshake-max-seconds", self.handshake_max_seconds),
        ):
            if not 0 <= number < 1 << 32:
                raise BlockError(f"NBD server: option '{option}': {number} is out of range")


class Directory:
    """The NBD exports of a process by name, and the servers that offer them."""

    def __init__(self) -> None:
        self.exports: dict[str, NbdExport] = {}
        self.suspended: list[NbdExport] = []
        """not offered now; whether they will be again is about to be decided, and clients wait for it"""
        self.servers: list[NbdServer] = []
        self._decided = asyncio.Event()
        self.memory: Any = ffi.NULL
        """the datapath's bound on the buffers of all sessions, while there are exports"""

    def add(self, export: NbdExport) -> None:
        """New clients find it from here on. MemoryError."""
        if self.memory == ffi.NULL:
            self.memory = lib.bt_nbd_server_new(export.datapath.dp, SESSION_MEMORY)
            if self.memory == ffi.NULL:
                raise MemoryError
        self.exports[export.name] = export

    def suspend(self, export: NbdExport) -> None:
        """New clients that ask for it wait, until ``resume`` or ``remove``."""
        if self.exports.get(export.name) is export:
            del self.exports[export.name]
            self.suspended.append(export)

    def resume(self, export: NbdExport) -> None:
        if export in self.suspended:
            self.suspended.remove(export)
            self.exports[export.name] = export
            self._decide()

    def remove(self, export: NbdExport) -> None:
        """New clients do not find it any more."""
        if self.exports.get(export.name) is export:
            del self.exports[export.name]
        elif export in self.suspended:
            self.suspended.remove(export)
        self._decide()
        if not self.exports and not self.suspended and self.memory != ffi.NULL:
            lib.bt_nbd_server_free(self.memory)  # goes with its last session
            self.memory = ffi.NULL

    def _decide(self) -> None:
        decided, self._decided = self._decided, asyncio.Event()
        decided.set()

    async def find(self, name: str) -> NbdExport | None:
        """The empty name means the only export there is."""
        while name not in self.exports and any(name in ("", export.name) for export in self.suspended):
            await self._decided.wait()
        if name == "" and name not in self.exports and len(self.exports) == 1:
            return next(iter(self.exports.values()))
        return self.exports.get(name)


_directories: WeakKeyDictionary[Datapath, Directory] = WeakKeyDictionary()


def directory_of(datapath: Datapath) -> Directory:
    """The one directory of the process that owns this datapath."""
    return _directories.setdefault(datapath, Directory())


class _View:
    """A directory as the clients of one server see it."""

    def __init__(self, directory: Directory, multi_conn: bool) -> None:
        self._directory = directory
        self._extra = TransmissionFlag.CAN_MULTI_CONN if multi_conn else TransmissionFlag(0)

    def _shown(self, export: NbdExport) -> ExportInfo:
        info = export.info()
        return replace(info, flags=info.flags | self._extra) if export.node.features.multi_conn else info

    def infos(self) -> Iterator[ExportInfo]:
        known = {export.name: export for export in self._directory.suspended} | self._directory.exports
        for name in sorted(known):
            yield self._shown(known[name])

    async def find(self, name: str) -> ExportInfo | None:
        export = await self._directory.find(name)
        return None if export is None else self._shown(export)


class NbdServer:
    """One address (which may be several sockets) with its limits, from ``start`` to ``stop``."""

    def __init__(self, datapath: Datapath, options: NbdServerOptions, id: str = "") -> None:
        options.check()
        self.id = id
        self.options = options
        self.directory = directory_of(datapath)
        self.listeners: list[Listener] = []
        self._view = _View(self.directory, options.max_connections != 1)
        self._accepting: list[asyncio.Task[None]] = []
        self._handshakes: set[asyncio.Task[None]] = set()
        self._sessions: set[Session] = set()
        self._room = asyncio.Event()
        self._warnings = Warnings(log, "NBD server")

    @property
    def connections(self) -> int:
        """Clients in handshake and in transmission."""
        return len(self._handshakes) + len(self._sessions)

    async def start(self, fds: Descriptors | None = None) -> None:
        """Listens. BlockError when the address cannot be used. ``fds``: see address.listen."""
        self.listeners = await listen(self.options.addr, fds)
        self._accepting = [asyncio.create_task(self._accept(listener)) for listener in self.listeners]
        self.directory.servers.append(self)

    async def close(self) -> None:
        """Stops listening, and ends handshakes; its address is free then."""
        if self in self.directory.servers:
            self.directory.servers.remove(self)
        tasks = [*self._accepting, *self._handshakes]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for listener in self.listeners:
            listener.close()

    def cut(self) -> None:
        """Its clients get no more replies; ``stop`` waits for their end."""
        for session in self._sessions:
            session.cut()

    async def stop(self, how: End = "stop") -> None:
        """``close``, and ends sessions."""
        await self.close()
        await end_sessions(self._sessions, how)
        self._warnings.close()

    async def _accept(self, listener: Listener) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wait_for_room()
            try:
                sock, _ = await loop.sock_accept(listener.socket)
            except OSError as error:
                if error.errno not in TEMPORARY:
                    raise
                self._warnings.say(f"accept: {error.strerror}")
                await asyncio.sleep(ACCEPT_PAUSE)
                continue
            task = asyncio.create_task(self._serve(sock))
            self._handshakes.add(task)
            task.add_done_callback(self._handshake_over)

    async def _wait_for_room(self) -> None:
        """Further clients wait in the socket's backlog."""
        limit = self.options.max_connections
        while limit and self.connections >= limit:
            self._room.clear()
            await self._room.wait()

    def _handshake_over(self, task: asyncio.Task[None]) -> None:
        self._handshakes.discard(task)
        self._room.set()
        if not task.cancelled() and (error := task.exception()):
            log.error("NBD server: handshake failed", exc_info=error)

    def _session_over(self, session: Session) -> None:
        self._sessions.discard(session)
        self._room.set()

    async def _serve(self, sock: socket.socket) -> None:
        """A client's handshake; then the export has the socket."""
        peer = peer_of(sock)
        try:
            _tune(sock)
            async with asyncio.timeout(self.options.handshake_max_seconds or None):
                negotiated = await negotiate(SocketStream(sock), self._view)
                export = await self.directory.find(negotiated.export.name) if negotiated else None
            if negotiated is None or export is None or not export.is_still(negotiated.export):
                return
            self._begin(export, sock, negotiated, peer)
        except TimeoutError:
            self._warnings.say(f"{peer}: the handshake was not finished in time")
        except (EOFError, ConnectionError):
            pass  # it has hung up
        except (ProtocolError, OSError) as error:
            self._warnings.say(f"{peer}: {error}")
        finally:
            sock.close()

    def _begin(self, export: NbdExport, sock: socket.socket, negotiated: Negotiated, peer: Peer) -> None:
        try:
            session = export.serve(sock, negotiated, peer, self._session_over)
        except OSError as error:
            export.warnings.say(f"{peer}: a new session: {error.strerror}")
        else:
            self._sessions.add(session)


def _tune(sock: socket.socket) -> None:
    sock.setblocking(False)
    if sock.family == socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        return
    with contextlib.suppress(OSError):  # an inherited socket need not be TCP
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
