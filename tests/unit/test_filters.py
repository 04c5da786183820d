# SPDX-License-Identifier: Apache-2.0
"""blkdebug and blklogwrites in a graph: rules, limits, the log's order, and options that are refused."""

from __future__ import annotations

import asyncio
import errno
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from target.datapath import FUA, UNMAP
from target.drivers.filter.blklogwrites import BlkLogWrites
from target.graph.errors import BlockError
from target.graph.graph import Graph
from target.graph.node import Node
from target.graph.permissions import Perm
from target.replay import Flag, WriteLog, rebuild

MIB = 1 << 20
Options = dict[str, Any]


def file(path: Path, size: int | None = None) -> Options:
    if size is not None:
        path.write_bytes(bytes(size))
    return {"driver": "file", "filename": str(path)}


async def debug(graph: Graph, scratch: Path, *rules: Options, **options: Any) -> Node:
    names = {name.replace("_", "-"): value for name, value in options.items()}
    image = file(scratch / "image", MIB)
    rest = {"inject-error": [{"event": "none"} | rule for rule in rules]} if rules else {}
    return await graph.add(
        {"driver": "blkdebug", "node-name": "d", "discard": "unmap", "image": image} | rest | names
    )


async def fails(request: Any, number: int = errno.EIO) -> None:
    with pytest.raises(OSError) as caught:
        await request
    assert caught.value.errno == number


# ---- blkdebug: rules ----

REQUESTS: dict[str, Callable[[Node], Any]] = {
    "read": lambda d: d.object.read(0, 512),
    "write": lambda d: d.object.write(0, bytes(512)),
    "write-zeroes": lambda d: d.object.zeroes(0, 512),
    "discard": lambda d: d.object.discard(0, 512),
    "flush": lambda d: d.object.flush(),
    "block-status": lambda d: d.object.status(0, 512),
}


@pytest.mark.parametrize("kind", REQUESTS)
async def test_a_rule_is_for_one_type_of_request(graph: Graph, scratch: Path, kind: str) -> None:
    node = await debug(graph, scratch, {"iotype": kind, "errno": errno.ENOSPC})
    for name, request in REQUESTS.items():
        if name == kind:
            await fails(request(node), errno.ENOSPC)
        else:
            await request(node)
    assert node.counters()["injected"] == 1
    assert all(node.counters()["operations"].values())


async def test_a_rule_without_a_type_is_for_all_but_block_status(graph: Graph, scratch: Path) -> None:
    node = await debug(graph, scratch, {})
    for name, request in REQUESTS.items():
        if name == "block-status":
            await request(node)
        else:
            await fails(request(node))


async def test_a_sector_and_once(graph: Graph, scratch: Path) -> None:
    node = await debug(graph, scratch, {"sector": 3, "once": True})
    await node.object.read(0, 1536)
    await node.object.read(2048, 512)
    await node.object.flush()
    await fails(node.object.read(0, 4096))
    await node.object.read(0, 4096)


async def test_the_nth_request_fails_once_or_from_then_on(graph: Graph, scratch: Path) -> None:
    rules = {"iotype": "write", "x-after": 2, "once": True}, {"iotype": "read", "x-after": 1, "errno": 28}
    node = await debug(graph, scratch, *rules)
    results = []
    for _ in range(5):
        try:
            await node.object.write(0, b"1" * 512)
            results.append(0)
        except OSError as error:
            results.append(error.errno or -1)
    assert results == [0, 0, errno.EIO, 0, 0]
    await node.object.read(0, 512)
    for _ in range(3):
        await fails(node.object.read(0, 512), errno.ENOSPC)


async def test_a_short_write_leaves_its_beginning(graph: Graph, scratch: Path) -> None:
    node = await debug(graph, scratch, {"iotype": "write", "x-short": 1024, "once": True})
    await fails(node.object.write(0, b"x" * 4096))
    assert await node.object.read(0, 4096) == b"x" * 1024 + bytes(3072)


async def test_a_slow_request_succeeds_without_errno(graph: Graph, scratch: Path) -> None:
    rule = {"iotype": "read", "x-delay-ns": 50_000_000, "errno": 0, "once": True}
    node = await debug(graph, scratch, rule)
    before = time.monotonic()
    slow = asyncio.ensure_future(node.object.read(0, 512))
    await asyncio.sleep(0.005)
    await node.object.read(0, 512)
    assert not slow.done()
    await slow
    assert time.monotonic() - before >= 0.05


async def test_rules_from_a_file(graph: Graph, scratch: Path) -> None:
    config = scratch / "rules"
    config.write_text(
        '# for a test\n[inject-error]\nevent = "none"\niotype = "flush"\nerrno = "28"\n\n'
        '[inject-error]\nevent = "none"\nsector = "1"\nonce = "on"\n'
    )
    node = await debug(graph, scratch, config=str(config))
    await fails(node.object.flush(), errno.ENOSPC)
    await fails(node.object.read(512, 512))
    await node.object.read(512, 512)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inject-error": [{"event": "cow_read"}]}, "'inject-error': event 'cow_read' is raised by no"),
        ({"inject-error": [{"event": "l3_load"}]}, "event' does not accept value 'l3_load'"),
        ({"inject-error": [{"event": "none", "x-short": 1, "iotype": "read"}]}, "x-short is for writes"),
        ({"inject-error": [{"event": "none", "iotype": "trim"}]}, "does not accept value 'trim'"),
        ({"inject-error": [{}]}, "event' is missing"),
        ({"set-state": [{"event": "none"}]}, "new_state' is missing"),
        ({"set-state": [{"event": "vmstate_load", "new_state": 2}]}, "'set-state': event 'vmstate_load'"),
        ({"align": 3}, "Cannot meet constraints with align 3"),
        ({"max-transfer": 700, "align": 512}, "Cannot meet constraints with max-transfer 700"),
        ({"max-write-zero": 1536, "opt-write-zero": 1024}, "constraints with max-write-zero 1536"),
        ({"config": "/nonexistent"}, "Could not read blkdebug config file '/nonexistent'"),
    ],
)
async def test_blkdebug_refuses_by_name(graph: Graph, scratch: Path, options: Options, message: str) -> None:
    with pytest.raises(BlockError, match=message):
        await debug(graph, scratch, **options)
    assert not graph.nodes


@pytest.mark.parametrize("text", ["event = none\n", "[suspend]\n", "[inject-error]\nevent\n"])
async def test_a_bad_rule_file_is_refused(graph: Graph, scratch: Path, text: str) -> None:
    (scratch / "rules").write_text(text)
    with pytest.raises(BlockError, match=r"Could not parse blkdebug config file .*line"):
        await debug(graph, scratch, config=str(scratch / "rules"))


async def test_permissions_can_be_taken_and_unshared(graph: Graph, scratch: Path) -> None:
    node = await debug(graph, scratch, take_child_perms=["resize"], unshare_child_perms=["write-unchanged"])
    edge = node.children["file"]
    assert Perm.RESIZE in edge.perm
    assert Perm.WRITE_UNCHANGED not in edge.shared


# ---- blkdebug: limits ----


async def test_requests_come_down_within_the_limits(graph: Graph, scratch: Path) -> None:
    limits = {"align": 4096, "max_transfer": 8192, "opt_write_zero": 16384, "max_write_zero": 65536}
    node = await debug(graph, scratch, {"iotype": "write-zeroes", "sector": 8}, **limits)
    image = bytearray(MIB)
    source = random.Random(5)
    for _ in range(100):
        offset, length = source.randrange(8192, MIB - 200_000), source.randrange(1, 200_000)
        data = source.randbytes(length)
        await node.object.write(offset, data)
        image[offset : offset + length] = data
        offset, length = source.randrange(8192, MIB - 200_000), source.randrange(1, 200_000)
        await node.object.zeroes(offset, length, UNMAP)
        image[offset : offset + length] = bytes(length)
        assert await node.object.read(offset - 100, length + 100) == image[offset - 100 : offset + length]
    await node.object.zeroes(4096, 4096)  # less than the preferred unit: data, which the rule is not for
    assert await node.object.read(0, MIB) == image
    below = node.children["file"].node.counters()
    assert below["requests"]["write"] > 100 * 100_000 // 8192
    assert below["bytes"]["write"] <= 8192 * below["requests"]["write"]


async def test_parts_of_a_block_do_not_lose_one_another(graph: Graph, scratch: Path) -> None:
    node = await debug(graph, scratch, align=4096)
    await asyncio.gather(*(node.object.write(i * 64, bytes([i]) * 64) for i in range(256)))
    assert await node.object.read(0, 256 * 64) == b"".join(bytes([i]) * 64 for i in range(256))


# ---- blklogwrites ----


async def logged(graph: Graph, scratch: Path, size: int = MIB, **options: Any) -> BlkLogWrites:
    names = {name.replace("_", "-"): value for name, value in options.items()}
    log = scratch / "log"
    log.touch()
    image = file(scratch / "image", size)
    base = {
        "driver": "blklogwrites",
        "node-name": "logged",
        "discard": "unmap",
        "file": image,
        "log": file(log),
    }
    node = await graph.add(base | names)
    assert isinstance(node, BlkLogWrites)
    return node


async def random_changes(node: Node, seed: int, count: int) -> None:
    source = random.Random(seed)
    for _ in range(count):
        offset, length = source.randrange(0, MIB - 70_000), source.randrange(1, 70_000)
        match source.randrange(4):
            case 0 | 1:
                await node.object.write(offset, source.randbytes(length))
            case 2:
                await node.object.zeroes(offset, length, source.choice((0, UNMAP)))
            case 3:
                await node.object.discard(offset, length)


@pytest.mark.parametrize("sector_size", [512, 4096])
async def test_a_log_rebuilds_the_image(graph: Graph, scratch: Path, sector_size: int) -> None:
    node = await logged(graph, scratch, log_sector_size=sector_size)
    await random_changes(node, 1, 60)
    await graph.remove("logged")
    copy = scratch / "copy"
    copy.write_bytes(bytes(MIB))
    with WriteLog(scratch / "log") as log:
        assert log.sector_size == sector_size
        rebuild(log, copy)
    assert copy.read_bytes() == (scratch / "image").read_bytes()


async def test_a_log_goes_on_where_it_ended(graph: Graph, scratch: Path) -> None:
    for part in range(3):
        node = (
            await logged(graph, scratch, size=MIB, log_append=True)
            if part == 0
            else await again(graph, scratch)
        )
        await random_changes(node, part, 10)
        await node.mark(f"part {part}")
        await graph.remove("logged")
    copy = scratch / "copy"
    copy.write_bytes(bytes(MIB))
    with WriteLog(scratch / "log") as log:
        assert log.mark("part 0") < log.mark("part 1") < log.mark("part 2")
        rebuild(log, copy)
    assert copy.read_bytes() == (scratch / "image").read_bytes()


async def again(graph: Graph, scratch: Path) -> BlkLogWrites:
    options = {"driver": "blklogwrites", "node-name": "logged", "discard": "unmap", "log-append": True}
    node = await graph.add(options | {"file": file(scratch / "image"), "log": file(scratch / "log")})
    assert isinstance(node, BlkLogWrites)
    return node


async def test_a_write_that_ends_during_a_flush_is_behind_it(graph: Graph, scratch: Path) -> None:
    slow = {"event": "none", "iotype": "flush", "errno": 0, "x-delay-ns": 30_000_000}
    image = {"driver": "blkdebug", "image": file(scratch / "image", MIB), "inject-error": [slow]}
    (scratch / "log").touch()
    node = await graph.add(
        {"driver": "blklogwrites", "node-name": "logged", "file": image, "log": file(scratch / "log")}
    )
    await node.object.write(0, b"a" * 512)
    flush = asyncio.ensure_future(node.object.flush())
    await asyncio.sleep(0.005)
    await node.object.write(512, b"b" * 512)
    await flush
    await graph.remove("logged")
    with WriteLog(scratch / "log") as log:
        assert [str(entry) for entry in log.entries] == ["0 write 0 512", "1 flush", "2 write 512 512"]


async def test_failed_requests_in_the_log(graph: Graph, scratch: Path) -> None:
    """A write that failed may be there in part, so it is logged; a flush that failed promises nothing."""
    rules = [{"event": "none", "iotype": kind, "once": True} for kind in ("write", "flush")]
    image = {"driver": "blkdebug", "image": file(scratch / "image", MIB), "inject-error": rules}
    (scratch / "log").touch()
    node = await graph.add(
        {"driver": "blklogwrites", "node-name": "logged", "file": image, "log": file(scratch / "log")}
    )
    await fails(node.object.write(0, b"a" * 512))
    await fails(node.object.flush())
    await node.object.write(0, b"b" * 512)
    await node.object.flush()
    with WriteLog(scratch / "log") as log:
        assert [entry.flags for entry in log.entries] == [Flag.NONE, Flag.NONE, Flag.FLUSH]


async def test_fua_is_a_flush_in_the_log(graph: Graph, scratch: Path) -> None:
    node = await logged(graph, scratch)
    await node.object.write(0, b"a" * 512, FUA)
    await node.write(512, b"b" * 512, FUA)
    await node.mark("end")
    with WriteLog(scratch / "log") as log:
        assert [entry.flags for entry in log.entries] == [Flag.NONE, Flag.FLUSH, Flag.FUA, Flag.MARK]


async def test_the_superblock_is_updated_at_the_interval(graph: Graph, scratch: Path) -> None:
    node = await logged(graph, scratch, log_super_update_interval=4)
    for i in range(10):
        await node.object.write(i * 512, b"a" * 512)
    with WriteLog(scratch / "log") as log:
        assert len(log.entries) == 8
    await graph.remove("logged")
    with WriteLog(scratch / "log") as log:
        assert len(log.entries) == 10


async def test_a_log_that_cannot_be_written_fails_the_request(graph: Graph, scratch: Path) -> None:
    full = {"event": "none", "iotype": "write", "errno": errno.ENOSPC}
    log = {"driver": "blkdebug", "image": file(scratch / "log", 0), "inject-error": [full]}
    node = await graph.add(
        {"driver": "blklogwrites", "node-name": "logged", "file": file(scratch / "image", MIB), "log": log}
    )
    await fails(node.object.write(0, b"a" * 512), errno.ENOSPC)
    await fails(node.object.flush(), errno.ENOSPC)
    await node.object.read(0, 512)
    with pytest.raises(OSError):
        await graph.remove("logged")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"log_super_update_interval": 0}, "Invalid log superblock update interval 0"),
        (
            {"log_append": True, "log_sector_size": 512},
            "log-append and log-sector-size are mutually exclusive",
        ),
        ({"log_sector_size": 513}, "Invalid log sector size 513"),
        ({"log_sector_size": 1 << 24}, "Invalid log sector size 16777216"),
    ],
)
async def test_blklogwrites_refuses_by_name(
    graph: Graph, scratch: Path, options: Options, message: str
) -> None:
    with pytest.raises(BlockError, match=f"node 'logged': {message}"):
        await logged(graph, scratch, **options)
    assert not graph.nodes


async def test_what_is_not_a_log_is_not_appended_to(graph: Graph, scratch: Path) -> None:
    (scratch / "log").write_bytes(b"something else".ljust(4096))
    with pytest.raises(BlockError, match="Invalid log superblock magic"):
        await logged(graph, scratch, log_append=True)
    assert (scratch / "log").read_bytes() == b"something else".ljust(4096)
