# SPDX-License-Identifier: Apache-2.0
"""The throttle filter in a graph: data, limits that change, drains that do not wait, groups."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from target.config.parse import parse_object
from target.drivers.filter.throttle import ThrottleNode
from target.graph.errors import BlockError
from target.graph.graph import Graph
from target.graph.node import BlockdevRef
from target.graph.permissions import Perm
from target.graph.registry import parse_blockdev
from target.throttle_group import ThrottleGroup
from tests.support.random_work import random_work
from tests.support.tools import create_image

pytestmark = pytest.mark.timed

KIB, MIB = 1 << 10, 1 << 20
SIZE = 2 * MIB
RW = Perm.CONSISTENT_READ | Perm.WRITE


def group(graph: Graph, name: str = "g", **limits: int) -> ThrottleGroup:
    """A group with limits given as iops_total=1."""
    given = {key.replace("_", "-"): value for key, value in limits.items()}
    kind, options = parse_object({"qom-type": "throttle-group", "id": name, "limits": given})
    made = kind(options, graph.datapath)
    made.start()
    assert isinstance(graph.objects, dict) and isinstance(made, ThrottleGroup)
    graph.objects[name] = made
    return made


async def throttled(graph: Graph, name: str = "t", **options: Any) -> ThrottleNode:
    below = {"driver": "null-co", "size": SIZE, "read-zeroes": True}
    node = await graph.add(
        {"driver": "throttle", "node-name": name, "throttle-group": "g", "file": below} | options
    )
    assert isinstance(node, ThrottleNode)
    return node


async def took(node: ThrottleNode, requests: int, length: int = 512) -> float:
    began = time.monotonic()
    await asyncio.gather(*(node.object.read(0, length) for _ in range(requests)))
    return time.monotonic() - began


@pytest.mark.parametrize("place", ["above", "below"])
async def test_data_are_those_of_the_child(graph: Graph, scratch: Path, place: str) -> None:
    group(graph, iops_total=2000, bps_write=40 * MIB, iops_size=64 * KIB)
    image = create_image(scratch / "disk", str(SIZE))
    file: dict[str, Any] = {"driver": "file", "filename": str(image)}
    throttle = {"driver": "throttle", "throttle-group": "g"}
    if place == "above":
        top = throttle | {"file": {"driver": "qcow2", "file": file}}
    else:
        top = {"driver": "qcow2", "file": throttle | {"file": file}}
    node = await graph.add(top | {"node-name": "top"})
    model = bytearray(SIZE)
    await random_work(node.object, model, seed=1, operations=25)
    await graph.remove("top")
    below = await graph.add({"driver": "qcow2", "node-name": "again", "file": file})
    assert await below.object.read(0, SIZE) == model


async def test_requests_wait_and_are_counted(graph: Graph) -> None:
    group(graph, iops_read=100)
    node = await throttled(graph)
    assert 0.25 < await took(node, 41) < 0.6  # 10 at once
    assert node.counters()["throttled"] >= 29
    began = time.monotonic()
    await asyncio.gather(*(node.object.write(0, bytes(512)) for _ in range(50)), node.object.flush())
    assert time.monotonic() - began < 0.2, "writes have no limit"


async def test_what_a_large_request_costs(graph: Graph) -> None:
    changed = group(graph, iops_total=100, iops_size=4096)
    node = await throttled(graph)
    await node.object.read(0, 40 * KIB)  # ten requests' worth
    assert 0.03 < await took(node, 5) < 0.3
    changed.set_limits({"iops-total": 0, "iops-size": 0, "bps-total": MIB})
    assert 0.12 < await took(node, 5, 64 * KIB) < 0.4


async def test_a_request_through_two_formats_is_charged_once(graph: Graph, scratch: Path) -> None:
    """One read of many scattered clusters: its parts pass, and the throttle knows it."""
    image = create_image(scratch / "disk", str(SIZE), options="cluster_size=4k")
    group(graph, iops_total=20)
    file = {"driver": "file", "filename": str(image)}
    node = await throttled(graph, file={"driver": "qcow2", "file": file})
    below = node.children["file"].node.object
    for at in range(0, SIZE, 8 * KIB):
        await below.write(at, b"x" * 4096)
    began = time.monotonic()
    await asyncio.gather(node.object.read(0, SIZE), node.object.read(0, SIZE))
    assert time.monotonic() - began < 1


async def test_limits_change_for_those_that_wait(graph: Graph) -> None:
    changed = group(graph, iops_total=1)
    node = await throttled(graph)
    waiting = asyncio.gather(*(node.object.read(0, 512) for _ in range(5)))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    changed.set_limits({"iops-total": 100000})
    await asyncio.wait_for(waiting, 0.5)
    with pytest.raises(BlockError, match="cannot be used at the same time"):
        changed.set_limits({"iops-read": 5})
    assert changed.get("limits")["iops-total"] == 100000 and changed.get("x-iops-read") == 0
    await changed.set("limits", {"iops-total": 0, "iops-read": 5})
    assert changed.numbers["iops-read"] == 5
    with pytest.raises(BlockError, match="Property cannot be set after initialization"):
        await changed.set("x-iops-read", 7)


async def test_a_drain_does_not_wait(graph: Graph) -> None:
    group(graph, iops_total=1)
    node = await throttled(graph)
    edge, other = [await graph.attach_root(f"user {i}", node, RW, Perm.ALL) for i in range(2)]
    reads = asyncio.gather(*(edge.gate.read(0, 512) for _ in range(20)))
    more = asyncio.ensure_future(other.gate.read(0, 512))
    await asyncio.sleep(0.05)
    began = time.monotonic()
    await edge.gate.drain()
    assert time.monotonic() - began < 0.3
    await reads
    assert not more.done(), "other users still wait"
    edge.gate.resume()
    await other.gate.drain()
    await asyncio.wait_for(more, 1)
    for user in (edge, other):
        await graph.detach_root(user)


async def test_reopen_with_another_group(graph: Graph) -> None:
    slow, fast = group(graph, iops_total=1), group(graph, "fast")
    node = await throttled(graph)
    edge = await graph.attach_root("a user", node, RW, Perm.ALL)
    reads = asyncio.gather(*(edge.gate.read(0, 512) for _ in range(5)))
    below = {"driver": "null-co", "size": SIZE, "read-zeroes": True}
    options = {"driver": "throttle", "node-name": "t", "throttle-group": "fast", "file": below}
    with pytest.raises(BlockError, match="Throttle group 'none' does not exist"):
        await reopen(graph, parse_blockdev(options | {"throttle-group": "none"}))
    assert (slow.in_use, fast.in_use) == (True, False)
    await reopen(graph, parse_blockdev(options))
    await asyncio.wait_for(reads, 1)
    assert (slow.in_use, fast.in_use) == (False, True)
    assert await took(node, 100) < 0.5
    await edge.hold()
    await graph.detach_root(edge)
    await graph.remove("t")
    assert not fast.in_use


async def reopen(graph: Graph, ref: BlockdevRef) -> None:
    async with graph.change() as change:
        await change.reopen([ref])


async def test_a_member_is_replaced_under_load(graph: Graph) -> None:
    """Taken out and put back while a client reads: no error, no request is left behind."""
    group(graph, iops_total=500)
    node = await throttled(graph)
    below = node.children["file"].node
    edge = await graph.attach_root("a user", node, RW, Perm.ALL)
    stop = False

    async def client() -> int:
        count = 0
        while not stop:
            await edge.gate.read(0, 512)
            count += 1
        return count

    clients = asyncio.gather(*(client() for _ in range(8)))
    for _ in range(10):
        for target in (below, node):
            async with graph.change() as change:
                await change.replace(edge, target)
            await asyncio.sleep(0.005)
    stop = True
    assert sum(await asyncio.wait_for(clients, 2)) > 100
    await edge.hold()
    await graph.detach_root(edge)


@pytest.mark.parametrize("count", [8, 9])
async def test_throttles_on_throttles(graph: Graph, count: int) -> None:
    group(graph, iops_total=1000)
    options: dict[str, Any] = {"driver": "null-co", "size": SIZE}
    for _ in range(count):
        options = {"driver": "throttle", "throttle-group": "g", "file": options}
    if count > 8:
        with pytest.raises(BlockError, match="more than 8 throttle nodes"):
            await graph.add(options | {"node-name": "top"})
        return
    node = await graph.add(options | {"node-name": "top"})
    assert await node.object.read(0, 512) == bytes(512)
