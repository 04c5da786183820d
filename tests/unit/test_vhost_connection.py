# SPDX-License-Identifier: Apache-2.0
"""The control socket: messages arrive whole with their descriptors, and no descriptor is leaked."""

from __future__ import annotations

import array
import asyncio
import os
import socket
from collections.abc import Iterator

import pytest

from target.exports.vhost_user_blk import connection
from target.exports.vhost_user_blk.connection import Connection
from target.exports.vhost_user_blk.messages import HEADER, MessageError, Request

MESSAGE = HEADER.pack(Request.SET_FEATURES, 1, 8) + bytes(range(8))


@pytest.fixture
def pair() -> Iterator[tuple[Connection, socket.socket]]:
    before = sorted(os.listdir("/proc/self/fd"))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    made = Connection(ours)
    yield made, theirs
    made.close()
    theirs.close()
    assert sorted(os.listdir("/proc/self/fd")) == before


def send_fds(sock: socket.socket, data: bytes, count: int) -> None:
    fds = [os.memfd_create("x") for _ in range(count)]
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
    for fd in fds:
        os.close(fd)


Pair = tuple[Connection, socket.socket]


async def test_messages_in_one_piece_and_in_bytes(pair: Pair) -> None:
    ours, theirs = pair
    theirs.send(MESSAGE + MESSAGE)
    for _ in range(2):
        message = await ours.receive()
        assert message is not None
        assert (message.header.request, message.payload) == (Request.SET_FEATURES, bytes(range(8)))
    receiving = asyncio.ensure_future(ours.receive())
    for byte in MESSAGE:
        theirs.send(bytes([byte]))
        await asyncio.sleep(0)
    message = await receiving
    assert message is not None
    assert message.payload == bytes(range(8))
    theirs.close()
    assert await ours.receive() is None


async def test_descriptors_stay_with_their_message(pair: Pair) -> None:
    ours, theirs = pair
    send_fds(theirs, MESSAGE, 2)
    theirs.send(MESSAGE)
    send_fds(theirs, MESSAGE, 1)
    for count in (2, 0, 1):
        message = await ours.receive()
        assert message is not None
        assert len(message.fds) == count
        assert not any(os.get_inheritable(fd) for fd in message.fds)
        message.close()


@pytest.mark.parametrize("count", [9, 253])
async def test_too_many_descriptors(pair: Pair, count: int) -> None:
    ours, theirs = pair
    send_fds(theirs, MESSAGE, count)
    with pytest.raises(MessageError, match="file descriptors"):
        await ours.receive()


async def test_descriptors_on_every_byte(pair: Pair) -> None:
    ours, theirs = pair
    for byte in MESSAGE:
        send_fds(theirs, bytes([byte]), 1)
    with pytest.raises(MessageError, match="file descriptors"):
        await ours.receive()


@pytest.mark.parametrize("length", [1, 11, 12, 19])
async def test_end_within_a_message(pair: Pair, length: int) -> None:
    ours, theirs = pair
    send_fds(theirs, MESSAGE[:length], 1)
    theirs.close()
    with pytest.raises(MessageError, match="ended within"):
        await ours.receive()


async def test_silence_within_a_message(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair
    monkeypatch.setattr(connection, "DEADLINE", 0.05)
    theirs.send(MESSAGE[:13])
    with pytest.raises(TimeoutError):
        await ours.receive()


async def test_peer_that_does_not_read(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = pair
    monkeypatch.setattr(connection, "DEADLINE", 0.05)
    with pytest.raises(TimeoutError):
        await ours.send(bytes(1 << 24))
