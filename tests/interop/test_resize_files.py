# SPDX-License-Identifier: Apache-2.0
"""Files, and raw over them, become larger and smaller while they are used."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from target.graph.errors import BlockError
from target.graph.permissions import Perm
from tests.support.qcow2 import Workload, content, running_graph

MIB = 1 << 20


def options(path: Path, kind: str) -> dict[str, Any]:
    file = {"driver": "file", "filename": str(path), "discard": "unmap"}
    if kind == "file":
        return file | {"node-name": "disk"}
    return {"driver": "raw", "node-name": "disk", "discard": "unmap", "file": file} | (
        {"offset": 4096} if kind == "offset" else {}
    )


@pytest.mark.parametrize("kind", ["file", "raw", "offset"])
async def test_sizes_change_under_load(scratch: Path, kind: str) -> None:
    path = scratch / "disk"
    before = 4096 if kind == "offset" else 0
    path.write_bytes(bytes(before + MIB))
    async with running_graph(threads=2) as graph:
        node = await graph.add(options(path, kind))
        model, source = bytearray(MIB), random.Random(kind)
        for number in range(12):
            kept = len(model) if number % 3 else len(model) // 2 // 512 * 512
            size = kept + (source.randrange(1, 2000) * 512 if number % 3 else 0)
            front = bytearray(model[:kept])
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(Workload(node, front, number).run(100, in_flight=8))
                await asyncio.sleep(source.random() * 0.01)
                await graph.resize(node, size)
            model[:] = front + bytes(size - kept)
            assert node.size == size == path.stat().st_size - before
        assert await content(node) == model
        await graph.remove("disk")
    assert path.read_bytes()[before:] == model


async def test_undone(scratch: Path) -> None:
    path = scratch / "disk"
    path.write_bytes(b"x" * (MIB + 100))  # not a whole sector
    async with running_graph() as graph:
        node = await graph.add(options(path, "raw"))
        edge = await graph.attach_root("a client", node, Perm.CONSISTENT_READ, Perm.ALL)
        for size in (2 * MIB, 1000, 512):
            with pytest.raises(KeyError):
                async with graph.change() as change:
                    await change.resize(node, size)
                    raise KeyError
            assert not change.failures
            assert node.size == edge.gate.size == MIB + 512 and path.read_bytes() == b"x" * (MIB + 100)
        await graph.resize(node, 1000)
        assert node.size == edge.gate.size == 1024 and path.read_bytes() == b"x" * 1000
        assert await node.read(0, 1024) == b"x" * 1000 + bytes(24)
        with pytest.raises(BlockError, match="Could not resize file: File too large"):
            await graph.resize(node, 1 << 62)
        assert node.size == 1024 and path.stat().st_size == 1000
        await graph.detach_root(edge)
