# SPDX-License-Identifier: Apache-2.0
"""Fuzz target: messages of a vhost-user front end, from the header to the state of the session.

Only MessageError may come out, and it ends the session. The back end is a model of the datapath's rules: what
may not change under a running queue raises EBUSY, and a queue that was stopped or removed does not run.
Input: messages of a kind, flags, a number of descriptors, a length and a payload; or a raw header.
"""

from __future__ import annotations

import errno
import os
import socket
from typing import Any

import atheris

from tests.fuzz.python.common import Input, finish, main

with atheris.instrument_imports(include=["target.exports.vhost_user_blk"]):
    from target.exports.vhost_user_blk import messages
    from target.exports.vhost_user_blk.device import BlockDevice
    from target.exports.vhost_user_blk.messages import (
        HEADER,
        MAX_PAYLOAD,
        REPLY,
        Header,
        MemoryRegion,
        MessageError,
        Request,
        VringAddress,
    )
    from target.exports.vhost_user_blk.session import Session

QUEUES = 3
MAX_QUEUE_SIZE = 1024
REGIONS = 64
KINDS = list(Request)
SOCKETS = socket.socketpair()
PIPE = os.pipe()


def refuse(number: int) -> OSError:
    return OSError(number, os.strerror(number))


class Backend:
    """The rules of the datapath's side of a session."""

    def __init__(self, choices: Input) -> None:
        self.choices = choices
        self.running: set[int] = set()
        self.regions: list[MemoryRegion] = []
        self.sizes: dict[int, int] = {}
        self.placed: set[int] = set()
        self.closed = False

    def _stopped(self, *queues: int) -> None:
        assert not self.closed
        if any(queue >= QUEUES for queue in queues):
            raise refuse(errno.EINVAL)
        if self.running & (set(queues) or set(range(QUEUES))):
            raise refuse(errno.EBUSY)

    async def close(self) -> None:
        self.running.clear()
        self.closed = True

    def set_features(self, features: int) -> None:
        self._stopped()

    def set_write_through(self, on: bool) -> None:
        assert isinstance(on, bool)

    def set_capacity(self, capacity: int) -> None:
        assert capacity % 512 == 0

    def clear_regions(self) -> None:
        self._stopped()
        self.regions.clear()

    def add_region(self, region: MemoryRegion, fd: int) -> None:
        self._stopped()
        if not region.size or len(self.regions) == REGIONS:
            raise refuse(errno.EINVAL)
        self.regions.append(region)

    def remove_region(self, region: MemoryRegion) -> None:
        self._stopped()
        found = [known for known in self.regions if known[:3] == region[:3]]
        if not found:
            raise refuse(errno.ENOENT)
        self.regions.remove(found[0])

    def set_size(self, queue: int, size: int) -> None:
        self._stopped(queue)
        if not 0 < size <= MAX_QUEUE_SIZE or size & (size - 1):
            raise refuse(errno.EINVAL)
        self.sizes[queue] = size

    def set_base(self, queue: int, base: int) -> None:
        self._stopped(queue)
        if base > 0xFFFF:
            raise refuse(errno.EINVAL)

    def set_addresses(self, address: VringAddress) -> None:
        self._stopped(address.queue)
        self.placed.add(address.queue)

    def set_kick(self, queue: int, fd: int) -> None:
        self._stopped(queue)

    def set_error(self, queue: int, fd: int) -> None:
        self._stopped(queue)

    def set_call(self, queue: int, fd: int) -> None:
        if queue >= QUEUES:
            raise refuse(errno.EINVAL)

    def base(self, queue: int) -> int:
        assert queue < QUEUES and queue not in self.running
        return queue * 7

    def start(self, queue: int) -> None:
        self._stopped(queue)
        if queue not in self.sizes or queue not in self.placed or not self.regions:
            raise refuse(errno.EFAULT)
        self.running.add(queue)

    async def stop(self, queue: int) -> None:
        assert queue in self.running
        self.running.discard(queue)


def device(mode: int) -> BlockDevice:
    return BlockDevice(
        capacity=1 << 20,
        block_size=4096 if mode & 1 else 512,
        queues=QUEUES,
        writable=bool(mode & 2),
        writethrough=bool(mode & 4),
        seg_max=126,
        max_segments=32,
        max_sectors=1 << 21,
    )


def take_message(input: Input) -> tuple[Header, bytes, int] | None:
    """A message; None when its header is refused."""
    kind = input.number()
    if kind == 0xFF:
        try:
            header = Header.parse(input.take(HEADER.size).ljust(HEADER.size, b"\0"))
        except MessageError:
            return None
        assert header.size <= MAX_PAYLOAD
        return header, input.take(header.size).ljust(header.size, b"\0"), input.number() % 10
    number = int(KINDS[kind % len(KINDS)]) if kind < 0xF0 else input.number()
    flags, fds, length = input.number(), input.number() % 10, input.number()
    payload = input.take(length)
    header = Header(number, messages.VERSION | (messages.NEED_REPLY if flags & 1 else 0), len(payload))
    return header, payload, fds


def check_answer(answer: bytes | None, header: Header) -> None:
    if answer is None:
        return
    request, flags, size = HEADER.unpack_from(answer)
    assert (request, flags) == (header.request, messages.VERSION | REPLY)
    assert size == len(answer) - HEADER.size


def descriptors(count: int, header: Header) -> list[int]:
    """Real ones only where the session keeps one."""
    if header.request != Request.SET_BACKEND_REQ_FD:
        return [PIPE[0]] * count
    return [os.dup(SOCKETS[0].fileno() if header.need_reply else PIPE[0]) for _ in range(count)]


async def play(session: Session, input: Input) -> None:
    while input.left:
        message = take_message(input)
        if message is None:
            continue
        header, payload, count = message
        fds = descriptors(count, header)
        try:
            answer = await session.handle(header.request, header.need_reply, payload, fds)
        finally:
            if header.request == Request.SET_BACKEND_REQ_FD:
                for fd in fds:
                    os.close(fd)
        check_answer(answer, header)
        wanted = {i for i, queue in enumerate(session.queues) if queue.wanted}
        backend: Any = session.backend
        assert backend.running <= wanted, "a queue runs that was stopped"
        if input.number() == 0x55:
            session.resized()


def test_one_input(data: bytes) -> None:
    input = Input(data)
    flushes = []

    async def flush() -> None:
        flushes.append(1)

    backend: Any = Backend(input)
    session = Session(device(input.number()), backend, flush)
    try:
        finish(play(session, input))
    except MessageError as error:
        assert "\n" not in str(error)
    finish(session.close())
    assert backend.closed and session.channel is None


if __name__ == "__main__":
    main(test_one_input)
