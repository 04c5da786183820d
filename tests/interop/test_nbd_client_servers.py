# SPDX-License-Identifier: Apache-2.0
"""The nbd driver with all kinds of proper servers: rare but legal replies, limits, several connections, sizes
past 4 GiB, read-only exports, every way to name a server; and servers that cannot be used."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket as sockets
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from target.datapath import FUA, UNMAP
from target.exports.nbd.protocol import Command, CommandFlag, TransmissionFlag
from target.graph.errors import BlockError
from target.graph.graph import Graph
from target.peers.nbd_client import NbdClient
from target.peers.nbd_faults import REPLYING
from target.peers.nbd_replies import failure
from target.peers.nbd_script import ALL_FLAGS, Armed, ServerOptions
from target.peers.nbd_server import NbdServer, ServerThread
from tests.support.daemon import Daemon, blocktarget_argv, free_port, nbd_export, nbd_server_unix
from tests.support.nbd_model import Model
from tests.support.nbd_peers import mock, nbd_node, open_node, refused, unix
from tests.support.tools import run

Start = Callable[..., Daemon]
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
SIZE = 16 * MIB

LEGAL = {
    "structured": ServerOptions(size=SIZE),
    "simple": ServerOptions(size=SIZE, structured=False),
    "extended": ServerOptions(size=SIZE, extended=True),
    "mixed": ServerOptions(size=SIZE, simple_replies=True, holes=False),
    "chunks": ServerOptions(size=SIZE, chunk=3000),
    "shuffled": ServerOptions(size=SIZE, shuffle=5, chunk=30_000),
    "shuffled-simple": ServerOptions(size=SIZE, shuffle=6, structured=False),
    "shuffled-extended": ServerOptions(size=SIZE, shuffle=7, extended=True, chunk=100_000),
    "one-extent": ServerOptions(size=SIZE, extents=1),
    "past-end": ServerOptions(size=SIZE, past_end=True, extended=True),
    "512": ServerOptions(size=SIZE, blocks=(512, 512, 64 * KIB)),
    "4096": ServerOptions(size=SIZE, blocks=(4096, 64 * KIB, MIB), shuffle=8),
    "64k": ServerOptions(size=SIZE, blocks=(64 * KIB, 64 * KIB, MIB)),
    "no-flags": ServerOptions(size=SIZE, flags=TransmissionFlag(0)),
    "one-connection": ServerOptions(size=SIZE, flags=ALL_FLAGS & ~TransmissionFlag.CAN_MULTI_CONN),
    "old": ServerOptions(size=SIZE, fixed=False),
    "no-go": ServerOptions(size=SIZE, go=False),
    "untold": ServerOptions(size=SIZE, tell_blocks=False),
}


@pytest.mark.parametrize("how", LEGAL)
async def test_many_requests_at_once_against_a_model(scratch: Path, start: Start, how: str) -> None:
    """Three clients of our daemon, 24 operations in flight, two I/O threads, four connections to the peer."""
    socket = scratch / "nbd.sock"
    threads = [word for name in ("t0", "t1") for word in ("--object", f"iothread,id={name}")]
    export = {"type": "nbd", "id": "e", "node-name": "disk", "name": "disk", "writable": True}
    export["iothread"] = ["t0", "t1"]
    with mock(scratch / "s.sock", LEGAL[how]) as peer:
        node = nbd_node(scratch / "s.sock", connections=4)
        daemon = start(*threads, *node, *nbd_server_unix(socket), "--export", json.dumps(export))
        clients = [await NbdClient.connect(str(socket), "disk", structured=n < 2) for n in range(3)]
        model = Model(clients, bytearray(SIZE), seed=11)
        await model.run(600, depth=24)
        await model.check_all()
        for client in clients:
            await client.flush()
            await client.close()
        daemon.stop()
        for sector in set(range(SIZE // 512)) - model.discarded:
            assert peer.disk.read(sector * 512, 512) == model.data[sector * 512 : sector * 512 + 512], sector
        multi = LEGAL[how].flags & TransmissionFlag.CAN_MULTI_CONN
        assert peer.accepted == (4 if multi else 1)
        busy = {request.connection for request in peer.log if request.command != Command.DISC}
        assert len(busy) >= 2 if multi else len(busy) == 1
        assert sum(request.command == Command.DISC for request in peer.log) == peer.accepted


async def read_many(socket: Path, depth: int, count: int) -> None:
    client = await NbdClient.connect(str(socket), "disk")
    room = asyncio.Semaphore(depth)

    async def one(number: int) -> None:
        async with room:
            assert await client.read(number * 4096, 4096) == number.to_bytes(2) * 2048

    await asyncio.gather(*(one(number) for number in range(count)))
    await client.close()


@pytest.mark.parametrize("threads", [0, 1, 2])
async def test_every_connection_is_used(scratch: Path, start: Start, threads: int) -> None:
    """By however many I/O threads; one client on each, which the export gives out in turn."""
    socket, count = scratch / "nbd.sock", 800
    names = [f"t{number}" for number in range(threads)]
    words = [word for name in names for word in ("--object", f"iothread,id={name}")]
    export = {"type": "nbd", "id": "e", "node-name": "disk", "name": "disk"}
    with mock(scratch / "s.sock", ServerOptions(size=SIZE, delay=0.002)) as peer:
        peer.disk.write(0, b"".join(number.to_bytes(2) * 2048 for number in range(count)))
        words += [*nbd_node(scratch / "s.sock", connections=4), *nbd_server_unix(socket)]
        daemon = start(*words, "--export", json.dumps(export | ({"iothread": names} if names else {})))
        async with asyncio.timeout(20):
            while len(peer.live) < 4:
                await asyncio.sleep(0.01)
            await read_many(socket, depth=1, count=20)
        assert len({request.connection for request in peer.commands(Command.READ)}) == 1
        peer.log.clear()
        async with asyncio.timeout(20):
            await asyncio.gather(*(read_many(socket, 64, count) for _ in range(max(threads, 1))))
        used = Counter(request.connection for request in peer.commands(Command.READ))
        assert len(used) == 4 and min(used.values()) > sum(used.values()) // 10, used
        daemon.stop()


async def test_several_connections_by_default(scratch: Path, start: Start) -> None:
    """One I/O thread; one connection when the server does not say that they see the same data."""
    for multi in (True, False):
        socket = scratch / f"nbd-{multi}.sock"
        flags = ALL_FLAGS if multi else ALL_FLAGS & ~TransmissionFlag.CAN_MULTI_CONN
        with mock(scratch / f"s-{multi}.sock", ServerOptions(size=SIZE, delay=0.002, flags=flags)) as peer:
            peer.disk.write(0, b"".join(number.to_bytes(2) * 2048 for number in range(800)))
            daemon = start(*nbd_node(scratch / f"s-{multi}.sock"), *nbd_server_unix(socket), *nbd_export())
            async with asyncio.timeout(20):
                while len(peer.live) < (4 if multi else 1):
                    await asyncio.sleep(0.01)
                await read_many(socket, depth=128, count=800)
            used = {request.connection for request in peer.commands(Command.READ)}
            assert len(used) == peer.accepted == (4 if multi else 1)
            daemon.stop()


async def test_a_connection_comes_back_to_a_thread_that_was_idle(scratch: Path, start: Start) -> None:
    """One I/O thread takes all; then the other one is used, and gets its share; both at once at last."""
    socket = scratch / "nbd.sock"
    words = [word for name in ("t0", "t1") for word in ("--object", f"iothread,id={name}")]
    export = {"type": "nbd", "id": "e", "node-name": "disk", "name": "disk", "iothread": ["t0", "t1"]}
    with mock(scratch / "s.sock", ServerOptions(size=SIZE, delay=0.001)) as peer:
        peer.disk.write(0, b"".join(number.to_bytes(2) * 2048 for number in range(800)))
        words += [*nbd_node(scratch / "s.sock", connections=3), *nbd_server_unix(socket)]
        daemon = start(*words, "--export", json.dumps(export))
        for _ in range(4):  # the export gives clients to its threads in turn
            async with asyncio.timeout(20):
                client = await NbdClient.connect(str(socket), "disk")
                while len({request.connection for request in peer.commands(Command.READ)}) < 3:
                    await asyncio.gather(*(client.read(number * 4096, 4096) for number in range(64)))
                await client.close()
            peer.log.clear()
        async with asyncio.timeout(20):
            await asyncio.gather(*(read_many(socket, 64, 400) for _ in range(4)))
        assert len({request.connection for request in peer.commands(Command.READ)}) == peer.accepted == 3
        daemon.stop()


async def test_a_request_of_every_alignment_on_a_server_with_large_blocks(
    scratch: Path, graph: Graph
) -> None:
    """Sub-block writes are read, changed and written; the server sees whole blocks only (mock checks)."""
    with mock(scratch / "s.sock", ServerOptions(size=MIB, blocks=(4096, 4096, 64 * KIB))) as peer:
        disk = await open_node(graph, scratch / "s.sock")
        await disk.write(0, b"a" * MIB)
        await disk.write(1536, b"b" * 512)
        await disk.write_zeroes(4096 - 512, 1024)
        await disk.write(100 * KIB + 512, b"c" * (200 * KIB))
        await disk.discard(512, 12 * KIB)
        expected = bytearray(b"a" * MIB)
        expected[1536:2048] = b"b" * 512
        expected[3584:4608] = bytes(1024)
        expected[100 * KIB + 512 : 300 * KIB + 512] = b"c" * (200 * KIB)
        found = await disk.read(0, MIB)
        assert found[16 * KIB :] == expected[16 * KIB :] and found[:512] == expected[:512]
        assert await disk.read(1536, 512) in (b"b" * 512, bytes(512))
        assert len(peer.commands(Command.WRITE)) >= 16  # no payload above 64k


async def test_sizes_that_are_no_multiple_of_a_sector(scratch: Path, graph: Graph) -> None:
    size = MIB + 100
    with mock(scratch / "s.sock", ServerOptions(size=size)) as peer:
        peer.disk.write(MIB, b"t" * 100)
        disk = await open_node(graph, scratch / "s.sock")
        assert disk.size == MIB + 512
        assert await disk.read(MIB, 512) == b"t" * 100 + bytes(412)
        with pytest.raises(OSError) as caught:  # as with QEMU's driver
            await disk.write(MIB, b"w" * 512)
        assert caught.value.errno == errno.ENOSPC
        assert peer.disk.read(MIB, 100) == b"t" * 100
        assert sum(extent.length for extent in await disk.block_status(0, MIB + 512)) == MIB + 512


@pytest.mark.parametrize("extended", [False, True])
async def test_more_than_4_gib_at_once(scratch: Path, graph: Graph, extended: bool) -> None:
    size = 24 * GIB
    with mock(scratch / "s.sock", ServerOptions(size=size, extended=extended)) as peer:
        disk = await open_node(graph, scratch / "s.sock")
        assert disk.size == size
        for offset in (0, 5 * GIB - 4096, 6 * GIB, size - 4096):
            await disk.write(offset, b"x" * 4096)
        await disk.write_zeroes(4096, 6 * GIB - 4096, UNMAP)  # else the server keeps 6 GiB of zeros
        assert await disk.read(0, 4096) == b"x" * 4096 == await disk.read(6 * GIB, 4096)
        assert await disk.read(5 * GIB - 4096, 4096) == bytes(4096)
        await disk.discard(4096, 12 * GIB)
        assert await disk.read(6 * GIB, 4096) == bytes(4096)
        assert await disk.read(size - 4096, 4096) == b"x" * 4096
        covered = 0
        while covered < size:
            extents = await disk.block_status(covered, size - covered)
            assert extents and all(extent.length for extent in extents)
            covered += sum(extent.length for extent in extents)
        assert covered == size
        zeroes = peer.commands(Command.WRITE_ZEROES)
        assert sum(request.length for request in zeroes) == 6 * GIB - 4096
        if extended:
            assert len(zeroes) == 1 and len(peer.commands(Command.TRIM)) == 1
        else:
            assert len(zeroes) <= 200  # no more in one than a payload may have, as QEMU's driver


async def test_flags_and_commands_that_the_server_lacks(scratch: Path, graph: Graph) -> None:
    """FUA becomes a flush, zeroes become data, a discard nothing; mock notes what was not offered."""
    options = ServerOptions(size=MIB, flags=TransmissionFlag.SEND_FLUSH)
    with mock(scratch / "s.sock", options) as peer:
        disk = await open_node(graph, scratch / "s.sock")
        await disk.write(0, b"x" * 4096, FUA)
        assert [r.command for r in peer.log if r.command != Command.READ] == [Command.WRITE, Command.FLUSH]
        await disk.write_zeroes(0, 4096)
        assert peer.disk.read(0, 4096) == bytes(4096)
        await disk.discard(0, 4096)
        await disk.flush()
        assert not peer.commands(Command.TRIM)
    with mock(scratch / "f.sock", ServerOptions(size=MIB)) as peer:
        disk = await open_node(graph, scratch / "f.sock", node_name="fua")
        await disk.write(0, b"x" * 4096, FUA)
        assert [r.flags for r in peer.log if r.command == Command.WRITE] == [CommandFlag.FUA]
        assert not peer.commands(Command.FLUSH)
    with mock(scratch / "n.sock", ServerOptions(size=MIB)) as peer:
        cache = {"no-flush": True}
        disk = await open_node(graph, scratch / "n.sock", node_name="unsafe", cache=cache)
        await disk.write(0, b"x" * 4096, FUA)
        await disk.flush()
        assert not peer.commands(Command.FLUSH)
    with mock(scratch / "d.sock", ServerOptions(size=MIB)) as peer:
        disk = await open_node(graph, scratch / "d.sock", node_name="ignore", discard="ignore")
        await disk.discard(0, 4096)
        assert not peer.commands(Command.TRIM)


@pytest.mark.parametrize("number", [errno.EPERM, errno.EIO, errno.ENOMEM, errno.EINVAL, errno.ENOSPC, 4242])
async def test_the_server_s_errors_come_through(scratch: Path, graph: Graph, number: int) -> None:
    """An error of the server is that request's; the connection goes on. Unknown numbers are some error."""
    with mock(scratch / "s.sock", ServerOptions(size=MIB)) as peer:
        disk = await open_node(graph, scratch / "s.sock")
        for about, call in (
            ("WRITE", lambda: disk.write(0, b"x" * 4096)),
            ("READ", lambda: disk.read(0, 4096)),
            ("FLUSH", disk.flush),
            ("TRIM", lambda: disk.discard(0, 4096)),
            ("WRITE_ZEROES", lambda: disk.write_zeroes(0, 4096)),
        ):
            peer.faults = [Armed(lambda step: [failure(step.asked, number, b"because")], about)]
            with pytest.raises(OSError) as caught:
                await call()
            assert caught.value.errno == (number if number != 4242 else errno.EINVAL), about
            await call()
        assert peer.accepted <= 4  # as many as there are by default: none was lost


# ---- read-only ----


async def test_read_only_exports(scratch: Path, graph: Graph) -> None:
    options = ServerOptions(size=MIB, flags=ALL_FLAGS | TransmissionFlag.READ_ONLY)
    where = unix(scratch / "s.sock")
    with mock(scratch / "s.sock", options) as peer:
        message = await refused(graph, server=where, export="disk")
        assert "read-only" in message.lower() or "read only" in message.lower()
        auto = await open_node(graph, scratch / "s.sock", node_name="auto", auto_read_only=True)
        assert auto.read_only
        told = await open_node(graph, scratch / "s.sock", node_name="told", read_only=True)
        assert await told.read(0, 512) == bytes(512)
        assert not peer.commands(Command.WRITE)


def test_a_writable_export_of_a_read_only_server_is_refused(scratch: Path) -> None:
    options = ServerOptions(size=MIB, flags=ALL_FLAGS | TransmissionFlag.READ_ONLY)
    with mock(scratch / "s.sock", options):
        node = nbd_node(scratch / "s.sock", auto_read_only=True)
        words = [*node, *nbd_server_unix(scratch / "e.sock"), *nbd_export()]
        done = run(*blocktarget_argv("daemon", *words), check=False)
    assert done.returncode == 1 and "disk" in done.stderr


# ---- how a server is named ----


def inet(port: int, host: str = "127.0.0.1") -> dict[str, Any]:
    return {"type": "inet", "host": host, "port": str(port)}


async def test_unix_tcp_and_descriptors(scratch: Path, graph: Graph) -> None:
    port = free_port()
    with ServerThread(NbdServer(ServerOptions(size=MIB)), ("127.0.0.1", port)) as peer:
        for number, host in enumerate(("127.0.0.1", "localhost")):
            options = {"driver": "nbd", "node-name": f"tcp{number}", "server": inet(port, host)}
            disk = await graph.add({**options, "export": "disk"})
            await disk.write(0, bytes([number + 1]) * 512)
            assert await disk.read(0, 512) == bytes([number + 1]) * 512
        with sockets.create_connection(("127.0.0.1", port)) as made:
            number = os.dup(made.fileno())
        server = {"type": "fd", "str": str(number)}
        disk = await graph.add({"driver": "nbd", "node-name": "fd", "server": server, "export": "disk"})
        assert await disk.read(0, 512) == b"\2" * 512
        assert peer.accepted >= 3 and peer.violations == []


def uris(path: Path, port: int) -> dict[str, str]:
    return {
        "unix": f"nbd+unix:///disk?socket={path}",
        "escaped": f"nbd+unix:///d%69sk?socket={str(path).replace('/', '%2F')}",
        "tcp": f"nbd://127.0.0.1:{port}/disk",
        "name": f"nbd://localhost:{port}/disk",
    }


@pytest.mark.parametrize("how", ["unix", "escaped", "tcp", "name"])
async def test_uris_as_libnbd_writes_them(scratch: Path, graph: Graph, how: str) -> None:
    port = free_port()
    path = scratch / "s.sock"
    uri = uris(path, port)[how]
    address = str(path) if "unix" in uri else ("127.0.0.1", port)
    with ServerThread(NbdServer(ServerOptions(size=MIB)), address):
        assert json.loads(run("nbdinfo", "--json", uri).stdout)["exports"][0]["export-size"] == MIB
        disk = await graph.add({"driver": "nbd", "node-name": "disk", "uri": uri})
        assert disk.size == MIB


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("http://localhost/disk", "http"),
        ("nbds://localhost/disk", "TLS"),
        ("nbds+unix:///disk?socket=/x", "TLS"),
        ("nbd+ssh://-oProxyCommand=x/disk", "nbd+ssh"),
        ("nbd+unix:///disk", "socket"),
        ("nbd+unix:///disk?socket=", "socket"),
        ("nbd://localhost:0x10/disk", "port"),
        ("nbd://localhost:99999/disk", "port"),
        ("nbd://[::1/disk", "::1"),
        ("nbd+vsock://words:1/disk", "words"),
        ("nbd://localhost/disk?colour=red", "colour"),
        ("nbd://localhost/a%00b", "NUL"),
        ("nbd://localhost/%ff", "UTF-8"),
        ("nbd://localhost/" + "a" * 4097, "4096"),
        ("", "uri"),
    ],
)
async def test_uris_that_are_none(graph: Graph, uri: str, text: str) -> None:
    assert text.lower() in (await refused(graph, uri=uri)).lower()


# ---- servers that cannot be used ----


async def test_nobody_listens(scratch: Path, graph: Graph) -> None:
    missing = await refused(graph, server=unix(scratch / "none.sock"), export="disk")
    assert "none.sock" in missing and "No such file" in missing
    with sockets.socket(sockets.AF_UNIX) as dead:
        dead.bind(str(scratch / "dead.sock"))
    assert "Connection refused" in await refused(graph, server=unix(scratch / "dead.sock"), export="disk")
    port = free_port()
    message = await refused(graph, server=inet(port), export="disk")
    assert "Connection refused" in message and str(port) in message
    assert "no-such-host" in await refused(graph, server=inet(port, "no-such-host.invalid"), export="disk")
    assert "too long" in await refused(graph, server=unix("/tmp/" + "x" * 200), export="disk")


async def test_a_wrong_export_name_and_a_server_that_wants_tls(scratch: Path, graph: Graph) -> None:
    where = unix(scratch / "s.sock")
    with mock(scratch / "s.sock", ServerOptions(size=MIB)):
        message = await refused(graph, server=where, export="other")
        assert "'other'" in message and "is not here" in message  # the server's own words, too
        assert "''" in await refused(graph, server=where)
    with mock(scratch / "t.sock", ServerOptions(size=MIB, tls_required=True)):
        assert "TLS" in await refused(graph, server=unix(scratch / "t.sock"), export="disk")
    with mock(scratch / "o.sock", ServerOptions(size=MIB, fixed=False)):
        await refused(graph, server=unix(scratch / "o.sock"), export="other")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"tls_creds": "tls0"}, "tls-creds"),
        ({"tls_hostname": "host"}, "tls-hostname"),
        ({"export": "a" * 4097}, "export"),
        ({"x_dirty_bitmap": "qemu:dirty-bitmap:none"}, "qemu:dirty-bitmap:none"),
        ({"x_dirty_bitmap": "x" * 4097}, "x-dirty-bitmap"),
        ({"uri": "nbd://localhost/disk"}, "uri"),
        ({"server": {"type": "fd", "str": "7777"}}, "7777"),
        ({"server": {"type": "fd", "str": "name"}}, "name"),
        ({"server": {"type": "inet", "host": "localhost", "port": "many"}}, "port"),
        ({"server": {"type": "vsock", "cid": "words", "port": "1"}}, "cid"),
        ({"server": {"type": "vsock", "cid": "1", "port": "5000000000"}}, "port"),
    ],
)
async def test_options_that_cannot_be(
    scratch: Path, graph: Graph, options: dict[str, Any], text: str
) -> None:
    with mock(scratch / "s.sock", ServerOptions(size=MIB)):
        message = await refused(graph, **{"server": unix(scratch / "s.sock"), "export": "disk", **options})
    assert text in message


async def test_a_node_is_closed_while_the_server_is_silent(
    scratch: Path, graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its requests end, and the graph's close waits for the server only so long."""
    monkeypatch.setattr("target.drivers.protocol.nbd.node.CLOSE_SECONDS", 1)
    with mock(scratch / "s.sock", ServerOptions(size=MIB), REPLYING["stall"].at("READ")):
        disk = await open_node(graph, scratch / "s.sock")
        reading = asyncio.create_task(disk.read(0, 512))
        await asyncio.sleep(0.2)
        assert not reading.done()
        before = time.monotonic()
        async with asyncio.timeout(10):
            await graph.remove("disk")
            with pytest.raises((OSError, BlockError)):
                await reading
        assert time.monotonic() - before < 8


async def test_truncate_is_refused(scratch: Path, graph: Graph) -> None:
    with mock(scratch / "s.sock", ServerOptions(size=MIB)):
        disk = await open_node(graph, scratch / "s.sock")
        with pytest.raises(BlockError, match="disk"):
            await graph.resize(disk, 2 * MIB)
        assert disk.size == MIB
