# SPDX-License-Identifier: Apache-2.0
"""The nbd driver when its server goes and comes back: reconnect-delay, open-timeout, lost connections."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from target.exports.nbd.protocol import TransmissionFlag
from target.graph.errors import BlockError
from target.graph.graph import Graph
from target.graph.node import Node
from target.peers import nbd_reply_faults as faults
from target.peers.nbd_client import NbdClient
from target.peers.nbd_script import ALL_FLAGS, ServerOptions
from target.peers.nbd_server import NbdServer, ServerThread
from tests.support.daemon import Daemon, nbd_export, nbd_server_unix
from tests.support.nbd_model import Model
from tests.support.nbd_peers import SERVERS, mock, nbd_node, open_node, refused, server, unix
from tests.support.tools import fill

Start = Callable[..., Daemon]
MIB = 1 << 20
SIZE = 16 * MIB
ERRORS = (errno.EIO, errno.ENOTCONN, errno.ESHUTDOWN)


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("target.drivers.protocol.nbd.node.CLOSE_SECONDS", 0.5)


async def works(node: Node, seconds: float = 10) -> None:
    """Asserts that the node can be used again soon."""
    end = time.monotonic() + seconds
    while True:
        try:
            assert len(await node.read(0, 4096)) == 4096
            return
        except OSError:
            assert time.monotonic() < end, f"not again in {seconds} s"
            await asyncio.sleep(0.1)


# ---- real servers, killed under load ----


@pytest.mark.parametrize("kind", SERVERS)
async def test_killed_and_restarted_under_load(scratch: Path, start: Start, kind: str) -> None:
    """Three times -9 while 24 operations are in flight: no client sees an error, and no byte is wrong."""
    image = fill(scratch / "disk.raw", SIZE, seed=4, pieces=10)
    socket = scratch / "nbd.sock"
    with server(kind, image, scratch / "s.sock") as peer:
        node = nbd_node(scratch / "s.sock", reconnect_delay=20, connections=2)
        daemon = start(*node, *nbd_server_unix(socket), *nbd_export())
        clients = [await NbdClient.connect(str(socket), "disk") for _ in range(3)]
        model = Load(clients, bytearray(image.read_bytes()), seed=9)
        load = asyncio.create_task(until_told(model))
        for _ in range(3):
            await asyncio.sleep(0.5)
            assert not load.done()
            peer.kill()
            (scratch / "s.sock").unlink(missing_ok=True)
            await asyncio.sleep(0.3)
            await asyncio.to_thread(peer.start)
        await asyncio.sleep(0.5)
        model.told = True
        async with asyncio.timeout(30):
            await load
        await model.check_all()
        for client in clients:
            await client.close()
        daemon.stop()
    after = image.read_bytes()
    for sector in set(range(SIZE // 512)) - model.discarded:
        assert after[sector * 512 : sector * 512 + 512] == model.data[sector * 512 : sector * 512 + 512]


class Load(Model):
    """A model that works until it is told to end."""

    told = False


async def until_told(model: Load) -> None:
    async def worker() -> None:
        while not model.told:
            await model.step()
            await asyncio.sleep(0)

    await asyncio.gather(*(worker() for _ in range(24)))


@pytest.mark.timed
async def test_a_clean_error_after_the_delay_and_work_when_the_server_is_back(
    scratch: Path, start: Start
) -> None:
    image = fill(scratch / "disk.raw", SIZE, seed=4, pieces=10)
    socket = scratch / "nbd.sock"
    with server("qemu-nbd", image, scratch / "s.sock") as peer:
        daemon = start(
            *nbd_node(scratch / "s.sock", reconnect_delay=1), *nbd_server_unix(socket), *nbd_export()
        )
        client = await NbdClient.connect(str(socket), "disk")
        await client.write(0, b"x" * 4096)
        peer.kill()
        before = time.monotonic()
        results = await asyncio.gather(
            client.read(0, 4096), client.write(4096, b"y" * 4096), client.flush(), return_exceptions=True
        )
        assert 0.8 < time.monotonic() - before < 6
        assert [error.errno for error in results if isinstance(error, OSError)] == [errno.EIO] * 3, results
        before = time.monotonic()
        with pytest.raises(OSError):
            await client.read(0, 4096)
        assert time.monotonic() - before < 0.5  # later ones do not wait again
        assert "'disk'" in daemon.output()
        (scratch / "s.sock").unlink(missing_ok=True)
        await asyncio.to_thread(peer.start)
        async with asyncio.timeout(15):
            while True:
                with contextlib.suppress(OSError):
                    assert await client.read(0, 4096) == b"x" * 4096
                    break
                await asyncio.sleep(0.1)
        await client.write(4096, b"z" * 4096)
        await client.close()


async def test_a_target_ends_while_its_requests_wait(scratch: Path, start: Start) -> None:
    image = fill(scratch / "disk.raw", SIZE, seed=4, pieces=10)
    socket = scratch / "nbd.sock"
    with server("qemu-nbd", image, scratch / "s.sock") as peer:
        node = nbd_node(scratch / "s.sock", reconnect_delay=300)
        daemon = start(*node, *nbd_server_unix(socket), *nbd_export())
        client = await NbdClient.connect(str(socket), "disk")
        peer.kill()
        reading = asyncio.create_task(client.read(0, 4096))
        await asyncio.sleep(0.3)
        assert not reading.done()
        before = time.monotonic()
        await asyncio.to_thread(daemon.stop)
        assert time.monotonic() - before < 10
        with contextlib.suppress(OSError, EOFError):
            await reading
        await client.abort()


# ---- a scriptable server ----


async def test_every_connection_is_cut_again_and_again(scratch: Path, graph: Graph) -> None:
    """Four connections; requests go on with those that are left, and are made again when all are lost."""
    thread = ServerThread(NbdServer(ServerOptions(size=SIZE, shuffle=3)), str(scratch / "s.sock"))
    with thread as peer:
        disk = await open_node(graph, scratch / "s.sock", reconnect_delay=20, connections=4)
        ended = False

        async def work(number: int) -> int:
            rounds = 0
            while not ended:
                data = bytes([number, rounds % 256]) * 16384
                await disk.write(number * 65536, data)
                assert await disk.read(number * 65536, 32768) == data
                rounds += 1
            return rounds

        tasks = [asyncio.create_task(work(number)) for number in range(16)]
        for _ in range(12):
            await asyncio.sleep(0.15)
            thread.cut()
        await asyncio.sleep(0.3)
        ended = True
        async with asyncio.timeout(20):
            rounds = await asyncio.gather(*tasks)
        assert min(rounds) > 3 and peer.accepted > 8
    assert peer.violations == []


async def test_one_of_several_connections_is_lost(scratch: Path, graph: Graph) -> None:
    """Also without reconnect-delay the node goes on with the others, and replaces the lost one."""
    thread = ServerThread(NbdServer(ServerOptions(size=SIZE)), str(scratch / "s.sock"))
    with thread as peer:
        disk = await open_node(graph, scratch / "s.sock", connections=4, reconnect_delay=10)
        await asyncio.gather(*(disk.write(n * 4096, bytes([n]) * 4096) for n in range(64)))
        peer.faults = [faults.armed("reset@READ")]
        for n in range(64):
            assert await disk.read(n * 4096, 4096) == bytes([n]) * 4096
        async with asyncio.timeout(10):
            while len(peer.live) < 4:
                await asyncio.sleep(0.05)
        assert peer.accepted == 5


@pytest.mark.timed
async def test_without_delay_requests_fail_at_once(scratch: Path, graph: Graph) -> None:
    with mock(scratch / "s.sock", ServerOptions(size=SIZE)) as peer:
        disk = await open_node(graph, scratch / "s.sock")
        peer.faults = [faults.armed("close@READ")]
        before = time.monotonic()
        with pytest.raises(OSError) as caught:
            await disk.read(0, 4096)
        assert caught.value.errno in ERRORS and time.monotonic() - before < 1
        await works(disk)


async def test_attempts_are_paced(scratch: Path, graph: Graph) -> None:
    """A server that accepts and closes is not hammered, and costs no processor time."""
    with mock(scratch / "s.sock", ServerOptions(size=SIZE), proper=False) as peer:
        disk = await open_node(graph, scratch / "s.sock", reconnect_delay=30)
        peer.faults = [faults.armed("close@READ"), faults.armed("close@greeting:0:1000000")]
        before, accepted = time.process_time(), peer.accepted
        reading = asyncio.create_task(disk.read(0, 4096))
        await asyncio.sleep(3)
        assert not reading.done()
        assert 1 <= peer.accepted - accepted < 40
        assert time.process_time() - before < 1
        peer.faults = []
        async with asyncio.timeout(20):
            assert await reading == bytes(4096)


async def test_a_server_that_is_silent_when_asked_again(
    scratch: Path, graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handshake without answers does not eat the whole delay."""
    monkeypatch.setattr("target.drivers.protocol.nbd.connections.ESTABLISH_SECONDS", 0.5)
    with mock(scratch / "s.sock", ServerOptions(size=SIZE), proper=False) as peer:
        disk = await open_node(graph, scratch / "s.sock", reconnect_delay=20)
        peer.faults = [faults.armed("close@READ"), faults.armed("stall@greeting:0:2")]
        async with asyncio.timeout(15):
            assert await disk.read(0, 4096) == bytes(4096)
        assert peer.accepted >= 4


async def test_a_request_that_kills_its_connection_each_time_does_not_hold_the_node(
    scratch: Path, graph: Graph
) -> None:
    """It is made again, or fails; closing the node ends it."""
    with mock(scratch / "s.sock", ServerOptions(size=SIZE), proper=False) as peer:
        disk = await open_node(graph, scratch / "s.sock", reconnect_delay=2)
        peer.faults = [faults.armed("close@READ:0:1000000")]
        reading = asyncio.create_task(disk.read(0, 4096))
        await asyncio.wait([reading], timeout=4)
        assert peer.accepted < 200
        async with asyncio.timeout(10):
            await graph.remove("disk")
            with contextlib.suppress(OSError):
                await reading


async def test_closing_ends_what_waits(scratch: Path, graph: Graph) -> None:
    with mock(scratch / "s.sock", ServerOptions(size=SIZE)):
        disk = await open_node(graph, scratch / "s.sock", reconnect_delay=300)
    waiting = [asyncio.create_task(disk.read(n * 4096, 4096)) for n in range(20)]
    await asyncio.sleep(0.3)
    assert not any(task.done() for task in waiting)
    async with asyncio.timeout(10):
        await graph.remove("disk")
        results = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(result, OSError) for result in results)


@pytest.mark.parametrize(
    "change",
    [
        {"size": SIZE * 2},
        {"size": SIZE // 2},
        {"flags": ALL_FLAGS | TransmissionFlag.READ_ONLY},
        {"blocks": (4096, 4096, MIB)},
        {"structured": False},
        {"allocation": False},
        {"flags": TransmissionFlag(0)},
        {"extended": True},
        {"name": "other"},
    ],
    ids=str,
)
async def test_the_server_comes_back_changed(scratch: Path, graph: Graph, change: dict[str, Any]) -> None:
    """Whatever has changed: a request works by the new rules or fails, and the client keeps to them."""
    with mock(scratch / "s.sock", ServerOptions(size=SIZE)):
        disk = await open_node(graph, scratch / "s.sock", reconnect_delay=2)
        await disk.write(0, b"x" * 4096)
    with mock(scratch / "s.sock", ServerOptions(**{"size": SIZE, **change})) as peer:
        peer.disk.write(0, b"y" * 8192)
        async with asyncio.timeout(30):
            with contextlib.suppress(OSError):
                assert await disk.read(512, 4096) == b"y" * 4096
            with contextlib.suppress(OSError):
                await disk.write(512, b"w" * 512)
                assert peer.disk.read(512, 512) == b"w" * 512
            with contextlib.suppress(OSError):
                await disk.write_zeroes(0, MIB)
            with contextlib.suppress(OSError):
                assert sum(extent.length for extent in await disk.block_status(0, MIB)) >= MIB
            with contextlib.suppress(OSError):
                await disk.write(SIZE - 4096, b"e" * 4096)
            with contextlib.suppress(OSError):
                await disk.flush()
        if change.get("size", 0) > SIZE:
            assert disk.size == SIZE * 2
        await graph.remove("disk")


# ---- open-timeout ----


async def test_open_timeout_waits_for_a_server(scratch: Path, graph: Graph) -> None:
    opening = asyncio.create_task(open_node(graph, scratch / "s.sock", open_timeout=20))
    await asyncio.sleep(0.7)
    assert not opening.done()
    with mock(scratch / "s.sock", ServerOptions(size=SIZE)):
        async with asyncio.timeout(10):
            disk = await opening
        assert await disk.read(0, 512) == bytes(512)
        await graph.remove("disk")


@pytest.mark.timed
async def test_open_timeout_ends_with_the_reason(scratch: Path, graph: Graph) -> None:
    before = time.monotonic()
    message = await refused(graph, server=unix(scratch / "none.sock"), export="disk", open_timeout=1)
    assert 0.8 < time.monotonic() - before < 4
    assert "No such file" in message and "none.sock" in message
    before = time.monotonic()
    await refused(graph, server=unix(scratch / "none.sock"), export="disk")
    assert time.monotonic() - before < 0.5


async def test_open_timeout_does_not_retry_what_cannot_become_right(scratch: Path, graph: Graph) -> None:
    """A wrong export name is told at once or at the end of the time, and as what it is."""
    with mock(scratch / "s.sock", ServerOptions(size=SIZE)):
        message = await refused(graph, server=unix(scratch / "s.sock"), export="other", open_timeout=2)
        assert "'other'" in message


async def test_an_open_that_waits_can_be_given_up(scratch: Path, graph: Graph) -> None:
    opening = asyncio.create_task(open_node(graph, scratch / "s.sock", open_timeout=300))
    await asyncio.sleep(0.3)
    opening.cancel()
    async with asyncio.timeout(5):
        with contextlib.suppress(asyncio.CancelledError, BlockError):
            await opening
