# SPDX-License-Identifier: Apache-2.0
"""Resizing qcow2 images while they are used, against a model and qemu-img."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from target.graph.errors import BlockError
from target.graph.graph import Graph
from target.graph.node import Node
from tests.support.qcow2 import Workload, content, qcow2_options, running_graph
from tests.support.tools import qemu_img, qemu_io

KIB, MIB = 1 << 10, 1 << 20


@pytest_asyncio.fixture
async def graph() -> AsyncIterator[Graph]:
    async with running_graph(threads=2) as made:
        yield made


def create(path: Path, size: int, options: str = "", *backing: str | Path) -> Path:
    words = ["-o", options] if options else []
    qemu_img("create", "-q", "-f", "qcow2", *words, *backing, path, str(size))
    return path


def check(path: Path) -> None:
    done = qemu_img("check", "-f", "qcow2", path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def flat(path: Path) -> bytes:
    out = path.with_suffix(".flat")
    qemu_img("convert", "-f", "qcow2", "-O", "raw", path, out)
    data = out.read_bytes()
    out.unlink()
    return data


async def settle(graph: Graph, path: Path, model: bytes) -> None:
    """What is read, before and after closing, is the model; the closed image is clean."""
    node = graph.get("disk")
    assert node.size == len(model)
    assert await content(node) == model
    await graph.remove("disk")
    check(path)
    assert flat(path) == model


@pytest.mark.parametrize(
    "options", ["cluster_size=512", "cluster_size=4k,compat=0.10", "cluster_size=64k", ""]
)
@pytest.mark.parametrize("start", [0, 512, 100 * KIB, MIB])
async def test_growing_step_by_step(graph: Graph, scratch: Path, options: str, start: int) -> None:
    path = create(scratch / "d.qcow2", start, options)
    node = await graph.add(qcow2_options(path))
    model = bytearray(start)
    source = random.Random(start)
    for size in (start + 512, 3 * MIB + 1536, 3 * MIB + 2048, 9 * MIB):
        await graph.resize(node, size)
        model.extend(bytes(size - len(model)))
        for offset in (source.randrange(0, size // 512) * 512, size - 512):
            await node.write(offset, b"\xa5" * 512)
            model[offset : offset + 512] = b"\xa5" * 512
    await settle(graph, path, bytes(model))


async def test_growing_moves_the_l1_table(graph: Graph, scratch: Path) -> None:
    """With clusters of 512 bytes 2 MiB need one cluster of L1; 100 GiB more than a refcount block counts."""
    path = create(scratch / "d.qcow2", MIB, "cluster_size=512")
    node = await graph.add(qcow2_options(path))
    await node.write(0, b"a" * MIB)
    for size in (3 * MIB, 1 << 30, 100 << 30):
        await graph.resize(node, size)
        await node.write(size - 1024, b"b" * 1024)
    await node.write(50 << 30, b"c" * 512)
    assert await node.read(0, MIB) == b"a" * MIB
    await graph.remove("disk")
    check(path)
    qemu_io(path, f"read -P 0x61 0 {MIB}", format="qcow2")
    for size in (3 * MIB, 1 << 30, 100 << 30):
        qemu_io(path, f"read -P 0x62 {size - 1024} 1k", format="qcow2")
    qemu_io(path, f"read -P 0x63 {50 << 30} 512", format="qcow2")


@pytest.mark.parametrize("start", [700 * KIB, 700 * KIB + 512, 704 * KIB, 0])
@pytest.mark.parametrize("written", [False, True])
async def test_a_longer_backing_file_stays_hidden(
    graph: Graph, scratch: Path, start: int, written: bool
) -> None:
    base = scratch / "base.raw"
    base.write_bytes(b"\xee" * (2 * MIB))
    path = create(scratch / "d.qcow2", start, "cluster_size=64k", "-b", base, "-F", "raw")
    node = await graph.add(qcow2_options(path))
    model = bytearray(b"\xee" * start)
    if written and start:
        await node.write(start - 512, b"w" * 512)
        model[start - 512 :] = b"w" * 512
    await graph.resize(node, 4 * MIB)
    model.extend(bytes(4 * MIB - start))
    await settle(graph, path, bytes(model))


async def test_version_2_cannot_hide_a_longer_backing_file(graph: Graph, scratch: Path) -> None:
    base = scratch / "base.raw"
    base.write_bytes(b"\xee" * (2 * MIB))
    path = create(scratch / "d.qcow2", MIB, "compat=0.10", "-b", base, "-F", "raw")
    before = path.read_bytes()
    node = await graph.add(qcow2_options(path))
    with pytest.raises(BlockError, match="Failed to zero out new clusters: Operation not supported"):
        await graph.resize(node, 2 * MIB)
    await settle(graph, path, b"\xee" * MIB)
    assert path.read_bytes() == before


async def test_a_tail_that_is_no_zeros(graph: Graph, scratch: Path) -> None:
    """Behind the end another program left data in the last cluster: of its own, shared, compressed."""
    for kind in ("own", "shared", "compressed"):
        path = scratch / f"{kind}.qcow2"
        full = scratch / "full.raw"
        full.write_bytes(b"t" * (128 * KIB))
        words = ["-c"] if kind == "compressed" else []
        qemu_img("convert", *words, "-f", "raw", "-O", "qcow2", full, path)
        if kind == "shared":
            qemu_img("snapshot", "-c", "s", path)
        with path.open("r+b") as file:  # the header's size: as qemu-img resize --shrink leaves it
            file.seek(24)
            file.write((100 * KIB).to_bytes(8, "big"))
        node = await graph.add(qcow2_options(path))
        await graph.resize(node, 200 * KIB)
        await settle(graph, path, b"t" * (100 * KIB) + bytes(100 * KIB))


async def test_shrinking_frees_and_growing_again_shows_zeros(graph: Graph, scratch: Path) -> None:
    path = create(scratch / "d.qcow2", 40 * MIB, "cluster_size=4k")
    node = await graph.add(qcow2_options(path))
    model = bytearray(random.Random(1).randbytes(40 * MIB))
    await node.write(0, bytes(model))
    await node.flush()
    length = path.stat().st_size
    for size in (20 * MIB + 1536, 5 * MIB, 512, 0):
        await graph.resize(node, size)
        del model[size:]
        assert path.stat().st_size < length
        length = path.stat().st_size
        assert await content(node) == model
    assert length < MIB
    await graph.resize(node, 10 * MIB)
    model.extend(bytes(10 * MIB))
    await node.write(9 * MIB, b"x" * 512)
    model[9 * MIB : 9 * MIB + 512] = b"x" * 512
    await settle(graph, path, bytes(model))


async def test_snapshots_keep_their_size_and_content(graph: Graph, scratch: Path) -> None:
    path = create(scratch / "d.qcow2", 4 * MIB, "cluster_size=4k")
    qemu_io(path, "write -P 1 0 4M", format="qcow2")
    qemu_img("snapshot", "-c", "one", path)
    qemu_io(path, "write -P 2 1M 1M", format="qcow2")
    node = await graph.add(qcow2_options(path))
    await graph.resize(node, 1536 * KIB)
    await graph.resize(node, 6 * MIB)
    await node.write(3 * MIB, b"\3" * 4096)
    model = b"\1" * MIB + b"\2" * (512 * KIB) + bytes(1536 * KIB) + b"\3" * 4096
    await settle(graph, path, model.ljust(6 * MIB, b"\0"))
    qemu_img("snapshot", "-a", "one", path)
    check(path)
    assert flat(path) == b"\1" * (4 * MIB)


Size = Callable[[random.Random], int]
SIZES: dict[str, Size] = {
    "grow": lambda source: source.randrange(1, 200) * 512,
    "both": lambda source: source.randrange(-200, 260) * 512,
}


@pytest.mark.parametrize("kind", ["plain", "chain", "one-slice", "snapshot"])
async def test_resizing_under_load(graph: Graph, scratch: Path, kind: str) -> None:
    """Clients keep to the size that they were told, as exports see to."""
    base = scratch / "base.raw"
    base.write_bytes(random.Random(2).randbytes(3 * MIB))
    words: list[str | Path] = ["-b", base, "-F", "raw"] if kind == "chain" else []
    path = create(scratch / "d.qcow2", MIB, "cluster_size=4k", *words)
    model = bytearray(base.read_bytes()[:MIB] if kind == "chain" else bytes(MIB))
    if kind == "snapshot":
        qemu_io(path, "write -P 9 0 1M", format="qcow2")
        qemu_img("snapshot", "-c", "s", path)
        model[:] = b"\x09" * MIB
    cache: dict[str, Any] = {"l2_cache_size": 512, "l2_cache_entry_size": 512} if kind == "one-slice" else {}
    node = await graph.add(qcow2_options(path, **cache))
    await under_load(graph, node, model, seed=3)
    await settle(graph, path, bytes(model))


async def under_load(graph: Graph, node: Node, model: bytearray, seed: int) -> None:
    source = random.Random(seed)
    for round in range(12):
        kept = len(model) if round % 3 else len(model) * 2 // 3 // 512 * 512
        front = bytearray(model[:kept])  # a shrink takes the rest, which nobody uses any more
        size = kept if not round % 3 else kept + source.randrange(1, 600) * 512
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(Workload(node, front, seed * 100 + round).run(120, in_flight=8))
            await asyncio.sleep(source.random() * 0.02)
            await graph.resize(node, size)
        model[:] = front + bytes(size - kept)
        await Workload(node, model, seed * 100 + round + 50).run(60, in_flight=8)


async def test_what_cannot_be(graph: Graph, scratch: Path) -> None:
    path = create(scratch / "d.qcow2", MIB, "cluster_size=512")
    node = await graph.add(qcow2_options(path))
    before = path.read_bytes()
    for size, message in (
        (MIB + 1, "The new size must be a multiple of 512"),
        (300 << 30, "Failed to grow the L1 table: File too large"),
        (1 << 63, "Failed to grow the L1 table: File too large"),
    ):
        with pytest.raises(BlockError, match=f"^node 'disk': {message}$"):
            await graph.resize(node, size)
    await graph.remove("disk")
    node = await graph.add(qcow2_options(path, read_only=True))
    with pytest.raises(BlockError, match=r"^node 'disk': Image is read-only$"):
        await graph.resize(node, 2 * MIB)
    await graph.remove("disk")
    old = create(scratch / "old.qcow2", MIB, "compat=0.10")
    qemu_img("snapshot", "-c", "s", old)
    node = await graph.add(qcow2_options(old))
    with pytest.raises(BlockError, match=r"^node 'disk': Can't resize a v2 image which has snapshots$"):
        await graph.resize(node, 2 * MIB)
    assert path.read_bytes() == before


# ---- undone ----


class Stop(Exception):
    """Ends a change from outside."""


async def undone(graph: Graph, *sizes: int) -> None:
    with pytest.raises(Stop):
        async with graph.change() as change:
            for size in sizes:
                await change.resize(graph.get("disk"), size)
                assert graph.get("disk").size == size
            raise Stop


@pytest.mark.parametrize("start", [MIB, MIB + 512])
@pytest.mark.parametrize("kind", ["cluster_size=64k", "cluster_size=512", "chain", "snapshot"])
async def test_undoing_leaves_the_file_as_it_was(graph: Graph, scratch: Path, kind: str, start: int) -> None:
    base = scratch / "base.raw"
    base.write_bytes(b"\xee" * (5 * MIB))
    words: list[str | Path] = ["-b", base, "-F", "raw"] if kind == "chain" else []
    path = create(scratch / "d.qcow2", start, kind if "=" in kind else "cluster_size=4k", *words)
    qemu_io(path, f"write -P 7 {start // 512 * 512 - 512} 512", "write -P 8 10k 1k", format="qcow2")
    if kind == "snapshot":
        qemu_img("snapshot", "-c", "s", path)
    before, model = path.read_bytes(), flat(path)
    node = await graph.add(qcow2_options(path))
    await undone(graph, 9 * MIB)
    await undone(graph, start - 1024)
    await undone(graph, 9 * MIB, 20 * MIB, 512)
    with pytest.raises(BlockError, match="cannot be resized again in the change that makes it smaller"):
        await undone(graph, 512, 3 * MIB)
    assert node.size == start
    assert await content(node) == model
    assert path.read_bytes() == before
    await graph.resize(node, start + 512)
    assert await content(node) == model + bytes(512)
    await settle(graph, path, model + bytes(512))


async def test_undoing_under_load(graph: Graph, scratch: Path) -> None:
    base = scratch / "base.raw"
    base.write_bytes(b"\xee" * (2 * MIB))
    path = create(scratch / "d.qcow2", MIB + 512, "cluster_size=512", "-b", base, "-F", "raw")
    node = await graph.add(qcow2_options(path))
    model = bytearray(b"\xee" * (MIB + 512))
    source = random.Random(6)
    for round in range(10):
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(Workload(node, model, round).run(150, in_flight=8))
            await asyncio.sleep(source.random() * 0.02)
            await undone(graph, source.choice((3 * MIB, 1 << 30)), 5 * MIB)
    await settle(graph, path, bytes(model))
