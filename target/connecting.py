# SPDX-License-Identifier: Apache-2.0
"""Connecting to socket addresses as options give them: what the clients among the drivers share.

It does not bound the time: the caller does.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
from typing import Any

import msgspec

from target.exports.address import FdAddress, VsockAddress, family, unix_name
from target.fdsets import Descriptors
from target.graph.errors import BlockError


class UnixPeer(msgspec.Struct, tag_field="type", tag="unix", rename="kebab", forbid_unknown_fields=True):
    """A unix socket by path, or by a name outside of any filesystem (``abstract``; ``tight``: not padded)."""

    path: str
    abstract: bool = False
    tight: bool = True


class InetPeer(msgspec.Struct, tag_field="type", tag="inet", rename="kebab", forbid_unknown_fields=True):
    """A TCP server. ``ipv4`` and ``ipv6``: which addresses may be used; unless given, all that there are."""

    host: str
    port: str
    numeric: bool = False
    keep_alive: bool = False
    ipv4: bool | None = None
    ipv6: bool | None = None


PeerAddress = UnixPeer | InetPeer | VsockAddress | FdAddress

BUSY_PAUSE = 0.01  # between attempts on a unix socket whose queue is full (seconds)
CIDS = 1 << 32
PORTS = 1 << 16


def describe(address: PeerAddress) -> str:
    """The address in messages."""
    match address:
        case UnixPeer(path=path, abstract=abstract):
            return f"unix:{'@' if abstract else ''}{path}"
        case InetPeer(host=host, port=port):
            return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        case VsockAddress(cid=cid, port=port):
            return f"vsock:{cid}:{port}"
        case FdAddress(number=number):
            return f"fd:{number}"


async def connect(address: PeerAddress) -> socket.socket:
    """A connected, non-blocking stream socket. BlockError says what failed."""
    match address:
        case UnixPeer():
            return await _connect(socket.AF_UNIX, _unix_name(address), address)
        case VsockAddress():
            where = (_number(address.cid, "cid"), _number(address.port, "port"))
            return await _connect(socket.AF_VSOCK, where, address)
        case InetPeer():
            return await _connect_inet(address)
        case FdAddress(number=number):
            return adopt(number)


def adopt(text: str, fds: Descriptors | None = None) -> socket.socket:
    """A connected stream socket that was inherited (a number) or passed (a name), taken over. BlockError."""
    with (fds or Descriptors()).taken(text) as fd:
        return _adopt(fd, text)


def _adopt(fd: int, text: str) -> socket.socket:
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise BlockError(f"File descriptor '{text}' is not a socket")
        sock = socket.socket(fileno=fd)
    except (OSError, OverflowError):
        raise BlockError(f"File descriptor '{text}' is not a socket") from None
    try:
        sock.getpeername()
        connected = sock.type == socket.SOCK_STREAM
    except OSError:
        connected = False
    if not connected:
        sock.detach()
        raise BlockError(f"File descriptor '{text}' is not a connected stream socket")
    sock.setblocking(False)
    sock.set_inheritable(False)
    return sock


def _number(text: str, name: str) -> int:
    if not text.isdecimal() or int(text) >= CIDS:
        raise BlockError(f"Parameter '{name}' expects a number below 2^32, not '{text}'")
    return int(text)


def _port(text: str) -> str:
    """A port's number or its service's name. getaddrinfo takes numbers modulo 65536: to another server."""
    is_number = text.isascii() and text.isdecimal()
    if (is_number and 0 < int(text) < PORTS) or text[:1].isalpha():
        return text
    raise BlockError(f"Parameter 'port' expects a number from 1 to {PORTS - 1} or a service, not '{text}'")


def _unix_name(address: UnixPeer) -> str | bytes:
    if not address.path:
        raise BlockError("Parameter 'path' expects the path of a unix socket")
    return unix_name(address.path, address.abstract, address.tight)


async def _connect_inet(address: InetPeer) -> socket.socket:
    """Tries all addresses of the host; the error is the last one's."""
    loop = asyncio.get_running_loop()
    wanted = family(address.ipv4, address.ipv6)
    flags = socket.AI_ADDRCONFIG
    if address.numeric:
        flags |= socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
    try:
        found = await loop.getaddrinfo(
            address.host, _port(address.port), family=wanted, type=socket.SOCK_STREAM, flags=flags
        )
    except (socket.gaierror, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a host name"
        raise BlockError(f"address resolution failed for {describe(address)}: {reason}") from None
    failure = BlockError(f"address resolution failed for {describe(address)}: no address")
    for found_family, _, _, _, where in found:
        try:
            sock = await _connect(found_family, where, address)
        except BlockError as error:
            failure = error
            continue
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, address.keep_alive)
        return sock
    raise failure


async def _connect(family: int, where: Any, address: PeerAddress) -> socket.socket:
    try:
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    except OSError as error:
        raise BlockError.from_os(f"Failed to connect to '{describe(address)}'", error) from None
    try:
        result = await _finish_connect(sock, where)
    except (OSError, ValueError) as error:  # raised by Python itself, before the system call
        sock.close()
        raise BlockError(f"Failed to connect to '{describe(address)}': {error}") from None
    except BaseException:
        sock.close()
        raise
    if result:
        sock.close()
        raise BlockError(f"Failed to connect to '{describe(address)}': {os.strerror(result)}")
    return sock


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _finish_connect(sock: socket.socket, where: Any) -> int:
    """0 or an errno."""
    while (result := sock.connect_ex(where)) == errno.EAGAIN:
        await asyncio.sleep(BUSY_PAUSE)
    if result != errno.EINPROGRESS:
        return result
    loop = asyncio.get_running_loop()
    writable: asyncio.Future[None] = loop.create_future()
    loop.add_writer(sock.fileno(), _resolve, writable)
    try:
        await writable
    finally:
        loop.remove_writer(sock.fileno())
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
