# SPDX-License-Identifier: Apache-2.0
"""blkdebug's events: each is raised where a driver does what it says; rules follow them through states."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any, get_args

import pytest

from target.drivers.filter.blkdebug import BlkDebug
from target.drivers.filter.blkdebug.rules import NEVER, Event
from target.graph.graph import Graph
from target.graph.node import Node
from tests.support.tools import check_image, create_image, qemu_img, qemu_io

KIB, MIB = 1 << 10, 1 << 20
Options = dict[str, Any]


async def image(
    graph: Graph, path: Path, rules: Options | None = None, **options: Any
) -> tuple[Node, BlkDebug]:
    """A qcow2 node over blkdebug over the file."""
    names = {name.replace("_", "-"): value for name, value in options.items()}
    below = {"driver": "blkdebug", "node-name": "debug", "image": {"driver": "file", "filename": str(path)}}
    await graph.add(below | (rules or {}))
    top = await graph.add(
        {"driver": "qcow2", "node-name": "disk", "file": "debug", "discard": "unmap"} | names
    )
    debug = graph.get("debug")
    assert isinstance(debug, BlkDebug)
    return top, debug


async def fails(work: Any, number: int = errno.EIO) -> None:
    with pytest.raises(OSError) as caught:
        await work
    assert caught.value.errno == number


async def test_every_event_is_raised(graph: Graph, scratch: Path) -> None:
    plain, path = scratch / "plain", scratch / "disk"
    with plain.open("wb") as out:
        out.write(b"c" * 256 * KIB)
        out.truncate(16 * MIB)
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=512", plain, path)
    qemu_io(path, "write -P 5 1M 64k", format="qcow2")
    qemu_img("snapshot", "-c", "s", path)  # the tables are shared now
    node, debug = await image(graph, path, {"align": 4096})
    assert await node.object.read(0, 512) == b"c" * 512  # compressed
    await node.object.write(MIB, b"x" * 512)  # a table is copied
    await node.object.flush()
    await node.object.write(MIB, b"y" * 512)  # in place
    await node.object.discard(MIB, 512)
    await node.object.flush()
    await node.object.write(4 * MIB, b"z" * 10 * MIB)  # the reference counts outgrow their table
    await node.object.flush()
    assert await node.object.read(5 * MIB, 512) == b"z" * 512
    await graph.resize(node, 400 * MIB)  # its L1 table outgrows its place
    await graph.resize(node, 4 * MIB)
    await debug.object.zeroes(debug.size, 16 * KIB)
    await debug.object.write(debug.size - 4096 + 512, b"tail and head")
    found = set(debug.counters()["events"])
    assert set(get_args(Event)) - NEVER - found == set()
    assert found <= set(get_args(Event)) - NEVER


async def test_an_event_makes_a_rule_active(graph: Graph, scratch: Path) -> None:
    path = create_image(scratch / "disk", "16M")
    qemu_io(path, "write -P 7 0 64k", format="qcow2")
    rules = {"inject-error": [{"event": "l2_load", "once": True}]}
    node, debug = await image(graph, path, rules)
    await fails(node.object.read(0, 512))
    assert await node.object.read(0, 512) == b"\x07" * 512
    assert debug.counters()["injected"] == 1


async def test_data_of_a_format_is_told_from_its_metadata(graph: Graph, scratch: Path) -> None:
    path = create_image(scratch / "disk", "16M")
    rules = {"inject-error": [{"event": "write_aio", "iotype": "write", "errno": errno.ENOSPC, "once": True}]}
    node, debug = await image(graph, path, rules)
    await fails(node.object.write(0, b"x" * 64 * KIB), errno.ENOSPC)
    await node.object.write(0, b"x" * 64 * KIB)
    events = debug.counters()["events"]
    assert events["write_aio"] == 2
    await node.object.flush()
    assert debug.counters()["events"]["write_aio"] == 2
    assert await node.object.read(0, 512) == b"x" * 512
    assert debug.counters()["events"]["read_aio"] == 1


async def test_states(graph: Graph, scratch: Path) -> None:
    """The second write after a flush fails, and then each read, until the next flush."""
    (scratch / "disk").write_bytes(bytes(MIB))
    write = {"event": "pwritev", "errno": errno.ENOSPC, "once": True, "iotype": "write"}
    options: Options = {
        "set-state": [
            {"event": "flush_to_disk", "state": 1, "new_state": 2},
            {"event": "flush_to_disk", "state": 4, "new_state": 1},
            {"event": "pwritev", "state": 2, "new_state": 3},
            {"event": "pwritev", "state": 3, "new_state": 4},
        ],
        "inject-error": [
            write | {"state": 3},
            {"event": "read_aio", "state": 4, "iotype": "read"},
            {"event": "flush_to_disk", "state": 4, "iotype": "discard"},
        ],
    }
    below: Options = {"driver": "blkdebug", "node-name": "debug", "discard": "unmap"}
    below["image"] = {"driver": "file", "filename": str(scratch / "disk"), "discard": "unmap"}
    await graph.add(below | options)
    node = await graph.add({"driver": "raw", "node-name": "disk", "file": "debug", "discard": "unmap"})
    await node.object.write(0, b"a")
    await node.object.flush()
    await node.object.write(0, b"b")
    await node.object.discard(0, 4096)
    await fails(node.object.write(0, b"c"), errno.ENOSPC)
    for _ in range(2):
        await fails(node.object.read(0, 1))
    assert graph.get("debug").counters()["state"] == 4
    await node.object.flush()  # its rule ends that for reads
    assert await node.object.read(0, 1) in (b"b", b"\0")
    await fails(node.object.discard(0, 4096))
    await node.object.write(0, b"d")
    assert graph.get("debug").counters()["state"] == 1


async def test_a_rule_file_has_states_too(graph: Graph, scratch: Path) -> None:
    (scratch / "disk").write_bytes(bytes(MIB))
    (scratch / "rules").write_text(
        '[set-state]\nevent = "read_aio"\nstate = "1"\nnew_state = "2"\n\n'
        '[inject-error]\nevent = "read_aio"\nstate = "2"\nerrno = "5"\n'
    )
    below: Options = {"driver": "blkdebug", "config": str(scratch / "rules")}
    below["image"] = {"driver": "file", "filename": str(scratch / "disk")}
    node = await graph.add({"driver": "raw", "node-name": "disk", "file": below})
    await node.object.read(0, 512)
    await fails(node.object.read(0, 512))


@pytest.mark.parametrize("event", ["l2_alloc_write", "refblock_update_part", "l1_update", "cluster_alloc"])
async def test_an_error_at_any_of_them_loses_nothing(graph: Graph, scratch: Path, event: str) -> None:
    """Whatever fails is tried again by the next flush, and the image is sound."""
    path = create_image(scratch / "disk", "16M")
    rules = {"inject-error": [{"event": event, "errno": errno.ENOSPC, "once": True, "iotype": "write"}]}
    node, debug = await image(graph, path, rules)
    with_error = 0
    for step in (node.object.write(0, b"x" * MIB), node.object.flush()):
        try:
            await step
        except OSError as error:
            assert error.errno == errno.ENOSPC
            with_error += 1
    assert debug.counters()["injected"] == 1
    assert with_error == (event != "cluster_alloc")  # after a write-back it is tried again
    await node.object.write(0, b"x" * MIB)
    await node.object.flush()
    await graph.remove("disk")
    await graph.remove("debug")
    check_image(path)
    qemu_io(path, "read -P 0x78 0 1M", format="qcow2")
