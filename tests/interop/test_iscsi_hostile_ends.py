# SPDX-License-Identifier: Apache-2.0
"""iSCSI targets that end a command before its data have moved, and ends of nodes that are busy.

Memory is its owner's again when the request is over: nothing is written to it then, nothing of it is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from target.peers.iscsi_target import Disk, IscsiTarget, faults
from target.peers.iscsi_target.connection import Connection
from target.peers.iscsi_target.pdu import FINAL, Opcode, Pdu
from target.peers.iscsi_target.sense import BUSY, CHECK_CONDITION, GOOD, Result, Sense
from tests.support.iscsi import MIB, fresh, mock_options
from tests.support.qcow2 import running_graph

Lun = tuple[IscsiTarget, Disk]
READ, WRITE, WRITE_16, SYNC, CAPACITY, COPY = 0x28, 0x2A, 0x8A, 0x35, 0x9E, 0x83
RESERVATION_CONFLICT, TASK_ABORTED = 0x18, 0x40
LONG = 20.0  # for what has to happen at all
OTHER_USE = b"\x77"


@pytest.fixture
def lun() -> Iterator[Lun]:
    with fresh(size=32 * MIB) as made:
        yield made


async def soon(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


# ---- reads ----

ENDS: dict[str, Callable[[Connection, Pdu], None]] = {
    "a response": lambda connection, request: connection.finish(request, Result(GOOD)),
    "data with a status": lambda connection, request: connection.finish(request, Result(GOOD, bytes(65536))),
    "a reject": lambda connection, request: connection.reject(request),
}


@pytest.mark.parametrize("end", ENDS)
async def test_data_for_a_read_that_has_ended_go_nowhere(lun: Lun, end: str) -> None:
    """In one segment: the end of a READ, and the beginning of (more) data for it. The rest comes later."""
    mock, disk = lun
    reused = threading.Event()

    def act(connection: Connection, request: Pdu) -> bool:
        with connection.kept() as status:
            ENDS[end](connection, request)
        with connection.kept() as data:
            connection.finish(request, Result(GOOD, b"\xee" * 65536))
        connection.send_raw(bytes(status + data[:148]))
        reused.wait(LONG)
        with contextlib.suppress(OSError):
            connection.send_raw(bytes(data[148:]))
        return True

    async with running_graph(threads=1) as graph:
        node = await graph.add({"node-name": "disk", **mock_options(mock)})
        rule = mock.rule(faults.on_opcode(READ), act, count=1)
        buffer = bytearray(65536)
        async with asyncio.timeout(LONG):
            await node.object.read_into(0, buffer)
        assert rule.acted == 1
        assert buffer == disk.data[:65536], "not what is there, by another connection"
        buffer[:] = OTHER_USE * len(buffer)
        reused.set()
        await asyncio.sleep(0.2)
        assert buffer.count(OTHER_USE) == len(buffer), "memory of a read that is over was written"
        assert await node.read(65536, 65536) == disk.data[65536 : 2 * 65536]
    assert mock.logins >= 2


# ---- writes ----

WRITES = 4
PART = 4 * MIB


class Refusal:
    """Asks for all of the data of a few writes, ends these, and only then takes what was asked for."""

    def __init__(self, result: Result) -> None:
        self.result = result
        self.requests: list[Pdu] = []
        self.ended, self.go_on = threading.Event(), threading.Event()
        self.taken = bytearray()
        self.finals = 0

    def __call__(self, connection: Connection, request: Pdu) -> bool:
        self.requests.append(request)
        if len(self.requests) < WRITES:
            return True
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        for asked in self.requests:
            connection.ask(asked, 0, PART, 9, 0)
        time.sleep(0.5)  # what there is room for on the way comes; the rest waits
        for asked in self.requests:
            connection.finish(asked, self.result)
        self.ended.set()
        self.go_on.wait(LONG)
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        while self.finals < WRITES:
            pdu = connection.receive()
            if pdu.opcode == Opcode.DATA_OUT and pdu.word(20) == 9:
                self.taken += pdu.data
                self.finals += bool(pdu.flags & FINAL)
        return True


REFUSALS: dict[str, tuple[Result, int]] = {
    "reserved": (Result(RESERVATION_CONFLICT), errno.EBADE),
    "write protected": (Result(CHECK_CONDITION, sense=Sense(7, 0x27, 0).encode()), errno.EROFS),
    "busy": (Result(BUSY), 0),
    "aborted": (Result(TASK_ABORTED), 0),
}


@pytest.mark.parametrize("why", REFUSALS)
async def test_a_write_that_is_refused_early_ends_when_its_data_are_out(lun: Lun, why: str) -> None:
    mock, disk = lun
    result, error = REFUSALS[why]
    refusal = Refusal(result)
    async with running_graph(threads=1) as graph:
        node = await graph.add({"node-name": "disk", **mock_options(mock)})
        mock.rule(faults.on_opcode(WRITE, WRITE_16), refusal, count=WRITES)
        buffer = bytearray(b"\x11" * (WRITES * PART))
        write = asyncio.create_task(node.object.write(0, buffer))
        await soon(refusal.ended.is_set)
        await asyncio.sleep(0.3)
        assert not write.done(), "it is over, and libiscsi still has its data to send"
        refusal.go_on.set()
        async with asyncio.timeout(LONG):
            if error:
                with pytest.raises(OSError, match=os.strerror(error)) as caught:
                    await write
                assert caught.value.errno == error
            else:
                await write
        buffer[:] = OTHER_USE * len(buffer)
        await soon(lambda: refusal.finals == WRITES)
        assert refusal.taken.count(b"\x11") == len(refusal.taken) == WRITES * PART
        await node.write(0, b"\4" * MIB)
        assert disk.data[:MIB] == b"\4" * MIB
        assert error or disk.data[MIB : WRITES * PART].count(b"\x11") == WRITES * PART - MIB
    assert mock.logins == 1, "an early refusal broke the connection"


async def test_a_write_that_is_done_before_its_data_are_out_is_sent_again(lun: Lun) -> None:
    """No target can have written what it does not have."""
    mock, disk = lun
    refusal = Refusal(Result(GOOD))
    async with running_graph(threads=1) as graph:
        node = await graph.add({"node-name": "disk", **mock_options(mock)})
        mock.rule(faults.on_opcode(WRITE, WRITE_16), refusal, count=WRITES)
        async with asyncio.timeout(LONG):
            await node.write(0, b"\x11" * (WRITES * PART))
        assert disk.data[: WRITES * PART].count(b"\x11") == WRITES * PART
        refusal.go_on.set()
    assert mock.logins >= 2


async def test_the_connection_of_writes_that_were_refused_early_is_lost(lun: Lun) -> None:
    """What the target has said about them holds."""
    mock, disk = lun
    refusal = Refusal(Result(RESERVATION_CONFLICT))
    async with running_graph(threads=1) as graph:
        node = await graph.add({"node-name": "disk", **mock_options(mock)})
        mock.rule(faults.on_opcode(WRITE, WRITE_16), refusal, count=WRITES)
        write = asyncio.create_task(node.write(0, b"\x11" * (WRITES * PART)))
        await soon(refusal.ended.is_set)
        await asyncio.sleep(0.2)
        mock.drop()
        async with asyncio.timeout(LONG):
            with pytest.raises(OSError, match=os.strerror(errno.EBADE)):
                await write
        refusal.go_on.set()
        assert await node.read(0, 4096) == disk.data[:4096]


# ---- what else was told too early, or not at all ----


async def test_a_flush_with_an_error_does_not_end_all_flushes(lun: Lun) -> None:
    """INVALID FIELD IN CDB does not say that there is no cache."""
    mock, disk = lun
    async with running_graph() as graph:
        node = await graph.add({"node-name": "disk", **mock_options(mock)})
        await node.write(0, bytes(512))
        rule = mock.rule(faults.on_opcode(SYNC), faults.sense(5, 0x24), count=1)
        with pytest.raises(OSError):
            await node.flush()
        assert rule.acted == 1
        before = disk.commands[SYNC]
        await node.write(0, bytes(512))
        await node.flush()
        assert disk.commands[SYNC] == before + 1


async def test_a_target_that_takes_one_command_at_a_time_is_not_silent(lun: Lun) -> None:
    """`timeout` is for commands that the target has, not for those that wait for its window (MaxCmdSN)."""
    mock, disk = lun
    async with running_graph() as graph:
        mock.window = 1
        node = await graph.add({"node-name": "disk", **mock_options(mock, timeout=2)})
        mock.rule(faults.on_opcode(READ), faults.delayed(0.7))
        found = await asyncio.gather(*(node.read(number * 4096, 4096) for number in range(7)))
        assert b"".join(found) == disk.data[: 7 * 4096]
        mock.behave()
    assert mock.logins == 1


async def test_synchronize_waits_for_a_copy_that_the_target_makes(lun: Lun) -> None:
    mock, disk = lun
    other = mock.add_disk(len(disk.data), lun=2)
    free = threading.Event()
    async with running_graph(threads=1) as graph:
        source = await graph.add({"node-name": "source", **mock_options(mock)})
        node = await graph.add({"node-name": "destination", **mock_options(mock, 2)})
        rule = mock.rule(faults.on_opcode(COPY), faults.stuck(free))
        copy = asyncio.create_task(graph.datapath.copy(source.object, node.object, 0, 0, MIB))
        await soon(lambda: rule.acted > 0)
        waits = asyncio.create_task(node.object.synchronize())
        await asyncio.sleep(0.2)
        assert not waits.done() and not copy.done()
        free.set()
        async with asyncio.timeout(LONG):
            await asyncio.gather(waits, copy)
    assert other.data[:MIB] == disk.data[:MIB]


# ---- the end of a node ----


async def test_a_node_is_closed_while_a_command_waits_to_be_sent_again(lun: Lun) -> None:
    """The LUN has grown; its capacity is read again, for which it is BUSY."""
    mock, disk = lun
    async with running_graph(threads=1) as graph:
        other = await graph.add({"driver": "null-co", "node-name": "other", "size": MIB})
        node = await graph.add({"node-name": "disk", **mock_options(mock)})
        rule = mock.rule(faults.on_service_action(CAPACITY, 0x10), faults.status(BUSY))
        disk.resize(2 * len(disk.data))
        await node.read(0, 512)
        await soon(lambda: rule.acted >= 4)
        async with asyncio.timeout(LONG):
            await graph.remove("disk")
            await other.read(0, 4096)


async def test_a_node_is_closed_while_commands_are_answered(lun: Lun) -> None:
    """The answer after which a command is to be sent again comes with that to the logout."""
    mock, disk = lun
    held: list[bytes] = []

    def keep(connection: Connection, request: Pdu) -> bool:
        with connection.kept() as answer:
            connection.finish(request, Result(CHECK_CONDITION, sense=Sense(6, 0x29, 0).encode()))
        held.append(bytes(answer))
        return True

    def give(connection: Connection, request: Pdu) -> bool:
        connection.send_raw(b"".join(held))
        return False

    async with running_graph(threads=1) as graph:
        for _ in range(10):
            held.clear()
            mock.behave()
            node = await graph.add({"node-name": "disk", **mock_options(mock)})
            mock.rule(faults.on_service_action(CAPACITY, 0x10), keep)
            mock.rule(faults.on_pdu(Opcode.LOGOUT), give)
            disk.resize(len(disk.data) + 512)
            await node.read(0, 512)
            await soon(lambda: bool(held))
            async with asyncio.timeout(LONG):
                await graph.remove("disk")
