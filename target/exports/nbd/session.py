# SPDX-License-Identifier: Apache-2.0
"""The control plane's side of an NBD session in the datapath: its start, its stop and its end."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Iterable
from typing import Any

from target.datapath import Datapath, Gate, ffi, lib
from target.exports.base import ExportClient
from target.exports.nbd.handshake import ALLOCATION_ID, Negotiated

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
        thread: int,
        negotiated: Negotiated,
        writethrough: bool,
        peer: str,
        on_end: Callable[[Session], None],
    ) -> None:
        """Takes over sock, also when it fails with OSError."""
        self.peer = peer
        self.datapath = datapath
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
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
            peer=self.peer,
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


async def end_sessions(sessions: Iterable[Session]) -> None:
    """Stops them, and waits until no request of theirs is under way."""
    ending = list(sessions)
    for session in ending:
        session.stop()
    if not ending:
        return
    _, late = await asyncio.wait([session.ended for session in ending], timeout=STOP_SECONDS)
    for session in ending if late else ():
        session.cut()
    await asyncio.gather(*(session.ended for session in ending))


def _mode(negotiated: Negotiated, writethrough: bool) -> int:
    mode = 0
    if negotiated.structured:
        mode |= lib.BT_NBD_STRUCTURED
    if negotiated.allocation:
        mode |= lib.BT_NBD_ALLOCATION
    if writethrough:
        mode |= lib.BT_NBD_WRITETHROUGH
    return mode
