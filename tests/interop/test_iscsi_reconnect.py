# SPDX-License-Identifier: Apache-2.0
"""The iSCSI target goes away under load and comes back: no request is lost, repeated wrongly or failed."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.daemon import Daemon, nbd_export, nbd_server_unix, nbd_uri
from tests.support.iscsi import MIB, nbd_clients
from tests.support.nbd import descriptors
from tests.support.nbd_model import Model
from tests.support.tgtd import Tgtd, make_disk
from tests.support.tools import fill, qemu_img, qemu_io

Start = Callable[..., Daemon]
SIZE = 16 * MIB


@pytest.fixture
def tgtd(scratch: Path) -> Iterator[Tgtd]:
    with Tgtd(scratch) as target:
        target.add_target()
        target.add_lun(fill(scratch / "lun", SIZE, seed=1))
        yield target


def export(threads: int = 2) -> list[str]:
    names = [f"t{number}" for number in range(threads)]
    objects = [word for name in names for word in ("--object", f"iothread,id={name}")]
    value = {"type": "nbd", "id": "e", "node-name": "disk", "name": "disk", "writable": True}
    return [*objects, "--export", json.dumps({**value, "iothread": names})]


async def load(model: Model, stop: asyncio.Event) -> int:
    """Random operations until told to stop; the number of rounds."""
    rounds = 0
    while not stop.is_set():
        await model.run(48, depth=24)
        rounds += 1
    return rounds


@pytest.mark.parametrize("sessions", [1, 3])
@pytest.mark.parametrize("block_size", [512, 4096])
async def test_restarts_under_load(scratch: Path, start: Start, sessions: int, block_size: int) -> None:
    with Tgtd(scratch) as tgtd:
        tgtd.add_target()
        path = tgtd.add_lun(fill(scratch / "lun", SIZE, seed=1), block_size=block_size)
        sock = scratch / "nbd.sock"
        node = tgtd.node(sessions=sessions, reconnect_delay=30)
        started = start(*node, *nbd_server_unix(sock), *export())
        before = descriptors(started.process.pid)
        async with nbd_clients(sock, 3) as connected:
            model = Model(connected, bytearray(path.read_bytes()), seed=sessions)
            stop = asyncio.Event()
            work = asyncio.create_task(load(model, stop))
            for down in (0.0, 0.3, 1.0, 0.0):
                await asyncio.sleep(0.4)
                await asyncio.to_thread(tgtd.restart, down)
            await asyncio.sleep(0.5)
            stop.set()
            async with asyncio.timeout(30):
                assert await work > 1
            await model.check_all()
        assert "connected" in started.output()
        end = time.monotonic() + 5
        while descriptors(started.process.pid) > before + 1:
            assert time.monotonic() < end, "descriptors are left open"
            await asyncio.sleep(0.05)
        started.stop()
        (scratch / "model").write_bytes(known(model, path.read_bytes()))
        qemu_img("compare", "-f", "raw", "-F", "raw", scratch / "model", tgtd.url())


def known(model: Model, stored: bytes) -> bytes:
    """The model, with what is stored where it promises nothing."""
    data = bytearray(model.data)
    for sector in model.discarded:
        data[sector * 512 : sector * 512 + 512] = stored[sector * 512 : sector * 512 + 512]
    return bytes(data)


async def test_a_target_that_stands_still(tgtd: Tgtd, scratch: Path, start: Start) -> None:
    """It keeps its connections and answers seconds later."""
    sock = scratch / "nbd.sock"
    start(*tgtd.node(), *nbd_server_unix(sock), *export())
    async with nbd_clients(sock, 3) as connected:
        model = Model(connected, bytearray((scratch / "lun").read_bytes()), seed=5)
        stop = asyncio.Event()
        work = asyncio.create_task(load(model, stop))
        await asyncio.sleep(0.3)
        tgtd.freeze()
        await asyncio.sleep(2)
        tgtd.thaw()
        await asyncio.sleep(0.3)
        stop.set()
        async with asyncio.timeout(20):
            await work
        await model.check_all()


async def test_a_target_that_stands_still_for_longer_than_a_command_may_take(
    tgtd: Tgtd, scratch: Path, start: Start
) -> None:
    """With `timeout` the connection is given up and made anew; the commands go over the new one."""
    sock = scratch / "nbd.sock"
    started = start(*tgtd.node(timeout=1, reconnect_delay=30), *nbd_server_unix(sock), *export())
    async with nbd_clients(sock, 1) as (client,):
        await client.write(0, b"\1" * 4096)
        tgtd.freeze()
        work = asyncio.create_task(client.write(4096, b"\2" * 4096))
        await asyncio.sleep(3)
        tgtd.thaw()
        async with asyncio.timeout(25):
            await work
        assert await client.read(0, 8192) == b"\1" * 4096 + b"\2" * 4096
    assert "node 'disk'" in started.output()


@pytest.mark.timed
@pytest.mark.parametrize("sessions", [1, 2])
async def test_a_target_that_stays_away(tgtd: Tgtd, scratch: Path, start: Start, sessions: int) -> None:
    """Requests wait for reconnect-delay, then fail; new ones fail at once; when it is back all is well."""
    sock = scratch / "nbd.sock"
    started = start(*tgtd.node(sessions=sessions, reconnect_delay=2), *nbd_server_unix(sock), *export())
    async with nbd_clients(sock, 2) as connected:
        client, other = connected
        await client.write(0, b"\1" * 4096)
        tgtd.stop()
        begun = time.monotonic()
        results = await asyncio.wait_for(
            asyncio.gather(
                *(client.read(at * 4096, 4096) for at in range(8)),
                *(other.write(MIB + at * 4096, b"\2" * 4096) for at in range(8)),
                return_exceptions=True,
            ),
            20,
        )
        assert all(isinstance(result, OSError) for result in results), results
        assert 1 < time.monotonic() - begun < 10
        begun = time.monotonic()
        with pytest.raises(OSError):
            await client.read(0, 4096)
        assert time.monotonic() - begun < 1
        tgtd.start()
        end = time.monotonic() + 15
        while True:
            try:
                assert await client.read(0, 4096) == b"\1" * 4096
                break
            except OSError:
                assert time.monotonic() < end, started.output()
                await asyncio.sleep(0.1)
        await other.write(MIB, b"\3" * 4096)
        assert await client.read(MIB, 4096) == b"\3" * 4096
    lines = started.output().splitlines()
    assert 2 * sessions <= len([line for line in lines if "node 'disk'" in line]) <= 6 * sessions, lines


def test_a_restart_while_nobody_uses_it(tgtd: Tgtd, scratch: Path, start: Start) -> None:
    sock = scratch / "nbd.sock"
    start(*tgtd.node(), *nbd_server_unix(sock), *nbd_export())
    qemu_io(nbd_uri(sock), "write -P 5 0 4k")
    tgtd.restart(0.2)
    qemu_io(nbd_uri(sock), "read -P 5 0 4k", "write -P 6 4k 4k", "flush")
    assert (scratch / "lun").read_bytes()[4096:8192] == b"\6" * 4096


@pytest.mark.parametrize("requests", [0, 4])
async def test_a_stop_while_the_target_is_away(
    tgtd: Tgtd, scratch: Path, start: Start, requests: int
) -> None:
    """SIGTERM ends the process once the requests under way have waited for reconnect-delay."""
    started = Daemon(
        *tgtd.node(reconnect_delay=3), *nbd_server_unix(scratch / "nbd.sock"), *export()
    ).wait_ready()
    try:
        async with nbd_clients(scratch / "nbd.sock", 1) as (client,):
            await client.write(0, b"\1" * 4096)
            tgtd.stop()
            await asyncio.sleep(0.3)
            work = [asyncio.create_task(client.write(4096 * at, b"\2" * 4096)) for at in range(requests)]
            await asyncio.sleep(0.2)
            started.process.send_signal(signal.SIGTERM)
            status = await asyncio.to_thread(started.process.wait, 15)
            assert status in (0, 1), started.output()
            results = await asyncio.gather(*work, return_exceptions=True)
            assert all(isinstance(result, Exception) for result in results)
    finally:
        started.kill()


async def test_another_node_does_not_notice(tgtd: Tgtd, scratch: Path, start: Start) -> None:
    sock = scratch / "nbd.sock"
    file = make_disk(scratch / "file", SIZE)
    start(
        *tgtd.node(reconnect_delay=30),
        *("--blockdev", json.dumps({"driver": "file", "node-name": "file", "filename": str(file)})),
        *nbd_server_unix(sock),
        *nbd_export(),
        *nbd_export(node="file", name="file"),
    )
    async with nbd_clients(sock) as (waiting,), nbd_clients(sock, name="file") as (other,):
        tgtd.stop()
        work = asyncio.create_task(waiting.write(0, b"\1" * 4096))
        slowest = 0.0
        for number in range(300):
            begun = time.monotonic()
            await other.write(number * 4096, bytes((number % 256,)) * 4096)
            slowest = max(slowest, time.monotonic() - begun)
        assert slowest < 1 and not work.done()
        await asyncio.to_thread(tgtd.start)
        async with asyncio.timeout(15):
            await work
