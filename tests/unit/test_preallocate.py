# SPDX-License-Identifier: Apache-2.0
"""preallocate in a graph: when it grows the file, what its users see, and that nothing is left over."""

from __future__ import annotations

import asyncio
import errno
import random
from pathlib import Path
from typing import Any

import pytest

from target.drivers.filter.preallocate import Preallocate
from target.graph.edge import RootEdge
from target.graph.errors import BlockError
from target.graph.graph import Graph
from target.graph.node import Node
from target.graph.permissions import Perm
from tests.support.tools import check_image, create_image, qemu_img, qemu_io

KIB, MIB = 1 << 10, 1 << 20
Options = dict[str, Any]
FORMAT = Perm.CONSISTENT_READ | Perm.WRITE | Perm.RESIZE


def file(path: Path) -> Options:
    path.touch()
    return {"driver": "file", "filename": str(path)}


async def preallocated(
    graph: Graph, scratch: Path, image: Options | None = None, **options: Any
) -> Preallocate:
    names = {name.replace("_", "-"): value for name, value in options.items()}
    base = {"driver": "preallocate", "node-name": "filter", "file": image or file(scratch / "image")}
    node = await graph.add(base | {"prealloc-size": 4 * MIB} | names)
    assert isinstance(node, Preallocate)
    return node


async def use(graph: Graph, node: Node, perm: Perm = FORMAT) -> RootEdge:
    return await graph.attach_root("a format", node, perm, Perm.ALL)


def on_disk(scratch: Path) -> int:
    return (scratch / "image").stat().st_size


async def test_the_file_grows_ahead_and_is_cut_at_the_end(graph: Graph, scratch: Path) -> None:
    node = await preallocated(graph, scratch)
    edge = await use(graph, node)
    assert on_disk(scratch) == 0 and node.size == 0
    await node.object.write(0, b"x" * 100 * KIB)
    assert on_disk(scratch) == 5 * MIB  # 100k and 4M, up to the next 1M
    assert node.size == 100 * KIB
    for at in range(100, 5120, 20):
        await node.object.write(at * KIB, b"y" * 20 * KIB)
    assert node.object.counters()["faults"]["write"] == 1  # all the others passed by
    assert on_disk(scratch) == 5 * MIB
    await node.object.write(5 * MIB, b"z" * 1000)
    assert on_disk(scratch) == 10 * MIB
    assert node.size == 5 * MIB + 1024  # in whole sectors
    assert await node.object.read(5 * MIB, 1024) == b"z" * 1000 + bytes(24)
    assert node.counters()["preallocations"] == 2
    await graph.detach_root(edge)
    assert on_disk(scratch) == 5 * MIB + 1024
    assert node.children["file"].perm == Perm.NONE


async def test_blocks_are_allocated_ahead(graph: Graph, scratch: Path) -> None:
    node = await preallocated(graph, scratch)
    edge = await use(graph, node)
    await node.object.write(0, b"x" * 4096)
    assert (scratch / "image").stat().st_blocks * 512 >= 5 * MIB
    await graph.detach_root(edge)
    await graph.remove("filter")
    assert (scratch / "image").stat().st_blocks * 512 <= 64 * KIB


async def test_without_the_permissions_it_only_passes_on(graph: Graph, scratch: Path) -> None:
    (scratch / "image").write_bytes(bytes(MIB))
    node = await preallocated(graph, scratch)
    edge = await use(graph, node, Perm.WRITE)
    await node.object.write(MIB - 4096, b"x" * 4096)
    assert on_disk(scratch) == MIB and node.size == MIB
    await graph.detach_root(edge)
    for _ in range(2):  # it begins anew each time
        edge = await use(graph, node)
        size = node.size
        await node.object.write(size, b"x" * 4096)
        assert on_disk(scratch) > 4 * MIB
        await graph.detach_root(edge)
        assert on_disk(scratch) == node.size == size + 4096


async def test_nobody_else_changes_the_file_meanwhile(graph: Graph, scratch: Path) -> None:
    await graph.add(file(scratch / "image") | {"node-name": "below"})
    node = await graph.add({"driver": "preallocate", "node-name": "filter", "file": "below"})
    edge = await use(graph, node)
    with pytest.raises(BlockError, match="Permission conflict on node 'below'"):
        await use(graph, graph.get("below"), Perm.WRITE)
    await graph.detach_root(edge)
    await graph.detach_root(await use(graph, graph.get("below"), Perm.WRITE))


async def test_random_writes_with_and_without_it(graph: Graph, scratch: Path) -> None:
    node = await preallocated(graph, scratch, prealloc_size=300 * KIB, prealloc_align=64 * KIB)
    plain = await graph.add(file(scratch / "plain") | {"node-name": "plain"})
    edges = [await use(graph, node), await use(graph, plain)]
    source = random.Random(1)
    for _ in range(80):
        end = node.size
        offset = min(source.randrange(end + 1), end) if source.random() < 0.5 else end
        length = source.randrange(1, 500) * 512
        offset = offset & -512
        data = source.randbytes(length)
        kind = source.random()
        for target in (node, plain):
            if kind < 0.8:
                await target.object.write(offset, data)
            else:
                await target.object.zeroes(offset, length)
        assert node.size == plain.size
    for edge in edges:
        await graph.detach_root(edge)
    await graph.remove("filter")
    await graph.remove("plain")
    assert (scratch / "image").read_bytes() == (scratch / "plain").read_bytes()


async def test_parallel_writes_past_the_end(graph: Graph, scratch: Path) -> None:
    node = await preallocated(graph, scratch, prealloc_size=64 * KIB, prealloc_align=512)
    edge = await use(graph, node)
    order = list(range(512))
    random.Random(2).shuffle(order)
    await asyncio.gather(*(node.object.write(i * 4096, bytes([i % 251]) * 4096) for i in order))
    await graph.detach_root(edge)
    assert (scratch / "image").read_bytes() == b"".join(bytes([i % 251]) * 4096 for i in range(512))


async def test_what_is_written_while_it_is_cut_stays(graph: Graph, scratch: Path) -> None:
    """A format's own writes are not held while the graph changes."""
    node = await preallocated(graph, scratch, prealloc_size=MIB, prealloc_align=512)
    edge = await use(graph, node)
    stopping = False
    at = 0

    async def write() -> None:
        nonlocal at
        while not stopping:
            await node.object.write(at, at.to_bytes(8, "big") * 512)
            at += 4096

    working = [asyncio.ensure_future(write())]
    for _ in range(60):
        await node.quiesce()
        await node.resume()
        await asyncio.sleep(0.001)
    stopping = True
    await asyncio.gather(*working)
    await graph.detach_root(edge)
    data = (scratch / "image").read_bytes()
    assert len(data) == at
    assert all(data[i : i + 8] == i.to_bytes(8, "big") for i in range(0, at, 4096))


async def test_what_is_under_way_when_it_begins_stays(graph: Graph, scratch: Path) -> None:
    slow = [{"event": "none", "iotype": "write", "errno": 0, "x-delay-ns": 200_000_000, "once": True}]
    image = {"driver": "blkdebug", "image": file(scratch / "image"), "inject-error": slow}
    node = await preallocated(graph, scratch, image)
    edge = await use(graph, node)
    await node.quiesce()
    writing = asyncio.ensure_future(node.object.write(0, b"x" * 8192))
    await asyncio.sleep(0.02)
    await node.resume()
    assert node.size == 8192
    await writing
    await graph.detach_root(edge)
    assert (scratch / "image").read_bytes() == b"x" * 8192


async def test_it_may_become_smaller_while_it_is_not_active(graph: Graph, scratch: Path) -> None:
    node = await preallocated(graph, scratch)
    edge = await use(graph, node)
    await node.object.write(0, b"x" * 8192)
    await graph.detach_root(edge)
    await graph.resize(node, 4096)
    assert node.size == 4096
    edge = await use(graph, node)
    assert node.size == 4096
    await node.object.write(4096, b"y" * 4096)
    await graph.detach_root(edge)
    assert (scratch / "image").read_bytes() == b"x" * 4096 + b"y" * 4096


async def test_a_full_disk_takes_what_fits(graph: Graph, scratch: Path) -> None:
    rules = [{"event": "none", "iotype": "write-zeroes", "errno": errno.ENOSPC}]
    image = {"driver": "blkdebug", "image": file(scratch / "image"), "inject-error": rules}
    node = await preallocated(graph, scratch, image)
    edge = await use(graph, node)
    for i in range(10):
        await node.object.write(i * 4096, b"x" * 4096)
        assert on_disk(scratch) == node.size == (i + 1) * 4096
    await graph.detach_root(edge)
    assert on_disk(scratch) == 40 * KIB


async def test_a_resize_drops_what_was_allocated(graph: Graph, scratch: Path) -> None:
    node = await preallocated(graph, scratch)
    edge = await use(graph, node)
    await node.object.write(0, b"x" * 4096)
    await node.truncate(2 * MIB)
    assert node.size == on_disk(scratch) == 2 * MIB
    await node.object.write(2 * MIB, b"y" * 4096)
    assert on_disk(scratch) == 7 * MIB
    await node.truncate(4096)
    assert node.size == on_disk(scratch) == 4096
    await graph.detach_root(edge)
    assert (scratch / "image").read_bytes() == b"x" * 4096


async def test_below_qcow2(graph: Graph, scratch: Path) -> None:
    """The image is what it would be without, and its file as long."""
    source = random.Random(3)
    writes = [(source.randrange(60 * 16) * 64 * KIB, source.randbytes(200 * KIB)) for _ in range(40)]
    for name in ("plain", "image"):
        create_image(scratch / name, "64M")
    filter = {"driver": "preallocate", "file": file(scratch / "image"), "prealloc-size": 8 * MIB}
    for name, below in (("plain", file(scratch / "plain")), ("image", filter)):
        node = await graph.add({"driver": "qcow2", "node-name": "disk", "file": below})
        for offset, data in writes:
            await node.object.write(offset, data)
        await node.object.flush()
        if name == "image":
            assert (scratch / name).stat().st_size >= node.children["file"].node.size + MIB
        await graph.remove("disk")
        check_image(scratch / name)
    assert (scratch / "image").stat().st_size == (scratch / "plain").stat().st_size
    qemu_img("compare", "-f", "qcow2", "-F", "qcow2", scratch / "image", scratch / "plain")
    qemu_io(scratch / "image", "read 0 64M", format="qcow2")


async def test_below_an_image_that_changes_its_size(graph: Graph, scratch: Path) -> None:
    create_image(scratch / "image", "16M")
    below = {"driver": "preallocate", "file": file(scratch / "image"), "prealloc-size": 4 * MIB}
    node = await graph.add({"driver": "qcow2", "node-name": "disk", "discard": "unmap", "file": below})
    edge = await graph.attach_root("guest", node, Perm.WRITE | Perm.CONSISTENT_READ, Perm.ALL)
    stopping = False
    written: dict[int, bytes] = {}

    async def guest() -> None:
        source = random.Random(4)
        while not stopping:
            at = source.randrange(16 * 16) * 64 * KIB
            written[at] = source.randbytes(64 * KIB)
            await edge.gate.write(at, written[at])
            await edge.gate.flush()

    working = asyncio.ensure_future(guest())
    for size in (64 * MIB, 16 * MIB, 300 * MIB, 16 * MIB):
        await asyncio.sleep(0.03)
        await graph.resize(node, size)
        assert node.size == size
    stopping = True
    await working
    for at, data in written.items():
        assert await edge.gate.read(at, len(data)) == data
    await edge.hold()
    await graph.detach_root(edge)
    await graph.remove("disk")
    check_image(scratch / "image")
    assert (scratch / "image").stat().st_size < 18 * MIB


async def test_other_options_take_effect_at_once(graph: Graph, scratch: Path) -> None:
    await graph.add(file(scratch / "image") | {"node-name": "below"})
    options = {"driver": "preallocate", "node-name": "filter", "file": "below"}
    node = await graph.add(options | {"prealloc-size": 4 * MIB})
    edge = await use(graph, node)
    await node.object.write(0, b"x" * 4096)
    assert on_disk(scratch) == 5 * MIB
    async with graph.change() as change:
        await change.reopen([graph.ref(options | {"prealloc-size": 16 * MIB}, "")])
    assert on_disk(scratch) == 4096  # nothing is left over while it changes
    await node.object.write(4096, b"y" * 4096)
    assert on_disk(scratch) == 17 * MIB
    with pytest.raises(
        BlockError, match="prealloc-align parameter of preallocate filter is not aligned to 512"
    ):
        async with graph.change() as change:
            await change.reopen([graph.ref(options | {"prealloc-align": 1000}, "")])
    await node.object.write(17 * MIB, b"z" * 4096)
    assert on_disk(scratch) == 34 * MIB
    await graph.detach_root(edge)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prealloc_align": 1000}, "prealloc-align parameter of preallocate filter is not aligned to 512"),
        ({"prealloc_size": -1}, "Parameter 'prealloc-size'"),
    ],
)
async def test_refused_by_name(graph: Graph, scratch: Path, options: Options, message: str) -> None:
    with pytest.raises(BlockError, match=message):
        await preallocated(graph, scratch, **options)
    assert not graph.nodes
