# SPDX-License-Identifier: Apache-2.0
"""Messages over a unix socket, with file descriptors: received whole or not at all. Knows no meaning."""

from __future__ import annotations

import array
import asyncio
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field

from target.exports.vhost_user_blk.messages import HEADER, MAX_FDS, Header, MessageError

# Seconds in which a message that has begun must be complete, or an answer be taken.
DEADLINE = 10.0
_FD_SIZE = array.array("i").itemsize
_ANCILLARY = socket.CMSG_SPACE(MAX_FDS * _FD_SIZE)


@dataclass(slots=True)
class Message:
    """fds belong to the message; ``close`` closes those that are left."""

    header: Header
    payload: bytes
    fds: list[int] = field(default_factory=list)

    def close(self) -> None:
        while self.fds:
            os.close(self.fds.pop())


class Connection:
    """Owns its socket. One coroutine at a time may receive or send."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._fds: list[int] = []

    def close(self) -> None:
        self._close_fds()
        self._sock.close()

    async def receive(self) -> Message | None:
        """The next message; None at the end. MessageError, TimeoutError (a part, then silence) or OSError."""
        await self._ready(reading=True)
        async with asyncio.timeout(DEADLINE):
            start = await self._read(HEADER.size)
            if not start:
                self._close_fds()
                return None
            header = Header.parse(start)
            payload = await self._read(header.size)
        if len(payload) != header.size:
            raise MessageError(f"request {header.request}: the connection ended within it")
        fds, self._fds = self._fds, []
        return Message(header, bytes(payload), fds)

    async def send(self, data: bytes) -> None:
        """TimeoutError when the peer does not read."""
        async with asyncio.timeout(DEADLINE):
            while data:
                try:
                    data = data[self._sock.send(data) :]
                except BlockingIOError:
                    await self._ready(reading=False)

    async def _read(self, size: int) -> bytearray:
        """size bytes; fewer only where the stream ends, which is no error before the first."""
        data = bytearray()
        while len(data) < size:
            try:
                part, ancillary, flags, _ = self._sock.recvmsg(
                    size - len(data), _ANCILLARY, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                await self._ready(reading=True)
                continue
            except ConnectionResetError:
                return data
            self._take_fds(ancillary)
            if flags & socket.MSG_CTRUNC or len(self._fds) > MAX_FDS:
                raise MessageError(f"a message with more than {MAX_FDS} file descriptors")
            if not part:
                if data:
                    raise MessageError("the connection ended within a message")
                return data
            data += part
        return data

    def _take_fds(self, ancillary: list[tuple[int, int, bytes]]) -> None:
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(data[: len(data) - len(data) % _FD_SIZE])
                self._fds += fds

    def _close_fds(self) -> None:
        while self._fds:
            os.close(self._fds.pop())

    async def _ready(self, reading: bool) -> None:
        await _wait(self._sock, reading)


async def _wait(sock: socket.socket, reading: bool) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    remove: Callable[[int], bool]
    if reading:
        loop.add_reader(sock.fileno(), _resolve, ready)
        remove = loop.remove_reader
    else:
        loop.add_writer(sock.fileno(), _resolve, ready)
        remove = loop.remove_writer
    try:
        await ready
    finally:
        remove(sock.fileno())


def _resolve(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
