# SPDX-License-Identifier: Apache-2.0
"""quorum and blkverify over children that fail, lie, or answer when they are told to."""

from __future__ import annotations

import asyncio
import errno
import itertools
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from target.datapath import FAST_ZERO, FUA, HOLE, ZERO, Extent
from target.drivers.filter.replicas import QuorumFailure, QuorumReportBad
from target.events import Event
from target.graph.errors import BlockError
from target.graph.graph import Graph
from target.graph.node import Node
from target.graph.permissions import Perm
from tests.support.replicas import Replica

SIZE = 65536
BLOCK = 512
Options = dict[str, Any]


class World:
    """A graph with a quorum ``q`` (or blkverify) over the children a, b, c..."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.events: list[Event] = []
        self.last_words: list[str] = []
        graph.events.listen(self.events.append)
        graph.fatal = self.last_words.append
        self.node: Node

    def child(self, name: str) -> Replica:
        node = self.graph.get(name)
        assert isinstance(node, Replica)
        return node

    async def make(self, children: str = "abc", threshold: int = 2, **options: Any) -> Node:
        for name in children:
            await self.graph.add({"driver": "test-replica", "node-name": name})
        rest = {name.replace("_", "-"): value for name, value in options.items()}
        self.node = await self.graph.add(
            {
                "driver": "quorum",
                "node-name": "q",
                "children": list(children),
                "vote-threshold": threshold,
                **rest,
            }
        )
        return self.node

    async def make_blkverify(self) -> Node:
        for name in "tr":
            await self.graph.add({"driver": "test-replica", "node-name": name})
        self.node = await self.graph.add({"driver": "blkverify", "node-name": "q", "test": "t", "raw": "r"})
        return self.node

    async def heard(self) -> list[Event]:
        """What was sent since the last call."""
        await asyncio.sleep(0.01)
        events, self.events[:] = list(self.events), []
        return events


@pytest.fixture
def world(graph: Graph) -> World:
    return World(graph)


async def fails(request: Any, number: int = errno.EIO) -> None:
    with pytest.raises(OSError) as caught:
        await request
    assert caught.value.errno == number


def bad(node: str, offset: int, length: int, error: str | None = None, type: Any = "read") -> Event:
    return QuorumReportBad(
        type=type, error=error, node_name=node, sector_num=offset // BLOCK, sectors_count=length // BLOCK
    )


def failure(offset: int, length: int) -> Event:
    return QuorumFailure(reference="q", sector_num=offset // BLOCK, sectors_count=length // BLOCK)


# ---- data ----


@pytest.mark.parametrize("pattern", ["quorum", "fifo"])
@pytest.mark.parametrize("children", ["a", "ab", "abc", "abcde"])
async def test_a_random_workload_is_as_without_it(world: World, pattern: str, children: str) -> None:
    q = await world.make(children, 1, read_pattern=pattern)
    model, rng = bytearray(SIZE), random.Random(children + pattern)
    for _ in range(150):
        offset = rng.randrange(SIZE - 1)
        length = rng.randrange(1, min(SIZE - offset, 9000) + 1)
        match rng.randrange(4):
            case 0:
                model[offset : offset + length] = bytes(length)
                await q.object.zeroes(offset, length)
            case 1:
                data = rng.randbytes(length)
                model[offset : offset + length] = data
                await q.object.write(offset, data, rng.choice([0, FUA]))
            case _:
                assert await q.object.read(offset, length) == model[offset : offset + length]
    await q.object.flush()
    await q.object.discard(0, SIZE)
    for name in children:
        assert world.child(name).data == model
        assert world.child(name).calls["discard"] == 0
        assert world.child(name).calls["flush"] > 1  # with FUA, too
    assert not await world.heard()


async def test_requests_longer_than_a_round(graph: Graph, scratch: Path) -> None:
    size = 5 << 20
    children = []
    for i in range(3):
        (scratch / f"{i}").write_bytes(bytes(size))
        children.append({"driver": "file", "filename": str(scratch / f"{i}")})
    q = await graph.add({"driver": "quorum", "node-name": "q", "children": children, "vote-threshold": 2})
    data = random.randbytes(size - 700)
    await q.object.write(300, data)
    with (scratch / "1").open("r+b") as file:
        file.seek(3_000_000)
        file.write(b"damage")
    assert await q.object.read(300, len(data)) == data
    assert (scratch / "0").read_bytes() == (scratch / "2").read_bytes()


@pytest.mark.parametrize("order", list(itertools.permutations("abc")))
async def test_children_may_answer_in_any_order(world: World, order: tuple[str, ...]) -> None:
    q = await world.make("abc", 2, rewrite_corrupted=True)
    data = random.randbytes(4096)

    async def answer_in_order(rounds: int) -> None:
        for _ in range(rounds):
            for name in order:
                child = world.child(name)
                while not child.held:
                    await asyncio.sleep(0)
                child.held.pop(0).set_result(None)

    for name in order:
        world.child(name).holding = True
    writing = asyncio.ensure_future(q.object.write(0, data))
    await answer_in_order(1)
    await writing
    world.child(order[0]).data[100] ^= 1
    reading = asyncio.ensure_future(q.object.read(0, 4096))
    await answer_in_order(2)  # it looks again before it believes that there is damage
    while not world.child(order[0]).held:
        await asyncio.sleep(0)
    assert not reading.done()  # before the repair is
    world.child(order[0]).held.pop().set_result(None)
    assert await reading == data
    assert world.child(order[0]).data[:4096] == data


async def test_an_outvoted_child_is_reported_and_repaired(world: World) -> None:
    q = await world.make("abc", 2, rewrite_corrupted=True)
    await q.object.write(0, b"x" * SIZE)
    world.child("b").data[5000] = 0
    assert await q.object.read(4096, 2048) == b"x" * 2048
    assert await world.heard() == [bad("b", 4096, 2048)]
    assert world.child("b").data == b"x" * SIZE
    assert await q.object.read(4096, 2048) == b"x" * 2048
    assert not await world.heard()


async def test_without_rewriting_it_stays_as_it_is(world: World) -> None:
    q = await world.make("abc", 2)
    world.child("b").data[5000] = 1
    assert await q.object.read(0, SIZE) == bytes(SIZE)
    assert await world.heard() == [bad("b", 0, SIZE)]
    assert world.child("b").data[5000] == 1
    assert world.child("b").calls["write"] == 0


async def test_too_few_agree(world: World) -> None:
    q = await world.make("abc", 2)
    for i, name in enumerate("abc"):
        world.child(name).data[700] = i
    await fails(q.object.read(512, 512))
    assert await world.heard() == [failure(512, 512)]
    assert await q.object.read(1024, 512) == bytes(512)


async def test_a_tie_goes_to_the_later_version(world: World) -> None:
    """As in QEMU, with a threshold that permits it."""
    q = await world.make("abcd", 1)
    for name, value in zip("abcd", (1, 2, 2, 1), strict=True):
        world.child(name).data[0] = value
    assert (await q.object.read(0, 512))[0] == 2


# ---- errors ----


@pytest.mark.parametrize("method", ["read", "write", "write_zeroes", "flush"])
async def test_one_child_may_fail(world: World, method: str) -> None:
    q = await world.make("abc", 2)
    requests: dict[str, Callable[[], Awaitable[bytes | None]]] = {
        "read": lambda: q.object.read(512, 1024),
        "write": lambda: q.object.write(512, bytes(1024)),
        "write_zeroes": lambda: q.object.zeroes(512, 1024),
        "flush": lambda: q.object.flush(),
    }
    kind = {"write_zeroes": "write"}.get(method, method)
    world.child("c").failing[method] = errno.ENOSPC
    await requests[method]()
    where = (0, 0) if method == "flush" else (512, 1024)
    text = "No space left on device"
    assert await world.heard() == [bad("c", *where, text, kind)]
    world.child("a").failing[method] = errno.EACCES
    await fails(requests[method](), errno.ENOSPC)  # as many say this; it came up last
    expected = [bad("a", *where, "Permission denied", kind), bad("c", *where, text, kind)]
    if method != "flush":
        expected.append(failure(*where))
    assert await world.heard() == expected
    world.child("b").failing[method] = errno.EACCES
    await fails(requests[method](), errno.EACCES)


async def test_fifo_asks_the_next_child_only_after_an_error(world: World) -> None:
    q = await world.make("abc", 1, read_pattern="fifo")
    world.child("a").data[:4] = b"AAAA"
    assert await q.object.read(0, 4) == b"AAAA"
    assert world.child("b").calls["read"] == 0
    world.child("a").failing["read"] = world.child("b").failing["read"] = errno.EIO
    assert await q.object.read(0, 4) == bytes(4)
    text = "Input/output error"
    partial = QuorumReportBad(type="read", error=text, node_name="a", sector_num=0, sectors_count=1)
    assert (await world.heard())[0] == partial
    world.child("c").failing["read"] = errno.ENOMEM
    await fails(q.object.read(0, 4), errno.ENOMEM)
    assert not any(isinstance(event, QuorumFailure) for event in await world.heard())


async def test_zeroes_that_are_fast_for_some_are_not_fast(world: World) -> None:
    q = await world.make("abc", 2)
    world.child("b").failing["write_zeroes"] = errno.ENOTSUP
    await fails(q.object.zeroes(0, 512, FAST_ZERO), errno.ENOTSUP)
    assert not await world.heard()


async def test_block_status(world: World) -> None:
    q = await world.make("abc", 2)
    both = ZERO | HOLE
    world.child("a").extents = [Extent(4096, 0), Extent(SIZE - 4096, both)]
    world.child("b").extents = [Extent(8192, 0), Extent(SIZE - 8192, both)]
    world.child("c").extents = [Extent(8192, both), Extent(1024, both), Extent(SIZE - 9216, ZERO)]
    assert await q.object.status(0, SIZE) == [
        Extent(8192, 0),
        Extent(1024, both),
        Extent(SIZE - 9216, ZERO),
    ]
    world.child("c").failing["block_status"] = errno.EIO
    assert await q.object.status(0, SIZE) == [Extent(SIZE, 0)]
    assert await world.heard() == [bad("c", 0, SIZE, "Input/output error")]


# ---- options and permissions ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"children": []}, "Number of provided children must be 1 or more"),
        ({"vote-threshold": 0}, "Parameter 'vote-threshold' expects a value >= 1"),
        ({"vote-threshold": -1}, "Parameter 'vote-threshold' expects a value >= 1"),
        ({"vote-threshold": 3}, "threshold may not exceed children count"),
        (
            {"blkverify": True, "vote-threshold": 1},
            "blkverify=on can only be set if there are exactly two files and vote-threshold is 2",
        ),
        (
            {"blkverify": True, "rewrite-corrupted": True},
            "rewrite-corrupted=on cannot be used with blkverify=on",
        ),
        ({"blkverify": True, "read-pattern": "fifo"}, "blkverify=on has no effect with read-pattern=fifo"),
        (
            {"rewrite-corrupted": True, "read-pattern": "fifo"},
            "rewrite-corrupted=on has no effect with read-pattern=fifo",
        ),
        ({"read-pattern": "x"}, "Parameter 'read-pattern' does not accept value 'x'"),
        ({"children": ["a"] * 65}, "Too many children: 65, not more than 64 are supported"),
    ],
)
async def test_options_that_are_refused(graph: Graph, options: Options, message: str) -> None:
    for name in "ab":
        await graph.add({"driver": "test-replica", "node-name": name})
    with pytest.raises(BlockError, match=message):
        await graph.add(
            {"driver": "quorum", "node-name": "q", "children": ["a", "b"], "vote-threshold": 2} | options
        )
    assert list(graph.nodes) == ["a", "b"]
    assert not graph.get("a").parents


async def test_children_of_different_sizes(graph: Graph) -> None:
    children = [{"driver": "test-replica", "size": size} for size in (65536, 131072)]
    with pytest.raises(BlockError, match="Could not refresh total sector count: Input/output error"):
        await graph.add({"driver": "quorum", "node-name": "q", "children": children, "vote-threshold": 1})


async def test_permissions(world: World) -> None:
    q = await world.make("abc", 2)
    edge = await world.graph.attach_root("a test", q, Perm.CONSISTENT_READ | Perm.WRITE, Perm.ALL)
    for name in "abc":
        [used] = world.child(name).parents
        assert used.perm == Perm.CONSISTENT_READ | Perm.WRITE
        assert used.shared == Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED
    await world.graph.detach_root(edge)


async def test_rewriting_needs_the_permission_to_write(world: World) -> None:
    await world.make("abc", 2, rewrite_corrupted=True)
    assert all(Perm.WRITE in world.child(name).parents[0].perm for name in "abc")
    other = World(world.graph)
    await other.graph.add({"driver": "test-replica", "node-name": "ro", "read-only": True})
    options = {"children": ["ro"], "vote-threshold": 1, "rewrite-corrupted": True}
    with pytest.raises(BlockError, match="Block node is read-only"):
        await other.graph.add({"driver": "quorum", "node-name": "q2", **options})


async def test_resizing_is_refused(world: World) -> None:
    q = await world.make("abc", 2)
    with pytest.raises(BlockError, match="Image format driver does not support resize"):
        await world.graph.resize(q, 2 * SIZE)


# ---- children that come and go ----


async def test_children_come_and_go(world: World) -> None:
    q = await world.make("abc", 2)
    graph = world.graph
    await q.object.write(0, b"1" * 512)
    async with graph.change() as change:
        await q.remove_child(change, q.children["children.1"])
    assert list(q.children) == ["children.0", "children.2"]
    await q.object.write(0, b"2" * 512)
    assert [world.child(name).data[0] for name in "abc"] == [ord("2"), ord("1"), ord("2")]
    with pytest.raises(BlockError, match="children cannot be lower than the vote threshold 2"):
        async with graph.change() as change:
            await q.remove_child(change, q.children["children.0"])
    async with graph.change() as change:
        await q.add_child(change, world.child("b"))
    assert list(q.children) == ["children.0", "children.2", "children.3"]
    await q.object.write(0, b"3" * 512)
    assert all(world.child(name).data[0] == ord("3") for name in "abc")
    async with graph.change() as change:
        await q.remove_child(change, q.children["children.3"])
        await q.add_child(change, world.child("b"))
    assert list(q.children) == ["children.0", "children.2", "children.3"]
    names = [ref.name for ref in q.options.children]  # type: ignore[attr-defined]
    assert names == ["a", "c", "b"]


async def test_a_change_that_is_undone(world: World) -> None:
    q = await world.make("abc", 2, read_pattern="fifo")
    before = q.options
    for name, value in zip("abc", b"ABC", strict=True):
        world.child(name).data[0] = value
    with pytest.raises(BlockError, match="given up"):
        async with world.graph.change() as change:
            await q.remove_child(change, q.children["children.0"])
            await change.add({"driver": "test-replica", "node-name": "d"})
            await q.add_child(change, world.graph.get("d"))
            raise BlockError("given up")
    assert sorted(q.children) == ["children.0", "children.1", "children.2"]
    assert q.options == before
    assert (await q.object.read(0, 1)) == b"A"  # it is the first again
    async with world.graph.change() as change:
        await change.add({"driver": "test-replica", "node-name": "d"})
        await q.add_child(change, world.graph.get("d"))
    assert "children.3" in q.children


async def test_children_that_cannot_be_added(world: World) -> None:
    q = await world.make("abc", 2)
    graph = world.graph
    await graph.add({"driver": "test-replica", "node-name": "big", "size": 2 * SIZE})
    for name, message in (
        ("a", "The node a already has a parent"),
        ("big", "node 'q': node 'big' has 131072 bytes, not 65536, and cannot be a child"),
        ("q", "Making 'q' a children.3 child of 'q' would create a cycle"),
    ):
        with pytest.raises(BlockError, match=message):
            async with graph.change() as change:
                await q.add_child(change, graph.get(name))
    assert sorted(q.children) == ["children.0", "children.1", "children.2"]
    pair = await graph.add(
        {
            "driver": "quorum",
            "node-name": "pair",
            "blkverify": True,
            "vote-threshold": 2,
            "children": [{"driver": "test-replica"}] * 2,
        }
    )
    await graph.add({"driver": "test-replica", "node-name": "d"})
    with pytest.raises(BlockError, match="Cannot add a child to a quorum in blkverify mode"):
        async with graph.change() as change:
            await pair.add_child(change, graph.get("d"))


async def test_a_child_is_replaced(world: World) -> None:
    q = await world.make("abc", 2)
    await world.graph.add({"driver": "test-replica", "node-name": "d"})
    async with world.graph.change() as change:
        await change.replace(q.children["children.1"], world.graph.get("d"))
    await q.object.write(0, b"new")
    assert world.child("d").data[:3] == b"new"
    assert world.child("b").data[:3] == bytes(3)
    world.child("d").data[0] = 0
    await q.object.read(0, 512)
    assert await world.heard() == [bad("d", 0, 512)]


# ---- blkverify ----


async def test_quorum_in_blkverify_mode_stops_at_a_difference(world: World) -> None:
    q = await world.make("ab", 2, blkverify=True)
    await q.object.write(0, b"x" * 8192)
    assert await q.object.read(100, 5000) == b"x" * 5000
    world.child("b").data[4242] = 1
    await fails(q.object.read(4096, 1024))
    await asyncio.sleep(0.01)
    assert world.last_words == ["quorum: offset=4096 bytes=1024 contents mismatch at offset 4242"]
    before = [world.child(name).calls.total() for name in "ab"]
    await fails(q.object.read(0, 512))
    await fails(q.object.write(0, bytes(512)))
    await fails(q.object.flush())
    assert [world.child(name).calls.total() for name in "ab"] == before


async def test_blkverify(world: World) -> None:
    q = await world.make_blkverify()
    await q.object.write(0, b"x" * 8192)
    await q.object.zeroes(1000, 1000)
    assert await q.object.read(0, 8192) == b"x" * 1000 + bytes(1000) + b"x" * 6192
    assert world.child("t").data == world.child("r").data
    await q.object.flush()
    assert (world.child("t").calls["flush"], world.child("r").calls["flush"]) == (1, 0)
    await fails(q.object.zeroes(0, 512, FAST_ZERO), errno.ENOTSUP)
    for name in "tr":
        world.child(name).failing["write"] = errno.ENOSPC
    await fails(q.object.write(0, b"y"), errno.ENOSPC)  # both alike
    assert not world.last_words
    world.child("r").data[6000] = 1
    await fails(q.object.read(4096, 4096))
    await asyncio.sleep(0.01)
    assert world.last_words == ["blkverify: read offset=4096 bytes=4096 contents mismatch at offset 6000"]


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("read", "blkverify: read offset=512 bytes=1024 return value mismatch 0 != -5"),
        ("write", "blkverify: write offset=512 bytes=1024 return value mismatch 0 != -5"),
    ],
)
async def test_blkverify_compares_results(world: World, method: str, words: str) -> None:
    q = await world.make_blkverify()
    world.child("r").failing[method] = errno.EIO
    await fails(q.object.read(512, 1024) if method == "read" else q.object.write(512, bytes(1024)))
    await asyncio.sleep(0.01)
    assert world.last_words == [words]


async def test_blkverify_resizes_both(graph: Graph, scratch: Path) -> None:
    files = {}
    for role in ("test", "raw"):
        (scratch / role).write_bytes(bytes(SIZE))
        files[role] = {"driver": "file", "filename": str(scratch / role)}
    q = await graph.add({"driver": "blkverify", "node-name": "q"} | files)
    edge = await graph.attach_root("a test", q, Perm.CONSISTENT_READ | Perm.WRITE, Perm.ALL)
    await graph.resize(q, 2 * SIZE)
    assert (q.size, edge.gate.size) == (2 * SIZE, 2 * SIZE)
    assert {(scratch / role).stat().st_size for role in files} == {2 * SIZE}
    await edge.gate.write(SIZE, b"x" * SIZE)
    assert await edge.gate.read(SIZE, SIZE) == b"x" * SIZE
    await graph.detach_root(edge)


# ---- other options while it is used ----


async def reopen(world: World, **options: Any) -> None:
    given = {"driver": "quorum", "node-name": "q", "children": list("abc"), **options}
    async with world.graph.change() as change:
        await change.reopen([world.graph.ref(given, "")])
    change.raise_failure()


async def test_its_options_change_while_it_is_used(world: World) -> None:
    q = await world.make("abc", 3)
    edge = await world.graph.attach_root("a client", q, Perm.CONSISTENT_READ, Perm.ALL)
    world.child("b").data[700] = 1
    await fails(edge.gate.read(512, 512))
    assert await world.heard() == [failure(512, 512)]
    with pytest.raises(BlockError, match="threshold may not exceed children count"):
        await reopen(world, **{"vote-threshold": 4})
    await fails(edge.gate.read(512, 512))  # as before
    await reopen(world, **{"vote-threshold": 2, "rewrite-corrupted": True})
    world.events.clear()
    assert await edge.gate.read(512, 512) == bytes(512)
    assert await world.heard() == [bad("b", 512, 512)]
    assert world.child("b").data == bytes(SIZE)
    await reopen(world, **{"vote-threshold": 2, "read-pattern": "fifo"})
    before = world.child("b").calls["read"]
    assert await edge.gate.read(0, 512) == bytes(512)
    assert world.child("b").calls["read"] == before
    await edge.hold()
    await world.graph.detach_root(edge)


async def test_its_old_options_are_back_when_a_change_is_undone(world: World) -> None:
    q = await world.make("abc", 3)
    world.child("b").data[700] = 1
    given = {"driver": "quorum", "node-name": "q", "children": list("abc"), "vote-threshold": 2}
    with pytest.raises(BlockError, match="undone"):
        async with world.graph.change() as change:
            await change.reopen([world.graph.ref(given, "")])
            assert await q.object.read(512, 512) == bytes(512)
            raise BlockError("undone")
    assert not change.failures
    await world.heard()
    world.events.clear()
    await fails(q.object.read(512, 512))
    assert await world.heard() == [failure(512, 512)]
