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

from target.exports.address import FdAddress, InetAddress, UnixAddress, VsockAddress
from target.graph.errors import BlockError

PeerAddress = UnixAddress | InetAddress | VsockAddress | FdAddress

BUSY_PAUSE = 0.01  # between attempts on a unix socket whose queue is full (seconds)
CIDS = 1 << 32


def describe(address: PeerAddress) -> str:
    """The address in messages."""
    match address:
        case UnixAddress(path=path):
            return f"unix:{path}" if not path.startswith("\0") else f"unix:@{path[1:]}"
        case InetAddress(host=host, port=port):
            return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        case VsockAddress(cid=cid, port=port):
            return f"vsock:{cid}:{port}"
        case FdAddress(number=number):
            return f"fd:{number}"


async def connect(address: PeerAddress) -> socket.socket:
    """A connected, non-blocking stream socket. BlockError says what failed."""
    match address:
        case UnixAddress(path=path):
            if not path:
                raise BlockError("Parameter 'path' expects the path of a unix socket")
            return await _connect(socket.AF_UNIX, path, address)
        case VsockAddress():
            where = (_number(address.cid, "cid"), _number(address.port, "port"))
            return await _connect(socket.AF_VSOCK, where, address)
        case InetAddress():
            return await _connect_inet(address)
        case FdAddress(number=number):
            return adopt(number)


def adopt(text: str) -> socket.socket:
    """A connected stream socket that the process was given, taken over. BlockError when it is none."""
    if not text.isdecimal():
        raise BlockError(f"File descriptor '{text}' is not a number")
    try:
        if not stat.S_ISSOCK(os.fstat(int(text)).st_mode):
            raise BlockError(f"File descriptor '{text}' is not a socket")
        sock = socket.socket(fileno=int(text))
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


async def _connect_inet(address: InetAddress) -> socket.socket:
    """Tries all addresses of the host; the error is the last one's."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG
        )
    except (socket.gaierror, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a host name"
        raise BlockError(f"address resolution failed for {describe(address)}: {reason}") from None
    failure = BlockError(f"address resolution failed for {describe(address)}: no address")
    for family, _, _, _, where in found:
        try:
            sock = await _connect(family, where, address)
        except BlockError as error:
            failure = error
            continue
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
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
