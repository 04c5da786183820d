# SPDX-License-Identifier: Apache-2.0
"""A plugin's process that dies or hangs: its requests fail, its policy is followed, nothing else notices."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from target.peers.nbd_client import NbdClient
from tests.support.daemon import Daemon, nbd_server_unix
from tests.support.nbd import descriptors
from tests.support.nbdkit_compare import SCRIPTS
from tests.support.nbdkit_server import SYSTEM_PYTHON, clients

SIZE = 65536
SLOW = SIZE - 512  # a read of this sector takes long
Start = Callable[..., Daemon]


def node(scratch: Path, name: str, seconds: float = 0, **options: Any) -> list[str]:
    """A plugin with its storage, and an export of it."""
    (scratch / f"{name}.raw").write_bytes(bytes(SIZE))
    config = {
        "pidfile": str(scratch / f"{name}.pid"),
        "storage": str(scratch / f"{name}.raw"),
        "refuse": str(scratch / f"{name}.refuse"),
        "seconds": seconds,
    }
    value = {
        "driver": "nbdkit-plugin",
        "node-name": name,
        "script": str(SCRIPTS / "mortal.py"),
        "python": SYSTEM_PYTHON,
        "config": config,
        **options,
    }
    export = {"type": "nbd", "id": name, "node-name": name, "name": name, "writable": True}
    return ["--blockdev", json.dumps(value), "--export", json.dumps(export)]


def pid(scratch: Path, name: str) -> int:
    return int((scratch / f"{name}.pid").read_text())


@asynccontextmanager
async def bystander(address: Path) -> AsyncIterator[None]:
    """A client of the node `other`, which goes on meanwhile and does not wait."""
    async with clients(address, name="other") as (client,):
        rounds, slowest = 0, 0.0

        async def work() -> None:
            nonlocal rounds, slowest
            while True:
                before = time.monotonic()
                data = rounds.to_bytes(8, "big") * 64
                await client.write(512, data)
                assert await client.read(512, 512) == data
                rounds += 1
                slowest = max(slowest, time.monotonic() - before)
                await asyncio.sleep(0.001)

        task = asyncio.create_task(work())
        await asyncio.sleep(0.1)
        try:
            yield
            before = rounds
            await asyncio.sleep(0.2)
            assert rounds > before
        finally:
            assert not task.done(), task.exception()
            task.cancel()
        assert slowest < 2


async def outcome(client: NbdClient, offset: int = 0) -> int:
    """A read's errno, 0 for none, within a bound."""
    try:
        await asyncio.wait_for(client.read(offset, 512), 10)
    except OSError as error:
        return error.errno or -1
    return 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
async def test_death_is_an_io_error(scratch: Path, start: Start, number: signal.Signals) -> None:
    sock = scratch / "nbd.sock"
    daemon = start(*nbd_server_unix(sock), *node(scratch, "disk", 60), *node(scratch, "other"))
    before = descriptors(daemon.process.pid)
    async with bystander(sock), clients(sock, name="disk") as (client,):
        assert await outcome(client) == 0
        waiting = [asyncio.create_task(outcome(client, offset)) for offset in (SLOW, SLOW, 0, 1024)]
        await asyncio.sleep(0.2)
        os.kill(pid(scratch, "disk"), number)
        assert await asyncio.gather(*waiting) == [5] * 4
        assert await outcome(client) == 5
        with pytest.raises(OSError, match="Input/output error"):
            await client.write(0, b"x" * 512)
        with pytest.raises(OSError, match="Input/output error"):
            await client.flush()
    line = next(line for line in daemon.output().splitlines() if "process" in line)
    assert "node 'disk'" in line and "restart=never" in line
    assert "node 'other'" not in daemon.output()
    daemon_settles(daemon, before)


def daemon_settles(daemon: Daemon, most: int) -> None:
    end = time.monotonic() + 5
    while descriptors(daemon.process.pid) > most:
        assert time.monotonic() < end
        time.sleep(0.05)


async def test_restart(scratch: Path, start: Start) -> None:
    """What was under way fails; what comes while it starts waits for it. Its storage is as it was."""
    sock = scratch / "nbd.sock"
    words = node(scratch, "disk", 60, restart="on-failure")
    daemon = start(*nbd_server_unix(sock), *words, *node(scratch, "other"))
    async with bystander(sock), clients(sock, name="disk") as (client,):
        await client.write(0, b"kept" * 128)
        first = pid(scratch, "disk")
        waiting = asyncio.create_task(outcome(client, SLOW))
        await asyncio.sleep(0.2)
        os.kill(first, signal.SIGKILL)
        assert await waiting == 5
        assert await asyncio.wait_for(client.read(0, 512), 10) == b"kept" * 128
        assert pid(scratch, "disk") != first
        await client.write(512, b"more" * 128)
        await client.flush()
    assert (scratch / "disk.raw").read_bytes()[:1024] == b"kept" * 128 + b"more" * 128
    assert "started again" in daemon.output()


async def test_restart_that_fails_is_tried_again(scratch: Path, start: Start) -> None:
    sock = scratch / "nbd.sock"
    daemon = start(
        *nbd_server_unix(sock), *node(scratch, "disk", restart="on-failure"), *node(scratch, "other")
    )
    async with bystander(sock), clients(sock, name="disk") as (client,):
        (scratch / "disk.refuse").touch()
        os.kill(pid(scratch, "disk"), signal.SIGKILL)
        await until(daemon, "cannot be started again")
        assert await outcome(client) == 5
        (scratch / "disk.refuse").unlink()
        end = time.monotonic() + 20
        while await outcome(client):
            assert time.monotonic() < end, daemon.output()
            await asyncio.sleep(0.1)
    assert "node 'disk'" in daemon.output() and "not now" in daemon.output()


async def until(daemon: Daemon, text: str) -> None:
    end = time.monotonic() + 10
    while text not in daemon.output():
        assert time.monotonic() < end, daemon.output()
        await asyncio.sleep(0.02)


async def test_process_that_changed_is_not_taken(scratch: Path, start: Start) -> None:
    """A process that is started again has to have the size that the users know."""
    script = scratch / "growing.py"
    text = (SCRIPTS / "mortal.py").read_text()
    script.write_text(text.replace("return SIZE", "return os.fstat(h).st_size"))
    sock = scratch / "nbd.sock"
    words = node(scratch, "disk", restart="on-failure", script=str(script))
    daemon = start(*nbd_server_unix(sock), *words)
    async with clients(sock, name="disk") as (client,):
        os.truncate(scratch / "disk.raw", 2 * SIZE)
        os.kill(pid(scratch, "disk"), signal.SIGKILL)
        await until(daemon, "cannot be started again")
        assert await outcome(client) == 5
        assert f"size was {SIZE} and is {2 * SIZE} now" in daemon.output()


async def test_hung_process_holds_up_nobody(scratch: Path, start: Start) -> None:
    """Its requests wait; the other node goes on, and the target ends within the close-timeout."""
    sock = scratch / "nbd.sock"
    words = [*node(scratch, "disk", close_timeout=1), *node(scratch, "other")]
    daemon = start(
        *nbd_server_unix(sock), *[word.replace("close_timeout", "close-timeout") for word in words]
    )
    os.kill(pid(scratch, "disk"), signal.SIGSTOP)
    async with bystander(sock), clients(sock, name="disk") as (client,):
        waiting = asyncio.create_task(outcome(client))
        await asyncio.sleep(1)
        assert not waiting.done()
        waiting.cancel()
    begin = time.monotonic()
    daemon.stop()
    assert time.monotonic() - begin < 10
    assert not Path(f"/proc/{pid(scratch, 'disk')}").exists()


async def test_plugins_do_not_outlive_a_target_that_is_killed(scratch: Path, start: Start) -> None:
    sock = scratch / "nbd.sock"
    daemon = start(*nbd_server_unix(sock), *node(scratch, "disk"), *node(scratch, "other"))
    pids = [pid(scratch, name) for name in ("disk", "other")]
    daemon.kill()
    end = time.monotonic() + 5
    while any(Path(f"/proc/{number}").exists() for number in pids):
        assert time.monotonic() < end
        await asyncio.sleep(0.02)
