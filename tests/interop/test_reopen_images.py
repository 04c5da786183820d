# SPDX-License-Identifier: Apache-2.0
"""Nodes of files and qcow2 images get other options, and other children, while clients use them."""

from __future__ import annotations

import asyncio
import fcntl
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from target.datapath import Extent
from target.drivers.locking import ImageLock
from target.graph.edge import RootEdge
from target.graph.errors import BlockError
from target.graph.graph import Graph
from target.graph.node import Node
from target.graph.permissions import Perm
from tests.support.qcow2 import Workload, content, qcow2_options, running_graph
from tests.support.tools import qemu_img, qemu_io

KIB, MIB = 1 << 10, 1 << 20
READ, WRITE = Perm.CONSISTENT_READ, Perm.CONSISTENT_READ | Perm.WRITE


@pytest_asyncio.fixture
async def graph() -> AsyncIterator[Graph]:
    async with running_graph(threads=2) as made:
        yield made


class Client:
    """What an export does: its requests enter through a gate, which a change holds."""

    def __init__(self, edge: RootEdge) -> None:
        self.edge = edge

    @classmethod
    async def of(cls, graph: Graph, perm: Perm = WRITE, name: str = "disk") -> Client:
        return cls(await graph.attach_root("a client", graph.get(name), perm, Perm.ALL))

    async def leave(self, graph: Graph) -> None:
        await self.edge.gate.drain()
        await graph.detach_root(self.edge)

    async def read(self, offset: int, length: int) -> bytes:
        return await self.edge.gate.read(offset, length)

    async def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        await self.edge.gate.write(offset, data, flags)

    async def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        await self.edge.gate.zeroes(offset, length, flags)

    async def discard(self, offset: int, length: int) -> None:
        await self.edge.gate.discard(offset, length)

    async def flush(self) -> None:
        await self.edge.gate.flush()

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        return await self.edge.gate.status(offset, length)


async def reopen(graph: Graph, *options: dict[str, Any]) -> None:
    async with graph.change() as change:
        await change.reopen([graph.ref(each, "") for each in options])
    change.raise_failure()


class Stop(Exception):
    """Ends a change from outside."""


async def undone(graph: Graph, *options: dict[str, Any]) -> None:
    with pytest.raises(Stop):
        async with graph.change() as change:
            await change.reopen([graph.ref(each, "") for each in options])
            raise Stop
    assert not change.failures


def create(path: Path, size: int = 4 * MIB, options: str = "cluster_size=4k", *backing: str | Path) -> Path:
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, *backing, path, str(size))
    return path


def check(path: Path, model: bytes | bytearray) -> None:
    done = qemu_img("check", "-f", "qcow2", path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    flat = path.with_suffix(".flat")
    qemu_img("convert", "-f", "qcow2", "-O", "raw", path, flat)
    assert flat.read_bytes() == model


async def while_working(
    user: Any, model: bytearray, change: Callable[[int], Awaitable[None]], times: int
) -> None:
    """Random requests all the time; ``change`` is called so often between."""
    for number in range(times):
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(Workload(user, model, number, 60_000).run(80, in_flight=8))
            await asyncio.sleep(0.003)
            await change(number)


# ---- qcow2 ----

QCOW2: list[dict[str, Any]] = [
    {"l2_cache_size": 64 * KIB, "refcount_cache_size": 8 * KIB},
    {"l2_cache_entry_size": 512, "l2_cache_size": 4 * KIB},
    {"overlap_check": "none", "lazy_refcounts": True},
    {"pass_discard_request": True, "discard": "ignore", "detect_zeroes": "on"},
    {"pass_discard_other": True, "pass_discard_snapshot": True, "cache": {"no-flush": True}},
    {"cache": {"direct": True}},
    {},
]


async def test_options_change_under_load(graph: Graph, scratch: Path) -> None:
    path = create(scratch / "d.qcow2")
    node = await graph.add(qcow2_options(path))
    client, model = await Client.of(graph), bytearray(4 * MIB)

    async def change(number: int) -> None:
        await reopen(graph, qcow2_options(path, **QCOW2[number % len(QCOW2)]))

    await while_working(client, model, change, 2 * len(QCOW2))
    assert node.settings.detect_zeroes == "off" and node.settings.direct is False
    await client.leave(graph)
    await graph.remove("disk")
    check(path, model)


async def test_what_options_do_after_a_reopen(graph: Graph, scratch: Path) -> None:
    path = create(scratch / "d.qcow2")
    node: Any = await graph.add(qcow2_options(path))
    await node.write(0, b"x" * (2 * MIB))
    await node.flush()
    assert node.serving.loader.slice_bits == 9
    await reopen(graph, qcow2_options(path, l2_cache_entry_size=512, l2_cache_size=512, overlap_check="none"))
    assert node.serving.loader.slice_bits == 6 and node.image.allocator.check_overlap is False
    assert await content(node) == b"x" * (2 * MIB) + bytes(2 * MIB)
    await asyncio.sleep(0.02)
    assert node.serving.map.bytes < 4 * KIB
    await node.write(0, bytes(4096))
    await reopen(graph, qcow2_options(path, detect_zeroes="unmap", pass_discard_request=True))
    before = path.stat().st_blocks
    await node.write(0, bytes(MIB))
    await node.flush()
    await asyncio.sleep(0.1)
    assert path.stat().st_blocks < before - MIB // 512 // 2
    await graph.remove("disk")
    check(path, bytes(MIB) + b"x" * MIB + bytes(2 * MIB))


async def test_read_only_and_back_while_read(graph: Graph, scratch: Path) -> None:
    path = create(scratch / "d.qcow2")
    node = await graph.add(qcow2_options(path))
    reader, model = await Client.of(graph, READ), bytearray(4 * MIB)
    source = random.Random(4)
    stopped = False

    async def read() -> None:
        while not stopped:
            offset = source.randrange(0, 4 * MIB // 512) * 512
            assert await reader.read(offset, 512) == model[offset : offset + 512]

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(read())
        for number in range(12):
            client = await Client.of(graph)
            with pytest.raises(BlockError, match="cannot support read-write users"):
                await reopen(graph, qcow2_options(path, read_only=True))
            half = 2 * MIB * (number % 2)
            await client.write(half, bytes([number + 1]) * 4096)
            model[half : half + 4096] = bytes([number + 1]) * 4096
            await client.leave(graph)
            await reopen(graph, qcow2_options(path, read_only=True))
            assert node.read_only and node.children["file"].node.read_only
            check(path, model)  # by another process, which may read it now
            with pytest.raises(BlockError, match="Block node is read-only"):
                await Client.of(graph)
            await reopen(graph, qcow2_options(path))
        stopped = True
    await reader.leave(graph)
    await graph.remove("disk")
    check(path, model)


async def test_a_reopen_that_is_undone_leaves_the_file_alone(graph: Graph, scratch: Path) -> None:
    path = create(scratch / "d.qcow2")
    qemu_io(path, "write -P 3 0 1M", format="qcow2")
    with path.open("r+b") as file:
        file.seek(88)
        file.write((1 << 40).to_bytes(8, "big"))  # autoclear features: cleared by who writes
    before = path.read_bytes()
    node: Any = await graph.add(qcow2_options(path, read_only=True))
    await undone(graph, qcow2_options(path))
    await undone(graph, qcow2_options(path, l2_cache_entry_size=512))
    assert node.read_only and node.serving.space is None and path.read_bytes() == before
    await reopen(graph, qcow2_options(path))
    assert path.read_bytes()[88:96] == bytes(8)
    after = path.read_bytes()
    for options in QCOW2:
        await undone(graph, qcow2_options(path, **options))
    await undone(graph, qcow2_options(path, read_only=True))
    await undone(graph, qcow2_options(path, read_only=True, l2_cache_entry_size=512))
    assert not node.read_only and path.read_bytes() == after
    await node.write(0, b"z" * 4096)
    await graph.remove("disk")
    check(path, b"z" * 4096 + b"\3" * (MIB - 4096) + bytes(3 * MIB))


async def test_an_image_that_cannot_be_written(graph: Graph, scratch: Path) -> None:
    path = create(scratch / "d.qcow2")
    qemu_img("bitmap", "--add", path, "b")
    node = await graph.add(qcow2_options(path, read_only=True))
    with pytest.raises(BlockError, match="node 'disk': the image has persistent bitmaps"):
        await reopen(graph, qcow2_options(path))
    assert node.read_only
    await reopen(graph, qcow2_options(path, auto_read_only=True))
    assert node.read_only and await content(node) == bytes(4 * MIB)


@pytest.mark.parametrize("version", ["cluster_size=4k", "cluster_size=4k,compat=0.10"])
async def test_other_backing_nodes(graph: Graph, scratch: Path, version: str) -> None:
    nodes = {}
    for name in ("a", "b"):
        (scratch / name).write_bytes(name.encode() * MIB)
        file = {"driver": "file", "filename": str(scratch / name)}
        nodes[name] = await graph.add({"driver": "raw", "node-name": name, "read-only": True, "file": file})
    path = create(scratch / "d.qcow2", 2 * MIB, version)
    await graph.add(qcow2_options(path, backing="a"))
    client = await Client.of(graph)
    await client.write(0, b"w" * 512)
    shown: dict[str | None, bytes] = {"a": b"a", "b": b"b", None: b"\0"}
    names: list[str | None] = ["b", None, "a", None, "b"]
    for shown_name in names:
        await reopen(graph, qcow2_options(path, backing=shown_name))
        assert await client.read(0, 513) == b"w" * 512 + b"a"
        assert await client.read(512 * KIB, MIB) == shown[shown_name] * (512 * KIB) + bytes(512 * KIB)
        await undone(graph, qcow2_options(path, backing="a" if shown_name != "a" else None))
        assert await client.read(4096, 4096) == shown[shown_name] * 4096
        await client.write_zeroes(64 * KIB, 64 * KIB)
        assert await client.read(64 * KIB, 64 * KIB) == bytes(64 * KIB)
        await client.discard(64 * KIB, 64 * KIB)
    await client.leave(graph)
    with pytest.raises(BlockError, match="backing is missing for 'disk'"):
        await reopen(graph, qcow2_options(path))


async def test_another_node_below(graph: Graph, scratch: Path) -> None:
    """Something is put between the image and its file, and taken out, under load."""
    path = create(scratch / "d.qcow2")
    file = {"driver": "file", "node-name": "file", "filename": str(path), "discard": "unmap"}
    await graph.add(file)
    await graph.add({"driver": "raw", "node-name": "between", "file": "file"})
    await graph.add(qcow2_options(path, file="file"))
    client, model = await Client.of(graph), bytearray(4 * MIB)

    async def change(number: int) -> None:
        await reopen(graph, qcow2_options(path, file=("between", "file")[number % 2]))

    await while_working(client, model, change, 8)
    await client.leave(graph)
    await graph.remove("disk")
    await graph.remove("between")
    await graph.remove("file")
    check(path, model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"l2_cache_size": MIB, "cache_size": 512 * KIB}, "l2-cache-size may not exceed cache-size"),
        ({"l2_cache_entry_size": 3000}, "L2 cache entry size must be a power of two between 512 and the"),
        ({"discard_no_unref": True}, "Cannot change the option 'discard-no-unref'"),
        ({"force_share": True}, "Cannot change the option 'force-share'"),
        ({"detect_zeroes": "unmap", "discard": "ignore"}, "setting detect-zeroes to unmap is not allowed"),
        ({"file": {"driver": "file", "filename": "/dev/null"}}, "Cannot change the option 'filename'"),
        ({"file": "not-there"}, "Cannot find device"),
    ],
)
async def test_what_cannot_change(graph: Graph, scratch: Path, options: dict[str, Any], message: str) -> None:
    path = create(scratch / "d.qcow2")
    await graph.add(qcow2_options(path))
    before = path.read_bytes()
    with pytest.raises(BlockError, match=message):
        await reopen(graph, qcow2_options(path, **options))
    assert path.read_bytes() == before


# ---- files ----

FILES: list[dict[str, Any]] = [
    {"cache": {"direct": True}, "aio": "native"},
    {"cache": {"direct": True}, "aio": "io_uring"},
    {"aio": "io_uring", "cache": {"no-flush": True}},
    {"aio": "threads", "locking": "off"},
    {"locking": "on", "detect-zeroes": "on"},
    {},
]


async def test_a_file_changes_under_load(graph: Graph, scratch: Path) -> None:
    path = scratch / "d.raw"
    path.write_bytes(bytes(4 * MIB))
    file = {"driver": "file", "node-name": "disk", "filename": str(path), "discard": "unmap"}
    node: Any = await graph.add(file)
    client, model = await Client.of(graph), bytearray(4 * MIB)

    async def change(number: int) -> None:
        new = file | FILES[number % len(FILES)]
        await undone(graph, file | FILES[(number + 1) % len(FILES)])
        await reopen(graph, new)
        direct = bool(fcntl.fcntl(node.fd, fcntl.F_GETFL) & os.O_DIRECT)
        assert direct == new.get("cache", {}).get("direct", False)
        assert (node.lock is None) == (new.get("locking") == "off")

    await while_working(client, model, change, 12)
    await client.leave(graph)
    assert len(os.listdir("/proc/self/fd")) < 64
    await graph.remove("disk")
    assert path.read_bytes() == model


async def test_a_file_that_was_renamed_is_still_the_one(graph: Graph, scratch: Path) -> None:
    path = scratch / "d.raw"
    path.write_bytes(b"1" * MIB)
    file = {"driver": "file", "node-name": "disk", "filename": str(path)}
    node: Node = await graph.add(file)
    path.rename(scratch / "other")
    path.write_bytes(b"2" * MIB)
    await reopen(graph, file | {"read-only": True})
    await reopen(graph, file)
    await node.write(0, b"3" * 512)
    await node.flush()
    assert (scratch / "other").read_bytes()[:1024] == b"3" * 512 + b"1" * 512


async def test_locks_are_never_let_go(graph: Graph, scratch: Path) -> None:
    path = scratch / "d.raw"
    path.write_bytes(bytes(MIB))
    file = {"driver": "file", "node-name": "disk", "filename": str(path)}
    await graph.add(file)
    client = await Client.of(graph)
    ended = False

    def intrude() -> int:
        """Another program that wants to write; it must never get what it wants."""
        tries = 0
        with path.open("r+b") as other:
            lock = ImageLock(other.fileno(), str(path))
            while not ended:
                with pytest.raises(BlockError, match='Failed to get "write" lock'):
                    lock.prepare(Perm.WRITE, Perm.ALL)
                tries += 1
        return tries

    intruder = asyncio.create_task(asyncio.to_thread(intrude))
    try:
        for number in range(60):
            direct = {"cache": {"direct": bool(number % 2)}}
            await (undone if number % 3 == 0 else reopen)(graph, file | direct)
    finally:
        ended = True
        assert await intruder > 100
    await client.leave(graph)


async def test_locking_that_is_turned_on_late_is_refused(graph: Graph, scratch: Path) -> None:
    path = scratch / "d.raw"
    path.write_bytes(bytes(MIB))
    file = {"driver": "file", "node-name": "disk", "filename": str(path)}
    node: Any = await graph.add(file | {"locking": "off"})

    def held() -> set[int] | None:
        return None if node.lock is None else set(node.lock.held)

    client = await Client.of(graph)
    with path.open("r+b") as other:
        lock = ImageLock(other.fileno(), str(path))
        lock.prepare(Perm.WRITE, Perm.CONSISTENT_READ)
        with pytest.raises(BlockError, match="Is another process using the image"):
            await reopen(graph, file)
        assert held() is None
    await reopen(graph, file)
    assert held()
    await client.leave(graph)


async def test_a_window_moves(graph: Graph, scratch: Path) -> None:
    path = scratch / "d.raw"
    path.write_bytes(b"a" * MIB + b"b" * MIB)
    raw = {"driver": "raw", "node-name": "disk", "file": {"driver": "file", "filename": str(path)}}
    node = await graph.add(raw)
    client = await Client.of(graph)
    for window, data in (
        ({"offset": MIB}, b"b" * MIB),
        ({"offset": MIB - 512, "size": 1024}, b"a" * 512 + b"b" * 512),
        ({}, b"a" * MIB + b"b" * MIB),
    ):
        await undone(graph, raw | {"size": 4096})
        await reopen(graph, raw | window)
        assert node.size == client.edge.gate.size == len(data)
        assert await client.read(0, len(data)) == data
    with pytest.raises(BlockError, match=r"The sum of offset \(0\) and size \(4194304\) has to be smaller"):
        await reopen(graph, raw | {"size": 4 * MIB})
    assert node.size == 2 * MIB
    await client.leave(graph)
