# SPDX-License-Identifier: Apache-2.0
"""copy-before-write and snapshot-access in a graph: the snapshot stays as it was, whatever is done above."""

from __future__ import annotations

import asyncio
import errno
import random
from pathlib import Path
from typing import Any

import pytest

from target.datapath import FUA, HOLE, UNMAP, ZERO
from target.drivers.filter.copy_before_write import CopyBeforeWrite
from target.graph.errors import BlockError
from target.graph.graph import Graph
from target.graph.node import Node
from target.graph.permissions import Perm
from tests.support.tools import create_image, qemu_io

KIB, MIB = 1 << 10, 1 << 20
SIZE = 4 * MIB + 3 * 512  # the last cluster is a part of one
Options = dict[str, Any]


def file(path: Path, size: int | None = None, **options: Any) -> Options:
    if size is not None:
        with path.open("wb") as out:
            out.truncate(size)
    return {"driver": "file", "filename": str(path), "discard": "unmap", **options}


def filled(path: Path, seed: int = 1, size: int = SIZE) -> bytes:
    """Random data with a hole in it."""
    data = bytearray(random.Random(seed).randbytes(size))
    data[MIB : MIB + 256 * KIB] = bytes(256 * KIB)
    with path.open("wb") as out:
        out.truncate(size)
        out.write(data[:MIB])
        out.seek(MIB + 256 * KIB)
        out.write(data[MIB + 256 * KIB :])
    return bytes(data)


async def guarded(
    graph: Graph, scratch: Path, target: Options | None = None, **options: Any
) -> CopyBeforeWrite:
    names = {name.replace("_", "-"): value for name, value in options.items()}
    base = {"driver": "copy-before-write", "node-name": "cbw", "discard": "unmap"}
    node = await graph.add(
        base | {"file": file(scratch / "disk"), "target": target or file(scratch / "target", SIZE)} | names
    )
    assert isinstance(node, CopyBeforeWrite)
    return node


async def snapshot_of(graph: Graph, name: str = "snap") -> Node:
    return await graph.add(
        {"driver": "snapshot-access", "node-name": name, "file": "cbw", "discard": "unmap"}
    )


async def change_at_random(node: Node, image: bytearray, source: random.Random, count: int) -> None:
    for _ in range(count):
        offset = source.randrange(len(image))
        length = source.randrange(1, min(300_000, len(image) - offset) + 1)
        match source.randrange(5):
            case 0 | 1:
                data = source.randbytes(length)
                await node.object.write(offset, data, source.choice((0, FUA)))
                image[offset : offset + length] = data
            case 2:
                await node.object.zeroes(offset, length, source.choice((0, UNMAP)))
                image[offset : offset + length] = bytes(length)
            case 3:
                offset, length = offset & -4096, length & -4096
                if length and offset + length <= len(image):
                    await node.object.discard(offset, length)
                    image[offset : offset + length] = bytes(length)
            case 4:
                assert await node.object.read(offset, length) == image[offset : offset + length]


async def fails(work: Any, number: int) -> None:
    with pytest.raises(OSError) as caught:
        await work
    assert caught.value.errno == number


@pytest.mark.parametrize("format", ["raw", "qcow2", "big"])
async def test_the_snapshot_stays_what_it_was(graph: Graph, scratch: Path, format: str) -> None:
    before = filled(scratch / "disk")
    target = file(scratch / "target", SIZE)
    if format != "raw":
        options = "cluster_size=128k" if format == "big" else ""
        create_image(scratch / "target.qcow2", str(SIZE), options=options)
        target = {"driver": "qcow2", "file": file(scratch / "target.qcow2")}
    node = await guarded(graph, scratch, target)
    assert node.bits == {"raw": 16, "qcow2": 16, "big": 17}[format]
    snap = await snapshot_of(graph)
    image = bytearray(before)
    source = random.Random(2)
    for _ in range(8):
        await change_at_random(node, image, source, 6)
        for _ in range(4):
            offset = source.randrange(SIZE)
            length = source.randrange(1, SIZE - offset + 1)
            assert await snap.object.read(offset, length) == before[offset : offset + length]
    assert await snap.object.read(0, SIZE) == before
    assert await node.object.read(0, SIZE) == image
    await graph.remove("snap")
    await graph.remove("cbw")
    assert (scratch / "disk").read_bytes() == image


async def test_a_snapshot_is_right_while_the_disk_is_written_in_parallel(graph: Graph, scratch: Path) -> None:
    """Readers find the old data, however reads and writes of the same cluster meet."""
    graph.datapath.add_thread(0)
    before = filled(scratch / "disk")
    node = await guarded(graph, scratch)
    snap = await snapshot_of(graph)
    source = random.Random(3)
    image = bytearray(before)

    async def write(lane: int) -> None:
        for _ in range(60):
            offset = source.randrange(SIZE // 4096) * 4096 + lane * 512
            data = source.randbytes(512)
            image[offset : offset + 512] = data
            await node.object.write(offset, data)

    async def read() -> None:
        for _ in range(60):
            offset = source.randrange(SIZE - 70_000)
            assert await snap.object.read(offset, 70_000) == before[offset : offset + 70_000]

    await asyncio.gather(*(write(lane) for lane in range(3)), *(read() for _ in range(4)))
    assert await node.object.read(0, SIZE) == image
    assert await snap.object.read(0, SIZE) == before


@pytest.mark.parametrize("error", [False, True])
async def test_a_write_waits_for_who_still_reads_the_old_data(
    graph: Graph, scratch: Path, error: bool
) -> None:
    """Also when the copy has failed and the snapshot is given up: what was read by then is right."""
    before = filled(scratch / "disk")
    slow = {"event": "none", "iotype": "read", "errno": 0, "x-delay-ns": 300_000_000, "once": True}
    disk = {"driver": "blkdebug", "image": file(scratch / "disk"), "inject-error": [slow]}
    target = failing(scratch, {"errno": errno.ENOSPC}) if error else None
    node = await guarded(graph, scratch, target, file=disk, on_cbw_error="break-snapshot")
    snap = await snapshot_of(graph)
    reading = asyncio.ensure_future(snap.object.read(4096, 8192))
    await asyncio.sleep(0.05)
    await node.object.write(0, b"x" * 64 * KIB)
    assert reading.done()
    assert await reading == before[4096 : 4096 + 8192]
    assert await node.object.read(0, 64 * KIB) == b"x" * 64 * KIB


async def test_each_cluster_is_copied_once(graph: Graph, scratch: Path) -> None:
    filled(scratch / "disk")
    node = await guarded(graph, scratch)
    await asyncio.gather(*(node.object.write(i * 4096, b"x" * 4096) for i in range(64)))
    assert node.copied == 4
    target = node.target.counters()
    assert target["bytes"]["write"] + target["bytes"]["zeroes"] == 256 * KIB
    faults = node.object.counters()["faults"]["write"]
    for i in range(64):
        await node.object.write(i * 4096, b"y" * 4096)
    await node.object.zeroes(0, 256 * KIB)
    await node.object.discard(0, 256 * KIB)
    assert node.object.counters()["faults"]["write"] == faults  # from then on nothing is asked
    assert node.copied == 4


async def test_zeros_are_copied_as_zeros(graph: Graph, scratch: Path) -> None:
    filled(scratch / "disk")
    node = await guarded(graph, scratch)
    await node.object.write(MIB, b"x" * 128 * KIB)
    assert node.target.counters()["bytes"]["write"] == 0
    assert node.target.counters()["bytes"]["zeroes"] == 128 * KIB


async def test_block_status_is_that_of_where_the_data_are(graph: Graph, scratch: Path) -> None:
    filled(scratch / "disk")
    node = await guarded(graph, scratch)
    snap = await snapshot_of(graph)
    assert [tuple(extent) for extent in await node.object.status(0, 2 * MIB)] == [
        (MIB, 0),
        (256 * KIB, HOLE | ZERO),
        (MIB - 256 * KIB, 0),
    ]
    assert await snap.object.status(0, 2 * MIB) == await node.object.status(0, 2 * MIB)
    await node.object.write(MIB, b"x" * 4096)  # a hole that is copied is a hole of the target
    await node.object.zeroes(0, 128 * KIB, UNMAP)  # data that are copied are data of the target
    assert [tuple(extent) for extent in await snap.object.status(0, 2 * MIB)] == [
        (MIB, 0),
        (256 * KIB, HOLE | ZERO),
        (MIB - 256 * KIB, 0),
    ]
    assert (await node.object.status(0, MIB))[0] == (128 * KIB, HOLE | ZERO)


async def test_fleecing_through_the_backing_chain_of_the_target(graph: Graph, scratch: Path) -> None:
    """The old way: an image whose backing node is the disk below the filter, read by its own user."""
    before = filled(scratch / "disk", size=4 * MIB)
    create_image(scratch / "fleece.qcow2", str(4 * MIB))
    await graph.add(file(scratch / "disk") | {"node-name": "disk"})
    target = {
        "driver": "qcow2",
        "node-name": "fleece",
        "backing": "disk",
        "file": file(scratch / "fleece.qcow2"),
    }
    await graph.add(target)
    node = await graph.add(
        {"driver": "copy-before-write", "node-name": "cbw", "file": "disk", "target": "fleece"}
    )
    assert isinstance(node, CopyBeforeWrite) and node.fleecing
    image = bytearray(before)
    source = random.Random(4)
    fleece = graph.get("fleece").object
    for _ in range(20):
        offset = source.randrange(4 * MIB - 200_000)
        data = source.randbytes(source.randrange(1, 200_000))
        image[offset : offset + len(data)] = data
        reading = asyncio.gather(*(fleece.read(at, MIB) for at in range(0, 4 * MIB, MIB)))
        await node.object.write(offset, data)
        assert b"".join(await reading) == before
    assert await fleece.read(0, 4 * MIB) == before
    assert await node.object.read(0, 4 * MIB) == image


async def test_a_snapshot_of_a_disk_in_use(graph: Graph, scratch: Path) -> None:
    """Above a node with a user, put in and taken out again, over and over; the user notices nothing."""
    image = bytearray(filled(scratch / "disk"))
    disk = await graph.add(file(scratch / "disk") | {"node-name": "disk"})
    edge = await graph.attach_root("guest", disk, Perm.CONSISTENT_READ | Perm.WRITE, Perm.ALL)
    source = random.Random(6)
    stopping = False

    async def guest() -> int:
        rounds = 0
        while not stopping:
            offset = source.randrange(SIZE - 100_000)
            data = source.randbytes(source.randrange(1, 100_000))
            await edge.gate.write(offset, data)
            image[offset : offset + len(data)] = data
            assert await edge.gate.read(offset, len(data)) == data
            rounds += 1
        return rounds

    working = asyncio.ensure_future(guest())
    for _ in range(4):
        target = file(scratch / "target", SIZE) | {"node-name": "target"}
        async with graph.change() as change:
            await change.add(target)
            cbw = await change.add(
                {"driver": "copy-before-write", "node-name": "cbw", "file": "disk", "target": "target"}
            )
            await change.replace_node(disk, cbw)
            before = bytes(image)  # requests are held now
        snap = await snapshot_of(graph)
        for _ in range(20):
            offset = source.randrange(SIZE - 100_000)
            assert await snap.object.read(offset, 100_000) == before[offset : offset + 100_000]
        assert await snap.object.read(0, SIZE) == before
        await graph.remove("snap")
        async with graph.change() as change:
            await change.replace_node(cbw, disk)
        await graph.remove("cbw")
        await graph.remove("target")
    stopping = True
    assert await working > 20
    assert await edge.gate.read(0, SIZE) == image
    await edge.hold()
    await graph.detach_root(edge)


async def test_a_snapshot_stays_with_its_filter(graph: Graph, scratch: Path) -> None:
    """When another filter is put above that of the snapshot."""
    before = filled(scratch / "disk")
    cbw = await guarded(graph, scratch)
    snap = await snapshot_of(graph)
    edge = await graph.attach_root("guest", cbw, Perm.WRITE | Perm.CONSISTENT_READ, Perm.ALL)
    async with graph.change() as change:
        above = await change.add({"driver": "blkdebug", "node-name": "above", "image": "cbw"})
        await change.replace_node(cbw, above)
    await edge.gate.write(0, b"x" * 4096)
    assert above.counters()["operations"]["write"] == 1
    assert await snap.object.read(0, SIZE) == before
    with pytest.raises(BlockError, match="Cannot change frozen 'file' link from 'snap' to 'cbw'"):
        async with graph.change() as change:
            await change.reopen(
                [graph.ref({"driver": "snapshot-access", "node-name": "snap", "file": "above"}, "")]
            )
    assert await snap.object.read(0, SIZE) == before
    await graph.detach_root(edge)


async def test_the_policy_may_change_while_it_is_used(graph: Graph, scratch: Path) -> None:
    filled(scratch / "disk")
    node = await guarded(graph, scratch, failing(scratch, {"errno": errno.ENOSPC}))
    await fails(node.object.write(0, b"x"), errno.ENOSPC)
    options = {"driver": "copy-before-write", "node-name": "cbw", "on-cbw-error": "break-snapshot"}
    async with graph.change() as change:
        children = {role: edge.node.name for role, edge in node.children.items()}
        await change.reopen([graph.ref(options | children, "")])
    await node.object.write(0, b"x")


# ---- what is not needed any more ----


async def test_a_discarded_part_is_neither_copied_nor_readable(graph: Graph, scratch: Path) -> None:
    before = filled(scratch / "disk")
    node = await guarded(graph, scratch)
    snap, other = await snapshot_of(graph), await snapshot_of(graph, "other")
    await node.object.write(0, b"x" * 4096)
    await snap.object.discard(1, 256 * KIB)  # not of the first cluster: a part of it is still wanted
    assert await snap.object.read(0, 64 * KIB) == before[: 64 * KIB]
    for view in (snap, other):
        await fails(view.object.read(64 * KIB, 1), errno.EACCES)
        await fails(view.object.read(60 * KIB, 8 * KIB), errno.EACCES)
        assert await view.object.read(256 * KIB, 4096) == before[256 * KIB : 260 * KIB]
    await node.object.write(64 * KIB, b"y" * 192 * KIB)
    assert node.copied == 1
    await snap.object.discard(SIZE - 512, 512)  # a part of the last cluster: nothing
    assert await snap.object.read(SIZE - 512, 512) == before[-512:]
    await snap.object.discard(4 * MIB, SIZE - 4 * MIB)  # all that there is of the last cluster
    await fails(snap.object.read(SIZE - 512, 512), errno.EACCES)


async def test_what_was_copied_is_discarded_in_the_target(graph: Graph, scratch: Path) -> None:
    filled(scratch / "disk")
    node = await guarded(graph, scratch)
    snap = await snapshot_of(graph)
    await node.object.write(0, b"x" * 256 * KIB)
    assert (await node.target.object.status(0, MIB))[0] == (256 * KIB, 0)
    await snap.object.discard(0, 128 * KIB)
    assert (await node.target.object.status(0, MIB))[0] == (128 * KIB, HOLE | ZERO)


async def test_a_snapshot_cannot_be_written(graph: Graph, scratch: Path) -> None:
    before = filled(scratch / "disk")
    await guarded(graph, scratch)
    snap = await snapshot_of(graph)
    await fails(snap.object.write(0, b"x"), errno.EOPNOTSUPP)
    await fails(snap.object.zeroes(0, 4096), errno.EOPNOTSUPP)
    await snap.object.flush()
    assert await snap.object.read(0, 4096) == before[:4096]


# ---- errors ----


def failing(scratch: Path, *rules: Options) -> Options:
    filled = [{"event": "none", "iotype": "write"} | rule for rule in rules]
    return {"driver": "blkdebug", "image": file(scratch / "target", SIZE), "inject-error": filled}


async def test_a_failing_copy_fails_the_guest(graph: Graph, scratch: Path) -> None:
    before = filled(scratch / "disk")
    node = await guarded(
        graph, scratch, failing(scratch, {"errno": errno.ENOSPC, "sector": 128, "once": True})
    )
    snap = await snapshot_of(graph)
    await fails(node.object.write(60 * KIB, b"x" * 8 * KIB), errno.ENOSPC)
    # The part of the request that lies in the first cluster may be there or not.
    assert (await node.object.read(64 * KIB, 64 * KIB)) == before[64 * KIB : 128 * KIB]
    assert await snap.object.read(0, SIZE) == before
    await node.object.write(60 * KIB, b"x" * 8 * KIB)  # the next attempt copies again
    assert await snap.object.read(0, SIZE) == before
    assert await node.object.read(60 * KIB, 8 * KIB) == b"x" * 8 * KIB


async def test_or_breaks_the_snapshot(graph: Graph, scratch: Path) -> None:
    before = filled(scratch / "disk")
    rule = {"errno": errno.ENOSPC, "sector": 128}
    node = await guarded(graph, scratch, failing(scratch, rule), on_cbw_error="break-snapshot")
    snap = await snapshot_of(graph)
    await node.object.write(0, b"x" * 4096)
    assert await snap.object.read(0, SIZE) == before
    await node.object.write(60 * KIB, b"x" * 8 * KIB)
    assert await node.object.read(60 * KIB, 8 * KIB) == b"x" * 8 * KIB
    await fails(snap.object.read(0, 512), errno.EACCES)
    await fails(snap.object.status(0, 512), errno.EACCES)
    copied = node.copied
    await node.object.write(0, b"z" * 2 * MIB)
    assert node.copied == copied
    assert node.counters()["snapshot_error"] == "No space left on device"


async def test_reading_the_old_data_can_fail(graph: Graph, scratch: Path) -> None:
    before = filled(scratch / "disk")
    rules = [{"event": "none", "iotype": "read", "sector": 0, "once": True}]
    disk = {"driver": "blkdebug", "image": file(scratch / "disk"), "inject-error": rules}
    node = await guarded(graph, scratch, file=disk)
    await fails(node.object.write(0, b"x"), errno.EIO)
    assert await node.object.read(0, 512) == before[:512]
    await node.object.write(0, b"x")


@pytest.mark.parametrize("policy", ["break-guest-write", "break-snapshot"])
async def test_a_copy_that_takes_too_long(graph: Graph, scratch: Path, policy: str) -> None:
    before = filled(scratch / "disk")
    slow = failing(scratch, {"errno": 0, "x-delay-ns": 1_300_000_000, "once": True})
    node = await guarded(graph, scratch, slow, on_cbw_error=policy, cbw_timeout=1)
    snap = await snapshot_of(graph)
    if policy == "break-guest-write":
        await fails(node.object.write(0, b"x" * 512), errno.ETIMEDOUT)
        assert await node.object.read(0, 512) == before[:512]
        await node.object.write(0, b"x" * 512)  # the copy has come through
        assert await snap.object.read(0, 512) == before[:512]
    else:
        await node.object.write(0, b"x" * 512)
        await fails(snap.object.read(0, 512), errno.EACCES)
    assert await node.object.read(0, 512) == b"x" * 512
    await graph.remove("snap")
    await graph.remove("cbw")  # waits for the copy, whoever has given it up


# ---- sizes, permissions, options ----


async def test_the_disk_may_change_its_size(graph: Graph, scratch: Path) -> None:
    before = filled(scratch / "disk")
    node = await guarded(graph, scratch)
    snap = await snapshot_of(graph)
    await graph.resize(node, 8 * MIB)
    assert node.size == 8 * MIB and snap.size == SIZE
    await node.object.write(4 * MIB, b"x" * 4 * MIB)
    assert node.copied == 1  # the part of a cluster at the end of the snapshot
    await graph.resize(node, MIB)
    assert node.size == MIB
    assert await snap.object.read(0, SIZE) == before
    later = await snapshot_of(graph, "later")
    assert later.size == SIZE
    assert await later.object.read(0, SIZE) == before


async def test_a_format_above_may_grow_it(graph: Graph, scratch: Path) -> None:
    create_image(scratch / "disk", "16M")
    size = -(-(scratch / "disk").stat().st_size // 512) * 512
    cbw: Options = {"driver": "copy-before-write", "node-name": "cbw"}
    cbw |= {"file": file(scratch / "disk"), "target": file(scratch / "target", size)}
    node = await graph.add({"driver": "qcow2", "node-name": "top", "file": cbw})
    old = (scratch / "disk").read_bytes()
    await node.object.write(5 * MIB, b"q" * MIB)
    await node.object.flush()
    snap = await snapshot_of(graph)
    assert await snap.object.read(0, len(old)) == old
    await graph.remove("snap")
    await graph.remove("top")
    qemu_io(scratch / "disk", "read -P 0x71 5M 1M", format="qcow2")


async def test_who_may_use_what(graph: Graph, scratch: Path) -> None:
    filled(scratch / "disk")
    await graph.add(file(scratch / "disk") | {"node-name": "disk"})
    await graph.add(file(scratch / "target", SIZE) | {"node-name": "target"})
    await graph.add({"driver": "copy-before-write", "node-name": "cbw", "file": "disk", "target": "target"})
    early = await graph.attach_root("early", graph.get("disk"), Perm.WRITE, Perm.ALL)
    with pytest.raises(BlockError, match="Permission conflict on node 'disk'"):
        await graph.attach_root("guest", graph.get("cbw"), Perm.WRITE, Perm.ALL)
    await graph.detach_root(early)
    edge = await graph.attach_root("guest", graph.get("cbw"), Perm.WRITE, Perm.ALL)
    for perm in (Perm.WRITE, Perm.RESIZE):
        with pytest.raises(BlockError, match="Permission conflict on node 'disk'"):
            await graph.attach_root("other", graph.get("disk"), perm, Perm.ALL)
    with pytest.raises(BlockError, match="Permission conflict on node 'target'"):
        await graph.attach_root("other", graph.get("target"), Perm.RESIZE, Perm.ALL)
    await graph.detach_root(edge)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bitmap": {"node": "cbw", "name": "b0"}}, "option 'bitmap': there are no dirty bitmaps yet"),
        (
            {"min_cluster_size": 100_000},
            "Cannot create block-copy-state: min-cluster-size needs to be a power of 2",
        ),
        ({"target_size": MIB}, r"target '#block...' \(1048576 bytes\) is smaller than file"),
        ({"on_cbw_error": "ignore"}, "does not accept value 'ignore'"),
        ({"cbw_timeout": 1 << 32}, "Parameter 'cbw-timeout'"),
    ],
)
async def test_refused_by_name(graph: Graph, scratch: Path, options: Options, message: str) -> None:
    filled(scratch / "disk")
    target = file(scratch / "target", options.pop("target_size", SIZE))
    with pytest.raises(BlockError, match=message):
        await guarded(graph, scratch, target, **options)
    assert not graph.nodes


async def test_a_cluster_may_be_larger(graph: Graph, scratch: Path) -> None:
    before = filled(scratch / "disk")
    node = await guarded(graph, scratch, min_cluster_size=MIB)
    await node.object.write(MIB - 1, b"xy")
    assert node.copied == 2
    assert (scratch / "target").read_bytes()[: 2 * MIB] == before[: 2 * MIB]


async def test_snapshot_access_needs_a_snapshot(graph: Graph, scratch: Path) -> None:
    options = {"driver": "snapshot-access", "node-name": "snap", "file": file(scratch / "x", MIB)}
    with pytest.raises(
        BlockError, match=r"node 'snap': node '#block...' \(driver 'file'\) gives no access to a"
    ):
        await graph.add(options)
    assert not graph.nodes
