# SPDX-License-Identifier: Apache-2.0
"""The target's end of the channel to a plugin's process: requests into slots of shared memory, replies out.

What the process sends is not trusted: a reply that fits no request ends the channel.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import mmap
import os
import socket
from collections import deque
from collections.abc import Callable

from target.datapath import FAST_ZERO, FUA, REQ_ONE, UNMAP, Fault, Op, ffi
from target.nbdkit import wire

RECEIVE_BYTES = 64 << 10
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
IDLE_SECONDS = 2.0  # after which the memory of the slots is given back
DATA_OPS = (Op.READ, Op.WRITE)
PIECE_WITHOUT_DATA = 1 << 31  # whole blocks of any size


class ProtocolError(Exception):
    """The process sent what no plugin's runner sends."""


class Memory:
    """A memfd that both sides map. Sealed, so that nobody shortens it under the other."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("nbdkit-plugin", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, wire.MEMORY_BYTES)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, SEALS)
            self.map = mmap.mmap(self.fd, wire.MEMORY_BYTES)
        except BaseException:
            os.close(self.fd)
            raise
        starts = range(0, wire.MEMORY_BYTES, wire.SLOT_BYTES)
        self._view = memoryview(self.map)
        self.slots = [self._view[at : at + wire.SLOT_BYTES] for at in starts]
        self.buffers = [ffi.from_buffer(slot) for slot in self.slots]

    def give_back(self) -> None:
        self.map.madvise(mmap.MADV_REMOVE)

    def close(self) -> None:
        os.close(self.fd)
        self.buffers.clear()
        for slot in self.slots:
            slot.release()
        self._view.release()
        self.map.close()


class Request:
    """One fault under way; at, length: the piece of it that the process has now."""

    __slots__ = ("at", "fault", "length", "most", "piece")

    def __init__(self, fault: Fault, most: int, piece: int) -> None:
        self.fault = fault
        self.most = most  # longer ones are split
        self.piece = piece  # into pieces of so many bytes
        self.at = 0
        self.length = 0


class Channel:
    """From the moment the plugin is open to its end. ``failed`` is called once when the process breaks it."""

    def __init__(
        self,
        sock: socket.socket,
        memory: Memory,
        maximum: int,
        asked: Callable[[int], None],
        failed: Callable[[str], None],
    ) -> None:
        self.sock = sock
        self.memory = memory
        self.data_most = min(maximum or wire.SLOT_BYTES, wire.SLOT_BYTES)
        self.asked = asked
        self.failed = failed
        self.loop = asyncio.get_running_loop()
        self.free = list(range(wire.SLOTS))
        self.under_way: dict[int, Request] = {}
        self.waiting: deque[Request] = deque()
        self.out: list[bytes] = []
        self.rest = b""
        self.open = True
        self.kinds: set[int] = set()
        self.used = False
        self.trim: asyncio.TimerHandle | None = None
        self.loop.add_reader(sock.fileno(), self._readable)

    @property
    def idle(self) -> bool:
        return not self.under_way and not self.waiting

    # ---- requests ----

    def submit(self, fault: Fault) -> None:
        if fault.op in DATA_OPS:
            request = Request(fault, self.data_most, self.data_most)
        else:
            request = Request(fault, wire.COUNT_MAX, PIECE_WITHOUT_DATA)
        self.used = True
        if self.trim is None:
            self.trim = self.loop.call_later(IDLE_SECONDS, self._give_back)
        if self.free:
            self._send(request, self.free.pop())
        else:
            self.waiting.append(request)

    def _send(self, request: Request, slot: int) -> None:
        fault = request.fault
        left = fault.length - request.at
        length = request.length = left if left <= request.most else request.piece
        if fault.op is Op.WRITE:
            fault.get_into(self.memory.buffers[slot], request.at, length)
        self.under_way[slot] = request
        flags = nbdkit_flags(fault.flags) if fault.flags else 0
        self.out.append(wire.REQUEST.pack(fault.op, flags, slot, length, fault.offset + request.at))
        if len(self.under_way) == 1:
            self._flush()  # the process has nothing to do
        elif len(self.out) == 1:
            self.loop.call_soon(self._flush)

    def _give_back(self) -> None:
        """Gives back the memory of the slots when nothing was asked for a while."""
        self.trim = None
        if self.used or not self.idle:
            self.used = False
            self.trim = self.loop.call_later(IDLE_SECONDS, self._give_back)
        else:
            self.memory.give_back()

    def close_connection(self) -> None:
        """Asks the process to end in order. No request may be under way."""
        self.out.append(wire.REQUEST.pack(wire.CLOSE, 0, 0, 0, 0))
        self._flush()

    def _flush(self) -> None:
        if not self.open or not self.out:
            return
        data = b"".join(self.out)
        self.out.clear()
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            return  # the process is ending, which is noticed elsewhere
        if sent < len(data):
            # All requests under way fit into the socket's buffer many times.
            self._fail("the channel is blocked")

    # ---- replies ----

    def _readable(self) -> bool:
        """False when there was nothing to read."""
        try:
            data = self.sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if data:
            self._take_replies(data)
        else:
            self._fail("")
        return True

    def _take_replies(self, data: bytes) -> None:
        data = self.rest + data
        whole = len(data) - len(data) % wire.REPLY.size
        self.rest = data[whole:]
        try:
            for kind, zero, slot, result in wire.REPLY.iter_unpack(data[:whole]):
                if kind == wire.DONE and not zero:
                    self._reply(slot, result)
                else:
                    self._event(kind, zero, slot, result)
                if not self.open:
                    return
        except ProtocolError as error:
            self._fail(str(error))

    def _event(self, kind: int, zero: int, slot: int, result: int) -> None:
        if kind not in (wire.SHUTDOWN, wire.DISCONNECT) or zero or slot or result or kind in self.kinds:
            raise ProtocolError(f"an unknown message {kind}")
        self.kinds.add(kind)
        self.asked(kind)

    def _reply(self, slot: int, result: int) -> None:
        request = self.under_way.pop(slot, None)
        if request is None:
            raise ProtocolError(f"a reply to no request, for slot {slot}")
        fault = request.fault
        try:
            ended = self._take(request, slot, result)
        except ProtocolError:
            fault.done(-errno.EIO)
            raise
        if ended:
            if self.waiting:
                self._send(self.waiting.popleft(), slot)
            else:
                self.free.append(slot)
        else:
            self._send(request, slot)

    def _take(self, request: Request, slot: int, result: int) -> bool:
        """Takes the answer to a piece; False when another piece is to follow."""
        fault = request.fault
        if result < 0:
            if result < -4095:
                raise ProtocolError(f"a reply with the error {-result}")
            fault.done(result)
            return True
        if fault.op is Op.STATUS:
            self._take_extents(request, slot, result)
            return True
        if result:
            raise ProtocolError(f"a reply with the result {result}")
        if fault.op is Op.READ:
            fault.put_from(self.memory.buffers[slot], request.at, request.length)
        request.at += request.length
        if request.at < fault.length:
            return False
        fault.done()
        return True

    def _take_extents(self, request: Request, slot: int, count: int) -> None:
        if not 0 < count <= wire.EXTENTS_MAX:
            raise ProtocolError(f"a reply with {count} extents")
        left = request.length
        # A copy: what is checked may not change afterwards.
        data = bytes(self.memory.slots[slot][: count * wire.EXTENT.size])
        for length, kind in wire.EXTENT.iter_unpack(data):
            if not 0 < length <= left or kind > 3:
                raise ProtocolError(
                    f"an extent of {length} bytes and type {kind} where {left} bytes are left"
                )
            left -= length
            if not request.fault.put_extent(length, kind):
                break
        request.fault.done()

    # ---- the end ----

    def take_last(self) -> None:
        """The process is gone; what it had answered before counts."""
        self.failed = _ignore
        while self.open and self.under_way and self._readable():
            pass

    def _fail(self, why: str) -> None:
        if self.open:
            self.close(errno.EIO)
            self.failed(why)

    def close(self, number: int) -> None:
        """No more messages; what is under way fails with this errno."""
        if not self.open:
            return
        self.open = False
        self.loop.remove_reader(self.sock.fileno())
        if self.trim is not None:
            self.trim.cancel()
        lost = [*self.under_way.values(), *self.waiting]
        self.under_way.clear()
        self.waiting.clear()
        for request in lost:
            request.fault.done(-number)


def _ignore(why: str) -> None:
    return None


def nbdkit_flags(flags: int) -> int:
    """nbdkit's flags of a request for the datapath's."""
    return (
        (wire.FUA if flags & FUA else 0)
        | (wire.MAY_TRIM if flags & UNMAP else 0)
        | (wire.FAST_ZERO if flags & FAST_ZERO else 0)
        | (wire.REQ_ONE if flags & REQ_ONE else 0)
    )
