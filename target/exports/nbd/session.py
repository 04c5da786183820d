# SPDX-License-Identifier: Apache-2.0
"""The control plane's side of an NBD session in the datapath: its start, its stop and its end."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, Iterable
from typing import Any

from target.datapath import Datapath, Gate, ffi, lib
from target.exports.base import SOFT_SECONDS, End, ExportClient
from target.exports.nbd.handshake import ALLOCATION_ID, Negotiated
from target.exports.peer import Peer

# How long a stop waits for requests under way before the clients are cut off (seconds).
STOP_SECONDS = 30

COUNTERS = ("requests", "errors", "holes", "received", "sent", "receives", "sends", "stalls")

TROUBLE: dict[int, str] = {
    lib.BT_NBD_END_PROTOCOL: "a wrong magic, or more data than is read and dropped; the session is ended",
    lib.BT_NBD_END_STUCK: "it does not take its replies; the session is ended",
}


def trouble(result: int) -> str | None:
    """What was wrong when a session ended so; None after an ordinary end."""
    return os.strerror(-result) if result < 0 else TROUBLE.get(result)


class Session:
    """One connection in transmission. ``ended`` gets why: one of ``lib.BT_NBD_END_*`` or a negative errno."""

    def __init__(
        self,
        datapath: Datapath,
        server: Any,
        gate: Gate,
        sock: socket.socket,
        peer: Peer,
        thread: int,
        negotiated: Negotiated,
        writethrough: bool,
        on_end: Callable[[Session], None],
    ) -> None:
        """Takes over sock, also when it fails with OSError."""
        self.datapath = datapath
        self.peer = peer
        self.since = time.time()
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._giving_up: asyncio.Future[None] | None = None
        self._paused = False
        self._on_end = on_end
        self._tag = datapath.session(self._on_event)
        with sock:
            options = ffi.new("struct bt_nbd_options *")
            options.thread = thread
            options.mode = _mode(negotiated, writethrough)
            options.size = negotiated.export.size
            options.allocation_id = ALLOCATION_ID
            options.transmission_flags = int(negotiated.export.flags)
            self._ptr = lib.bt_nbd_session_new(server, gate.ptr, sock.fileno(), self._tag, options)
            if self._ptr == ffi.NULL:
                datapath.end_session(self._tag)
                raise OSError(ffi.errno, os.strerror(ffi.errno))
            sock.detach()

    def _on_event(self, result: int) -> None:
        self._counters = self.counters()
        self.datapath.end_session(self._tag)
        lib.bt_nbd_session_free(self._ptr)
        self._ptr = ffi.NULL
        self.ended.set_result(result)
        self._on_end(self)

    async def pause(self) -> None:
        """Returns when no request is under way, or it has ended; requests that come wait for ``resume``.

        When it is cancelled, the session goes on as before.
        """
        if self._giving_up is not None:
            await asyncio.shield(self._giving_up)
        if self._ptr == ffi.NULL:
            return
        cookie, done = self.datapath.cookie()
        lib.bt_nbd_session_pause(self._ptr, cookie)
        try:
            self._paused = await asyncio.shield(done) == 0
        except asyncio.CancelledError:
            self._giving_up = asyncio.ensure_future(self._give_up(done))
            raise

    async def _give_up(self, pause: asyncio.Future[int]) -> None:
        if self._ptr == ffi.NULL:
            return
        cookie, done = self.datapath.cookie()
        lib.bt_nbd_session_unpause(self._ptr, cookie)
        await done
        self._paused = pause.result() == 0
        self.resume()

    def resume(self, thread: int = -1) -> None:
        """Goes on after ``pause``, on another I/O thread when one is named."""
        if self._paused and self._ptr != ffi.NULL:
            lib.bt_nbd_session_resume(self._ptr, thread)
        self._paused = False

    def set_size(self, size: int) -> None:
        """The export has a new size: requests behind it fail."""
        if self._ptr != ffi.NULL:
            lib.bt_nbd_session_set_size(self._ptr, size)

    def shut(self) -> None:
        """Refuses what comes, and ends as soon as the client waits for nothing."""
        if self._ptr != ffi.NULL:
            lib.bt_nbd_session_shut(self._ptr)

    def stop(self) -> None:
        """Requests under way are answered, later ones are not read."""
        if self._ptr != ffi.NULL:
            lib.bt_nbd_session_stop(self._ptr)

    def cut(self) -> None:
        """The client gets no more replies; requests under way still finish."""
        if self._ptr != ffi.NULL:
            lib.bt_nbd_session_cut(self._ptr)

    def client(self) -> ExportClient:
        found = self.counters()
        return ExportClient(
            peer=str(self.peer),
            pid=self.peer.pid,
            since=self.since,
            requests=found["requests"],
            failed=found["errors"],
            bytes_received=found["received"],
            bytes_sent=found["sent"],
        )

    def counters(self) -> dict[str, int]:
        if self._ptr == ffi.NULL:
            return self._counters
        raw = ffi.new("struct bt_nbd_counters *")
        lib.bt_nbd_session_counters(self._ptr, raw)
        return {name: int(getattr(raw, name)) for name in COUNTERS}


async def pause_all(sessions: Iterable[Session], deadline: float | None = None) -> None:
    """Pauses them all, or (TimeoutError after so many seconds) none."""
    pausing = list(sessions)
    try:
        async with asyncio.timeout(deadline):
            await asyncio.gather(*(session.pause() for session in pausing))
    except BaseException:
        for session in pausing:
            session.resume()
        raise


async def end_sessions(sessions: Iterable[Session], how: End = "stop") -> None:
    """Ends them, and waits until no request of theirs is under way."""
    ending = list(sessions)
    if how == "soft":
        ending = await _end(ending, Session.shut, SOFT_SECONDS)
    if how in ("soft", "stop"):
        ending = await _end(ending, Session.stop, STOP_SECONDS)
    await _end(ending, Session.cut if how != "hide" else _wait, None)


def _wait(session: Session) -> None:
    """Until it ends by itself."""


async def _end(ending: list[Session], how: Callable[[Session], None], timeout: float | None) -> list[Session]:
    """Those that have not ended then."""
    for session in ending:
        how(session)
    if not ending:
        return []
    await asyncio.wait([session.ended for session in ending], timeout=timeout)
    return [session for session in ending if not session.ended.done()]


def _mode(negotiated: Negotiated, writethrough: bool) -> int:
    mode = 0
    if negotiated.structured:
        mode |= lib.BT_NBD_STRUCTURED
    if negotiated.allocation:
        mode |= lib.BT_NBD_ALLOCATION
    if writethrough:
        mode |= lib.BT_NBD_WRITETHROUGH
    return mode
