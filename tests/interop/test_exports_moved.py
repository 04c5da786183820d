# SPDX-License-Identifier: Apache-2.0
"""An export's I/O threads changed, and its node resized, while clients work: they notice nothing."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
import struct
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from target.exports.vhost_user_blk import messages
from target.graph.errors import BlockError
from target.peers.nbd_client import NbdClient
from target.peers.vhost_user_front_end import IOERR, OUT, FrontEnd
from target.service import Service
from tests.support.held import Live, live
from tests.support.tools import qemu_img

MIB = 1 << 20
PLACES: list[str | list[str] | None] = ["io0", "io1", None, ["io0", "io1"], ["io1", "io0"]]
SYSTEM_PYTHON = "/usr/bin/python3"  # which has libnbd's binding


@pytest_asyncio.fixture
async def target(scratch: Path) -> AsyncIterator[Live]:
    async with live(scratch, 8 * MIB) as made:
        yield made


async def moving(service: Service, node: str, pause: float) -> None:
    for place in PLACES * 1000:
        await service.set_iothread(node, place, force=True)
        await asyncio.sleep(pause)


@contextlib.asynccontextmanager
async def moved(service: Service, node: str = "disk", pause: float = 0.005) -> AsyncIterator[None]:
    """While the body runs the node's exports change threads all the time."""
    task = asyncio.create_task(moving(service, node, pause))
    try:
        yield
    finally:
        assert not task.done(), task.exception()
        task.cancel()
        await asyncio.wait([task])


async def exercise(client: NbdClient, base: int, seconds: float, seed: int) -> int:
    """Random reads and writes of all sizes, several at a time, against what it knows; how many."""
    rng = random.Random(seed)
    known = bytearray(await client.read(base, MIB))
    end = asyncio.get_running_loop().time() + seconds
    count = 0
    part = MIB // 8  # each in its own part: they are done in any order

    async def one(i: int) -> None:
        length = rng.choice([512, 4096, 20_000, part])
        offset = i * part + rng.randrange(part - length + 1)
        if rng.random() < 0.5:
            data = rng.randbytes(length)
            known[offset : offset + length] = data
            await client.write(base + offset, data)
        assert await client.read(base + offset, length) == known[offset : offset + length]

    while asyncio.get_running_loop().time() < end:
        await asyncio.gather(*(one(i) for i in range(8)))
        count += 8
    assert await client.read(base, MIB) == known
    return count


@pytest.mark.parametrize("structured", [True, False])
async def test_nbd_sessions_move(scratch: Path, structured: bool) -> None:
    """Over a native node, so that requests are at all stages; large simple reads are in pieces."""
    async with live(scratch) as target:
        image = scratch / "image"
        image.write_bytes(bytes(8 * MIB))
        file = {"driver": "file", "filename": str(image), "node-name": "f"}
        await target.service.graph.add({"driver": "raw", "node-name": "r", "file": file})
        await target.export(node_name="r", name="disk")
        clients = [await target.client(structured=structured) for _ in range(4)]
        large = [asyncio.create_task(clients[0].read(4 * MIB, 3 * MIB)) for _ in range(4)]
        async with moved(target.service, "r", 0.002):
            counts = await asyncio.gather(*(exercise(c, i * MIB, 2, i) for i, c in enumerate(clients)))
            assert all(data == bytes(3 * MIB) for data in await asyncio.gather(*large))
        assert min(counts) > 50
        for client in clients:
            await client.close()


async def test_a_client_that_stops_in_the_middle_of_a_request_moves_too(target: Live) -> None:
    await target.export()
    client = await target.client()
    request = struct.pack(">IHHQQI", 0x25609513, 0, 1, 1 << 40, 4096, 8192)
    message = request + b"w" * 8192
    before = 0
    for at in (7, 28, 1000, 5000, len(message)):
        await client.raw.send(message[before:at])
        before = at
        await asyncio.sleep(0.02)
        for place in PLACES:
            await target.service.set_iothread("disk", place, force=True)
    async with asyncio.timeout(5):
        while target.disk.data[4096:12288] != b"w" * 8192:
            await asyncio.sleep(0.01)
    await client.abort()


async def test_a_move_is_refused_when_requests_take_too_long(
    target: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("target.exports.placing.MOVE_SECONDS", 0.2)
    nbd = await target.export("a")
    vhost = await target.export("b", "vhost-user-blk")
    client = await target.client()
    with await asyncio.to_thread(FrontEnd.connect, str(target.directory / "b")) as front:
        target.disk.hold()
        write = asyncio.create_task(client.write(0, b"w" * 4096))
        other = asyncio.create_task(asyncio.to_thread(front.write, 16, b"v" * 4096))
        await target.disk.has(2)
        with pytest.raises(BlockError, match=r"export 'a': requests are still under way after 0\.2 s"):
            await target.service.set_iothread("disk", "io0", force=True)
        target.disk.let_go()
        await asyncio.wait_for(write, 5)
        await asyncio.wait_for(other, 5)
        target.disk.hold()
        other = asyncio.create_task(asyncio.to_thread(front.write, 32, b"v" * 4096))
        await target.disk.has(1)
        with pytest.raises(BlockError, match=r"export 'b': requests are still under way after 0\.2 s"):
            await target.service.set_iothread("disk", "io0", force=True)
        assert nbd.threads == vhost.threads == [0]
        target.disk.let_go()
        await asyncio.wait_for(other, 5)
        await client.write(0, b"x" * 4096)
        await asyncio.to_thread(front.write, 48, b"v" * 4096)
    await client.close()


async def test_what_cannot_be_moved_says_so(target: Live) -> None:
    service = target.service
    with pytest.raises(BlockError, match=r"^Failed to find node with node-name='no'$"):
        await service.set_iothread("no", "io0")
    with pytest.raises(BlockError, match=r"^Cannot find iothread no$"):
        await service.set_iothread("disk", "no")
    await service.set_iothread("disk", "io1")
    export = await target.export()
    assert export.options.iothreads() == ["io1"] and export.threads == [2]
    with pytest.raises(
        BlockError,
        match=r"^Node disk is associated with a BlockBackend and could be in use"
        r" \(use force=true to override this check\)$",
    ):
        await service.set_iothread("disk", "io0")
    await service.set_iothread("disk", None, force=True)
    assert export.options.iothreads() == [] and export.threads == [0]
    await target.export("fixed", name="fixed", iothread="io1", fixed_iothread=True)
    with pytest.raises(BlockError, match=r"^Cannot change iothread of active block backend$"):
        await service.set_iothread("disk", "io0", force=True)
    with pytest.raises(BlockError, match="Export type does not support inactive exports"):
        await target.export("v", "vhost-user-blk", allow_inactive=True)
    with pytest.raises(BlockError, match="Cannot use fixed-iothread for a multi-threaded export"):
        await target.export("many", name="many", iothread=["io0", "io1"], fixed_iothread=True)
    assert export.threads == [0]


async def test_virtqueues_move(target: Live) -> None:
    """A front end with two queues writes and reads back while they move."""
    await target.export("v", "vhost-user-blk", num_queues=2)
    with await asyncio.to_thread(front_end, str(target.directory / "v"), 2) as front:
        async with moved(target.service, pause=0.002):
            count = await asyncio.to_thread(work, front, 2.0)
    assert count > 100


def front_end(path: str, queues: int) -> FrontEnd:
    return FrontEnd.connect(path, queues=queues)


def work(front: FrontEnd, seconds: float) -> int:
    rng, count, end = random.Random(1), 0, time.monotonic() + seconds
    while time.monotonic() < end:
        queue, sector = count % 2, rng.randrange(1000)
        data = rng.randbytes(rng.choice([512, 4096, 32768]))
        front.write(sector, data, queue)
        assert front.read(sector, len(data), 1 - queue) == data
        count += 1
    return count


async def test_nbd_clients_that_are_attached_use_what_a_node_grows_by(target: Live) -> None:
    """As QEMU does not: it refuses to resize what NBD exports."""
    await target.export()
    old = await target.client()
    with pytest.raises(OSError) as refused:
        await old.write(8 * MIB, b"w" * 512)
    assert refused.value.errno == errno.ENOSPC
    await target.service.graph.resize(target.disk, 16 * MIB)
    await old.write(15 * MIB, b"w" * MIB)
    assert await old.read(15 * MIB, MIB) == b"w" * MIB
    new = await target.client()
    assert (old.export.size, new.export.size) == (8 * MIB, 16 * MIB)
    await target.service.graph.resize(target.disk, 4 * MIB)
    for client in (old, new):
        with pytest.raises(OSError) as refused:
            await client.read(4 * MIB - 512, 1024)
        assert refused.value.errno == errno.EINVAL
        with pytest.raises(OSError) as refused:
            await client.write_zeroes(3 * MIB, 2 * MIB)
        assert refused.value.errno == errno.ENOSPC
        assert await client.read(4 * MIB - 512, 512) == bytes(512)
        await client.close()
    assert len(target.disk.data) == 4 * MIB


async def test_only_our_own_resize_is_let_through(target: Live, scratch: Path) -> None:
    """The export keeps other programs, and drivers here, from resizing its image, as QEMU's does."""
    image = scratch / "image"
    image.write_bytes(bytes(MIB))
    file = {"driver": "file", "filename": str(image), "node-name": "f"}
    node = await target.service.graph.add({"driver": "raw", "node-name": "r", "file": file})
    await target.export(node_name="r", name="r", writable=False)
    client = await target.client("r")
    for size in (3 * MIB, 2 * MIB):
        await target.service.graph.resize(node, size)
        assert await client.read(size - 512, 512) == bytes(512) and image.stat().st_size == size
        grown = await asyncio.to_thread(qemu_img, "resize", "-f", "raw", "--shrink", image, "4M", check=False)
        assert grown.returncode != 0 and '"resize" lock' in grown.stderr
    with pytest.raises(BlockError, match="permissions 'resize' are both required"):
        await target.service.graph.add({"driver": "qcow2", "node-name": "q", "file": "f"})
    await client.close()


async def test_requests_held_while_a_node_shrinks_fail(target: Live) -> None:
    """They passed the check of the old size; nothing is written behind the new end."""
    await target.export("a")
    export = await target.export("b", "vhost-user-blk")
    client = await target.client()
    with await asyncio.to_thread(FrontEnd.connect, str(target.directory / "b")) as front:
        await export.edge.hold()
        late = asyncio.create_task(asyncio.to_thread(front.request, OUT, 8192, b"w" * 512))
        await target.service.exports["a"].edge.hold()
        write = asyncio.create_task(client.write(4 * MIB, b"w" * 512))
        early = asyncio.create_task(client.write(MIB, b"w" * 512))
        await asyncio.sleep(0.1)
        await target.service.graph.resize(target.disk, 2 * MIB)
        export.edge.let_go()
        target.service.exports["a"].edge.let_go()
        with pytest.raises(OSError) as refused:
            await asyncio.wait_for(write, 5)
        assert refused.value.errno == errno.ENOSPC
        await asyncio.wait_for(early, 5)
        status, *_ = await asyncio.wait_for(late, 5)
        assert status == IOERR
    assert len(target.disk.data) == 2 * MIB
    await client.close()


async def test_a_front_end_hears_of_each_new_size(target: Live) -> None:
    await target.export("v", "vhost-user-blk")
    with await asyncio.to_thread(FrontEnd.connect, str(target.directory / "v")) as front:
        channel = await asyncio.to_thread(front.open_channel)
        with channel:
            for size in (16 * MIB, 4 * MIB, 8 * MIB):
                await target.service.graph.resize(target.disk, size)
                channel.settimeout(5)
                message = await asyncio.to_thread(channel.recv, 4096)
                assert message == messages.config_changed()
                config = await asyncio.to_thread(front.get_config)
                assert struct.unpack_from("<Q", config)[0] * 512 == size
                await asyncio.to_thread(front.write, size // 512 - 8, b"w" * 4096)
                status, *_ = await asyncio.to_thread(front.request, OUT, size // 512 - 7, b"w" * 4096)
                assert status == IOERR


async def test_libnbd_works_over_moving_threads(target: Live) -> None:
    await target.export()
    script = f"""
import nbd, random, time
h = nbd.NBD()
h.set_export_name("disk")
h.connect_unix({target.address!r})
rng, count, end = random.Random(2), 0, time.time() + 2
known = bytearray(h.get_size())
while time.time() < end:
    writes = []
    for i in range(16):
        data = rng.randbytes(rng.choice([512, 4096, 65536]))
        at = i * 131072 + rng.randrange(131072 - len(data) + 1)
        known[at : at + len(data)] = data
        writes.append(h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), at))
    for cookie in writes:
        while not h.aio_command_completed(cookie):
            h.poll(-1)
    count += 16
    assert h.pread(131072, 131072) == known[131072:262144]
assert h.pread(2 << 20, 0) == known[: 2 << 20]
h.shutdown()
print(count)
"""
    process = await asyncio.create_subprocess_exec(
        SYSTEM_PYTHON, "-c", script, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    async with moved(target.service), asyncio.timeout(20):
        out, _ = await process.communicate()
    assert process.returncode == 0 and int(out) > 100, out.decode()


async def test_a_change_that_holds_the_requests_of_an_export_moves_it_when_they_go_on(target: Live) -> None:
    export = await target.export("a")
    client = await target.client()
    work = asyncio.create_task(exercise(client, 0, 1.5, 4))
    graph, places = target.service.graph, {"io0": 1, "io1": 2}
    while not work.done():
        for place, thread in places.items():
            async with asyncio.timeout(10), graph.change() as change:
                await change.drain(target.disk)
                await asyncio.sleep(0.01)  # requests come meanwhile, and are held
                await target.service.set_export_iothread_in(change, "a", place)
            change.raise_failure()
            assert export.threads == [thread] and export.options.iothreads() == [place]
            await asyncio.sleep(0.01)
    assert await work > 0
    await client.close()


async def test_a_move_that_waits_for_the_end_of_a_change_goes_with_it(target: Live) -> None:
    export = await target.export("a")
    with pytest.raises(BlockError, match="undone"):
        async with target.service.graph.change() as change:
            await change.drain(target.disk)
            await target.service.set_export_iothread_in(change, "a", "io1")
            raise BlockError("undone")
    assert not change.failures
    assert export.threads == [0] and export.options.iothreads() == []
