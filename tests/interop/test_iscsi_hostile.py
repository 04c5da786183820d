# SPDX-License-Identifier: Apache-2.0
"""iSCSI targets that are absent, say no, or break the protocol: a clear error, in time, for one node only."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from target.graph.errors import BlockError
from target.graph.graph import Graph
from target.graph.node import Node
from target.peers.iscsi_target import Account, Disk, IscsiTarget, faults
from target.peers.iscsi_target.faults import Action
from target.peers.iscsi_target.pdu import Opcode
from target.peers.iscsi_target.sense import BUSY
from tests.support.daemon import blockdev, free_port
from tests.support.iscsi import MIB, fails, fresh, mock_options, together
from tests.support.objects import made
from tests.support.qcow2 import running_graph
from tests.support.tgtd import Tgtd, make_disk

SIZE = 8 * MIB
OPEN_SECONDS = 25.0  # that a failing open may take at most, with `timeout` 1 of these tests
ACCOUNT = Account("user", "password1234")


@contextlib.contextmanager
def password_graph() -> Iterator[contextlib.AbstractAsyncContextManager[Graph]]:
    """A graph with the secret `pw`."""
    yield running_graph(objects={"pw": made("secret", data=ACCOUNT.password)})


@pytest.fixture
def mock() -> Iterator[IscsiTarget]:
    with fresh() as (target, _):
        yield target


# ---- nobody there, or the wrong one ----


WRONG: tuple[tuple[dict[str, Any], str], ...] = (
    ({"portal": "127.0.0.1:CLOSED"}, "127.0.0.1:CLOSED"),
    ({"portal": "no.such.host.invalid"}, "no.such.host.invalid"),
    ({"portal": "127.0.0.1:0"}, "portal"),
    ({"portal": "127.0.0.1:99999"}, "portal"),
    ({"portal": ""}, "portal"),
    ({"target": "iqn.2026-11.org.example:nobody"}, "iqn.2026-11.org.example:nobody"),
    ({"target": ""}, "target"),
    ({"target": "x" * 300}, "target"),
    ({"lun": 77}, "LUN 77"),
    ({"lun": 1 << 20}, "lun"),
    ({"transport": "iser"}, "iser"),
    ({"initiator-name": ""}, "initiator-name"),
    ({"password-secret": "none"}, "password-secret"),
    ({"user": "x"}, "password-secret"),
    ({"sessions": 0}, "sessions"),
    ({"sessions": 1000}, "sessions"),
)


async def test_what_does_not_open_is_named(mock: IscsiTarget) -> None:
    closed = str(free_port())

    async def check(case: tuple[dict[str, Any], str]) -> None:
        change, message = case
        change = {
            key: value.replace("CLOSED", closed) if isinstance(value, str) else value
            for key, value in change.items()
        }
        async with running_graph() as graph:
            told = await does_not_open(graph, {**mock_options(mock), **change})
        assert message.replace("CLOSED", closed) in told, told

    await together(WRONG, check)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"portal": "127.0.0.1:1"}, "127.0.0.1:1"),
        ({"lun": -1}, "lun"),
        ({"transport": "pigeon"}, "transport"),
        ({"header-digest": "md5"}, "header-digest"),
        ({"frobnicate": 1}, "frobnicate"),
    ],
)
def test_a_daemon_says_it_in_one_line(mock: IscsiTarget, change: dict[str, Any], message: str) -> None:
    line = fails(*blockdev(node_name="disk", **{**mock_options(mock), **change}))
    assert "node 'disk'" in line and message in line


def test_a_lun_that_is_no_disk(scratch: Path) -> None:
    """LUN 0 of tgtd is a storage array controller."""
    with Tgtd(scratch) as tgtd:
        tgtd.add_target()
        tgtd.add_lun(make_disk(scratch / "lun", MIB))
        line = fails(*tgtd.node(lun=0))
    assert "node 'disk'" in line and "disk" in line.partition("LUN 0")[2]


def speak(answer: bytes, keep: bool) -> Callable[[socket.socket], None]:
    def talk(connection: socket.socket) -> None:
        connection.recv(4096)
        connection.sendall(answer)
        if keep:
            connection.settimeout(20)
            with contextlib.suppress(OSError):
                while connection.recv(4096):
                    pass

    return talk


@contextlib.contextmanager
def stranger(talk: Callable[[socket.socket], None]) -> Iterator[int]:
    """Something that listens and is no iSCSI target; gives its port."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(8)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError):
                    talk(connection)

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(10)


LOGIN_RESPONSE = bytes((0x23, 0x87, 0, 0, 0, 0, 0, 0))
STRANGERS = {
    "silent": speak(b"", keep=True),
    "hangs up": speak(b"", keep=False),
    "http": speak(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 10, keep=True),
    "zeros": speak(bytes(1000), keep=True),
    "ones": speak(b"\xff" * 1000, keep=True),
    "half a header": speak(LOGIN_RESPONSE, keep=True),
    "half a header and away": speak(LOGIN_RESPONSE, keep=False),
    "much additional header": speak(b"\x23\x87\0\0\xff\0\0\0" + bytes(40 + 4 * 255), keep=True),
    "16 MiB promised": speak(b"\x23\x87\0\0\0\xff\xff\xff" + bytes(40), keep=True),
    "noise": speak(random.Random(7).randbytes(20_000), keep=False),
}


async def test_strangers(mock: IscsiTarget) -> None:
    async def check(name: str) -> None:
        with stranger(STRANGERS[name]) as port:
            async with running_graph() as graph:
                options = {**mock_options(mock), "portal": f"127.0.0.1:{port}", "timeout": 1}
                await does_not_open(graph, options)

    await together(STRANGERS, check)


async def does_not_open(graph: Graph, options: dict[str, Any]) -> str:
    """The error, which names the node and came in time."""
    begun = time.monotonic()
    with pytest.raises(BlockError) as caught:
        await graph.add({"node-name": "disk", **options})
    assert time.monotonic() - begun < OPEN_SECONDS
    assert str(caught.value).startswith("node 'disk': "), caught.value
    assert not graph.nodes
    return str(caught.value)


# ---- a target that goes wrong at each step of the login ----

LOGIN_STATUS = 36
LOGINS: dict[str, Action] = {
    "silence": faults.silence,
    "hang up": faults.hang_up,
    "cut": faults.cut(20),
    "cut in the text": faults.cut(60),
    "wrong tag": faults.wrong_tag(),
    "another PDU": faults.patched(0, bytes((Opcode.SCSI_RESPONSE,))),
    "refused": faults.patched(LOGIN_STATUS, b"\2\0"),
    "target error": faults.patched(LOGIN_STATUS, b"\3\1"),
    "moved to nowhere": faults.patched(LOGIN_STATUS, b"\1\1"),
    "unknown status": faults.patched(LOGIN_STATUS, b"\x77\x77"),
    "another version": faults.patched(2, b"\7\7"),
    "text that is none": faults.changed(lambda pdu: pdu[:5] + b"\0\1\0" + pdu[8:48] + b"\xff" * 256),
    "an endless key": faults.changed(lambda pdu: pdu[:5] + b"\0\x20\0" + pdu[8:48] + b"A" * 8192),
    "keys that are wrong": faults.changed(
        lambda pdu: (
            pdu[:5] + b"\0\0\x40" + pdu[8:48] + b"MaxBurstLength=-1\0HeaderDigest=MD5\0".ljust(64, b"\0")
        )
    ),
}


async def test_logins_that_go_wrong() -> None:
    """The first step, and with a password a later one too."""

    async def check(case: tuple[str, int]) -> None:
        name, after = case
        with fresh(account=ACCOUNT) as (mock, _), password_graph() as running:
            rule = mock.rule(faults.on_pdu(Opcode.LOGIN), LOGINS[name], after=after)
            async with running as graph:
                options = mock_options(mock, timeout=1, user=ACCOUNT.user, password_secret="pw")
                begun = time.monotonic()
                try:
                    await graph.add({"node-name": "disk", **options})
                except BlockError as error:
                    assert str(error).startswith("node 'disk': ")
                    assert not graph.nodes
                else:  # what the change broke was not needed
                    assert name in ("another version", "keys that are wrong", "text that is none")
                assert rule.acted and time.monotonic() - begun < OPEN_SECONDS
                mock.behave()
                await graph.add({"node-name": "again", **options})

    await together([(name, after) for name in LOGINS for after in range(3)], check)


# ---- a target that goes wrong while it is asked about the LUN ----

ASKED = {
    "test unit ready": faults.on_opcode(0x00),
    "inquiry": lambda connection, request: (
        faults.on_opcode(0x12)(connection, request) and not request.cdb[1] & 1
    ),
    "pages": lambda connection, request: faults.on_opcode(0x12)(connection, request) and request.cdb[1] & 1,
    "capacity": faults.on_opcode(0x25, 0x9E),
    "mode sense": faults.on_opcode(0x1A, 0x5A),
}
ANSWERS: dict[str, Action] = {
    "nothing": faults.data(b""),
    "one byte": faults.data(b"\xff"),
    "zeros": faults.data(bytes(255)),
    "ones": faults.data(b"\xff" * 4096),
    "noise": faults.data(random.Random(3).randbytes(4096)),
    "invalid opcode": faults.sense(5, 0x20),
    "not ready": faults.sense(2, 0x04, 1),
    "medium error": faults.sense(3, 0x11),
    "sense without end": faults.raw_sense(b"\x70\0\5\0\0\0\0\xff"),
    "no sense": faults.raw_sense(b""),
    "odd status": faults.status(0x30),
    "busy": faults.status(BUSY),
    "silence": faults.silence,
    "garbage": faults.raw(b"\xa5" * 480),
    "cut": faults.cut(30),
    "wrong tag": faults.wrong_tag(),
    "attention without end": faults.sense(6, 0x29),
}


@pytest.mark.parametrize("step", ASKED)
async def test_questions_about_the_lun(step: str) -> None:
    """It opens as what it can be known to be, or not at all; and what it opened as works."""

    async def check(answer: str) -> None:
        with fresh() as (mock, disk):
            mock.rule(ASKED[step], ANSWERS[answer])
            async with running_graph() as graph:
                begun = time.monotonic()
                try:
                    node = await graph.add({"node-name": "disk", **mock_options(mock, timeout=1)})
                except BlockError as error:
                    assert str(error).startswith("node 'disk': ")
                    assert not graph.nodes
                else:
                    mock.behave()
                    await works_if_whole(node, disk)
                    assert step != "capacity" or answer not in NO_CAPACITY
                assert time.monotonic() - begun < OPEN_SECONDS

    await together(ANSWERS, check)


NO_CAPACITY = ("nothing", "one byte", "silence", "garbage")


async def works_if_whole(node: Node, disk: Disk) -> None:
    assert 0 <= node.size < 1 << 63
    if node.size == SIZE:
        assert await node.read(0, 4096) == disk.data[:4096]
        await node.write(4096, b"\7" * 512)
        assert disk.data[4096:4608] == b"\7" * 512


@pytest.mark.parametrize(
    ("last", "block"),
    [(0, 0), (0, 1), (0, 520), (0, 1 << 31), (1 << 63, 512), ((1 << 64) - 1, 512), ((1 << 62), 4096), (7, 3)],
)
async def test_capacities_that_cannot_be(mock: IscsiTarget, last: int, block: int) -> None:
    small = min(last, 0xFFFFFFFF)
    mock.rule(faults.on_opcode(0x25), faults.data(struct.pack(">II", small, block)))
    mock.rule(faults.on_service_action(0x9E, 0x10), faults.data(struct.pack(">QI20x", last, block)))
    async with running_graph() as graph:
        await does_not_open(graph, mock_options(mock, timeout=1))
