# SPDX-License-Identifier: Apache-2.0
"""The target's end of a plugin's channel, against a peer that answers rightly, wrongly, or with anything."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from target.datapath import FUA, Op
from target.drivers.protocol.nbdkit_plugin.channel import Channel, Memory
from target.nbdkit import wire

OPS = (Op.READ, Op.WRITE, Op.ZEROES, Op.DISCARD, Op.FLUSH, Op.STATUS, Op.CACHE)


class FakeFault:
    """Counts its answers: there has to be one."""

    def __init__(self, op: Op, offset: int = 0, length: int = 512, flags: int = 0) -> None:
        self.op, self.offset, self.length, self.flags = op, offset, length, flags
        self.results: list[int] = []
        self.got = 0
        self.extents: list[tuple[int, int]] = []

    def done(self, result: int = 0) -> None:
        self.results.append(result)

    def get_into(self, buffer: Any, at: int, length: int) -> None:
        assert 0 <= at <= self.length - length
        buffer[0:length] = bytes([self.offset % 251]) * length

    def put_from(self, buffer: Any, at: int, length: int) -> None:
        assert at == self.got and at + length <= self.length
        self.got += length

    def put_extent(self, length: int, flags: int) -> bool:
        self.extents.append((length, flags))
        return len(self.extents) < 2048


class Peer:
    """The other end: requests as they come, and replies as the test wants them."""

    def __init__(self, maximum: int = 0) -> None:
        ours, self.sock = socket.socketpair()
        ours.setblocking(False)
        self.sock.setblocking(False)
        self.ours = ours
        self.memory = Memory()
        self.asked: list[int] = []
        self.broken: list[str] = []
        self.channel = Channel(ours, self.memory, maximum, self.asked.append, self.broken.append)

    def submit(self, fault: FakeFault) -> FakeFault:
        self.channel.submit(fault)  # type: ignore[arg-type]
        return fault

    def requests(self) -> list[tuple[int, int, int, int, int]]:
        try:
            data = self.sock.recv(1 << 20)
        except BlockingIOError:
            return []
        return list(wire.REQUEST.iter_unpack(data))

    def send(self, data: bytes) -> None:
        try:
            self.sock.sendall(data)
        except (BrokenPipeError, BlockingIOError):
            assert not self.channel.open

    def reply(self, slot: int, result: int = 0) -> None:
        self.send(wire.REPLY.pack(wire.DONE, 0, slot, result))

    def close(self) -> None:
        self.channel.close(5)
        self.sock.close()
        self.ours.close()
        self.memory.close()


@pytest.fixture
def peers() -> Iterator[Callable[..., Peer]]:
    made: list[Peer] = []

    def make(maximum: int = 0) -> Peer:
        made.append(Peer(maximum))
        return made[-1]

    yield make
    for peer in made:
        peer.close()


async def turn() -> None:
    for _ in range(4):
        await asyncio.sleep(0)


async def test_a_request_and_its_reply(peers: Callable[..., Peer]) -> None:
    peer = peers()
    fault = peer.submit(FakeFault(Op.WRITE, 4096, 1000, FUA))
    await turn()
    ((op, flags, slot, length, offset),) = peer.requests()
    assert (op, flags, length, offset) == (wire.WRITE, wire.FUA, 1000, 4096)
    assert bytes(peer.memory.slots[slot][:1001]) == bytes([4096 % 251]) * 1000 + b"\0"
    assert fault.results == []
    peer.reply(slot)
    await turn()
    assert fault.results == [0] and not peer.broken


@pytest.mark.parametrize(("maximum", "pieces"), [(0, [524288, 524288, 1]), (65536, [65536] * 16 + [1])])
async def test_pieces_follow_one_another(peers: Callable[..., Peer], maximum: int, pieces: list[int]) -> None:
    peer = peers(maximum)
    fault = peer.submit(FakeFault(Op.READ, 7, (1 << 20) + 1))
    at = 7
    for piece in pieces:
        await turn()
        ((_, _, slot, length, offset),) = peer.requests()
        assert (length, offset) == (piece, at)
        at += piece
        peer.reply(slot)
    await turn()
    assert fault.results == [0] and fault.got == fault.length


async def test_an_error_ends_a_request_of_many_pieces(peers: Callable[..., Peer]) -> None:
    peer = peers()
    fault = peer.submit(FakeFault(Op.READ, 0, 2 << 20))
    await turn()
    ((_, _, slot, _, _),) = peer.requests()
    peer.reply(slot, -28)
    await turn()
    assert fault.results == [-28] and peer.requests() == [] and peer.channel.idle


async def test_more_requests_than_slots_wait(peers: Callable[..., Peer]) -> None:
    peer = peers()
    faults = [peer.submit(FakeFault(Op.FLUSH)) for _ in range(200)]
    await turn()
    while requests := peer.requests():
        assert len(requests) <= wire.SLOTS
        for request in requests:
            peer.reply(request[2])
        await turn()
    assert all(fault.results == [0] for fault in faults)


async def test_replies_that_come_in_parts(peers: Callable[..., Peer]) -> None:
    peer = peers()
    fault = peer.submit(FakeFault(Op.FLUSH))
    await turn()
    data = wire.REPLY.pack(wire.DONE, 0, peer.requests()[0][2], 0)
    for at in range(len(data)):
        assert fault.results == []
        peer.send(data[at : at + 1])
        await turn()
    assert fault.results == [0] and not peer.broken


async def test_a_slot_is_answered_once(peers: Callable[..., Peer]) -> None:
    peer = peers()
    first, second = peer.submit(FakeFault(Op.FLUSH)), peer.submit(FakeFault(Op.FLUSH))
    await turn()
    slot = peer.requests()[0][2]
    peer.reply(slot)
    peer.reply(slot)
    await turn()
    assert first.results == [0] and second.results == [-5]
    assert peer.broken == [f"a reply to no request, for slot {slot}"]


@pytest.mark.parametrize("seed", range(30))
async def test_any_peer_gets_one_answer_to_each_request(peers: Callable[..., Peer], seed: int) -> None:
    chance = random.Random(seed)
    peer = peers(chance.choice((0, 512, 4096)))
    wrong = chance.choice((0.0, 0.02, 0.2))
    faults: list[FakeFault] = []
    for _ in range(60):
        for _ in range(chance.randrange(4)):
            length = chance.choice((1, 512, 4096, 5000))
            faults.append(peer.submit(FakeFault(chance.choice(OPS), chance.randrange(1 << 40), length)))
        await turn()
        for op, _, slot, length, _ in peer.requests():
            if chance.random() < wrong:
                peer.send(chance.randbytes(chance.randrange(1, 40)))
            answer(peer, chance, op, slot, length)
        await turn()
    if not wrong:
        await turn()
        assert not peer.broken and peer.channel.open
    peer.channel.close(5)
    assert len(peer.broken) <= 1
    assert all(len(fault.results) == 1 for fault in faults if peer.channel.idle)
    assert all(-4095 <= fault.results[0] <= 0 for fault in faults if fault.results)


def answer(peer: Peer, chance: random.Random, op: int, slot: int, length: int) -> None:
    if op != wire.STATUS:
        peer.reply(slot, chance.choice((0, 0, 0, -5, -28)))
        return
    wire.EXTENT.pack_into(peer.memory.slots[slot], 0, chance.randrange(1, length + 1), chance.randrange(4))
    peer.reply(slot, 1)
