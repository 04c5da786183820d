# SPDX-License-Identifier: Apache-2.0
"""Devices that are stream sockets: a server with many clients, or a client that may reconnect."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from typing import Any

import msgspec
from msgspec import UNSET

from target import connecting
from target.chardev.base import Chardev
from target.chardev.options import SocketOptions
from target.chardev.stream import SocketStream
from target.connecting import InetPeer, PeerAddress, UnixPeer
from target.exports import address
from target.exports.address import Listener, VsockAddress
from target.exports.address_legacy import (
    FdSocketAddressWrapper,
    InetSocketAddressWrapper,
    UnixSocketAddressWrapper,
    VsockSocketAddressWrapper,
    plain,
)
from target.exports.warnings import Warnings
from target.graph.errors import BlockError

log = logging.getLogger("blocktarget")

ACCEPT_PAUSE = 0.1  # seconds after an accept that failed for want of descriptors or memory
_LASTING = (errno.EBADF, errno.EINVAL, errno.ENOTSOCK)


class Socket(Chardev, type="socket"):
    """Clients wait in the backlog until there is a front end, and room."""

    options: SocketOptions

    async def _open(self) -> None:
        self._listeners: list[Listener] = []
        self._first: socket.socket | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._warnings = Warnings(log, f"chardev '{self.id}'")
        self._has_front = asyncio.Event()
        self._room = asyncio.Event()
        self._check()
        if self.options.server:
            await self._open_server()
        else:
            await self._open_client()

    def _check(self) -> None:
        options = self.options
        for name in ("telnet", "tn3270", "websocket", "tls_creds", "tls_authz"):
            if getattr(options, name):
                raise BlockError(f"option '{name.replace('_', '-')}' is not supported")
        if options.server and (options.reconnect is not UNSET or options.reconnect_ms is not UNSET):
            raise BlockError("'reconnect' option is incompatible with socket in server listen mode")
        if not options.server and options.wait is not UNSET:
            raise BlockError("'wait' option is incompatible with socket in client connect mode")
        if options.reconnect is not UNSET and options.reconnect_ms is not UNSET:
            raise BlockError("'reconnect' and 'reconnect-ms' are mutually exclusive")
        if isinstance(options.addr, FdSocketAddressWrapper) and options.reconnect is not UNSET:
            raise BlockError("'reconnect' option is incompatible with 'fd' address type")

    @property
    def filename(self) -> str:
        return self._describe() if self.clients else f"disconnected:{self._describe()}"

    def _describe(self) -> str:
        server = ",server=on" if self.options.server else ""
        match self.options.addr:
            case UnixSocketAddressWrapper(data=data):
                abstract = ",abstract=on" if data.abstract else ""
                tight = ",tight=on" if data.abstract and data.tight else ""
                return f"unix:{data.path}{abstract}{tight}{server}"
            case InetSocketAddressWrapper(data=data):
                return f"tcp:{data.host}:{self._port(data.port)}{server}"
            case VsockSocketAddressWrapper(data=data):
                return f"vsock:{data.cid}:{data.port}"
            case FdSocketAddressWrapper(data=data):
                return f"fd:{data.number}{server}"

    def address(self) -> dict[str, Any]:
        """In QMP's form, without the layer of ``data``."""
        given = self.options.addr
        known: dict[str, Any] = msgspec.to_builtins(given.data)
        if isinstance(given, InetSocketAddressWrapper):
            known["port"] = self._port(given.data.port)
        return {
            **{name: value for name, value in known.items() if value is not None},
            "type": given.__struct_config__.tag,
        }

    def _port(self, given: str) -> str:
        """The one that the kernel chose, where the options leave it to it."""
        return str(self._listeners[0].socket.getsockname()[1]) if self._listeners else given

    # ---- server ----

    async def _open_server(self) -> None:
        self._listeners = await self._listen()
        if self.options.wait is True:
            self._warnings.say(f"waiting for a client on {self._describe()}")
            self._first = await self._accept(self._listeners[0])
        self._tasks = [asyncio.ensure_future(self._run_server(listener)) for listener in self._listeners]

    async def _listen(self) -> list[Listener]:
        given = self.options.addr
        if isinstance(given, VsockSocketAddressWrapper):
            raise BlockError("a server on an address of type 'vsock' is not supported")
        return await address.listen(plain(given), self.descriptors)

    async def _run_server(self, listener: Listener) -> None:
        while True:
            await self._has_front.wait()
            await self._wait_for_room()
            sock, self._first = self._first, None
            sock = sock or await self._accept(listener)
            if self.front is None:
                self._first = sock  # it came in the moment in which the front end left
                continue
            self._start(self._stream(sock)).add_done_callback(lambda _: self._room.set())

    async def _accept(self, listener: Listener) -> socket.socket:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listener.socket)
            except OSError as error:
                if error.errno in _LASTING:
                    raise
                self._warnings.say(f"accept: {error.strerror}")
                await asyncio.sleep(ACCEPT_PAUSE)
            else:
                return sock

    async def _wait_for_room(self) -> None:
        limit = self.options.max_connections
        while limit and self.clients >= limit:
            self._room.clear()
            await self._room.wait()

    # ---- client ----

    async def _open_client(self) -> None:
        pause = self._pause()
        if not pause:
            self._first = await self._connect()
        self._tasks = [asyncio.ensure_future(self._run_client(pause))]

    def _pause(self) -> float:
        """Seconds between attempts to connect; 0: one attempt."""
        if self.options.reconnect_ms is not UNSET:
            return self.options.reconnect_ms / 1000
        return 0 if self.options.reconnect is UNSET else self.options.reconnect

    async def _connect(self) -> socket.socket:
        match self.options.addr:
            case FdSocketAddressWrapper(data=data):
                return connecting.adopt(data.number, self.descriptors)
            case UnixSocketAddressWrapper(data=unix):
                peer: PeerAddress = UnixPeer(unix.path, unix.abstract, unix.tight)
            case VsockSocketAddressWrapper(data=vsock):
                peer = VsockAddress(vsock.cid, vsock.port)
            case InetSocketAddressWrapper(data=data):
                peer = InetPeer(data.host, data.port, data.numeric, data.keep_alive, data.ipv4, data.ipv6)
        try:
            return await connecting.connect(peer)
        except BlockError as error:
            raise BlockError(str(error).replace("'unix:", "'", 1)) from None

    async def _run_client(self, pause: float) -> None:
        told = False
        while True:
            try:
                sock = self._first or await self._connect()
                self._first, told = None, False
            except BlockError as error:
                if not told:  # once, not at each attempt
                    log.warning("Unable to connect character device %s: %s", self.id, error)
                told = True
            else:
                self._first = sock
                await self._has_front.wait()
                self._first = None
                await asyncio.wait({self._start(self._stream(sock))})
            if not pause:
                return
            await asyncio.sleep(pause)

    # ---- both ----

    def _stream(self, sock: socket.socket) -> SocketStream:
        if sock.family != socket.AF_UNIX and self.options.nodelay:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return SocketStream(sock, self._log)

    def _attached(self) -> None:
        self._has_front.set()

    async def detach(self) -> None:
        self._has_front.clear()
        await super().detach()

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for listener in self._listeners:
            listener.close()
        if self._first is not None:
            self._first.close()
        self._warnings.close()
        self._tasks, self._listeners, self._first = [], [], None
