# SPDX-License-Identifier: Apache-2.0
"""iSCSI targets that break the protocol while they are used: right bytes or an error, soon, for one node."""

from __future__ import annotations

import asyncio
import contextlib
import random
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest

from target.datapath import HOLE, ZERO
from target.graph.graph import Graph
from target.graph.node import Node
from target.peers.iscsi_target import Disk, IscsiTarget, faults
from target.peers.iscsi_target.connection import Connection
from target.peers.iscsi_target.faults import Action
from target.peers.iscsi_target.pdu import NO_TAG, Opcode, Pdu, make
from target.peers.iscsi_target.sense import BUSY, TASK_SET_FULL
from tests.support.iscsi import MIB, daemon, fresh, mock_node, mock_options, together
from tests.support.qcow2 import running_graph

SIZE = 8 * MIB
QUICK: dict[str, Any] = {"timeout": 2, "reconnect-delay": 2}
REQUEST_SECONDS = 30.0

READ, WRITE, WRITE_16, SYNC, UNMAP, LBA_STATUS = 0x28, 0x2A, 0x8A, 0x35, 0x42, 0x9E


@contextlib.asynccontextmanager
async def bystander(graph: Graph) -> AsyncIterator[None]:
    """Another node, on a target of its own, is used all the while and sees nothing."""
    with IscsiTarget() as target:
        other = target.add_disk(MIB)
        node = await graph.add({"node-name": "other", **mock_options(target)})
        slowest = 0.0

        async def use() -> None:
            nonlocal slowest
            for number in range(1 << 30):
                begun = time.monotonic()
                await node.write(0, bytes((number % 256,)) * 4096)
                assert await node.read(0, 4096) == other.data[:4096]
                slowest = max(slowest, time.monotonic() - begun)
                await asyncio.sleep(0.005)

        task = asyncio.create_task(use())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            await graph.remove("other")
        assert slowest < 3, f"the other node waited {slowest:.1f} s"


Lun = tuple[IscsiTarget, Disk]


@pytest.fixture
def lun() -> Iterator[Lun]:
    with fresh() as made:
        yield made


async def ends(work: Awaitable[Any]) -> OSError | None:
    """None when it succeeded; else the error. Never for ever."""
    try:
        async with asyncio.timeout(REQUEST_SECONDS):
            await work
    except TimeoutError as error:
        if error.errno is None:
            raise AssertionError("a request does not end") from None
        return error
    except OSError as error:
        return error
    return None


SHORT = struct.Struct(">I")


def data_in(change: Callable[[bytes], bytes]) -> Action:
    """Changes Data-In PDUs only."""
    return faults.changed(lambda pdu: change(pdu) if pdu[0] & 0x3F == Opcode.DATA_IN else pdu)


def at(place: int, value: int) -> Callable[[bytes], bytes]:
    return lambda pdu: pdu[:place] + SHORT.pack(value) + pdu[place + 4 :]


READS: dict[str, Action] = {
    "garbage": faults.raw(b"\xa5" * 480),
    "zeros": faults.raw(bytes(480)),
    "reserved opcode": faults.patched(0, b"\x2a"),
    "reject": faults.patched(0, b"\x3f"),
    "cut in the header": faults.cut(17),
    "cut in the data": faults.cut(1000),
    "hang up": faults.hang_up,
    "silence": faults.silence,
    "wrong tag": faults.wrong_tag(),
    "offset before": data_in(at(40, 0xFFFFFE00)),
    "offset past the end": data_in(at(40, 1 << 20)),
    "offset in the middle": data_in(at(40, 512)),
    "more data than asked for": data_in(lambda pdu: pdu[:5] + b"\0\x40\0" + pdu[8:48] + bytes(0x4000)),
    "less data than asked for": data_in(lambda pdu: pdu[:5] + b"\0\2\0" + pdu[8:48] + pdu[48:560]),
    "no data": faults.data(b""),
    "a byte": faults.data(b"\1"),
    "too much said to remain": data_in(
        lambda pdu: pdu[:1] + b"\x83" + pdu[2:44] + b"\xff\xff\xff\xff" + pdu[48:]
    ),
    "16 MiB promised": data_in(lambda pdu: pdu[:5] + b"\xff\xff\xff" + pdu[8:]),
    "additional header": data_in(lambda pdu: pdu[:4] + b"\xff" + pdu[5:]),
    "R2T for a read": data_in(
        lambda pdu: b"\x31\x80" + pdu[2:5] + b"\0\0\0" + pdu[8:40] + b"\0\0\0\0\0\0\2\0"
    ),
    "good without data": faults.changed(lambda pdu: b"\x21\x80\0\0\0\0\0\0" + pdu[8:36] + bytes(12)),
    "target failure": faults.changed(lambda pdu: b"\x21\x80\1\0\0\0\0\0" + pdu[8:36] + bytes(12)),
    "medium error": faults.sense(3, 0x11),
    "sense in another format": faults.sense(4, 0x44, 0, 0x72),
    "sense that is none": faults.raw_sense(b"\xff" * 20),
    "no sense": faults.raw_sense(b""),
    "sense longer than said": faults.raw_sense(b"\x70\0\3\0\0\0\0\xff\0\0\0\0\x11"),
    "odd status": faults.status(0x30),
    "reservation conflict": faults.status(0x18),
    "task set full for ever": faults.status(TASK_SET_FULL),
    "busy for ever": faults.status(BUSY),
    "attention for ever": faults.sense(6, 0x29),
    "aborted for ever": faults.sense(0xB, 0x47),
    "not ready for ever": faults.sense(2, 0x04, 1),
}


@pytest.mark.slow
async def test_reads_that_go_wrong() -> None:
    """The right bytes or an error, soon; afterwards all is well again."""

    async def check(name: str) -> None:
        with fresh() as (mock, disk):
            async with running_graph() as graph:
                node = await graph.add({"node-name": "disk", **mock_options(mock, **QUICK)})
                mock.rule(faults.on_opcode(READ, 0x88), READS[name])
                for offset, length in ((0, 4096), (8192, 65536)):
                    error = await ends(check_read(node, disk, offset, length))
                    if "said to remain" not in name:
                        assert error is not None, "a read that failed was taken for good"
                mock.behave()
                assert await recovers(node, disk)

    async with running_graph(threads=2) as graph, bystander(graph):
        await together(READS, check)


def answer_then_data(connection: Connection, request: Pdu) -> bool:
    """The command fails, and behind that in the same breath some of its data begin to come."""
    data = make(Opcode.DATA_IN, itt=request.itt, data=bytes(4096), words={20: NO_TAG})
    connection.wire = lambda encoded: encoded + data.header + data.data[:100]
    return faults.sense(3, 0x11)(connection, request)


async def test_data_of_a_command_that_is_over(lun: Lun, caplog: pytest.LogCaptureFixture) -> None:
    """They have no place any more: the buffer is another's."""
    target, disk = lun
    async with running_graph() as graph:
        node = await graph.add({"node-name": "disk", **mock_options(target, header_digest="none", **QUICK)})
        target.rule(faults.on_opcode(READ), answer_then_data, count=1)
        async with asyncio.timeout(10):
            assert await node.read(0, 4096) == disk.data[:4096], "not asked again"
            assert await node.read(0, MIB) == disk.data[:MIB]
    assert "the target sends data that no command wants" in caplog.text


async def recovers(node: Node, disk: Disk) -> bool:
    """Whether it works again soon."""
    end = time.monotonic() + 15
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            return await node.read(0, MIB) == disk.data[:MIB]
        await asyncio.sleep(0.1)
    return False


TRANSIENT = ("hang up", "cut", "for ever", "silence", "garbage", "zeros", "wrong tag", "reserved")


@pytest.mark.slow
async def test_reads_that_go_wrong_once() -> None:
    """A target that errs on the way, not about the medium, is asked again: the caller sees nothing."""

    async def check(name: str) -> None:
        with fresh() as (mock, disk):
            async with running_graph() as graph:
                node = await graph.add({"node-name": "disk", **mock_options(mock, **QUICK)})
                rule = mock.rule(faults.on_opcode(READ, 0x88), READS[name], count=1)
                error = await ends(check_read(node, disk, 4096, 100_000))
                assert rule.acted == 1
                if any(word in name for word in TRANSIENT):
                    assert error is None, error
                assert await recovers(node, disk)

    await together(READS, check)


async def check_read(node: Node, disk: Disk, offset: int, length: int) -> None:
    assert await node.read(offset, length) == disk.data[offset : offset + length], "wrong bytes"


WRITES: dict[str, Action] = {
    name: READS[name]
    for name in (
        *("garbage", "reject", "cut in the header", "hang up", "silence", "wrong tag", "medium error"),
        *("no sense", "odd status", "busy for ever", "reservation conflict", "attention for ever"),
    )
} | {
    "R2T past the end": faults.changed(lambda pdu: r2t(pdu, offset=1 << 30, length=4096)),
    "R2T without end": faults.changed(lambda pdu: r2t(pdu, offset=0, length=0xFFFFFFFF)),
    "R2T at the last byte": faults.changed(lambda pdu: r2t(pdu, offset=0xFFFFFFFF, length=0xFFFFFFFF)),
    "R2T of nothing": faults.changed(lambda pdu: r2t(pdu, offset=0, length=0)),
    "write protected": faults.sense(7, 0x27),
    "no space": faults.sense(7, 0x27, 7),
}


def r2t(pdu: bytes, offset: int, length: int) -> bytes:
    return (
        b"\x31\x80\0\0\0\0\0\0"
        + pdu[8:20]
        + b"\0\0\0\x09"
        + pdu[24:36]
        + struct.pack(">III", 0, offset, length)
    )


@pytest.mark.slow
async def test_writes_that_go_wrong() -> None:
    async def check(name: str) -> None:
        with fresh() as (mock, disk):
            async with running_graph() as graph:
                node = await graph.add({"node-name": "disk", **mock_options(mock, **QUICK)})
                mock.rule(faults.on_opcode(WRITE, WRITE_16), WRITES[name])
                for length in (4096, 600_000):
                    error = await ends(node.write(0, b"\3" * length))
                    assert error is not None, f"a write of {length} bytes that failed was taken for good"
                mock.behave()
                assert await recovers(node, disk)
                await node.write(0, b"\4" * 600_000)
                assert disk.data[:600_000] == b"\4" * 600_000

    async with running_graph(threads=2) as graph, bystander(graph):
        await together(WRITES, check)


def status_data(length: int, *descriptors: tuple[int, int, int]) -> bytes:
    """Parameter data of GET LBA STATUS that may lie about its length."""
    packed = b"".join(struct.pack(">QIB3x", *descriptor) for descriptor in descriptors)
    return struct.pack(">I4x", length) + packed


BLOCKS = SIZE // 512
STATUSES = {
    "nothing": b"",
    "a header": bytes(8),
    "no descriptors": status_data(4),
    "a length without descriptors": status_data(20),
    "a length past the end": status_data(0xFFFFFFFF, (0, BLOCKS, 1)),
    "half a descriptor": status_data(20, (0, BLOCKS, 1))[:20],
    "another place": status_data(20, (BLOCKS // 2, BLOCKS // 2, 1)),
    "a place before": status_data(36, (0, 1, 1), (1, BLOCKS, 1)),
    "no blocks": status_data(20, (0, 0, 1)),
    "more blocks than there are": status_data(20, (0, 0xFFFFFFFF, 0)),
    "an unknown status": status_data(20, (0, BLOCKS, 9)),
    "descriptors that overlap": status_data(36, (0, BLOCKS, 0), (0, BLOCKS, 1)),
}


@pytest.mark.parametrize("name", STATUSES)
async def test_block_status_that_is_none(lun: Lun, name: str) -> None:
    """CVE-2020-1711: never past the answer, never without progress, and data are not told to be zeros."""
    mock, _ = lun
    async with running_graph() as graph:
        node = await graph.add({"node-name": "disk", **mock_options(mock, **QUICK)})
        mock.rule(faults.on_service_action(LBA_STATUS, 0x12), faults.data(STATUSES[name]))
        for offset in (0, MIB, 512):
            extents: list[Any] = []

            async def ask(offset: int = offset) -> None:
                nonlocal extents
                extents = await node.block_status(offset, MIB)

            if await ends(ask()) is None:
                assert extents and all(extent.length > 0 for extent in extents)
                assert sum(extent.length for extent in extents) <= MIB
                if name in ("another place", "no blocks", "half a descriptor"):
                    assert not any(extent.flags & (ZERO | HOLE) for extent in extents)
        mock.behave()
        found = await node.block_status(0, SIZE)
        assert [(extent.length, bool(extent.flags & ZERO)) for extent in found] == [
            (SIZE // 2, False),
            (SIZE // 2, True),
        ]


OTHERS: dict[int, Callable[[Node], Awaitable[None]]] = {
    UNMAP: lambda node: node.discard(0, MIB),
    SYNC: lambda node: node.flush(),
    0x41: lambda node: node.write_zeroes(0, MIB),
    0x93: lambda node: node.write_zeroes(0, MIB),
}


@pytest.mark.slow
async def test_other_commands_that_go_wrong() -> None:
    async def check(case: tuple[int, str]) -> None:
        opcode, answer = case
        with fresh() as (mock, disk):
            async with running_graph() as graph:
                node = await graph.add({"node-name": "disk", **mock_options(mock, **QUICK)})
                rule = mock.rule(faults.on_opcode(opcode), READS[answer])
                if opcode == SYNC:
                    await node.write(0, b"\1" * 512)
                error = await ends(OTHERS[opcode](node))
                if rule.acted:
                    assert error is not None or answer == "medium error"  # zeroes can be written otherwise
                mock.behave()
                assert await recovers(node, disk)

    answers = ("hang up", "silence", "medium error", "busy for ever", "garbage")
    await together([(opcode, answer) for opcode in OTHERS for answer in answers], check)


async def test_zeroes_and_discards_of_luns_that_lie(lun: Lun) -> None:
    """What was offered is refused: zeroes are written as data, a discard does nothing."""
    mock, disk = lun
    mock.rule(faults.on_opcode(0x41, 0x93, UNMAP), faults.sense(5, 0x20))
    async with running_graph() as graph:
        node = await graph.add({"node-name": "disk", **mock_options(mock, **QUICK)})
        await node.write_zeroes(0, MIB)
        assert not any(disk.data[:MIB])
        before = bytes(disk.data)
        await ends(node.discard(MIB, MIB))
        assert disk.data == before


async def test_a_target_that_speaks_out_of_turn(lun: Lun) -> None:
    """Pings are answered; a request to log out is followed by a new login; strangers' answers are dropped."""
    mock, disk = lun
    async with running_graph() as graph:
        node = await graph.add({"node-name": "disk", **mock_options(mock, **QUICK)})
        (connection,) = mock.connections
        for _ in range(20):
            connection.ping()
        assert await ends(check_read(node, disk, 4096, 100_000)) is None
        connection.send_async(1)
        assert await recovers(node, disk)
        for connection in list(mock.connections):
            connection.send_async(2)
        assert await recovers(node, disk)
        for connection in list(mock.connections):
            connection.send_raw(random.Random(5).randbytes(4800))
        assert await recovers(node, disk)


@pytest.mark.parametrize("change", ["block size", "another disk", "gone"])
async def test_another_lun_after_a_reconnect(lun: Lun, change: str) -> None:
    """Bytes meant for one disk never reach another."""
    mock, disk = lun
    async with running_graph() as graph:
        node = await graph.add({"node-name": "disk", **mock_options(mock, **QUICK)})
        await node.write(0, b"\1" * 4096)
        port = mock.port
        mock.stop()
        with IscsiTarget() as second:
            second.stop()
            second.port = port
            other = None
            if change == "gone":
                second.add_disk(SIZE, lun=2)
            else:
                size = 4096 if change == "block size" else 512
                other = second.add_disk(SIZE, block_size=size)
                other.naa = other.naa if change == "block size" else b"\x60\x01\x40\x5b" + bytes(12)
            second.start()
            assert await ends(node.write(0, b"\2" * 4096)) is not None
            assert await ends(node.read(0, 4096)) is not None
            if other is not None:
                assert not any(other.data)
        mock.start()
        assert await recovers(node, disk)


async def test_many_requests_in_flight_when_garbage_comes(lun: Lun) -> None:
    mock, disk = lun
    async with running_graph(threads=2) as graph, bystander(graph):
        node = await graph.add({"node-name": "disk", **mock_options(mock, sessions=2, **QUICK)})
        mock.rule(faults.on_opcode(READ), faults.raw(random.Random(9).randbytes(997)), after=50, count=3)
        places = [random.Random(11).randrange(SIZE // 4096) * 4096 for _ in range(400)]
        found = await asyncio.gather(*(node.read(place, 4096) for place in places))
        assert all(data == disk.data[place : place + 4096] for place, data in zip(places, found, strict=True))


def test_a_daemon_goes_on_without_the_node(lun: Lun) -> None:
    """One line of log names the node, when the target is lost."""
    mock, _ = lun
    with daemon(*mock_node(mock, **QUICK)) as started:
        mock.stop()
        end = time.monotonic() + 10
        while "node 'disk'" not in started.output():
            assert time.monotonic() < end, started.output()
            time.sleep(0.05)
        mock.start()
