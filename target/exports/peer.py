# SPDX-License-Identifier: Apache-2.0
"""Who is at the other end of a connection."""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import NamedTuple

CREDENTIALS = struct.Struct("iII")  # struct ucred: process, user, group


class Peer(NamedTuple):
    """A client as its socket shows it."""

    address: str  # of TCP: host and port; of a unix socket: its path, which is the server's
    pid: int | None  # None: not a process of this machine

    def __str__(self) -> str:
        """For messages."""
        if self.pid is not None:
            return f"client (process {self.pid})"
        return f"client {self.address}" if self.address else "client"


def peer_of(sock: socket.socket) -> Peer:
    """Of a connected socket; what cannot be found out is left empty."""
    with contextlib.suppress(OSError):
        if sock.family == socket.AF_UNIX:
            raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
            return Peer(f"unix:{sock.getsockname()}", CREDENTIALS.unpack(raw)[0])
        host, port = sock.getpeername()[:2]
        return Peer(f"[{host}]:{port}" if ":" in host else f"{host}:{port}", None)
    return Peer("", None)
