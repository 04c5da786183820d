# SPDX-License-Identifier: Apache-2.0
"""Power cuts during resizes of a qcow2 image in use: before every write and flush, with any part of what was
not flushed. The image is clean (leaks at most), has one of the sizes, and the content that goes with it.
"""

from __future__ import annotations

import asyncio
import struct
from pathlib import Path
from typing import Any

import pytest

from target.graph.graph import Graph
from target.graph.node import Node
from target.replay import Discarded, PowerCut, WriteLog
from tests.crash import images
from tests.support.qcow2 import running_graph
from tests.support.tools import qemu_img

KIB, MIB = 1 << 10, 1 << 20
START = MIB + 1536
SIZES = (5 * MIB, 400 * KIB + 512, 2 * MIB)
KEPT = min(SIZES)
KINDS = {
    "512": "cluster_size=512",  # the L1 table moves
    "4k-snapshot": "cluster_size=4k",
    "4k-chain": "cluster_size=4k",
}


def make(name: str, root: Path) -> tuple[Path, bytes]:
    base = root / "base.raw"
    base.write_bytes(b"\xee" * (3 * MIB))
    words: list[str | Path] = ["-b", base, "-F", "raw"] if "chain" in name else []
    disk = root / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", KINDS[name], *words, disk, str(START))
    images.patch(disk, root, 64 * KIB, 600 * KIB, 1 << 20)
    images.patch(disk, root, MIB, 1024, 1 << 21)
    if "snapshot" in name:
        qemu_img("snapshot", "-c", "one", disk)
        images.patch(disk, root, 300 * KIB, 200 * KIB, 1 << 22)
    return disk, images.content(disk)


async def churn(node: Node) -> None:
    """Rewrites what is there: clusters come and go, but nothing that is read changes."""
    for at in range(0, KEPT - 8 * KIB, 40 * KIB):
        await node.write(at, await node.read(at, 8 * KIB))
        await node.flush()


async def live(graph: Graph, disk: Path, log: Path) -> None:
    file: dict[str, Any] = {"driver": "file", "filename": str(disk), "discard": "unmap"}
    logged = {"driver": "blklogwrites", "file": file, "log": {"driver": "file", "filename": str(log)}}
    node = await graph.add({"driver": "qcow2", "node-name": "disk", "discard": "unmap", "file": logged})
    for size in SIZES:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(churn(node))
            tasks.create_task(graph.resize(node, size))
        if size > KEPT:
            await node.write(size - 512, b"\x55" * 512)
            await node.flush()
    await graph.remove("disk")


def expected(size: int, found: bytes, model: bytes) -> bool:
    """What was there before, zeros behind that, and a last sector that was written or not."""
    front = min(size, START)
    kept = found[:KEPT] == model[:KEPT]
    middle = all(a in (b, 0) for a, b in zip(found[KEPT:front], model[KEPT:front], strict=True))
    tail = found[front:].replace(b"\x55" * 512, bytes(512))
    return kept and middle and not any(tail)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", KINDS)
async def test_power_cut_during_a_resize(scratch: Path, name: str, scale: int) -> None:
    disk, model = make(name, scratch)
    start = disk.read_bytes()
    snapshot = images.content(disk, "one") if "snapshot" in name else b""
    path = scratch / "log"
    path.touch()
    async with running_graph() as graph:
        await live(graph, disk, path)
    sizes = set()
    with WriteLog(path) as log:
        cuts = [PowerCut(at, 1.0) for at in range(len(log.entries) + 1)]
        cuts += [PowerCut(at, 0.5, at, Discarded.POISON) for at in range(0, len(log.entries), 3)]
        for cut in cuts[:: 1 if scale > 1 else 5]:
            crashed = scratch / "crashed.qcow2"
            crashed.write_bytes(start)
            cut.make(log, crashed)
            images.check(crashed)
            (size,) = struct.unpack(">Q", crashed.read_bytes()[24:32])
            sizes.add(size)
            assert size in (START, *SIZES)
            assert expected(size, images.content(crashed), model), cut
            if snapshot:
                qemu_img("snapshot", "-a", "one", crashed)  # -l would show it in the size of today
                assert images.content(crashed) == snapshot
    assert sizes == {START, *SIZES}
