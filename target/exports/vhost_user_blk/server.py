# SPDX-License-Identifier: Apache-2.0
"""Serves one front end after the other on a listening socket. A second one waits until the first has gone."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable, Coroutine
from typing import Any

from target.exports.address import Listener
from target.exports.peer import Peer, peer_of
from target.exports.vhost_user_blk.connection import Connection, Message
from target.exports.vhost_user_blk.messages import MessageError
from target.exports.vhost_user_blk.session import Session
from target.exports.warnings import Warnings

log = logging.getLogger(__name__)

ACCEPT_RETRY = 0.2  # seconds, after accept failed for want of descriptors


class Server:
    """name: the export's, for messages. make_session is called for each connection."""

    def __init__(self, name: str, listener: Listener, make_session: Callable[[], Session]) -> None:
        self.session: Session | None = None
        self.peer = Peer("", None)
        self.since = 0.0  # of the session, in seconds since the epoch
        self.connections = 0
        self.warnings = Warnings(log, f"export '{name}'")
        self.listener = listener
        self._make_session = make_session
        self._serving: asyncio.Task[None] | None = None
        self._open = asyncio.Event()
        self._open.set()
        self._last = False  # the session there is now is the last one
        self._task = asyncio.ensure_future(self._run())

    def suspend(self) -> None:
        """A front end that comes waits until ``resume``."""
        self._open.clear()

    def resume(self) -> None:
        self._open.set()

    async def stop(self, *, wait: bool = False) -> None:
        """Takes no more connections, ends the one there is (wait: until it ends), and removes the socket."""
        self._last = True
        if self._serving is None or not wait:
            self._task.cancel()
        else:
            self.listener.close()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self.listener.close()
        self.warnings.close()

    def end_session(self, why: str) -> None:
        """Ends the connection there is now, from a callback."""
        if self._serving is not None:
            self.warnings.say(f"{why}; the session is ended")
            self._serving.cancel()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while not self._last:
            try:
                sock, _ = await loop.sock_accept(self.listener.socket)
            except OSError as error:
                self.warnings.say(f"accept: {error.strerror}")
                await asyncio.sleep(ACCEPT_RETRY)
                continue
            with sock:  # until a session has it
                await self._open.wait()
                self.connections += 1
                await self._serve_in_task(sock)

    async def _serve_in_task(self, sock: socket.socket) -> None:
        """In a task of its own, so that a session can be cancelled and the server go on."""
        self._serving = asyncio.ensure_future(self._serve(sock))
        try:
            await asyncio.wait({self._serving})
        except asyncio.CancelledError:
            self._serving.cancel()
            await asyncio.wait({self._serving})
            raise
        finally:
            serving, self._serving = self._serving, None
        if not serving.cancelled() and (error := serving.exception()) is not None:
            raise error

    async def _serve(self, sock: socket.socket) -> None:
        self.peer, self.since = peer_of(sock), time.time()
        connection = Connection(sock)
        try:
            session = self._make_session()
        except OSError as error:
            self.warnings.say(f"a new session: {error.strerror}")
            connection.close()
            return
        self.session = session
        try:
            await self._exchange(connection, session)
        except ConnectionError:
            pass  # it left before the answer, which is no more than leaving
        except (MessageError, OSError) as error:  # TimeoutError is an OSError
            why = str(error) or "the front end is silent"  # TimeoutError has no text
            self.warnings.say(f"{why}; the session is ended")
        finally:
            self.session = None
            try:
                await _finish(session.close())
            finally:
                # Drained first: when the connection ends, a front end that comes back takes the used ring as
                # it is then. What completed later would be done, and completed, twice.
                connection.close()

    async def _exchange(self, connection: Connection, session: Session) -> None:
        while (message := await connection.receive()) is not None:
            try:
                answer = await self._handle(session, message)
            finally:
                message.close()
            if answer is not None:
                await connection.send(answer)

    @staticmethod
    async def _handle(session: Session, message: Message) -> bytes | None:
        header = message.header
        return await session.handle(header.request, header.need_reply, message.payload, message.fds)


async def _finish(closing: Coroutine[Any, Any, None]) -> None:
    """Runs it to its end, even when the caller is cancelled meanwhile; then the cancellation goes on."""
    task = asyncio.ensure_future(closing)
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            cancelled = True
    task.result()
    if cancelled:
        raise asyncio.CancelledError
