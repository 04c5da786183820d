# SPDX-License-Identifier: Apache-2.0
"""The nbd driver: its life, its size, and its datapath object. Requests never pass through here."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

from target.datapath import Object, lib
from target.drivers.protocol.nbd.connections import Connection, establish, link_struct
from target.drivers.protocol.nbd.negotiate import Link
from target.drivers.protocol.nbd.options import MAX_CONNECTIONS, NbdOptions, Place, place
from target.exports.address import FdAddress
from target.exports.nbd.protocol import TransmissionFlag
from target.exports.warnings import Warnings
from target.graph.errors import BlockError
from target.graph.node import Node

log = logging.getLogger("blocktarget")

CONNECTIONS = 4  # unless the option is given, or there are more I/O threads
DEPTH = 16  # of a connection, before its thread takes the next one: many servers do no more of one at once
OPEN_PAUSE = 0.1  # between attempts within open-timeout (seconds)
CLOSE_SECONDS = 10  # how long the last flush may take
INTERRUPT_SECONDS = 10  # how long a server may take to answer when the process is to end


class Nbd(Node, driver="nbd"):
    """An export of an NBD server, over one connection or, where the server permits it, several."""

    is_protocol = True
    Options = NbdOptions
    options: NbdOptions
    place: Place
    link: Link
    """what the first connection has negotiated, with the size of now; the node's own is rounded up to 512"""
    client: Object | None = None
    _socket: socket.socket | None = None  # the first connection's, until the datapath has it
    _stopped: asyncio.Future[int] | None = None
    _interrupted: asyncio.TimerHandle | None = None

    async def open(self) -> None:
        if self.settings.force_share and not self.read_only:
            raise self.error("force-share=on can only be used with read-only images")
        try:
            self.place = place(self.options)
        except BlockError as error:
            raise self.error(str(error)) from None
        self.warnings = Warnings(log, self.label)
        self.connections: list[Connection] = []
        self._socket, self.link = await self._open_first()
        if TransmissionFlag.READ_ONLY in self.link.flags and not self.read_only:
            if not self.settings.auto_read_only:
                raise self.error("NBD export is read-only")
            self.read_only = True

    async def _open_first(self) -> tuple[socket.socket, Link]:
        """Tries for ``open-timeout`` seconds, but once at least."""
        # A descriptor is used up by the first attempt.
        timeout = 0 if isinstance(self.place.server, FdAddress) else self.options.open_timeout
        until = time.monotonic() + timeout
        while True:
            try:
                return await self.establish()
            except BlockError as error:
                if time.monotonic() + OPEN_PAUSE >= until:
                    raise self.error(str(error)) from None
                await asyncio.sleep(OPEN_PAUSE)

    async def establish(self) -> tuple[socket.socket, Link]:
        """A new connection, negotiated. BlockError."""
        return await establish(self.place, self.options.x_dirty_bitmap)

    def make_object(self) -> Object:
        count = self._connection_count()
        self._tag = self.datapath.session(self._lost)
        self.client = self.datapath.adopt(
            lambda tag: lib.bt_nbdc_new(
                self.datapath.dp,
                tag,
                self._tag,
                self.link.size,
                count,
                DEPTH,
                self.options.reconnect_delay * 1_000_000_000,
                self.settings.no_flush,
            )
        )
        self.connections = [Connection(self, index) for index in range(count)]
        assert self._socket is not None
        sock, self._socket = self._socket, None
        self.hand_over(0, sock, self.link)
        for connection in self.connections[1:]:
            connection.reconnect()
        return self.client if self.link.block == 1 else self.datapath.align(self.client, self.link.block)

    def _connection_count(self) -> int:
        """One, unless the server says that several see the same data."""
        if TransmissionFlag.CAN_MULTI_CONN not in self.link.flags or isinstance(self.place.server, FdAddress):
            return 1
        return self.options.connections or min(max(self.datapath.threads, CONNECTIONS), MAX_CONNECTIONS)

    # ---- connections ----

    def hand_over(self, index: int, sock: socket.socket, link: Link, outdates: bool = False) -> None:
        """Gives a connection's socket to the datapath. OSError; sock is taken over in any case.

        outdates: what the other connections have negotiated is no longer true.
        """
        assert self.client is not None
        with sock:
            result = lib.bt_nbdc_attach(self.client.ptr, index, sock.fileno(), link_struct(link, outdates))
            if result < 0:
                raise OSError(-result, "the connection cannot be used")
            sock.detach()

    def check(self, link: Link) -> None:
        """Whether a server that has come back still offers what the node is used for. BlockError."""
        if link.size < self.link.size:
            raise BlockError(f"the export has shrunk from {self.link.size} to {link.size} bytes")
        if TransmissionFlag.READ_ONLY in link.flags and not self.read_only:
            raise BlockError("NBD export is read-only")
        if self.link.block % link.block:
            raise BlockError(f"its minimum block size is now {link.block}, which was {self.link.block}")

    def grown(self, link: Link) -> bool:
        """A connection has come back with at least the old size. Whether it is a new one."""
        assert self.client is not None
        size = link.size // self.link.block * self.link.block
        if size == self.link.size:
            return False
        log.info("%s: the export has grown from %d to %d bytes", self.label, self.link.size, size)
        self.link = replace(self.link, size=size)
        lib.bt_nbdc_set_size(self.client.ptr, size)
        if self.object is not self.client:
            self.object.size = self.client.size
        self.resized()
        return True

    def _lost(self, result: int) -> None:
        self.connections[result >> 16].lost(result & 0xFFFF)

    async def truncate(self, size: int) -> None:
        if size != self.size:
            raise self.error("Cannot resize NBD nodes")

    # ---- the end ----

    async def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self.client is None:
            return
        try:
            if self.opened and not self.read_only and any(c.up for c in self.connections):
                await self._last_flush()
        finally:
            await _whatever_comes(self._end(self.client))

    async def _end(self, client: Object) -> None:
        """The object must not go before its connections have: this is not to be cut short."""
        if self._interrupted is not None:
            self._interrupted.cancel()
        await self._stop()
        self.datapath.end_session(self._tag)
        if not self.opened or self.object is not client:
            client.release()
        self.warnings.close()

    def interrupt(self) -> None:
        """Nothing waits for a lost server any more, and a silent one is given up after a while."""
        if self.client is not None and self._interrupted is None:
            lib.bt_nbdc_give_up(self.client.ptr)
            self._interrupted = asyncio.get_running_loop().call_later(INTERRUPT_SECONDS, self._cut)

    def _cut(self) -> None:
        assert self.client is not None
        if self._stopped is None:
            cookie, self._stopped = self.datapath.cookie()
            lib.bt_nbdc_stop(self.client.ptr, cookie)

    async def _stop(self) -> None:
        """Disconnects. What is still in flight fails."""
        await asyncio.gather(*(connection.stop() for connection in self.connections))
        self._cut()
        assert self._stopped is not None
        await self._stopped

    async def _last_flush(self) -> None:
        """A node whose server does not answer can be removed all the same, as in QEMU; the log tells."""
        try:
            await asyncio.wait_for(self.flush(), CLOSE_SECONDS)
        except TimeoutError:
            self.warnings.say(f"the last flush took longer than {CLOSE_SECONDS} s and is given up")
        except OSError as error:
            self.warnings.say(f"the last flush failed: {error.strerror}")

    def counters(self) -> dict[str, Any]:
        connections = [connection.counters() for connection in self.connections]
        return {**super().counters(), "connections": connections}


async def _whatever_comes(work: Coroutine[Any, Any, None]) -> None:
    """Awaits work to its end, also when the one who waits is cancelled meanwhile."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise
