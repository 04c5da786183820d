# SPDX-License-Identifier: Apache-2.0
"""copy-before-write while much happens at once: clients write, others read the snapshot, errors, drains."""

from __future__ import annotations

import asyncio
import errno
import random
from pathlib import Path

import pytest

from target.graph.edge import RootEdge
from target.graph.graph import Graph
from target.graph.permissions import Perm
from tests.unit.test_copy_before_write import (
    KIB,
    MIB,
    SIZE,
    Options,
    failing,
    fails,
    file,
    filled,
    guarded,
    snapshot_of,
)

CLUSTER = 64 * KIB
LANES = 3


class Scene:
    """A disk with a client and a snapshot, and what both are to hold."""

    def __init__(self, graph: Graph, before: bytes, seed: int) -> None:
        self.graph, self.before, self.image = graph, before, bytearray(before)
        self.source = random.Random(seed)
        self.hidden: set[int] = set()  # clusters
        self.errors = 0
        self.writing = LANES

    async def open(self, scratch: Path, target: Options, policy: str) -> None:
        self.node = await guarded(self.graph, scratch, target, on_cbw_error=policy)
        self.snap = await snapshot_of(self.graph)
        self.edge = await user_of(self.graph, "cbw")

    async def write(self, lane: int) -> None:
        """To a third of the disk; what fails is tried again."""
        start, room = lane * (SIZE // LANES), SIZE // LANES
        for _ in range(40):
            at = start + self.source.randrange(room - 1)
            length = self.source.randrange(1, min(self.source.choice((4 * KIB, MIB)), start + room - at) + 1)
            data = self.source.choice((bytes(length), self.source.randbytes(length)))
            while not await self._change(at, data):
                self.errors += 1
            self.image[at : at + length] = data
            assert await self.edge.gate.read(at, length) == data
        self.writing -= 1

    async def _change(self, at: int, data: bytes) -> bool:
        try:
            if any(data):
                await self.edge.gate.write(at, data)
            else:
                await self.edge.gate.zeroes(at, len(data))
        except OSError as error:
            assert error.errno == errno.ENOSPC
            return False
        return True

    async def look(self) -> None:
        while self.writing:
            at = self.source.randrange(SIZE)
            length = self.source.randrange(1, min(self.source.choice((4 * KIB, MIB)), SIZE - at) + 1)
            try:
                data = await self.snap.object.read(at, length)
            except OSError as error:
                assert error.errno == errno.EACCES
                clusters = set(range(at // CLUSTER, (at + length - 1) // CLUSTER + 1))
                assert self.node.snapshot_error is not None or clusters & self.hidden
            else:
                assert data == self.before[at : at + length]

    async def forget(self) -> None:
        while self.writing:
            first = self.source.randrange(SIZE // CLUSTER - 2)
            self.hidden |= {first, first + 1}
            await self.snap.object.discard(first * CLUSTER, 2 * CLUSTER)
            await fails(self.snap.object.read(first * CLUSTER, 1), errno.EACCES)
            await asyncio.sleep(0.03)

    async def drain(self) -> None:
        while self.writing:
            async with self.graph.change() as change:
                await change.drain(self.node)
            await asyncio.sleep(0.005)

    async def close(self) -> None:
        await self.edge.hold()
        await self.graph.detach_root(self.edge)


async def user_of(graph: Graph, name: str) -> RootEdge:
    return await graph.attach_root("guest", graph.get(name), Perm.CONSISTENT_READ | Perm.WRITE, Perm.ALL)


@pytest.mark.parametrize("policy", ["break-guest-write", "break-snapshot"])
@pytest.mark.parametrize("seed", range(4))
async def test_the_snapshot_stays_whatever_happens(
    graph: Graph, scratch: Path, policy: str, seed: int
) -> None:
    scene = Scene(graph, filled(scratch / "disk", seed), seed)
    sectors = [cluster * 128 for cluster in random.Random(seed).sample(range(SIZE // CLUSTER), 8)]
    late = [{"errno": 0, "x-delay-ns": 20_000_000, "sector": at, "once": True} for at in sectors[:4]]
    rules = [{"errno": errno.ENOSPC, "sector": at, "once": True} for at in sectors[4:]]
    await scene.open(scratch, failing(scratch, *late, *rules), policy)
    lanes = [scene.write(lane) for lane in range(LANES)]
    await asyncio.wait_for(
        asyncio.gather(*lanes, scene.look(), scene.look(), scene.forget(), scene.drain()), 60
    )
    assert await scene.edge.gate.read(0, SIZE) == scene.image
    if policy == "break-snapshot":
        assert not scene.errors
    else:
        assert scene.node.snapshot_error is None
        for cluster in set(range(SIZE // CLUSTER)) - scene.hidden:
            at = cluster * CLUSTER
            assert await scene.snap.object.read(at, CLUSTER) == scene.before[at : at + CLUSTER]
    await scene.close()


async def test_first_writes_ask_nobody(graph: Graph, scratch: Path) -> None:
    before = filled(scratch / "disk")
    node = await guarded(graph, scratch)
    snap = await snapshot_of(graph)
    await asyncio.gather(*(node.object.write(at, b"x") for at in range(0, SIZE, 48 * KIB)))
    await node.object.zeroes(0, SIZE)
    assert not any(node.object.counters()["faults"].values())
    assert node.copied == -(-SIZE // CLUSTER)
    assert await snap.object.read(0, SIZE) == before


async def test_a_write_waits_for_readers_of_its_own_clusters_only(graph: Graph, scratch: Path) -> None:
    before = filled(scratch / "disk")
    slow = {
        "event": "none",
        "iotype": "read",
        "errno": 0,
        "x-delay-ns": 500_000_000,
        "sector": 8,
        "once": True,
    }
    disk = {"driver": "blkdebug", "image": file(scratch / "disk"), "inject-error": [slow]}
    node = await guarded(graph, scratch, file=disk)
    snap = await snapshot_of(graph)
    reading = asyncio.ensure_future(snap.object.read(4096, 8192))
    await asyncio.sleep(0.05)
    await node.object.write(CLUSTER, b"x" * CLUSTER)
    assert not reading.done()
    await node.object.write(0, b"x" * CLUSTER)
    assert reading.done()
    assert await reading == before[4096 : 4096 + 8192]


async def test_a_drain_waits_for_a_copy_that_is_under_way(graph: Graph, scratch: Path) -> None:
    before = filled(scratch / "disk")
    slow = failing(scratch, {"errno": 0, "x-delay-ns": 400_000_000, "once": True})
    node = await guarded(graph, scratch, slow)
    snap = await snapshot_of(graph)
    edge = await user_of(graph, "cbw")
    writing = asyncio.ensure_future(edge.gate.write(0, b"x" * 4096))
    await asyncio.sleep(0.05)
    assert not writing.done()
    async with graph.change() as change:
        await change.drain(node)
        assert node.copied == 1
        assert (scratch / "target").read_bytes()[:CLUSTER] == before[:CLUSTER]
    await writing
    assert await snap.object.read(0, SIZE) == before
    await edge.hold()
    await graph.detach_root(edge)


async def test_each_request_has_its_own_time(graph: Graph, scratch: Path) -> None:
    """Of three that wait for one copy, the last still sees it come through."""
    before = filled(scratch / "disk")
    slow = failing(scratch, {"errno": 0, "x-delay-ns": 1_900_000_000, "once": True})
    node = await guarded(graph, scratch, slow, cbw_timeout=1)
    snap = await snapshot_of(graph)
    loop = asyncio.get_running_loop()

    async def write(after: float) -> tuple[int, float]:
        await asyncio.sleep(after)
        begun = loop.time()
        try:
            await node.object.write(int(after * 10) * 4096, b"x" * 4096)
        except OSError as error:
            return error.errno or 0, loop.time() - begun
        return 0, loop.time() - begun

    (first, took), (second, also), (third, _) = await asyncio.gather(write(0), write(0.5), write(1.4))
    assert (first, second, third) == (errno.ETIMEDOUT, errno.ETIMEDOUT, 0)
    assert 0.9 < took < 1.4 and 0.9 < also < 1.4
    assert await snap.object.read(0, SIZE) == before


async def test_what_is_forgotten_while_its_copy_fails(graph: Graph, scratch: Path) -> None:
    filled(scratch / "disk")
    late = failing(scratch, {"errno": errno.ENOSPC, "x-delay-ns": 300_000_000, "once": True})
    node = await guarded(graph, scratch, late)
    snap = await snapshot_of(graph)
    writing = asyncio.ensure_future(node.object.write(0, b"x"))
    await asyncio.sleep(0.05)
    await snap.object.discard(0, CLUSTER)
    await fails(writing, errno.ENOSPC)
    await node.object.write(0, b"x")
    await fails(snap.object.read(0, 1), errno.EACCES)


async def test_much_that_is_a_hole_is_not_read(graph: Graph, scratch: Path) -> None:
    with (scratch / "disk").open("wb") as out:
        out.truncate(1 << 36)
    node = await guarded(graph, scratch, file(scratch / "target", 1 << 36))
    await asyncio.wait_for(node.object.discard(0, 1 << 36), 20)
    assert node.below.counters()["bytes"]["read"] == 0
    assert node.copied == 1 << 20
    assert (scratch / "target").stat().st_blocks * 512 < MIB
