# SPDX-License-Identifier: Apache-2.0
"""A vhost-user-blk front end that can do everything right, and anything wrong.

It shares memory, lays out split rings in it, and drives a back end's queues with blocking calls. Each layer
can be used raw: any bytes and descriptors on the socket, any descriptor in a ring. It is a test peer: slow,
and it trusts nothing that the back end does.
"""

from __future__ import annotations

import array
import contextlib
import mmap
import os
import select
import socket
import struct
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import NamedTuple, Self

from target.exports.vhost_user_blk import messages
from target.exports.vhost_user_blk.device import Feature
from target.exports.vhost_user_blk.messages import MemoryRegion, ProtocolFeature, Request, VringAddress

NEXT, WRITE, INDIRECT = 1, 2, 4  # descriptor flags
IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13  # request types
OK, IOERR, UNSUPP, UNTOUCHED = 0, 1, 2, 0xEE  # status bytes; the last is what this side puts there
UNMAP = 1

DESC = struct.Struct("<QIHH")
BLK_HEADER = struct.Struct("<IIQ")
USED_ELEMENT = struct.Struct("<II")
SEGMENT = struct.Struct("<QII")

USER_BASE = 0x7F00_0000_0000
TIMEOUT = 10.0


class PeerError(Exception):
    """The back end did not do what the protocol says."""


class Closed(PeerError):
    """The back end ended the session."""


class Refusal(PeerError):
    """A negative answer to a message."""


class GuestMemory:
    """Guest addresses [base, base + size), in a memfd or any descriptor, with a simple allocator.

    file_offset: where in the file the region starts, a multiple of the page size for this side's mapping.
    """

    def __init__(
        self, size: int = 4 << 20, base: int = 0, file_offset: int = 0, fd: int | None = None
    ) -> None:
        self.base, self.size, self.file_offset = base, size, file_offset
        if fd is None:
            fd = os.memfd_create("guest")
            os.truncate(fd, file_offset + size)
        self.fd = fd
        self.map = mmap.mmap(fd, size, offset=file_offset)
        self._next = 0

    def close(self) -> None:
        self.map.close()
        os.close(self.fd)

    @property
    def region(self) -> MemoryRegion:
        return MemoryRegion(self.base, self.size, USER_BASE + self.base, self.file_offset)

    def allocate(self, size: int, align: int = 16) -> int:
        """A guest address."""
        start = -(-self._next // align) * align
        if start + size > self.size:
            raise MemoryError(f"{size} bytes of guest memory")
        self._next = start + size
        return self.base + start

    def release_all(self, mark: int = 0) -> None:
        self._next = mark

    @property
    def mark(self) -> int:
        return self._next

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        self.map[address - self.base : address - self.base + len(data)] = bytes(data)

    def read(self, address: int, size: int) -> bytes:
        return self.map[address - self.base : address - self.base + size]

    def put(self, data: bytes, align: int = 16) -> int:
        """Allocates and writes; returns the address."""
        address = self.allocate(len(data), align)
        self.write(address, data)
        return address


class Buffer(NamedTuple):
    """One descriptor of a chain."""

    address: int
    length: int
    writable: bool = False


class Used(NamedTuple):
    head: int
    length: int


class Ring:
    """A split virtqueue in guest memory, driver side (virtio 1.2, section 2.7)."""

    def __init__(self, memory: GuestMemory, size: int = 128, event_idx: bool = True) -> None:
        self.memory, self.size, self.event_idx = memory, size, event_idx
        self.desc = memory.allocate(16 * size, 4096)
        self.avail = memory.allocate(6 + 2 * size, 4096)
        self.used = memory.allocate(6 + 8 * size, 4096)
        self.kick_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.call_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.error_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.restart(0)

    def close(self) -> None:
        for fd in (self.kick_fd, self.call_fd, self.error_fd):
            os.close(fd)

    def restart(self, base: int) -> None:
        """As after a reset of the device: next index base, all descriptors free."""
        self.avail_idx = self.kicked = self.used_seen = base
        self.free = list(range(self.size))
        self.memory.write(self.avail, bytes(6 + 2 * self.size))
        self.memory.write(self.used, bytes(6 + 8 * self.size))
        self._put16(self.avail + 2, base)
        self._put16(self.used + 2, base)
        self._put16(self._used_event, base)

    @property
    def address(self) -> tuple[int, int, int]:
        """User addresses: descriptor, used, available."""
        return USER_BASE + self.desc, USER_BASE + self.used, USER_BASE + self.avail

    @property
    def _used_event(self) -> int:
        return self.avail + 4 + 2 * self.size

    @property
    def _avail_event(self) -> int:
        return self.used + 4 + 8 * self.size

    def _put16(self, address: int, value: int) -> None:
        self.memory.write(address, struct.pack("<H", value & 0xFFFF))

    def _get16(self, address: int) -> int:
        return int.from_bytes(self.memory.read(address, 2), "little")

    # raw

    def set_desc(self, index: int, address: int, length: int, flags: int = 0, next: int = 0) -> None:
        """Writes one descriptor, whatever it says."""
        self.memory.write(self.desc + 16 * index, DESC.pack(address, length, flags, next))

    def set_avail_idx(self, value: int) -> None:
        self.avail_idx = value & 0xFFFF
        self._put16(self.avail + 2, value)

    def expose(self, head: int) -> None:
        """Puts a head into the available ring."""
        self._put16(self.avail + 4 + 2 * (self.avail_idx % self.size), head)
        self.set_avail_idx(self.avail_idx + 1)

    def kick(self) -> None:
        os.eventfd_write(self.kick_fd, 1)

    # as it should be

    def add(self, buffers: Sequence[Buffer], indirect: bool = False) -> int:
        """Makes a chain available; returns its head. ``notify`` comes after the last of a batch."""
        if indirect:
            table = b"".join(
                DESC.pack(
                    b.address, b.length, _flags(b, i + 1 < len(buffers)), i + 1 if i + 1 < len(buffers) else 0
                )
                for i, b in enumerate(buffers)
            )
            head = self.free.pop()
            self.set_desc(head, self.memory.put(table), len(table), INDIRECT)
        else:
            indices = [self.free.pop() for _ in buffers]
            for i, buffer in enumerate(buffers):
                more = i + 1 < len(buffers)
                follower = indices[i + 1] if more else 0
                self.set_desc(indices[i], buffer.address, buffer.length, _flags(buffer, more), follower)
            head = indices[0]
        self.expose(head)
        return head

    def notify(self) -> bool:
        """Kicks if the back end asks for it."""
        if self.event_idx:
            wanted = self._get16(self._avail_event)
            needed = (self.avail_idx - wanted - 1) & 0xFFFF < (self.avail_idx - self.kicked) & 0xFFFF
        else:
            needed = not self._get16(self.used) & 1
        self.kicked = self.avail_idx
        if needed:
            self.kick()
        return needed

    def used_idx(self) -> int:
        return self._get16(self.used + 2)

    def take_used(self) -> list[Used]:
        """What has been completed since the last call."""
        done = []
        while self.used_seen != self.used_idx():
            at = self.used + 4 + 8 * (self.used_seen % self.size)
            done.append(Used(*USED_ELEMENT.unpack(self.memory.read(at, 8))))
            self.used_seen = (self.used_seen + 1) & 0xFFFF
        return done

    def wait_used(self, count: int = 1, timeout: float = TIMEOUT) -> list[Used]:
        """At least count completions, by notification only: one that is lost shows as a PeerError."""
        until = time.monotonic() + timeout
        done = self.take_used()
        while len(done) < count:
            self._put16(self._used_event, self.used_seen)
            if (
                self.used_idx() == self.used_seen
                and not select.select([self.call_fd], [], [], max(0.0, until - time.monotonic()))[0]
            ):
                raise PeerError(f"{len(done)} of {count} requests completed within {timeout} s")
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self.call_fd)
            done += self.take_used()
        return done

    def reclaim(self, head: int) -> None:
        """Gives a direct chain's descriptors back."""
        while True:
            self.free.append(head)
            _, _, flags, follower = DESC.unpack(self.memory.read(self.desc + 16 * head, 16))
            if flags & INDIRECT or not flags & NEXT:
                return
            head = follower

    def failed(self, timeout: float = TIMEOUT) -> bool:
        """Whether the back end signals the error descriptor."""
        return bool(select.select([self.error_fd], [], [], timeout)[0])


def _flags(buffer: Buffer, more: bool) -> int:
    return (WRITE if buffer.writable else 0) | (NEXT if more else 0)


class Connection:
    """The socket: whole messages, right or wrong."""

    def __init__(self, path: str, timeout: float = TIMEOUT) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(timeout)
        self.socket.connect(path)
        self.acknowledged = False  # REPLY_ACK was negotiated

    def close(self) -> None:
        self.socket.close()

    def send_raw(self, data: bytes, fds: Iterable[int] = ()) -> None:
        """Any bytes, with any descriptors."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        try:
            self.socket.sendmsg([data], ancillary if ancillary[0][2] else [])
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Closed("on sending") from error

    def send(
        self, request: int, payload: bytes = b"", fds: Iterable[int] = (), flags: int = messages.VERSION
    ) -> None:
        self.send_raw(messages.HEADER.pack(request, flags, len(payload)) + payload, fds)

    def receive(self) -> tuple[int, bytes]:
        """The next answer: its request and payload."""
        request, flags, size = messages.HEADER.unpack(self._read(messages.HEADER.size))
        if flags != messages.VERSION | messages.REPLY:
            raise PeerError(f"an answer to request {request} has the flags {flags:#x}")
        return request, self._read(size)

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                part = self.socket.recv(size - len(data))
            except ConnectionResetError as error:
                raise Closed("on receiving") from error
            if not part:
                raise Closed("on receiving")
            data += part
        return data

    def ask(self, request: int, payload: bytes = b"") -> bytes:
        """Sends a request that has an answer of its own; returns that."""
        self.send(request, payload)
        answered, answer = self.receive()
        if answered != request:
            raise PeerError(f"an answer to request {answered} instead of {request}")
        return answer

    def ask_u64(self, request: int) -> int:
        return int(messages.U64.unpack(self.ask(request))[0])

    def tell(self, request: int, payload: bytes = b"", fds: Iterable[int] = ()) -> None:
        """Sends a request without an answer of its own, and waits for the acknowledgement if there is one."""
        if not self.acknowledged:
            self.send(request, payload, fds)
            return
        self.send(request, payload, fds, messages.VERSION | messages.NEED_REPLY)
        answered, answer = self.receive()
        if answered != request or len(answer) != 8:
            raise PeerError(f"an answer to request {answered} instead of {request}")
        if int.from_bytes(answer, "little"):
            raise Refusal(f"request {request}")

    def tell_u64(self, request: int, value: int, fds: Iterable[int] = ()) -> None:
        self.tell(request, messages.U64.pack(value), fds)

    def tell_state(self, request: int, queue: int, number: int) -> None:
        self.tell(request, messages.VRING_STATE.pack(queue, number))

    def ended(self, timeout: float = TIMEOUT) -> bool:
        """Whether the back end closes the connection; what it still sends is thrown away."""
        until = time.monotonic() + timeout
        while (left := until - time.monotonic()) > 0:
            if not select.select([self.socket], [], [], left)[0]:
                return False
            try:
                if not self.socket.recv(65536):
                    return True
            except ConnectionResetError:
                return True
        return False


class FrontEnd:
    """A connection with memory and queues, step by step or all at once (``connect``)."""

    def __init__(self, path: str, memories: Sequence[GuestMemory] | None = None) -> None:
        self.connection = Connection(path)
        self.memories = list(memories) if memories is not None else [GuestMemory()]
        self.memory = self.memories[0]
        self.features = Feature(0)
        self.protocol = ProtocolFeature(0)
        self.rings: list[Ring] = []

    @classmethod
    def connect(
        cls,
        path: str,
        *,
        queues: int = 1,
        size: int = 128,
        features: int = -1,
        protocol: int = -1,
        memories: Sequence[GuestMemory] | None = None,
    ) -> Self:
        """Negotiates all that is offered and both sides know, within the masks, and starts the queues."""
        front_end = cls(path, memories)
        try:
            front_end.negotiate(features, protocol)
            front_end.share_memory()
            for index in range(queues):
                front_end.start_queue(index, size)
        except BaseException:
            front_end.close()
            raise
        return front_end

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.connection.close()
        for ring in self.rings:
            ring.close()
        for memory in self.memories:
            memory.close()
        self.rings, self.memories = [], []

    def negotiate(self, features: int = -1, protocol: int = -1) -> None:
        c = self.connection
        offered = c.ask_u64(Request.GET_FEATURES)
        if offered & Feature.PROTOCOL_FEATURES & features:
            known = sum(ProtocolFeature)
            self.protocol = ProtocolFeature(c.ask_u64(Request.GET_PROTOCOL_FEATURES) & protocol & known)
            c.tell_u64(Request.SET_PROTOCOL_FEATURES, self.protocol)
            c.acknowledged = ProtocolFeature.REPLY_ACK in self.protocol
        c.tell(Request.SET_OWNER)
        self.set_features(offered & features)

    def set_features(self, features: int) -> None:
        self.features = Feature(features)
        self.connection.tell_u64(Request.SET_FEATURES, features)

    def share_memory(self) -> None:
        """By SET_MEM_TABLE, or region by region where CONFIGURE_MEM_SLOTS was taken."""
        if ProtocolFeature.CONFIGURE_MEM_SLOTS in self.protocol:
            for memory in self.memories:
                self.add_region(memory.region, memory.fd)
        else:
            self.set_table(
                [memory.region for memory in self.memories], [memory.fd for memory in self.memories]
            )

    def set_table(self, regions: Sequence[MemoryRegion], fds: Iterable[int]) -> None:
        payload = messages.MEMORY_HEADER.pack(len(regions), 0)
        payload += b"".join(messages.REGION.pack(*region) for region in regions)
        self.connection.tell(Request.SET_MEM_TABLE, payload, fds)

    def add_region(self, region: MemoryRegion, *fds: int) -> None:
        self.connection.tell(Request.ADD_MEM_REG, messages.SINGLE_REGION.pack(0, *region), fds)

    def remove_region(self, region: MemoryRegion, *fds: int) -> None:
        self.connection.tell(Request.REM_MEM_REG, messages.SINGLE_REGION.pack(0, *region), fds)

    def get_config(self, offset: int = 0, size: int = 60) -> bytes:
        """The data; empty when the back end refuses."""
        payload = messages.CONFIG_HEADER.pack(offset, size, 0) + bytes(size)
        return self.connection.ask(Request.GET_CONFIG, payload)[messages.CONFIG_HEADER.size :]

    def set_config(self, offset: int, data: bytes, flags: int = 0) -> None:
        payload = messages.CONFIG_HEADER.pack(offset, len(data), flags) + data
        self.connection.tell(Request.SET_CONFIG, payload)

    def open_channel(self) -> socket.socket:
        """SET_BACKEND_REQ_FD; returns this side of the channel."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.settimeout(TIMEOUT)
        with theirs:
            self.connection.tell(Request.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
        return ours

    # queues

    def start_queue(
        self, index: int, size: int = 128, base: int = 0, memory: GuestMemory | None = None
    ) -> Ring:
        """A new ring, set up and enabled."""
        ring = Ring(memory or self.memory, size, Feature.RING_EVENT_IDX in self.features)
        while len(self.rings) <= index:
            self.rings.append(ring)
        self.rings[index] = ring
        ring.restart(base)
        self.set_up(index, ring, base)
        return ring

    def set_up(self, index: int, ring: Ring, base: int) -> None:
        """All messages that start a queue."""
        c = self.connection
        c.tell_state(Request.SET_VRING_NUM, index, ring.size)
        c.tell_state(Request.SET_VRING_BASE, index, base)
        descriptor, used, available = ring.address
        self.set_addresses(VringAddress(index, 0, descriptor, used, available, 0))
        c.tell_u64(Request.SET_VRING_ERR, index, [ring.error_fd])
        c.tell_u64(Request.SET_VRING_CALL, index, [ring.call_fd])
        c.tell_u64(Request.SET_VRING_KICK, index, [ring.kick_fd])
        if Feature.PROTOCOL_FEATURES in self.features:
            c.tell_state(Request.SET_VRING_ENABLE, index, 1)

    def set_addresses(self, address: VringAddress) -> None:
        self.connection.tell(Request.SET_VRING_ADDR, messages.VRING_ADDRESS.pack(*address))

    def stop_queue(self, index: int) -> int:
        """GET_VRING_BASE; returns the base."""
        answer = self.connection.ask(Request.GET_VRING_BASE, messages.VRING_STATE.pack(index, 0))
        queue, base = messages.VRING_STATE.unpack(answer)
        if queue != index:
            raise PeerError(f"GET_VRING_BASE of queue {index} answered for queue {queue}")
        return int(base)

    # requests, one at a time

    def request(
        self,
        kind: int,
        sector: int = 0,
        out: bytes = b"",
        into: int = 0,
        *,
        queue: int = 0,
        indirect: bool = False,
        pieces: int = 1,
    ) -> tuple[int, bytes, int]:
        """One request with ``out`` to the device and ``into`` bytes from it, each in so many buffers.

        Returns the status byte, what was read, and the used length.
        """
        ring = self.rings[queue]
        memory = ring.memory
        mark = memory.mark
        header = memory.put(BLK_HEADER.pack(kind, 0, sector))
        source = memory.put(out, 512) if out else 0
        sink = memory.put(b"\xa5" * into, 512) if into else 0
        status = memory.put(bytes([UNTOUCHED]))
        buffers = [Buffer(header, BLK_HEADER.size)]
        buffers += _split(source, len(out), pieces, False) + _split(sink, into, pieces, True)
        buffers.append(Buffer(status, 1, True))
        head = ring.add(buffers, indirect)
        ring.notify()
        try:
            (used,) = ring.wait_used()
            if used.head != head:
                raise PeerError(f"descriptor {used.head} was used instead of {head}")
            ring.reclaim(head)
            return memory.read(status, 1)[0], memory.read(sink, into) if into else b"", used.length
        finally:
            memory.release_all(mark)

    def _succeed(self, kind: int, sector: int = 0, out: bytes = b"", into: int = 0, queue: int = 0) -> bytes:
        status, data, used = self.request(kind, sector, out, into, queue=queue)
        if status != OK:
            raise PeerError(f"request type {kind} at sector {sector}: status {status}")
        if used != into + 1:
            raise PeerError(f"request type {kind}: used length {used} instead of {into + 1}")
        return data

    def read(self, sector: int, size: int, queue: int = 0) -> bytes:
        return self._succeed(IN, sector, into=size, queue=queue)

    def write(self, sector: int, data: bytes, queue: int = 0) -> None:
        self._succeed(OUT, sector, data, queue=queue)

    def flush(self) -> None:
        self._succeed(FLUSH)

    def identify(self) -> bytes:
        """The serial, 20 bytes."""
        return self._succeed(GET_ID, into=20)

    def discard(self, ranges: Iterable[tuple[int, int]]) -> None:
        """(sector, sectors) of each."""
        self._succeed(DISCARD, out=b"".join(SEGMENT.pack(*part, 0) for part in ranges))

    def write_zeroes(self, ranges: Iterable[tuple[int, int]], unmap: bool = False) -> None:
        flags = UNMAP if unmap else 0
        self._succeed(WRITE_ZEROES, out=b"".join(SEGMENT.pack(*part, flags) for part in ranges))


def _split(address: int, length: int, pieces: int, writable: bool) -> list[Buffer]:
    if not length:
        return []
    step = -(-length // pieces)
    return [Buffer(address + at, min(step, length - at), writable) for at in range(0, length, step)]
