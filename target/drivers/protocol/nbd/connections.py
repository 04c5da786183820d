# SPDX-License-Identifier: Apache-2.0
"""Connections of an nbd node: making one, and making it again after a loss, for as long as the node lives."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from typing import TYPE_CHECKING, Any

from target.connecting import connect, describe
from target.datapath import ffi, lib
from target.drivers.protocol.nbd.negotiate import Link, negotiate
from target.drivers.protocol.nbd.options import Place
from target.exports.address import FdAddress
from target.exports.nbd.stream import SocketStream
from target.graph.errors import BlockError

if TYPE_CHECKING:
    from target.drivers.protocol.nbd.node import Nbd

log = logging.getLogger("blocktarget")

ESTABLISH_SECONDS = 10  # for connecting and negotiating
FIRST_PAUSE = 0.05  # after an attempt that failed; doubled up to LAST_PAUSE (seconds)
LAST_PAUSE = 1.0
SHORT_LIFE = 1.0  # a connection that was lost sooner was no success
SEND_BUFFER = 1 << 20  # asked for on unix sockets; the kernel bounds it (net.core.wmem_max)

COUNTERS = ("requests", "errors", "resent", "received", "sent", "receives", "sends", "losses")
LOST_ERRNO = 0x8000
REASONS: dict[int, str] = {
    lib.BT_NBDC_EOF: "the server closed it",
    lib.BT_NBDC_SHUTDOWN: "the server is shutting down",
    lib.BT_NBDC_OUTDATED: "cut, to be made again for the export's new size",
    lib.BT_NBDC_BAD_MAGIC: "a reply with a wrong magic",
    lib.BT_NBDC_BAD_COOKIE: "a reply to no request",
    lib.BT_NBDC_BAD_SIMPLE: "a simple reply in place of a structured one",
    lib.BT_NBDC_BAD_TYPE: "a reply chunk of a type that does not belong to its request",
    lib.BT_NBDC_BAD_LENGTH: "a reply chunk with a wrong length",
    lib.BT_NBDC_BAD_RANGE: "a reply chunk outside of its request's range, or over another one",
    lib.BT_NBDC_BAD_ERROR: "a malformed error chunk",
    lib.BT_NBDC_BAD_STATUS: "a malformed block status",
    lib.BT_NBDC_INCOMPLETE: "a reply that does not hold all that was asked for",
    lib.BT_NBDC_TOO_MANY: "a read answered in too many pieces out of order",
    lib.BT_NBDC_BAD_OFFSET: "a reply with another offset than its request",
}


async def establish(place: Place, bitmap: str | None) -> tuple[socket.socket, Link]:
    """A connected and negotiated socket, and what was negotiated. BlockError names the server."""
    where = describe(place.server)
    try:
        async with asyncio.timeout(ESTABLISH_SECONDS):
            sock = await connect(place.server)
            try:
                link = await negotiate(SocketStream(sock), place.export, bitmap)
            except BaseException:
                sock.close()
                raise
    except TimeoutError:
        raise BlockError(f"NBD server '{where}' did not answer within {ESTABLISH_SECONDS} s") from None
    except (EOFError, ConnectionResetError, BrokenPipeError):
        raise BlockError(f"NBD server '{where}' closed the connection while negotiating") from None
    except OSError as error:
        raise BlockError.from_os(f"NBD server '{where}'", error) from None
    if sock.family == socket.AF_UNIX:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    return sock, link


def link_struct(link: Link, outdates: bool) -> Any:
    """As the datapath takes it."""
    raw = ffi.new("struct bt_nbdc_link *")
    raw.mode = link.mode
    raw.transmission_flags = int(link.flags)
    raw.max_payload = link.max_payload
    raw.block = link.block
    raw.context_id = -1 if link.context_id is None else link.context_id
    raw.depth = link.depth
    raw.outdates = outdates
    return raw


class Connection:
    """One of the node's connections, from outside: the datapath has the socket."""

    def __init__(self, node: Nbd, index: int) -> None:
        self.node = node
        self.index = index
        self.up = index == 0
        self._since = time.monotonic()
        self._pause = 0.0
        self._said = ""
        self._task: asyncio.Task[None] | None = None
        self._stopping = False

    def lost(self, reason: int) -> None:
        """The datapath has closed the socket."""
        text = os.strerror(reason & ~LOST_ERRNO) if reason & LOST_ERRNO else REASONS[reason]
        if lib.BT_NBDC_PROTOCOL <= reason < LOST_ERRNO:
            text = f"the server broke the protocol: {text}"
        self.node.warnings.say(f"{self._name()} lost: {text}")
        self.up = False
        if time.monotonic() - self._since > SHORT_LIFE:
            self._pause = 0.0
        self.reconnect()

    def reconnect(self) -> None:
        """Tries until it succeeds or ``stop`` is called."""
        if not self._stopping:
            self._task = asyncio.create_task(self._try_for_ever())

    async def stop(self) -> None:
        """No more attempts."""
        self._stopping = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def counters(self) -> dict[str, int]:
        assert self.node.client is not None
        raw = ffi.new("struct bt_nbdc_counters *")
        lib.bt_nbdc_counters(self.node.client.ptr, self.index, raw)
        return {"up": int(self.up), **{name: int(getattr(raw, name)) for name in COUNTERS}}

    def _name(self) -> str:
        several = f" {self.index}" if len(self.node.connections) > 1 else ""
        return f"connection{several} to NBD server '{describe(self.node.place.server)}'"

    async def _try_for_ever(self) -> None:
        if isinstance(self.node.place.server, FdAddress):
            return  # there is no other socket to be had
        while True:
            await asyncio.sleep(self._pause)
            self._pause = min(max(2 * self._pause, FIRST_PAUSE), LAST_PAUSE)
            try:
                await self._try_once()
            except (BlockError, OSError) as error:
                if str(error) != self._said:
                    self._said = str(error)
                    self.node.warnings.say(f"{self._name()}: {error}; trying again")
            else:
                return

    async def _try_once(self) -> None:
        sock, link = await self.node.establish()
        try:
            self.node.check(link)
        except BlockError:
            sock.close()
            raise
        grown = self.node.grown(link)
        self.node.hand_over(self.index, sock, link, outdates=grown)
        self.up = True
        self._since = time.monotonic()
        self._said = ""
        log.info("%s: %s is up", self.node.label, self._name())
