# SPDX-License-Identifier: Apache-2.0
"""Clients of a monitor that send what no client should: others notice nothing, and memory stays bounded."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support.daemon import Daemon, blockdev
from tests.support.qmp import Qmp, monitor_argv, qmp_daemon

MB = 1 << 20
# What the process may take more than before, at any time: a message and its value, with some room.
GROWTH = 60 * MB
LATENCY = 2.0  # seconds for another client's command, on a machine that is busy with tests


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, Path, Path]]:
    folder = tmp_path_factory.mktemp("hostile")
    one, two = folder / "one", folder / "two"
    argv = [*monitor_argv(two, id="second"), *blockdev(driver="null-co", node_name="null", size=MB)]
    with qmp_daemon(one, *argv) as started:
        yield started, one, two


def rss(daemon: Daemon) -> int:
    for line in Path(f"/proc/{daemon.process.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no VmRSS")


@contextmanager
def others_unaffected(started: tuple[Daemon, Path, Path], growth: int = GROWTH) -> Iterator[None]:
    """While the body runs: another monitor answers soon, and the process takes no more than ``growth``."""
    daemon, _, second = started
    stop = threading.Event()
    slowest = [0.0]
    largest = [0]

    def watch() -> None:
        with Qmp(second) as qmp:
            while not stop.is_set():
                before = time.monotonic()
                qmp.execute("query-version")
                slowest[0] = max(slowest[0], time.monotonic() - before)
                largest[0] = max(largest[0], rss(daemon))
                time.sleep(0.002)

    before = rss(daemon)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join(60)
    print(f"slowest {slowest[0]:.3f} s, {(largest[0] - before) / MB:.1f} MiB more")
    assert slowest[0] < LATENCY
    assert largest[0] - before < growth, f"{before >> 20} MiB became {largest[0] >> 20} MiB"


HUGE = 100 * MB


def repeated(start: bytes, piece: bytes, end: bytes, size: int = HUGE) -> Iterator[bytes]:
    """About so many bytes in parts."""
    part = piece * (MB // len(piece))
    yield start
    for _ in range(size // len(part)):
        yield part
    yield end


@pytest.mark.parametrize(
    ("parts", "error"),
    [
        (repeated(b'{"execute":"', b"x", b'"}'), "JSON token size limit exceeded"),
        (repeated(b'{"id":[', b"{},", b"0]}"), "JSON token count limit exceeded"),
        (repeated(b'{"id":[', b'{"a":["b",1]},', b"0]}", 8 * MB), "JSON token count limit exceeded"),
        (repeated(b"", b"[", b""), "JSON nesting depth limit exceeded"),
        (repeated(b"", b'{"a":', b"", 8 * MB), "JSON nesting depth limit exceeded"),
        (repeated(b"[", b"9", b"]"), "JSON parse error, a number or keyword is longer than 1024 bytes"),
    ],
    ids=["string", "objects", "members", "arrays", "nested objects", "number"],
)
def test_huge_commands(
    daemon: tuple[Daemon, Path, Path], parts: Iterator[bytes], error: str, request: pytest.FixtureRequest
) -> None:
    with others_unaffected(daemon), Qmp(daemon[1]) as qmp:
        for part in parts:
            qmp.send(part)
        # A byte that is in no text ends what the brackets have left open, with an error of its own.
        qmp.send(b'\xff\n{"execute":"query-version","id":"after"}')
        answers = [qmp.answer()]
        while answers[-1].get("id") != "after":
            answers.append(qmp.answer())
        assert answers[0]["error"] == {"class": "GenericError", "desc": error}
        assert len(answers) <= 4, answers
        assert "return" in answers[-1]


def test_garbage_without_end(daemon: tuple[Daemon, Path, Path]) -> None:
    """Each byte is an error; who does not read the answers is not read either."""
    with others_unaffected(daemon), Qmp(daemon[1]) as qmp:
        qmp.socket.settimeout(3)
        sent = 0
        with pytest.raises(TimeoutError):
            while sent < HUGE:
                sent += qmp.socket.send(b"]\x01," * 10000)
        assert sent < 10 * MB
        qmp.socket.settimeout(30)
        assert qmp.receive()["error"]["desc"] == "JSON parse error, expecting value"


def test_one_byte_at_a_time(daemon: tuple[Daemon, Path, Path]) -> None:
    with Qmp(daemon[1], negotiate=False) as qmp:
        for message in ({"execute": "qmp_capabilities"}, {"execute": "query-version", "id": "é\t'\""}):
            for byte in json.dumps(message, ensure_ascii=False).encode():
                qmp.send(bytes([byte]))
            answer = qmp.answer()
            assert "return" in answer and answer.get("id") == message.get("id")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"size": 1 << 63}, "Invalid parameter type for 'size', expected: integer"),
        ({"size": 1 << 64}, "Invalid parameter type for 'size', expected: integer"),
        ({"size": -(1 << 80)}, "Invalid parameter type for 'size', expected: integer"),
        ({"size": 1.5}, "Invalid parameter type for 'size', expected: integer"),
        ({"size": -1}, "Parameter 'size': expected `int` >= 0"),
        ({"cache": {"direct": 1}}, "Invalid parameter type for 'cache.direct', expected: boolean"),
        ({"node-name": "a\0b"}, "Parameter 'node-name' must not contain a null character"),
        ({"detect-zeroes": "é"}, "Parameter 'detect-zeroes' does not accept value 'é'"),
    ],
)
def test_wrong_values_are_named_by_their_path(
    daemon: tuple[Daemon, Path, Path], arguments: dict[str, object], text: str
) -> None:
    with Qmp(daemon[1]) as qmp:
        options = {"driver": "null-co", "node-name": "x", **arguments}
        answer = qmp.ask({"execute": "blockdev-add", "arguments": options})
        assert answer == {"error": {"class": "GenericError", "desc": text}}
        answer = qmp.ask(
            {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "raw", "file": options}]}}
        )
        assert answer["error"]["desc"] == text.replace("'", "'options[0].file.", 1)


def test_numbers_that_no_type_holds(daemon: tuple[Daemon, Path, Path]) -> None:
    with Qmp(daemon[1]) as qmp:
        for number in (b"1e400", b"-1e400", b"9" * 500, b"1e999999999"):
            options = b'{"driver":"null-co","node-name":"x","size":%b}' % number
            text = b'{"execute":"blockdev-add","arguments":%b,"id":%b}' % (options, number)
            (answer,) = qmp.raw(text, 1)
            assert answer["error"]["desc"] == "Invalid parameter type for 'size', expected: integer"
            assert isinstance(answer["id"], float)


def test_children_nested_as_deep_as_json_may_be(daemon: tuple[Daemon, Path, Path]) -> None:
    options: dict[str, object] = {"driver": "null-co"}
    for _ in range(400):
        options = {"driver": "raw", "file": options}
    with Qmp(daemon[1]) as qmp:
        answer = qmp.ask({"execute": "blockdev-add", "arguments": {**options, "node-name": "deep"}})
        assert answer["error"]["class"] == "GenericError"
        assert "deep" in answer["error"]["desc"]
        nested: object = []
        for _ in range(490):
            nested = [nested]
        assert qmp.ask({"execute": "query-version", "id": nested})["id"] == nested


def test_a_hundred_clients(daemon: tuple[Daemon, Path, Path]) -> None:
    """They all are answered, while others, on another monitor, have sent large messages by half."""
    with others_unaffected(daemon, growth=200 * MB), ExitStack() as stack:
        clients = [stack.enter_context(Qmp(daemon[1])) for _ in range(90)]
        half = b'{"execute":"x","arguments":{"a":"' + b"x" * (2 * MB)
        for client in clients[:50]:
            client.send(half)
        for client in clients[50:]:
            client.send(b'{"execute":"query-version","id":1}' * 20)
        for client in clients[50:]:
            assert [client.answer()["id"] for _ in range(20)] == [1] * 20
        time.sleep(1)  # for what was sent by half to arrive
        for client in clients[:50]:
            client.send(b'"}}{"execute":"query-version","id":2}')
            answer = client.answer()
            assert answer["error"]["desc"] in (
                "The command x has not been found",
                "JSON token size limit exceeded",
            )
            assert client.answer()["id"] == 2


def test_a_client_that_never_reads(daemon: tuple[Daemon, Path, Path]) -> None:
    """Neither its own commands nor everybody's events take memory for it."""
    with others_unaffected(daemon), Qmp(daemon[1]) as deaf:
        deaf.socket.settimeout(3)
        with pytest.raises(TimeoutError):
            while True:
                deaf.socket.send(b'{"execute":"query-qmp-schema"}' * 1000)


def test_clients_that_come_and_go(daemon: tuple[Daemon, Path, Path]) -> None:
    before = len(list(Path(f"/proc/{daemon[0].process.pid}/fd").iterdir()))
    with others_unaffected(daemon):
        for i in range(300):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(daemon[1]))
                client.sendall(b'{"execute":"qmp_capabilities"}{"execute":"query-version"}'[: i % 60])
    end = time.monotonic() + 10
    while len(list(Path(f"/proc/{daemon[0].process.pid}/fd").iterdir())) > before:
        assert time.monotonic() < end, "descriptors are left"
        time.sleep(0.05)
    assert "Traceback" not in daemon[0].output()
