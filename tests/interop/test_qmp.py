# SPDX-License-Identifier: Apache-2.0
"""Monitors as programs use them: QEMU's own client library and shell, many monitors and clients, the end."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import ExecuteError, QMPClient

from tests.support.daemon import Daemon, blockdev, daemon_argv, nbd_export, nbd_server_unix
from tests.support.qmp import Qmp, monitor_argv, qmp_daemon
from tests.support.tools import run

SHELL = str(Path(sys.executable).with_name("qmp-shell"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "qmp"


@pytest.fixture
def daemon(path: Path) -> Iterator[Daemon]:
    with qmp_daemon(path, *blockdev(driver="null-co", node_name="null", size=1 << 20)) as started:
        yield started


def test_the_client_library_of_qemu(path: Path, daemon: Daemon) -> None:
    async def talk() -> None:
        client = QMPClient("test")
        await client.connect(str(path))
        assert client.greeting is not None
        assert client.greeting.QMP.capabilities == ["oob"]
        version: Any = await client.execute("query-version")
        assert set(version) == {"qemu", "package"} and set(version["qemu"]) == {"major", "minor", "micro"}
        with pytest.raises(ExecuteError, match="has not been found"):
            await client.execute("no-such")
        added = {"driver": "null-co", "node-name": "a"}
        assert await client.execute("blockdev-add", added) == {}
        with pytest.raises(ExecuteError, match="Duplicate nodes with node-name='a'"):
            await client.execute("blockdev-add", added)
        nodes: Any = await client.execute("query-named-block-nodes")
        assert {node["node-name"] for node in nodes} == {"null", "a"}
        assert await client.execute("query-version", oob=False) == version
        await client.disconnect()

    asyncio.run(talk())


LEGACY = """
import os, sys
from qemu.qmp.legacy import QEMUMonitorProtocol
with QEMUMonitorProtocol(sys.argv[1]) as client:
    client.connect()
    print(client.cmd("query-version")["package"])
    reader, writer = os.pipe()
    client.send_fd_scm(reader)
    print(client.cmd("add-fd", **{"fdset-id": 7}))
"""


def test_the_older_interface_of_that_library(path: Path, daemon: Daemon) -> None:
    """As scripts of old use it, descriptors too. It leaves an event loop behind: a process of its own."""
    done = run(sys.executable, "-c", LEGACY, path)
    assert "blocktarget" in done.stdout and "'fdset-id': 7" in done.stdout, done


def test_its_shell_reads_commands_from_a_pipe(path: Path, daemon: Daemon) -> None:
    commands = (
        'blockdev-add driver=null-co node-name=n1 size=65536\nblockdev-add {"driver":"x"}\nquery-version\n'
    )
    done = run(SHELL, str(path), input=commands, check=False)
    assert "Connected to QEMU" in done.stdout, done
    assert "'return': {}" in done.stdout or '"return": {}' in done.stdout, done
    assert "package" in done.stdout, done
    with Qmp(path) as qmp:
        assert "n1" in {node["node-name"] for node in qmp.execute("query-named-block-nodes")}


def test_its_shell_on_a_terminal_completes_names(path: Path, daemon: Daemon) -> None:
    """It asks query-commands for what it completes."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "dumb"}
    shell = subprocess.Popen(
        [SHELL, str(path)], stdin=follower, stdout=follower, stderr=follower, env=environment
    )
    os.close(follower)
    try:
        until(leader, b"(QEMU) ")
        os.write(leader, b"query-vers\t\n")
        seen = until(leader, b"\r\n(QEMU) ")
        os.write(leader, b"\x04")
        assert shell.wait(20) == 0
    finally:
        shell.kill()
        shell.wait()
        os.close(leader)
    assert b"query-version" in seen and b"package" in seen


def until(fd: int, text: bytes, seconds: float = 60) -> bytes:
    """What a terminal shows, up to the text."""
    seen = b""
    end = time.monotonic() + seconds
    while text not in seen:
        ready, _, _ = select.select([fd], [], [], max(0, end - time.monotonic()))
        assert ready, seen
        seen += os.read(fd, 4096)
    return seen


def test_quit_answers_after_the_events_of_the_exports(path: Path, tmp_path: Path) -> None:
    argv = [
        *blockdev(driver="null-co", node_name="disk", size=1 << 20),
        *nbd_server_unix(tmp_path / "nbd"),
        *nbd_export(name="one"),
        *nbd_export(name="two"),
    ]
    with qmp_daemon(path, *argv) as daemon, Qmp(path) as qmp, Qmp(path) as other:
        assert qmp.ask({"execute": "quit", "id": "bye"}) == {"return": {}, "id": "bye"}
        deleted = [event["data"]["id"] for event in qmp.events if event["event"] == "BLOCK_EXPORT_DELETED"]
        assert sorted(deleted) == ["nbd-one", "nbd-two"]
        stamp = qmp.events[0]["timestamp"]
        assert abs(stamp["seconds"] + stamp["microseconds"] / 1e6 - time.time()) < 60
        for client in (qmp, other):
            with pytest.raises(EOFError):
                while True:
                    assert client.receive()["event"] == "BLOCK_EXPORT_DELETED"
        assert daemon.process.wait(20) == 0
        assert not path.exists()


def test_clients_hear_of_the_end_by_a_signal(path: Path, tmp_path: Path) -> None:
    argv = [*blockdev(driver="null-co", node_name="disk"), *nbd_server_unix(tmp_path / "nbd"), *nbd_export()]
    with qmp_daemon(path, *argv) as daemon, Qmp(path) as qmp, Qmp(path, negotiate=False) as silent:
        daemon.process.terminate()
        assert qmp.receive()["event"] == "BLOCK_EXPORT_DELETED"
        with pytest.raises(EOFError):
            qmp.receive()
        with pytest.raises(EOFError):  # who has not negotiated gets no events
            silent.receive()
        assert daemon.process.wait(20) == 0


def test_several_monitors_with_several_clients(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    argv = [*monitor_argv(two, id="second", monitor=",pretty=on")]
    with qmp_daemon(one, *argv), Qmp(one) as a, Qmp(one) as b:
        a.execute("blockdev-add", driver="null-co", node_name="n")
        assert [node["node-name"] for node in b.execute("query-named-block-nodes")] == ["n"]
        with socket.socket(socket.AF_UNIX) as pretty:
            pretty.settimeout(20)
            pretty.connect(str(two))
            text = b""
            while not text.endswith(b"\n}\r\n"):
                text += pretty.recv(4096)
        assert text.startswith(b'{\n    "QMP": {')
        assert json.loads(text)["QMP"]["capabilities"] == ["oob"]


@pytest.mark.timed
def test_a_command_that_lasts_holds_up_neither_others_nor_the_next_client(tmp_path: Path) -> None:
    """Its client may even be gone: a monitor for one client at a time is free again."""
    one, two = tmp_path / "one", tmp_path / "two"
    deaf = tmp_path / "deaf"  # an NBD server that says nothing
    with (
        socket.socket(socket.AF_UNIX) as server,
        qmp_daemon(one, *monitor_argv(two, id="second", chardev=",max-connections=1")),
    ):
        server.bind(str(deaf))
        server.listen()
        waiting = Qmp(two)
        options = {"driver": "nbd", "node-name": "n", "server": {"type": "unix", "path": str(deaf)}}
        waiting.send(json.dumps({"execute": "blockdev-add", "arguments": options}).encode())
        accepted, _ = server.accept()
        with Qmp(one) as other:
            start = time.monotonic()
            other.execute("query-version")
            assert time.monotonic() - start < 1
        waiting.close()
        with Qmp(two) as following:
            start = time.monotonic()
            following.execute("query-version")
            assert time.monotonic() - start < 3
        accepted.close()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--monitor", "nowhere"], 'option --monitor: chardev "nowhere" not found'),
        (["--monitor", "mon"], "option --monitor: Device 'mon' is in use"),
        (
            ["--chardev", "null,id=n", "--monitor", "n,mode=readline"],
            "option --monitor: Only QMP is supported",
        ),
        (["--monitor", "chardev=mon,x=1"], "option --monitor: Parameter 'x' is unexpected"),
        (["--monitor", "pretty=on"], "option --monitor: Parameter 'chardev' is missing"),
    ],
)
def test_monitors_that_cannot_be_had(path: Path, argv: list[str], message: str) -> None:
    done = run(*daemon_argv(), *monitor_argv(path), *argv, check=False)
    assert done.returncode == 1
    assert message in done.stderr
