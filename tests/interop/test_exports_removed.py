# SPDX-License-Identifier: Apache-2.0
"""Exports removed while clients are attached: the modes, what each leaves to clients, and undoing it."""

from __future__ import annotations

import asyncio
import errno
import functools
import os
import socket
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from target.config.options import Notation
from target.config.parse import parse_export, parse_nbd_server
from target.exports.removal import RemoveMode
from target.graph.errors import BlockError
from target.peers.nbd_client import NbdClient
from target.peers.nbd_raw import OptionFailed
from target.peers.vhost_user_front_end import FrontEnd
from tests.support.held import Live, live
from tests.support.nbd import Bystander, descriptors

CUT = (EOFError, ConnectionError)
SYSTEM_PYTHON = "/usr/bin/python3"  # which has libnbd's binding


@pytest_asyncio.fixture
async def target(scratch: Path) -> AsyncIterator[Live]:
    async with live(scratch) as made:
        yield made


async def soon(condition: object) -> None:
    assert callable(condition)
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def is_cut(client: NbdClient) -> bool:
    """Whether the server has closed the connection."""
    with pytest.raises(CUT):
        await asyncio.wait_for(client.read(0, 512), 5)
    await client.abort()
    return True


async def test_safe_is_refused_while_there_are_clients(target: Live) -> None:
    await target.export()
    client = await target.client()
    with pytest.raises(BlockError, match=r"^export 'e' still in use$"):
        await target.service.remove_export("e")
    assert await client.read(0, 512) == bytes(512)
    (found,) = target.service.exports["e"].clients()
    assert found.pid == os.getpid() and found.requests == 1
    await client.close()
    await soon(lambda: not target.service.exports["e"].clients())
    assert target.deleted() == []
    await target.service.remove_export("e")
    assert target.deleted() == ["e"] and not target.service.exports and not target.disk.parents
    with pytest.raises(BlockError, match=r"^Export 'e' is not found$"):
        await target.service.remove_export("e")


async def test_hard_cuts_clients_at_once_and_finishes_what_they_asked(target: Live) -> None:
    export = await target.export()
    client, idle = await target.client(), await target.client()
    target.disk.hold()
    write = asyncio.create_task(client.write(0, b"w" * 4096))
    await target.disk.has(1)
    await target.service.remove_export("e", "hard")
    with pytest.raises(CUT):
        await asyncio.wait_for(write, 5)
    assert await is_cut(idle)
    assert target.service.leaving == [export] and export.shutting_down and target.deleted() == []
    with pytest.raises(BlockError, match=r"^Export 'e' is already shutting down$"):
        await target.service.remove_export("e", "hard")
    with pytest.raises(BlockError, match="Block export id 'e' is already in use"):
        await target.export(name="other")
    target.disk.let_go()
    await asyncio.wait_for(export.gone.wait(), 5)
    assert target.deleted() == ["e"] and target.disk.data[:4096] == b"w" * 4096
    await client.abort()
    await target.export()


async def test_a_change_cuts_an_export_off_and_removes_its_node_which_closes_after_it(target: Live) -> None:
    export = await target.export()
    graph, disk = target.service.graph, target.disk
    client = await target.client()
    disk.hold()
    write = asyncio.create_task(client.write(0, b"w" * 4096))
    await disk.has(1)
    with pytest.raises(BlockError, match="undone"):
        async with graph.change() as change:
            await target.service.remove_export_in(change, "e", "hard")
            change.remove("disk")
            raise BlockError("undone")
    assert graph.nodes["disk"] is disk and disk.owned and not disk.leaving
    with pytest.raises(BlockError, match=r"^Node disk is in use: by block export 'e' as 'root' child$"):
        await graph.remove("disk")
    async with asyncio.timeout(5), graph.change() as change:
        await target.service.remove_export_in(change, "e", "hard")
        change.remove("disk")
    change.raise_failure()
    assert "disk" not in graph.nodes and not disk.closed and target.deleted() == []
    with pytest.raises(CUT):
        await asyncio.wait_for(write, 5)
    disk.let_go()
    await asyncio.wait_for(export.gone.wait(), 5)
    assert target.deleted() == ["e"] and disk.data[:4096] == b"w" * 4096
    await soon(lambda: disk.closed)
    await client.abort()


async def test_soft_answers_what_is_under_way_and_refuses_the_rest(target: Live) -> None:
    await target.export()
    client, idle = await target.client(), await target.client()
    target.disk.hold()
    first = asyncio.create_task(client.write(0, b"w" * 4096))
    await target.disk.has(1)
    removal = asyncio.create_task(target.service.remove_export("e", "soft"))
    await asyncio.sleep(0.1)
    later = asyncio.create_task(client.write(0, b"x" * 4096))
    await asyncio.sleep(0.1)
    assert not first.done() and not later.done() and not removal.done()
    target.disk.let_go()
    await asyncio.wait_for(first, 5)
    with pytest.raises(OSError) as refused:
        await asyncio.wait_for(later, 5)
    assert refused.value.errno == errno.ESHUTDOWN
    await asyncio.wait_for(removal, 5)
    assert target.disk.data[:4096] == b"w" * 4096
    assert target.deleted() == ["e"] and not target.service.leaving
    assert await is_cut(client) and await is_cut(idle)


async def test_soft_is_given_up_after_its_deadline_and_nobody_notices(target: Live) -> None:
    export = await target.export()
    client = await target.client()
    target.disk.hold()
    write = asyncio.create_task(client.write(0, b"w" * 4096))
    await target.disk.has(1)
    with pytest.raises(BlockError, match=r"export 'e': requests are still under way after 0\.2 s"):
        await target.service.remove_export("e", "soft", 0.2)
    assert target.service.exports == {"e": export} and not export.shutting_down
    assert not write.done()
    target.disk.let_go()
    await asyncio.wait_for(write, 5)
    other = await target.client()
    assert await other.read(0, 4096) == b"w" * 4096
    await target.service.remove_export("e", "soft")
    assert await is_cut(client) and await is_cut(other)


async def test_soft_does_not_wait_for_a_client_that_stops_within_a_request(target: Live) -> None:
    await target.export()
    client = await target.client()
    await client.raw.send(bytes.fromhex("2560951300000001") + bytes(12))
    await asyncio.sleep(0.05)
    async with asyncio.timeout(8):
        await target.service.remove_export("e", "soft")
    assert await is_cut(client)


async def test_hide_lets_clients_stay_and_ends_with_the_last(target: Live) -> None:
    export = await target.export()
    client = await target.client()
    await target.service.remove_export("e", "hide")
    with pytest.raises(OptionFailed, match="not present"):
        await target.client()
    await client.write(0, b"w" * 4096)
    assert target.service.leaving == [export] and export.shutting_down and target.deleted() == []
    replacement = await target.export("f", name="disk")
    other = await target.client()
    assert await other.read(0, 4096) == b"w" * 4096
    await client.close()
    await asyncio.wait_for(export.gone.wait(), 5)
    assert target.deleted() == ["e"] and len(replacement.clients()) == 1
    await other.close()


async def test_a_removal_that_is_undone_keeps_its_clients(target: Live) -> None:
    """And a client that came meanwhile is served; what was added beside it is gone without a trace."""
    export = await target.export()
    client = await target.client()
    coming: list[asyncio.Task[NbdClient]] = []
    for mode in ("soft", "hide", "hard"):
        with pytest.raises(BlockError, match="on purpose"):
            async with target.service.graph.change() as change:
                await target.service.remove_export_in(change, "e", mode)
                given = {"type": "nbd", "id": "e", "node-name": "disk", "name": "disk"}
                await target.service.add_export_in(change, *parse_export(given, Notation.JSON))
                coming.append(asyncio.create_task(target.client()))
                await asyncio.sleep(0.05)
                assert not coming[-1].done()
                raise BlockError("on purpose")
        assert target.service.exports == {"e": export} and not target.service.leaving
        await client.write(0, b"w" * 512)
        await (await asyncio.wait_for(coming[-1], 5)).close()
    assert target.deleted() == [] and len(target.disk.parents) == 1
    await client.close()


async def test_an_export_and_its_node_are_replaced_in_one_change(target: Live) -> None:
    await target.export()
    client = await target.client()
    async with target.service.graph.change() as change:
        await target.service.remove_export_in(change, "e", "soft")
        change.remove("disk")
        await change.add({"driver": "test-held", "node-name": "disk", "size": 8192})
        given = {"type": "nbd", "id": "e", "node-name": "disk"}
        await target.service.add_export_in(change, *parse_export(given, Notation.JSON))
        coming = asyncio.create_task(target.client())
        await asyncio.sleep(0.05)
    assert change.failures == []
    assert await is_cut(client)
    fresh = await asyncio.wait_for(coming, 5)
    assert fresh.export.size == 8192
    assert target.deleted() == ["e"] and list(target.service.exports) == ["e"]
    await fresh.close()


async def test_servers_start_and_stop_while_others_serve(target: Live, scratch: Path) -> None:
    service = target.service
    await target.export()
    second = str(scratch / "second")
    options = parse_nbd_server({"addr": {"type": "unix", "path": second}}, Notation.JSON)
    with pytest.raises(BlockError, match=r"^NBD server already running$"):
        await service.start_nbd_server(options, "")
    await service.start_nbd_server(options, "two")
    first, other = await target.client(), await NbdClient.connect(second, "disk")
    await service.stop_nbd_server()
    assert await is_cut(first)
    assert await other.read(0, 512) == bytes(512) and target.deleted() == []
    with pytest.raises(BlockError, match=r"^NBD server not running$"):
        await service.stop_nbd_server()
    await service.stop_nbd_server("two")
    assert await is_cut(other)
    assert target.deleted() == ["e"] and not service.exports
    with pytest.raises(BlockError, match="NBD server not running"):
        await target.export()


async def test_the_end_of_the_process_tells_of_each_export(scratch: Path) -> None:
    async with live(scratch) as target:
        await target.export("a")
        await target.export("b", name="b")
        await target.export("c", "vhost-user-blk")
        client = await target.client()
        await target.service.remove_export("a", "hide")
    assert sorted(target.deleted()) == ["a", "b", "c"]
    assert await is_cut(client)


async def test_a_node_that_only_an_export_uses_stays_open_until_its_last_reply(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It closed first, and a request that had read the block around its data had nowhere to write it."""
    reading, go_on = asyncio.Event(), asyncio.Event()

    async def slow(offset: int, length: int) -> bytes:
        reading.set()
        await go_on.wait()
        return bytes(length)

    async with live(scratch) as target:
        graph = target.service.graph
        monkeypatch.setattr(target.disk, "read", slow)
        inner = {"driver": "blkdebug", "node-name": "inner", "align": 4096, "image": "disk"}
        await graph.add({"driver": "raw", "node-name": "outer", "file": inner})
        await target.export(node_name="inner")
        await graph.remove("outer")
        client = await target.client("inner")
        write = asyncio.create_task(client.write(512, b"w" * 512))
        await asyncio.wait_for(reading.wait(), 5)
        stopping = asyncio.create_task(target.service.remove_exports())
        await asyncio.sleep(0.1)
        go_on.set()
        await asyncio.wait_for(write, 5)
        await stopping
        assert target.disk.data[:1536] == bytes(512) + b"w" * 512 + bytes(512)
        assert "inner" not in graph.nodes
        await client.abort()


@pytest.mark.parametrize("mode", ["hard", "soft"])
async def test_a_front_end_gets_its_answers_and_then_the_end(target: Live, mode: RemoveMode) -> None:
    export = await target.export("v", "vhost-user-blk")
    path = str(target.directory / "v")
    with await asyncio.to_thread(FrontEnd.connect, path) as front:
        (found,) = export.clients()
        assert found.pid == os.getpid()
        with pytest.raises(BlockError, match=r"^export 'v' still in use$"):
            await target.service.remove_export("v")
        target.disk.hold()
        write = asyncio.create_task(asyncio.to_thread(front.write, 0, b"w" * 4096))
        await target.disk.has(1)
        if mode == "soft":
            with pytest.raises(BlockError, match="requests are still under way"):
                await target.service.remove_export("v", "soft", 0.2)
            assert list(target.service.exports) == ["v"]
            read = asyncio.create_task(asyncio.to_thread(front.connection.ended, 0.2))
            assert not await read
        removal = asyncio.create_task(target.service.remove_export("v", mode))
        await asyncio.sleep(0.05)
        target.disk.let_go()
        await asyncio.wait_for(write, 5)
        await asyncio.wait_for(removal, 5)
        await asyncio.wait_for(export.gone.wait(), 5)
        assert await asyncio.to_thread(front.connection.ended)
    assert target.deleted() == ["v"] and not Path(path).exists()
    assert target.disk.data[:4096] == b"w" * 4096


async def test_soft_ends_when_the_front_end_leaves_meanwhile(target: Live) -> None:
    """It hung for good, and every later change with it."""
    await target.export("v", "vhost-user-blk")
    front = await asyncio.to_thread(FrontEnd.connect, str(target.directory / "v"))
    target.disk.hold()
    write = asyncio.create_task(asyncio.to_thread(front.write, 0, b"w" * 4096))
    await target.disk.has(1)
    removal = asyncio.create_task(target.service.remove_export("v", "soft"))
    await asyncio.sleep(0.1)
    front.connection.socket.shutdown(socket.SHUT_RDWR)
    await asyncio.sleep(0.1)
    assert not removal.done()
    target.disk.let_go()
    await asyncio.wait_for(removal, 5)
    await asyncio.wait([write])
    front.close()
    assert target.deleted() == ["v"] and target.disk.data[:4096] == b"w" * 4096
    await asyncio.wait_for(target.export(), 5)


async def test_a_hidden_vhost_user_export_serves_its_front_end(target: Live) -> None:
    export = await target.export("v", "vhost-user-blk")
    path = str(target.directory / "v")
    with await asyncio.to_thread(FrontEnd.connect, path) as front:
        await target.service.remove_export("v", "hide")
        await soon(lambda: not Path(path).exists())
        await asyncio.to_thread(front.write, 0, b"w" * 512)
        assert target.deleted() == []
    await asyncio.wait_for(export.gone.wait(), 5)
    assert target.deleted() == ["v"] and target.disk.data[:512] == b"w" * 512


async def test_a_vhost_user_export_is_made_anew_at_its_path(target: Live) -> None:
    """In one change; undone, the old one listens there, with its front end."""
    await target.export("v", "vhost-user-blk")
    path = target.directory / "v"
    given = {"type": "vhost-user-blk", "id": "v", "node-name": "disk", "num-queues": 2}
    given["addr"] = {"type": "unix", "path": str(path)}
    with await asyncio.to_thread(FrontEnd.connect, str(path)) as front:
        with pytest.raises(BlockError, match="on purpose"):
            async with target.service.graph.change() as change:
                await target.service.remove_export_in(change, "v", "soft")
                await target.service.add_export_in(change, *parse_export(given, Notation.JSON))
                raise BlockError("on purpose")
        assert await asyncio.to_thread(front.read, 0, 512) == bytes(512)
        async with target.service.graph.change() as change:
            await target.service.remove_export_in(change, "v", "soft")
            await target.service.add_export_in(change, *parse_export(given, Notation.JSON))
        assert change.failures == [] and await asyncio.to_thread(front.connection.ended)
    fresh = await asyncio.to_thread(functools.partial(FrontEnd.connect, str(path), queues=2))
    fresh.close()
    assert sorted(found.name for found in target.directory.iterdir()) == ["nbd", "v"]


async def test_exports_come_and_go_and_leave_nothing(target: Live) -> None:
    """Hundreds of them, of both types, with clients in every state, while one client works."""
    service = target.service
    await target.export("keep")
    worker = Bystander(await target.client(), 512 << 10)
    modes: tuple[RemoveMode, ...] = ("hard", "soft", "hide", "safe")
    for i in range(200):
        if i == 20:
            before = descriptors(os.getpid()), len(service.datapath._objects), len(service.datapath._futures)
        mode = modes[i % 4]
        await target.export("n", name="n", iothread=["io0", "io1"])
        await target.export("v", "vhost-user-blk")
        client = await target.client("n")
        reads = [asyncio.create_task(client.read(0, 4096)) for _ in range(4)]
        if mode in ("hide", "safe"):
            await asyncio.gather(*reads)
            await client.close()
            await soon(lambda: not service.exports["n"].clients())
        await service.remove_export("n", mode)
        await service.remove_export("v", mode)
        await soon(lambda: not service.leaving)
        await asyncio.gather(*reads, return_exceptions=True)
        if mode not in ("hide", "safe"):
            await client.abort()
    await worker.goes_on()
    await worker.stop()
    await soon(lambda: len(service.datapath._objects) <= before[1])
    assert descriptors(os.getpid()) <= before[0] and len(service.datapath._futures) <= before[2]
    await soon(lambda: not service.datapath._sessions)
    assert sorted(target.deleted()) == ["n"] * 200 + ["v"] * 200


async def test_libnbd_sees_an_orderly_end(target: Live) -> None:
    """A busy client of another make gets answers or ESHUTDOWN for all that it asked, then the end."""
    await target.export()
    script = f"""
import errno, nbd
h = nbd.NBD()
h.set_export_name("disk")
h.connect_unix({target.address!r})
done, refused = 0, 0
print("ready", flush=True)
buffer = nbd.Buffer.from_bytearray(bytearray(4096))
while True:
    try:
        cookies = [h.aio_pwrite(buffer, 4096 * i) for i in range(32)]
    except nbd.Error:
        break
    for cookie in cookies:
        try:
            while not h.aio_command_completed(cookie):
                h.poll(-1)
            done += 1
        except nbd.Error as error:
            assert error.errnum == errno.ESHUTDOWN or h.aio_is_dead() or h.aio_is_closed(), error
            refused += error.errnum == errno.ESHUTDOWN
print(done, refused)
"""
    process = await asyncio.create_subprocess_exec(
        SYSTEM_PYTHON, "-c", script, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"ready\n"
    await asyncio.sleep(0.3)
    async with asyncio.timeout(15):
        await target.service.remove_export("e", "soft")
        rest = (await process.stdout.read()).decode()
    assert await process.wait() == 0, rest
    done, _ = map(int, rest.split())
    assert done > 100
