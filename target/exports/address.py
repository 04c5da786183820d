# SPDX-License-Identifier: Apache-2.0
"""Socket addresses in options (QMP's SocketAddress), and listening on them. Clients: see target.connecting.

A unix socket follows the umask. A stale one is replaced, a live one and anything that is not a socket (a
symbolic link too) are refused; the one made here is removed at the end if it is still the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
import struct
from typing import Any

import msgspec

from target.fdsets import Descriptors
from target.graph.errors import BlockError

BACKLOG = 128
ASIDE = ".aside"  # behind the path of a listener that has stepped aside
PEER = struct.Struct("iII")  # struct ucred: process, user, group
UNIX_PATH_BYTES = 108  # sun_path
PORT_MAX = 65535


class UnixAddress(msgspec.Struct, tag_field="type", tag="unix", rename="kebab", forbid_unknown_fields=True):
    """A unix socket by path, or by a name outside of any filesystem (``abstract``; ``tight``: not padded)."""

    path: str
    abstract: bool = False
    tight: bool = True


class InetAddress(msgspec.Struct, tag_field="type", tag="inet", rename="kebab", forbid_unknown_fields=True):
    """A TCP address; port 0 takes any free one, an empty host means all interfaces.

    ``to``: the last port to try. ``ipv4`` and ``ipv6``: which addresses; unless given, all that there are.
    """

    host: str
    port: str
    numeric: bool = False
    to: int | None = None
    ipv4: bool | None = None
    ipv6: bool | None = None
    keep_alive: bool = False


class FdAddress(
    msgspec.Struct, tag_field="type", tag="fd", rename={"number": "str"}, forbid_unknown_fields=True
):
    """A descriptor that the process was started with, by number: a listening socket."""

    number: str  # "str" in QMP


class VsockAddress(msgspec.Struct, tag_field="type", tag="vsock", rename="kebab", forbid_unknown_fields=True):
    """A port of a virtual machine or its host. For clients."""

    cid: str
    port: str


SocketAddress = UnixAddress | InetAddress | FdAddress


class Listener:
    """A listening, non-blocking socket; ``close`` also removes its path."""

    def __init__(self, sock: socket.socket, path: str | None = None) -> None:
        self.socket = sock
        # The working directory changes when the process goes to the background.
        self.path = None if path is None else os.path.abspath(path)
        self._identity = _identity(path) if path is not None else None

    def step_aside(self) -> None:
        """Another listener may have the path, until ``step_back``. OSError."""
        assert self.path is not None
        os.rename(self.path, self.path + ASIDE)
        self.path += ASIDE

    def step_back(self) -> None:
        """The opposite; nothing when it has not stepped aside. OSError."""
        if self.path is not None and self.path.endswith(ASIDE):
            path = self.path.removesuffix(ASIDE)
            os.rename(self.path, path)
            self.path = path

    def close(self) -> None:
        self.socket.close()
        path, self.path = self.path, None
        if path is not None and _identity(path) == self._identity:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


async def listen(
    address: UnixAddress | InetAddress | FdAddress, fds: Descriptors | None = None
) -> list[Listener]:
    """The sockets that listen on address: one, or one for each address that a host name has. BlockError.

    ``fds``: where descriptors have names.
    """
    if isinstance(address, UnixAddress):
        return [listen_unix(address.path, address.abstract, address.tight)]
    if isinstance(address, FdAddress):
        return [listen_fd(address.number, fds)]
    return await listen_inet(address)


def listen_unix(path: str, abstract: bool = False, tight: bool = True) -> Listener:
    """A listening unix socket at path. BlockError when the path is taken or cannot be used.

    An abstract one is outside of any filesystem; ``tight``: its name is not padded.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        if not path:
            raise BlockError("Parameter 'path' expects the path of a unix socket")
        if not abstract:
            _remove_stale(path)
        sock.bind(unix_name(path, abstract, tight))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        if error.errno is None:  # raised by Python itself, before the system call
            raise BlockError(f"UNIX socket path '{path}' is too long") from None
        raise BlockError.from_os(f"Failed to bind socket to {path}", error) from None
    except BlockError:
        sock.close()
        raise
    return Listener(sock, None if abstract else path)


def unix_name(path: str, abstract: bool, tight: bool) -> str | bytes:
    """What bind and connect take."""
    if not abstract:
        return path
    name = b"\0" + os.fsencode(path)
    return name if tight else name.ljust(UNIX_PATH_BYTES, b"\0")


def _remove_stale(path: str) -> None:
    """Removes a socket that nobody listens on."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise BlockError(f"Failed to bind socket to {path}: it exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        result = probe.connect_ex(path)
    if result == errno.ECONNREFUSED:
        os.unlink(path)
    elif result != errno.ENOENT:
        raise BlockError(f"Failed to bind socket to {path}: Address already in use")


def listen_fd(text: str, fds: Descriptors | None = None) -> Listener:
    """A listening socket that was inherited (a number) or passed (a name). BlockError when it is none."""
    with (fds or Descriptors()).taken(text) as fd:
        return _listen_fd(fd, text)


def _listen_fd(fd: int, text: str) -> Listener:
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise BlockError(f"File descriptor '{text}' is not a socket")
        sock = socket.socket(fileno=fd)
    except (OSError, OverflowError):
        raise BlockError(f"File descriptor '{text}' is not a socket") from None
    if sock.type != socket.SOCK_STREAM or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        sock.detach()
        raise BlockError(f"File descriptor '{text}' is not a listening socket")
    sock.setblocking(False)
    sock.set_inheritable(False)
    return Listener(sock)


async def listen_inet(address: InetAddress) -> list[Listener]:
    """TCP sockets on all addresses of host. With port 0 all share the port that the first one got."""
    host, port = address.host, address.port
    if not port.isdecimal() or int(port) > PORT_MAX:
        raise BlockError(f"Parameter 'port' expects a number from 0 to {PORT_MAX}, not '{port}'")
    if address.keep_alive:
        raise BlockError("keep-alive option is not supported for passive sockets")
    last = int(port) if address.to is None else address.to
    if not int(port) <= last <= PORT_MAX:
        raise BlockError(f"Parameter 'to' expects a number from {port} to {PORT_MAX}, not '{last}'")
    numeric = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV if address.numeric else 0
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            host or None,
            port,
            family=family(address.ipv4, address.ipv6),
            type=socket.SOCK_STREAM,
            flags=socket.AI_PASSIVE | socket.AI_ADDRCONFIG | numeric,
        )
    except socket.gaierror as error:
        raise BlockError(f"address resolution failed for {host}:{port}: {error.strerror}") from None
    for number in range(int(port), last + 1):
        try:
            return _bind_all(found, number)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or number == last:
                raise BlockError.from_os(f"Failed to bind socket to {host}:{number}", error) from None
    raise AssertionError


def family(ipv4: bool | None, ipv6: bool | None) -> int:
    """Of the two, one that is on is the only one, unless the other is on, too; as QEMU decides."""
    if ipv4 is False and ipv6 is False:
        raise BlockError("Cannot disable IPv4 and IPv6 at same time")
    if ipv6 is False or (ipv4 and not ipv6):
        return socket.AF_INET
    if ipv4 is False or (ipv6 and not ipv4):
        return socket.AF_INET6
    return socket.AF_UNSPEC


def _bind_all(found: list[Any], port: int) -> list[Listener]:
    """A socket for each address, or OSError and none."""
    listeners: list[Listener] = []
    try:
        for family, kind, protocol, _, where in found:
            number = listeners[0].socket.getsockname()[1] if port == 0 and listeners else port
            where = (where[0], number, *where[2:])
            listeners.append(Listener(_bind_inet(family, kind, protocol, where)))
    except OSError:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def _bind_inet(family: int, kind: int, protocol: int, where: tuple[object, ...]) -> socket.socket:
    sock = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(where)
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def peer(sock: socket.socket) -> str:
    """Who is at the other end, for messages: "client (process 7)", "client ::1 port 40000"."""
    with contextlib.suppress(OSError):
        if sock.family == socket.AF_UNIX:
            pid, _, _ = PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size))
            return f"client (process {pid})"
        host, port = sock.getpeername()[:2]
        return f"client {host} port {port}"
    return "client"


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
