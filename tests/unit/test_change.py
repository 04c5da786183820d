# SPDX-License-Identifier: Apache-2.0
"""Changes of a graph that is used: a client reads and writes meanwhile, and failures undo all."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from target.config.parse import parse_blockdev
from target.graph.edge import RootEdge
from target.graph.errors import BlockError
from target.graph.graph import Graph
from target.graph.permissions import Perm
from tests.support.graph_shape import shape
from tests.support.tools import create_image
from tests.support.verifying import VerifyingClient

MIB = 1 << 20
SIZE = 4 * MIB
BLOCK = 4096
RW = Perm.CONSISTENT_READ | Perm.WRITE


class Client(VerifyingClient):
    """Through a gate, as exports work."""

    def __init__(self, edge: RootEdge) -> None:
        super().__init__(edge.gate, SIZE)
        self.edge = edge


@contextlib.asynccontextmanager
async def client(graph: Graph, name: str) -> AsyncIterator[Client]:
    edge = await graph.attach_root("a client", graph.get(name), RW, Perm.ALL)
    made = Client(edge)
    try:
        yield made
        await made.verify()
    finally:
        made.stopping = True
        await asyncio.wait({made.task})
        await edge.hold()
        await graph.detach_root(edge)


def disk(path: Path, name: str = "disk") -> dict[str, Any]:
    path.touch()
    os.truncate(path, SIZE)
    return {"driver": "file", "node-name": name, "filename": str(path)}


async def test_a_filter_comes_and_goes_above_a_disk_and_below_it(graph: Graph, tmp_path: Path) -> None:
    await graph.add(disk(tmp_path / "a", "file"))
    top = await graph.add({"driver": "raw", "node-name": "top", "file": "file"})
    async with client(graph, "top") as user:
        for _ in range(10):
            await user.some()
            async with graph.change() as change:
                above = await change.add({"driver": "raw", "node-name": "above", "file": "top"})
                await change.replace(user.edge, above)
                below = await change.add({"driver": "blkdebug", "node-name": "below", "image": "file"})
                await change.replace(top.children["file"], below)
            await user.some()
            async with graph.change() as change:
                await change.replace_node(above, top)
                await change.replace_node(below, graph.get("file"))
                change.remove("above")
                change.remove("below")
        assert set(graph.nodes) == {"file", "top"}


async def test_a_change_that_fails_at_its_end_leaves_all_as_it_was(graph: Graph, tmp_path: Path) -> None:
    await graph.add(disk(tmp_path / "a", "file"))
    top = await graph.add({"driver": "raw", "node-name": "top", "file": "file"})
    await graph.add({"driver": "null-co", "node-name": "spare"})
    async with client(graph, "top") as user:
        for _ in range(5):
            await user.some()
            before = shape(graph)
            with pytest.raises(ZeroDivisionError):
                async with graph.change() as change:
                    below = await change.add({"driver": "raw", "node-name": "below", "file": "file"})
                    await change.replace(top.children["file"], below)
                    change.remove("spare")
                    await change.add(
                        {"driver": "raw", "node-name": "spare", "file": {"driver": "null-co", "size": 512}}
                    )
                    change.attach_root("somebody", graph.get("below"), Perm.CONSISTENT_READ, Perm.ALL)
                    await change.resize(graph.get("file"), 2 * SIZE)
                    await user.some(0)
                    raise ZeroDivisionError
            assert shape(graph) == before
            assert os.stat(tmp_path / "a").st_size == SIZE


async def test_a_conflict_of_permissions_undoes_the_replacement(graph: Graph, tmp_path: Path) -> None:
    await graph.add(disk(tmp_path / "a", "a"))
    await graph.add({"driver": "null-co", "node-name": "read-only", "size": SIZE, "read-only": True})
    await graph.add({"driver": "raw", "node-name": "top", "file": "a"})
    async with client(graph, "top") as user:
        await user.some()
        before = shape(graph)
        with pytest.raises(BlockError, match="Block node is read-only"):
            async with graph.change() as change:
                await change.replace_node(graph.get("a"), graph.get("read-only"))
        assert shape(graph) == before
        await user.some()


async def test_a_node_does_not_become_its_own_child(graph: Graph) -> None:
    await graph.add({"driver": "null-co", "node-name": "a"})
    top = await graph.add({"driver": "raw", "node-name": "top", "file": "a"})
    with pytest.raises(BlockError, match="Making 'top' a file child of 'top' would create a cycle"):
        async with graph.change() as change:
            await change.replace(top.children["file"], top)


async def test_a_drain_that_takes_too_long_refuses_the_change(
    graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("target.graph.change.holding.DRAIN_SECONDS", 0.05)
    slow = await graph.add({"driver": "null-co", "node-name": "slow", "latency-ns": 400_000_000})
    await graph.add({"driver": "null-co", "node-name": "other"})
    edge = await graph.attach_root("block export 'e'", slow, RW, Perm.ALL)
    reading = asyncio.ensure_future(edge.gate.read(0, 512))
    await asyncio.sleep(0.02)
    before = shape(graph)
    with pytest.raises(BlockError, match="requests of block export 'e' did not finish in"):
        async with graph.change() as change:
            await change.replace(edge, graph.get("other"))
    assert shape(graph) == before
    await asyncio.wait_for(edge.gate.write(0, bytes(512)), 5)
    await reading
    await graph.detach_root(edge)


async def test_several_hold_an_edge_and_the_last_lets_go(graph: Graph) -> None:
    node = await graph.add({"driver": "null-co", "node-name": "n"})
    edge = await graph.attach_root("x", node, RW, Perm.ALL)
    await edge.hold()
    await edge.hold()
    reading = asyncio.ensure_future(edge.gate.read(0, 512))
    edge.let_go()
    await asyncio.sleep(0.02)
    assert not reading.done()
    edge.let_go()
    await asyncio.wait_for(reading, 5)
    await graph.detach_root(edge)


async def test_reopen_replaces_the_file_of_a_disk_that_is_used(graph: Graph, tmp_path: Path) -> None:
    await graph.add(disk(tmp_path / "a", "file"))
    await graph.add({"driver": "raw", "node-name": "top", "file": "file"})
    await graph.add({"driver": "blkdebug", "node-name": "debug", "image": "file"})
    async with client(graph, "top") as user:
        for child in ("debug", "file") * 5:
            await user.some()
            async with graph.change() as change:
                await change.reopen([parse_blockdev({"driver": "raw", "node-name": "top", "file": child})])
            assert graph.get("top").children["file"].node.name == child


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"driver": "null-co", "node-name": "top"}, "Cannot change the option 'driver'"),
        ({"driver": "raw", "node-name": "top", "file": "nobody"}, "nor node-name='nobody'"),
        ({"driver": "raw", "node-name": "top", "file": "top"}, "would create a cycle"),
        ({"driver": "raw", "node-name": "no", "file": "file"}, "Failed to find node with node-name='no'"),
        ({"driver": "raw", "file": "file"}, "node-name not specified"),
        (
            {"driver": "raw", "node-name": "top", "file": "file", "force-share": True},
            "Cannot change the option 'force-share'",
        ),
        (
            {"driver": "raw", "node-name": "top", "file": "file", "read-only": True},
            "Read-only block node 'top' cannot support read-write users: block export 'e'",
        ),
        (
            {"driver": "raw", "node-name": "top", "file": "file", "detect-zeroes": "unmap"},
            "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
        ),
    ],
)
async def test_what_a_reopen_refuses(graph: Graph, options: dict[str, Any], message: str) -> None:
    await graph.add({"driver": "null-co", "node-name": "file", "size": MIB})
    top = await graph.add({"driver": "raw", "node-name": "top", "file": "file"})
    edge = await graph.attach_root("block export 'e'", top, RW, Perm.ALL)
    before = shape(graph)
    with pytest.raises(BlockError, match=message):
        async with graph.change() as change:
            await change.reopen([parse_blockdev(options)])
    assert shape(graph) == before
    await graph.detach_root(edge)


async def test_a_resize_is_permitted_at_once_or_not_at_all(graph: Graph, tmp_path: Path) -> None:
    """Not at the end of a transaction, when it is over: the image of a format is not resized under it."""
    create_image(tmp_path / "d.qcow2", "1M")
    file = {"driver": "file", "node-name": "file", "filename": str(tmp_path / "d.qcow2")}
    await graph.add(file)
    await graph.add({"driver": "qcow2", "node-name": "disk", "file": "file"})
    size = os.stat(tmp_path / "d.qcow2").st_size
    with pytest.raises(BlockError, match="Permission conflict on node 'file': permissions 'resize'"):
        async with graph.change() as change:
            change.lenient = True
            await change.resize(graph.get("file"), 4 * MIB)
    assert os.stat(tmp_path / "d.qcow2").st_size == size
