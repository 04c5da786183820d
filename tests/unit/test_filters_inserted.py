# SPDX-License-Identifier: Apache-2.0
"""throttle and copy-on-read come and go, above and below an image with a backing file, while it is used."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from target.graph.graph import Graph
from target.graph.permissions import Perm
from target.throttle_group import ThrottleGroup, ThrottleGroupOptions
from tests.support.random_work import random_work
from tests.support.tools import check_image, create_image, qemu_io

MIB = 1 << 20
SIZE = 2 * MIB
RW = Perm.CONSISTENT_READ | Perm.WRITE


def prepare(graph: Graph, scratch: Path) -> bytearray:
    """base.qcow2 with data in it, top.qcow2 over it, and the group g."""
    create_image(scratch / "base.qcow2", str(SIZE))
    qemu_io(scratch / "base.qcow2", "write -P 7 0 1M", format="qcow2")
    create_image(scratch / "top.qcow2", str(SIZE), backing=scratch / "base.qcow2")
    group = ThrottleGroup(ThrottleGroupOptions(id="g"), graph.datapath)
    group.start()
    group.set_limits({"iops-total": 3000})
    graph.objects["g"] = group  # type: ignore[index]
    return bytearray(b"\7" * MIB + bytes(MIB))


async def replaced(graph: Graph, edge: Any, options: dict[str, Any] | str) -> None:
    """The edge leads to a new node, or back to the one of that name."""
    async with graph.change() as change:
        to = graph.get(options) if isinstance(options, str) else await change.add(options)
        await change.replace(edge, to)


async def test_in_and_out_while_it_is_used(graph: Graph, scratch: Path) -> None:
    model = prepare(graph, scratch)
    await graph.add({"driver": "file", "node-name": "file", "filename": str(scratch / "top.qcow2")})
    top = await graph.add({"driver": "qcow2", "node-name": "top", "file": "file"})
    edge = await graph.attach_root("a client", top, RW, Perm.ALL)
    work = asyncio.ensure_future(random_work(edge.gate, model, seed=3, operations=150))
    above: list[dict[str, Any]] = [
        {"driver": "throttle", "node-name": "filter", "throttle-group": "g", "file": "top"},
        {"driver": "copy-on-read", "node-name": "filter", "file": "top"},
    ]
    below = {"driver": "throttle", "node-name": "below", "throttle-group": "g", "file": "file"}
    rounds = 0
    while not work.done():
        await replaced(graph, edge, above[rounds % 2])
        await replaced(graph, top.children["file"], below)
        await asyncio.sleep(0.005)
        await replaced(graph, edge, "top")
        await graph.remove("filter")
        await replaced(graph, top.children["file"], "file")
        await graph.remove("below")
        rounds += 1
    await work
    assert rounds > 3
    assert await edge.gate.read(0, SIZE) == model
    await edge.hold()
    await graph.detach_root(edge)
    await graph.remove("top")
    await graph.remove("file")
    check_image(scratch / "top.qcow2")
