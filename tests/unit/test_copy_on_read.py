# SPDX-License-Identifier: Apache-2.0
"""copy-on-read in a graph: data under load, failures, what is copied and what is not, the graph around it."""

from __future__ import annotations

import asyncio
import errno
import random
from pathlib import Path
from typing import Any

import pytest

from target.datapath import Op
from target.graph.errors import BlockError
from target.graph.graph import Graph
from target.graph.node import Node
from target.graph.permissions import Perm
from tests.support.random_work import random_work
from tests.support.tools import check_image, create_image, qemu_img, qemu_io

KIB, MIB = 1 << 10, 1 << 20
SIZE = 4 * MIB
Options = dict[str, Any]


def images(scratch: Path, options: str = "", base_options: str = "") -> bytearray:
    """base.qcow2 with data in three quarters of it, an empty top.qcow2 over it; the content."""
    model = bytearray(random.Random(1).randbytes(SIZE))
    model[MIB : 2 * MIB] = bytes(MIB)
    model[3 * MIB + 512 :] = bytes(MIB - 512)
    (scratch / "raw").write_bytes(model[: 3 * MIB + 512])
    convert = ["convert", "-O", "qcow2", "-f", "raw"]
    qemu_img(
        *convert, *(["-c"] if base_options == "compressed" else []), scratch / "raw", scratch / "base.qcow2"
    )
    create_image(scratch / "top.qcow2", str(SIZE), options=options, backing=scratch / "base.qcow2")
    return model


def top(scratch: Path, **options: Any) -> Options:
    file = {"driver": "file", "filename": str(scratch / "top.qcow2")}
    return {"driver": "qcow2", "node-name": "top", "file": file} | options


async def filtered(graph: Graph, child: Options | str, **options: Any) -> Node:
    return await graph.add({"driver": "copy-on-read", "node-name": "cor", "file": child} | options)


def backing_reads(graph: Graph) -> int:
    reads: int = graph.get("top").children["backing"].node.counters()["requests"]["read"]
    return reads


@pytest.mark.parametrize("options", ["", "compat=0.10", "cluster_size=4k"])
@pytest.mark.parametrize("base", ["", "compressed"])
async def test_data_are_those_of_the_chain(graph: Graph, scratch: Path, options: str, base: str) -> None:
    model = images(scratch, options, base)
    node = await filtered(graph, top(scratch))
    await random_work(node.object, model, seed=1, operations=40)
    assert await node.object.read(0, SIZE) == model
    before = backing_reads(graph)
    assert await node.object.read(0, SIZE) == model
    assert backing_reads(graph) == before, "all is in the top image now"
    await graph.remove("cor")
    check_image(scratch / "top.qcow2")
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", "", scratch / "top.qcow2")
    (scratch / "model").write_bytes(model)
    qemu_img("compare", "-f", "raw", "-F", "qcow2", scratch / "model", scratch / "top.qcow2")


async def test_each_cluster_is_read_once_by_many(graph: Graph, scratch: Path) -> None:
    model = images(scratch)
    node = await filtered(graph, top(scratch))
    parts = await asyncio.gather(*(node.object.read(at, 4096) for at in range(0, 256 * KIB, 4096)))
    assert b"".join(parts) == model[: 256 * KIB]
    assert graph.get("top").counters()["grants"] == 4


async def test_zeros_need_no_cluster(graph: Graph, scratch: Path) -> None:
    images(scratch)
    node = await filtered(graph, top(scratch))
    assert await node.object.read(MIB, MIB) == bytes(MIB)
    before = backing_reads(graph)
    await node.object.read(MIB, MIB)
    assert backing_reads(graph) == before
    await graph.remove("cor")
    assert (scratch / "top.qcow2").stat().st_size < MIB


async def test_populate_and_cache(graph: Graph, scratch: Path) -> None:
    model = images(scratch)
    node = await filtered(graph, top(scratch))
    below = node.children["file"].node.object
    await below.populate(0, 128 * KIB + 1)
    await node.object.cache(512 * KIB, 1)
    assert graph.get("top").counters()["grants"] == 4
    before = backing_reads(graph)
    assert await below.read(0, 192 * KIB) == model[: 192 * KIB]
    assert await below.read(512 * KIB, 64 * KIB) == model[512 * KIB : 576 * KIB]
    assert backing_reads(graph) == before
    await below.populate(0, SIZE)
    assert await below.read(0, SIZE) == model


async def test_a_copy_that_cannot_be_written_fails_the_read(graph: Graph, scratch: Path) -> None:
    """As in QEMU. What is in the image, and every later read, is as it was."""
    model = images(scratch)
    file = {"driver": "file", "filename": str(scratch / "top.qcow2")}
    rule = {"event": "none", "iotype": "write", "errno": errno.EDQUOT, "once": True}
    failing = {"driver": "blkdebug", "image": file, "inject-error": [rule]}
    node = await filtered(graph, top(scratch, file=failing))
    with pytest.raises(OSError) as failed:
        await node.object.read(0, 64 * KIB)
    assert failed.value.errno == errno.EDQUOT
    assert await node.object.read(0, SIZE) == model
    await graph.remove("cor")
    check_image(scratch / "top.qcow2")


async def test_a_read_of_the_backing_that_fails(graph: Graph, scratch: Path) -> None:
    model = images(scratch)
    rule = {"event": "none", "iotype": "read", "sector": 8, "once": True}
    file = {"driver": "file", "filename": str(scratch / "base.qcow2")}
    backing = {"driver": "blkdebug", "image": {"driver": "qcow2", "file": file}, "inject-error": [rule]}
    node = await filtered(graph, top(scratch, backing=backing))
    with pytest.raises(OSError):
        await node.object.read(0, 512)  # its cluster has the sector that cannot be read
    assert await node.object.read(0, SIZE) == model


@pytest.mark.parametrize("between", ["throttle", "copy-before-write", "blkdebug", "raw"])
async def test_other_filters_above_the_image(graph: Graph, scratch: Path, between: str) -> None:
    model = images(scratch)
    child: Options = {"driver": between, "file": top(scratch)}
    if between == "blkdebug":
        child = {"driver": between, "image": top(scratch)}
    elif between == "copy-before-write":
        child["target"] = {"driver": "null-co", "size": SIZE}
    elif between == "throttle":
        from target.throttle_group import ThrottleGroup, ThrottleGroupOptions

        group = ThrottleGroup(ThrottleGroupOptions(id="g"), graph.datapath)
        group.start()
        graph.objects["g"] = group  # type: ignore[index]
        child["throttle-group"] = "g"
    node = await filtered(graph, child)
    assert await node.object.read(0, 100) == model[:100]
    assert graph.get("top").counters()["grants"] == 1


async def test_where_there_is_nothing_to_copy(graph: Graph, scratch: Path) -> None:
    (scratch / "raw").write_bytes(b"x" * MIB)
    node = await filtered(
        graph, {"driver": "raw", "file": {"driver": "file", "filename": str(scratch / "raw")}}
    )
    assert await node.object.read(5, 10) == b"x" * 10
    await node.object.write(0, b"y" * 512)
    assert await node.object.read(0, 1024) == b"y" * 512 + b"x" * 512
    create_image(scratch / "alone.qcow2", str(SIZE))
    file = {"driver": "file", "filename": str(scratch / "alone.qcow2")}
    alone = await graph.add(
        {"driver": "copy-on-read", "node-name": "other", "file": {"driver": "qcow2", "file": file}}
    )
    assert await alone.object.read(0, SIZE) == bytes(SIZE)
    assert alone.children["file"].node.counters()["grants"] == 0


async def test_writes_race_with_reads(graph: Graph, scratch: Path) -> None:
    """Many small writes into clusters that are being copied: none is lost."""
    model = images(scratch)
    graph.datapath.add_thread(poll_max_ns=0)
    node = await filtered(graph, top(scratch))
    for round in range(8):
        start = round * 256 * KIB
        writes = []
        for at in range(start, start + 256 * KIB, 16 * KIB):
            data = random.Random(at).randbytes(512)
            model[at + 512 : at + 1024] = data
            writes.append(node.object.write(at + 512, data))
        reads = [node.object.read(at, 512) for at in range(start, start + 256 * KIB, 32 * KIB)]
        got, _ = await asyncio.gather(asyncio.gather(*reads), asyncio.gather(*writes))
        for at, data in zip(range(start, start + 256 * KIB, 32 * KIB), got, strict=True):
            assert data == model[at : at + 512]
    assert await node.object.read(0, SIZE) == model


# ---- bottom ----


async def chain(graph: Graph, scratch: Path) -> None:
    create_image(scratch / "a", str(SIZE))
    create_image(scratch / "b", str(SIZE), backing=scratch / "a")
    create_image(scratch / "c", str(SIZE), backing=scratch / "b")
    qemu_io(scratch / "a", "write -P 1 0 1M", format="qcow2")
    qemu_io(scratch / "b", "write -P 2 512k 1M", format="qcow2")
    below: str | None = None
    for name in "abc":
        file = {"driver": "file", "filename": str(scratch / name)}
        options = {"driver": "qcow2", "node-name": name, "file": file, "read-only": name != "c"}
        await graph.add(options | ({"backing": below} if below else {}))
        below = name


@pytest.mark.parametrize(("bottom", "clusters"), [("a", 24), ("b", 16), ("c", 0), (None, 32)])
async def test_what_lies_below_the_bottom_stays(
    graph: Graph, scratch: Path, bottom: str | None, clusters: int
) -> None:
    await chain(graph, scratch)
    node = await filtered(graph, "c", **({"bottom": bottom} if bottom else {}))
    expected = b"\1" * (512 * KIB) + b"\2" * MIB + bytes(512 * KIB)
    assert await node.object.read(0, 2 * MIB) == expected
    assert graph.get("c").counters()["grants"] == clusters  # those for zeros were given back
    assert await node.object.read(0, 2 * MIB) == expected


async def test_the_way_to_the_bottom_is_frozen(graph: Graph, scratch: Path) -> None:
    await chain(graph, scratch)
    await filtered(graph, "c", bottom="b")
    edge = graph.get("c").children["backing"]
    await graph.add({"driver": "null-co", "node-name": "n", "size": SIZE})
    with pytest.raises(BlockError, match="Cannot change frozen 'backing' link from 'c' to 'b'"):
        async with graph.change() as change:
            await change.replace(edge, graph.get("n"))
    await graph.remove("cor")
    async with graph.change() as change:
        await change.replace(edge, graph.get("n"))


@pytest.mark.parametrize(
    ("bottom", "message"),
    [
        ("x", "Bottom node 'x' not found"),
        ("n", "is not in the backing chain"),
        ("f", "Bottom node 'f' is a filter"),
    ],
)
async def test_bottoms_that_are_refused(graph: Graph, scratch: Path, bottom: str, message: str) -> None:
    await chain(graph, scratch)
    await graph.add({"driver": "null-co", "node-name": "n", "size": SIZE})
    await graph.add({"driver": "copy-on-read", "node-name": "f", "file": "c"})
    with pytest.raises(BlockError, match=message):
        await filtered(graph, "f", bottom=bottom)
    assert not any(edge.frozen for node in graph.nodes.values() for edge in node.parents)


# ---- permissions ----


async def test_it_needs_to_write_what_is_unchanged(graph: Graph, scratch: Path) -> None:
    await chain(graph, scratch)
    with pytest.raises(BlockError, match="Block node is read-only"):
        await filtered(graph, "b")
    await filtered(graph, "c")
    edge = graph.get("cor").children["file"]
    assert edge.perm == Perm.WRITE_UNCHANGED
    user = await graph.attach_root("a user", graph.get("cor"), Perm.CONSISTENT_READ, Perm.ALL & ~Perm.WRITE)
    assert edge.perm == Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED
    assert Perm.WRITE not in edge.shared and Perm.WRITE_UNCHANGED in edge.shared
    assert await user.gate.read(0, 10) == b"\1" * 10, "through a gate that may not write"
    assert graph.get("c").counters()["requests"][Op.READ.name.lower()] > 0
    await graph.detach_root(user)
