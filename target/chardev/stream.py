# SPDX-License-Identifier: Apache-2.0
"""One conversation through a character device: bytes both ways, and descriptors where it is a unix socket.

A stream does not queue: ``write`` returns when the kernel has everything, so that a peer that does not read
slows down who writes.
"""

from __future__ import annotations

import array
import asyncio
import os
import select
import socket
from collections.abc import Callable
from typing import Protocol

READ_BYTES = 64 << 10
# Descriptors in one message, as many as QEMU takes, and those that may wait to be taken. Others are closed.
MESSAGE_FDS = 16
WAITING_FDS = 64
PIPE_BYTES = 4096  # PIPE_BUF: a pipe that is ready takes so much without blocking

_FD_SIZE = array.array("i").itemsize
_ANCILLARY = socket.CMSG_SPACE(MESSAGE_FDS * _FD_SIZE)

Log = Callable[[bytes], None]


class Stream(Protocol):
    """What a front end gets. One coroutine reads and one writes at a time."""

    async def read(self) -> bytes:
        """Some bytes, at most READ_BYTES; b"" at the end, and after an error or ``close``."""

    def take_fds(self) -> list[int]:
        """The descriptors received and not taken yet, oldest first. The caller closes them."""

    async def write(self, data: bytes) -> None:
        """Returns when the kernel has all of it. OSError when the peer is gone."""

    def hung_up(self) -> bool:
        """Whether the peer is gone, not only done with sending."""

    def close(self) -> None:
        """At once; a read that waits then ends, and a write fails."""


class _Waiting:
    """Waits for descriptors to become ready. ``close`` ends all waiting and comes before they are closed."""

    def __init__(self) -> None:
        self.closed = False
        self._waits: dict[asyncio.Future[None], Callable[[], object]] = {}

    def close(self) -> None:
        self.closed = True
        for ready in list(self._waits):
            self._forget(ready)
            _resolve(ready)

    async def forever(self) -> None:
        await self._wait(lambda ready: None, lambda: None)

    async def readable(self, fd: int) -> None:
        loop = asyncio.get_running_loop()
        await self._wait(lambda ready: loop.add_reader(fd, _resolve, ready), lambda: loop.remove_reader(fd))

    async def writable(self, fd: int) -> None:
        loop = asyncio.get_running_loop()
        await self._wait(lambda ready: loop.add_writer(fd, _resolve, ready), lambda: loop.remove_writer(fd))

    async def _wait(
        self, watch: Callable[[asyncio.Future[None]], object], unwatch: Callable[[], object]
    ) -> None:
        if self.closed:
            return
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        watch(ready)
        self._waits[ready] = unwatch
        try:
            await ready
        finally:
            self._forget(ready)

    def _forget(self, ready: asyncio.Future[None]) -> None:
        # Once only: after a close the number may be another descriptor's.
        unwatch = self._waits.pop(ready, None)
        if unwatch is not None:
            unwatch()


def _resolve(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


class SocketStream:
    """A connected stream socket, which it owns."""

    def __init__(self, sock: socket.socket, log: Log) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._log = log
        self._fds: list[int] = []
        self._waiting = _Waiting()

    async def read(self) -> bytes:
        # One peer that always has more to say must not keep the loop from others.
        await asyncio.sleep(0)
        while not self._waiting.closed:
            try:
                data, ancillary, _, _ = self._sock.recvmsg(READ_BYTES, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
            except (BlockingIOError, InterruptedError):
                await self._waiting.readable(self._sock.fileno())
                continue
            except OSError:
                break
            self._keep_fds(ancillary)
            return data
        return b""

    def take_fds(self) -> list[int]:
        taken, self._fds = self._fds, []
        return taken

    async def write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            if self._waiting.closed:
                raise ConnectionError("the stream is closed")
            try:
                rest = rest[self._sock.send(rest, socket.MSG_NOSIGNAL) :]
            except (BlockingIOError, InterruptedError):
                await self._waiting.writable(self._sock.fileno())
        self._log(data)

    def hung_up(self) -> bool:
        return self._waiting.closed or hung_up(self._sock.fileno())

    def close(self) -> None:
        self._waiting.close()
        self._sock.close()
        for fd in self.take_fds():
            os.close(fd)

    def _keep_fds(self, ancillary: list[tuple[int, int, bytes]]) -> None:
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(data[: len(data) - len(data) % _FD_SIZE])
                self._fds += fds
        while len(self._fds) > WAITING_FDS:
            os.close(self._fds.pop(0))


class FdStream:
    """A pair of descriptors, which it does not own; -1 for none: nothing to read, and writes are dropped.

    They stay in blocking mode, which they may share with other processes: it waits until they are ready.
    """

    def __init__(self, reader: int, writer: int, log: Log) -> None:
        self._reader = reader
        self._writer = writer
        self._log = log
        self._waiting = _Waiting()
        self._polls_reader = _pollable(reader)
        self._polls_writer = _pollable(writer)

    async def read(self) -> bytes:
        await asyncio.sleep(0)
        if self._reader < 0:
            await self._waiting.forever()
        elif self._polls_reader:
            await self._waiting.readable(self._reader)
        if self._waiting.closed:
            return b""
        try:
            return os.read(self._reader, READ_BYTES)
        except OSError:
            return b""

    def take_fds(self) -> list[int]:
        return []

    async def write(self, data: bytes) -> None:
        rest = memoryview(data if self._writer >= 0 else b"")
        while rest:
            if self._polls_writer:
                await self._waiting.writable(self._writer)
            if self._waiting.closed:
                raise ConnectionError("the stream is closed")
            rest = rest[os.write(self._writer, rest[:PIPE_BYTES]) :]
        self._log(data)

    def hung_up(self) -> bool:
        return self._waiting.closed or (self._writer >= 0 and hung_up(self._writer))

    def close(self) -> None:
        self._waiting.close()


class SinkStream:
    """Nothing to read; what is written goes to a function."""

    def __init__(self, sink: Log) -> None:
        self._sink = sink
        self._waiting = _Waiting()

    async def read(self) -> bytes:
        await self._waiting.forever()
        return b""

    def take_fds(self) -> list[int]:
        return []

    async def write(self, data: bytes) -> None:
        self._sink(data)

    def hung_up(self) -> bool:
        return self._waiting.closed

    def close(self) -> None:
        self._waiting.close()


def hung_up(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, 0)
    return any(events & (select.POLLHUP | select.POLLERR) for _, events in poll.poll(0))


def _pollable(fd: int) -> bool:
    """False for regular files and the like, which are always ready."""
    if fd < 0:
        return False
    with select.epoll() as probe:
        try:
            probe.register(fd, 0)
        except PermissionError:
            return False
    return True
