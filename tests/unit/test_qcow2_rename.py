# SPDX-License-Identifier: Apache-2.0
"""Another backing file in a header, checked by qemu-img; each step in between is a complete header too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from target.drivers.format.qcow2.errors import ImageError
from target.drivers.format.qcow2.header import cluster_size, parse
from target.drivers.format.qcow2.rename import renamed
from target.graph.errors import BlockError
from target.graph.graph import Graph
from tests.support.qcow2 import qcow2_options
from tests.support.tools import qemu_img

KINDS = ["cluster_size=64k", "cluster_size=4k", "cluster_size=512", "cluster_size=64k,compat=0.10"]
Name = tuple[str | None, str | None]
NAMES: list[Name] = [
    ("base2", "raw"),
    ("x" * 450, "raw"),
    ("b", "qcow2"),
    (None, None),
    ("/a/b", "host_device"),
    ("c", None),
]


def info(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(qemu_img("info", "-U", "--output=json", path).stdout)
    return found


def make(path: Path, kind: str, backing: bool) -> bytes:
    words = ["-u", "-b", "base", "-F", "raw"] if backing else []
    qemu_img("create", "-q", "-f", "qcow2", "-o", kind, *words, path, "1M")
    return path.read_bytes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backing", [False, True])
def test_each_step_is_a_header(scratch: Path, kind: str, backing: bool) -> None:
    disk = make(scratch / "d.qcow2", kind, backing)
    size = cluster_size(disk)
    cluster = disk[:size]
    old: Name = ("base", "raw") if backing else (None, None)
    for name, format in NAMES * 2:
        header = parse(cluster + disk[size:], len(disk))
        if name and len(name) > 400 and size == 512:
            with pytest.raises(ImageError, match="no room"):
                renamed(cluster, header, name, format)
            continue
        steps = renamed(cluster, header, name, format)
        found = cluster
        for number, step in enumerate(steps):
            assert number == len(steps) - 1 or step[:512] == found[:512] or step[512:] == found[512:]
            between = parse(step + disk[size:], len(disk))
            wanted = (name, format) if number == len(steps) - 1 else old
            assert (between.backing_file, between.backing_format) == wanted
            found = step
        cluster, old = found, (name, format)
        (scratch / "e.qcow2").write_bytes(cluster + disk[size:])
        shown = info(scratch / "e.qcow2")
        assert (shown.get("backing-filename"), shown.get("backing-filename-format")) == (name, format)
    assert parse(cluster + disk[size:], len(disk)).feature_names == parse(disk, len(disk)).feature_names


async def test_undone_and_done(graph: Graph, scratch: Path) -> None:
    path = scratch / "d.qcow2"
    (scratch / "base").write_bytes(bytes(1 << 20))
    before = make(path, "cluster_size=64k", True)
    node: Any = await graph.add(qcow2_options(path))
    with pytest.raises(KeyError):
        async with graph.change() as change:
            await node.change_backing_file(change, "other", "qcow2")
            assert info(path)["backing-filename"] == "other"
            raise KeyError
    assert path.read_bytes() == before and node.image.header.backing_file == "base"
    async with graph.change() as change:
        await node.change_backing_file(change, str(scratch / "base"), "raw")
        await change.resize(node, 2 << 20)
    assert info(path)["backing-filename"] == str(scratch / "base") and info(path)["virtual-size"] == 2 << 20
    with pytest.raises(BlockError, match="node 'disk': Could not change backing file to 'xxxx"):
        async with graph.change() as change:
            await node.change_backing_file(change, "x" * 1024, "raw")
    await graph.remove("disk")
    qemu_img("check", path)
