# SPDX-License-Identifier: Apache-2.0
"""Changes that are undone, or refused, while clients work: afterwards all is as it was before."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from target.exports import placing
from target.graph.errors import BlockError
from target.graph.permissions import Perm
from target.transactions import actions
from target.transactions.request import parse_action
from target.transactions.run import run
from tests.support.held import Live, live
from tests.support.tools import create_image

MIB = 1 << 20
Options = dict[str, Any]
REOPEN_DISK = ("blockdev-reopen", {"options": [{"driver": "test-held", "size": MIB, "node-name": "disk"}]})
DELETE = ("blockdev-del", {"node-name": "n", "x-now": True})
ABORT: tuple[str, Options] = ("abort", {})


@pytest_asyncio.fixture
async def target(scratch: Path) -> AsyncIterator[Live]:
    actions.load()
    async with live(scratch, MIB) as made:
        yield made


async def transaction(target: Live, *given: tuple[str, Options]) -> None:
    requests = [parse_action({"type": type, "data": data}) for type, data in given]
    await asyncio.wait_for(run(target.service, requests), 20)


async def refused(target: Live, *given: tuple[str, Options]) -> str:
    with pytest.raises(BlockError) as caught:
        await transaction(target, *given)
    return str(caught.value)


def file(scratch: Path, name: str, **options: Any) -> Options:
    path = scratch / name
    if not path.exists():
        path.write_bytes(name.encode() * MIB)
    return {"driver": "file", "filename": str(path), "node-name": name} | options


# ---- x-now ----


async def test_an_export_that_comes_back_serves_the_node_that_was_opened_again(
    target: Live, scratch: Path
) -> None:
    graph = target.service.graph
    await graph.add(file(scratch, "n"))
    export = await target.export(node_name="n", name="n")
    await refused(target, ("block-export-del", {"id": "e"}), DELETE, ABORT)
    assert export.node is graph.nodes["n"]
    assert not export.node.closed
    client = await target.client("n")
    assert await client.read(0, 512) == b"n" * 512
    await client.close()


async def test_a_node_that_an_undo_needs_is_not_closed_at_once(target: Live, scratch: Path) -> None:
    graph = target.service.graph
    await graph.add(file(scratch, "n"))
    await graph.add(file(scratch, "m"))
    raw = await graph.add({"driver": "raw", "file": "n", "node-name": "r"})
    replace = {"parent": "r", "child": "file", "new-child": "m"}
    text = "Node n cannot be closed now: what was done before may have to be undone"
    assert await refused(target, ("x-blockdev-replace", replace), DELETE) == text
    assert await raw.object.read(0, 4) == b"nnnn"
    assert await refused(target, ("blockdev-del", {"node-name": "r"}), DELETE) == text
    assert graph.nodes["n"].owned
    await graph.remove("r")
    options = file(scratch, "n", **{"read-only": True})
    assert await refused(target, ("blockdev-reopen", {"options": [options]}), DELETE) == text
    assert not graph.nodes["n"].read_only
    await graph.remove("n")
    assert await refused(target, ("blockdev-add", file(scratch, "n")), DELETE) == text
    assert "n" not in graph.nodes


# ---- snapshots and nesting ----


async def test_a_snapshot_below_a_frozen_link_is_refused(target: Live, scratch: Path) -> None:
    """It was taken, and the guest went on to write to what is behind the overlay."""
    graph = target.service.graph
    for name in ("base", "top", "over"):
        create_image(scratch / name, str(MIB), backing=scratch / "base" if name == "top" else None)
        image = {"driver": "file", "filename": str(scratch / name)}
        backing = "base" if name == "top" else None
        await graph.add({"driver": "qcow2", "node-name": name, "file": image, "backing": backing})
    await graph.add({"driver": "copy-on-read", "node-name": "cor", "file": "top", "bottom": "base"})
    text = await refused(target, ("blockdev-snapshot", {"node": "top", "overlay": "over"}))
    assert text == "Cannot change frozen 'file' link from 'cor' to 'top'"
    assert "backing" not in graph.get("over").children


async def test_too_many_throttles_on_one_way_are_refused_however_they_come_there(target: Live) -> None:
    graph = target.service.graph
    await transaction(target, ("object-add", {"qom-type": "throttle-group", "id": "g"}))
    await graph.add({"driver": "null-co", "node-name": "n"})
    for i in range(8):
        below = f"t{i - 1}" if i else "n"
        await graph.add({"driver": "throttle", "node-name": f"t{i}", "throttle-group": "g", "file": below})
    other = {"driver": "null-co", "node-name": "m"}
    await graph.add({"driver": "throttle", "node-name": "top", "throttle-group": "g", "file": other})
    replace = {"parent": "top", "child": "file"}
    text = await refused(target, ("x-blockdev-replace", replace | {"new-child": "t7"}))
    assert text == "node 'top': there are more than 8 throttle nodes on one way"
    await transaction(target, ("x-blockdev-replace", replace | {"new-child": "t6"}))


# ---- requests that are held ----


async def test_a_thread_that_is_new_does_not_pass_a_closed_gate(target: Live) -> None:
    graph = target.service.graph
    root = await graph.attach_root("test", target.disk, Perm.CONSISTENT_READ, Perm.ALL)
    await root.hold()
    thread = graph.datapath.add_thread(0)
    reading = asyncio.ensure_future(graph.datapath.copy(root.gate, target.disk.object, 0, 0, 512, thread))
    await asyncio.wait([reading], timeout=0.3)
    assert not reading.done()
    root.let_go()
    await asyncio.wait_for(reading, 5)
    await root.hold()
    await graph.detach_root(root)


async def test_a_drain_that_is_cancelled_leaves_the_gate_as_it_was(target: Live) -> None:
    graph = target.service.graph
    root = await graph.attach_root("test", target.disk, Perm.CONSISTENT_READ, Perm.ALL)
    target.disk.hold()
    reading = asyncio.ensure_future(root.gate.read(0, 512))
    await target.disk.has(1)

    async def drain() -> None:
        async with graph.change() as change:
            await change.drain(target.disk)

    task = asyncio.ensure_future(drain())
    await asyncio.sleep(0.1)
    task.cancel()
    await asyncio.wait([task])
    target.disk.let_go()
    await reading
    await asyncio.wait_for(drain(), 5)
    assert await asyncio.wait_for(root.gate.read(0, 4), 5) == bytes(4)
    await root.hold()
    await graph.detach_root(root)


@contextlib.asynccontextmanager
async def load(target: Live) -> AsyncIterator[None]:
    """A client has requests under way all the time."""
    client = await target.client()
    going = True

    async def work() -> None:
        while going:
            await client.read(0, 512)

    lanes = [asyncio.create_task(work()) for _ in range(4)]
    await asyncio.sleep(0.05)
    yield
    going = False
    await asyncio.gather(*lanes)
    await client.close()


async def test_a_move_is_undone_although_what_came_after_it_holds_requests(
    target: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placing, "MOVE_SECONDS", 3.0)
    export = await target.export()
    before = export.threads
    async with load(target):
        await refused(target, ("x-export-set-iothread", {"id": "e", "iothread": "io0"}), REOPEN_DISK, ABORT)
        assert export.threads == before


async def test_nobody_waits_long_for_requests_that_the_change_itself_holds(target: Live) -> None:
    action = ("block-export-del", {"id": "e", "mode": "soft"})
    await target.export()
    async with load(target), asyncio.timeout(10):
        text = await refused(target, REOPEN_DISK, action)
        assert text == "export 'e': requests are still under way after 1 s"


async def test_an_export_under_load_moves_after_its_node_was_reopened(target: Live) -> None:
    export = await target.export()
    async with load(target), asyncio.timeout(10):
        for place, threads in (("io0", [1]), ("io1", [2])):
            await transaction(target, REOPEN_DISK, ("x-export-set-iothread", {"id": "e", "iothread": place}))
            assert export.threads == threads
