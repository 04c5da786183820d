# SPDX-License-Identifier: Apache-2.0
"""An image is handed from one graph to another, as between two processes, and back."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from target.graph.activity import activate, inactivate
from target.graph.edge import RootEdge
from target.graph.errors import BlockError
from target.graph.graph import Graph
from target.graph.node import Node
from target.graph.permissions import Perm
from tests.support.qcow2 import content, qcow2_options, running_graph
from tests.support.tools import qemu_img

MIB = 1 << 20
WRITE = Perm.CONSISTENT_READ | Perm.WRITE


async def become(graph: Graph, active: bool, name: str = "disk") -> None:
    async with graph.change() as change:
        await (activate if active else inactivate)(change, graph.nodes[name])
    change.raise_failure()


async def attach(graph: Graph) -> RootEdge:
    return await graph.attach_root("a client", graph.get("disk"), WRITE, Perm.ALL)


def options(kind: str, path: Path, **more: Any) -> dict[str, Any]:
    if kind == "qcow2":
        return qcow2_options(path, **more)
    file = {"driver": "file", "filename": str(path)}
    return {"driver": "raw", "node-name": "disk", "file": file} | more


@pytest.mark.parametrize("kind", ["qcow2", "raw"])
async def test_an_image_goes_to_and_fro(scratch: Path, kind: str) -> None:
    path = scratch / "disk"
    qemu_img("create", "-q", "-f", kind, path, str(2 * MIB))
    async with running_graph() as here, running_graph() as there:
        a = await here.add(options(kind, path))
        edges = [await attach(here)]
        b = await there.add(options(kind, path, active=False))
        edges.append(await attach(there))
        model = bytearray(2 * MIB)
        await edges[0].gate.write(MIB, b"first")
        model[MIB : MIB + 5] = b"first"
        with pytest.raises(BlockError, match="Failed to inactivate node: Operation not permitted"):
            await become(here, False)
        for edge in edges:
            edge.allow_inactive = True
        order = [(here, a, edges[0]), (there, b, edges[1])]
        for number in range(4):
            (one, _, gone), (two, new, coming) = order
            with pytest.raises(BlockError, match="Is another process using the image"):
                await become(two, True)
            assert not new.active
            with pytest.raises(OSError) as caught:
                await coming.gate.write(0, b"x")
            assert caught.value.errno == errno.EPERM
            await become(one, False)
            await become(two, True)
            assert await content(new) == model
            if number == 1:
                await two.resize(new, 4 * MIB)
                model.extend(bytes(2 * MIB))
            data = bytes([number + 65]) * 70_000
            await coming.gate.write(number * 100_000, data)
            model[number * 100_000 : number * 100_000 + 70_000] = data
            with pytest.raises(OSError) as caught:
                await gone.gate.flush()
            assert await gone.gate.read(0, 512) in (bytes(512), bytes(model[:512]), data[:512])
            assert caught.value.errno == errno.EPERM
            order.reverse()
        for graph, _, edge in order:
            await graph.detach_root(edge)
            await graph.remove("disk")
    if kind == "qcow2":
        qemu_img("check", path)
    flat = scratch / "flat"
    qemu_img("convert", "-f", kind, "-O", "raw", path, flat)
    assert flat.read_bytes() == model


async def test_undone(scratch: Path) -> None:
    path = scratch / "disk"
    qemu_img("create", "-q", "-f", "qcow2", path, str(2 * MIB))
    async with running_graph() as graph:
        node: Node = await graph.add(qcow2_options(path))
        await node.write(0, b"x" * 512)
        for active in (False, True):
            if active:
                await become(graph, False)
            before = path.read_bytes()
            with pytest.raises(KeyError):
                async with graph.change() as change:
                    await (activate if active else inactivate)(change, node)
                    raise KeyError
            assert not change.failures
            assert node.active is not active
            if active:
                assert path.read_bytes() == before
        await become(graph, True)
        await node.write(512, b"y" * 512)
        assert await node.read(0, 1536) == b"x" * 512 + b"y" * 512 + bytes(512)


async def test_what_is_refused(scratch: Path) -> None:
    path = scratch / "disk"
    qemu_img("create", "-q", "-f", "qcow2", path, str(2 * MIB))
    async with running_graph() as graph:
        await graph.add({"driver": "file", "node-name": "file", "filename": str(path)})
        await graph.add(qcow2_options(path, file="file"))
        with pytest.raises(BlockError, match="Node has active parent node"):
            await become(graph, False, "file")
        await become(graph, False)
        assert not graph.nodes["file"].active
        node = graph.nodes["disk"]
        with pytest.raises(BlockError, match="Cannot change the option 'active'"):
            async with graph.change() as change:
                await change.reopen([graph.ref(qcow2_options(path, file="file", active=False), "")])
        await become(graph, True)
        await node.write(0, b"1")
