# SPDX-License-Identifier: Apache-2.0
"""The graph: names, inheritance, life of nodes, errors that leave nothing, nodes that Python serves."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from target.datapath import Extent
from target.drivers.protocol import alignment, file
from target.graph.errors import BlockError
from target.graph.graph import DEPTH_MAX, Graph
from target.graph.node import Node, NodeOptions
from target.graph.options import BlockdevRef, Settings
from target.graph.permissions import Perm

CR, W = Perm.CONSISTENT_READ, Perm.WRITE


class Memory(Node, driver="test-graph-memory"):
    """A driver in twenty lines of Python, without a native object."""

    class Options(NodeOptions):
        file: BlockdevRef | None = None
        fail: str = ""

    options: Options
    log: list[str]

    async def open(self) -> None:
        self.data = bytearray(1 << 20)
        self.log = []
        if self.options.file is not None:
            await self.attach("file", self.options.file)
        if self.options.fail == "open":
            raise OSError(errno.ENOSPC, "no space")

    async def close(self) -> None:
        if self.options.fail == "close":
            raise OSError(errno.EIO, "close")

    @property
    def size(self) -> int:
        return len(self.data)

    async def read(self, offset: int, length: int) -> bytes:
        if self.options.fail == "read":
            raise OSError(errno.ENODEV, "gone")
        return bytes(self.data[offset : offset + length])

    async def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        self.data[offset : offset + len(data)] = data

    async def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        self.data[offset : offset + length] = bytes(length)

    async def discard(self, offset: int, length: int) -> None:
        self.log.append(f"discard {offset}+{length}")

    async def flush(self) -> None:
        self.log.append("flush")

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        return [Extent(4096, 0), Extent(length - 4096, 3)]

    async def truncate(self, size: int) -> None:
        self.data = self.data[:size] + bytes(max(0, size - len(self.data)))
        self.object.size = size


class Chain(Node, driver="test-graph-chain"):
    """A format that finds its backing node in its file's name, as image headers do."""

    is_format = True

    class Options(NodeOptions):
        file: BlockdevRef
        next: str = ""

    options: Options

    async def open(self) -> None:
        node = await self.attach("file", self.options.file)
        with open(node.options.filename) as header:  # type: ignore[attr-defined]
            backing = header.readline().strip()
        if backing:
            inner = {"driver": "file", "filename": backing}
            await self.attach("backing", {"driver": "test-graph-chain", "file": inner})

    @property
    def size(self) -> int:
        return 4096


def null(name: str, **options: Any) -> dict[str, Any]:
    return {"driver": "null-co", "node-name": name, **options}


def file_options(path: Path, **options: Any) -> dict[str, Any]:
    return {"driver": "file", "filename": str(path), **options}


@pytest.fixture
def disk(scratch: Path) -> Path:
    path = scratch / "disk"
    path.write_bytes(b"x" * 10_000)
    return path


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


async def all_closed(before: int) -> bool:
    """Whether no more files are open than before, once the datapath has let go of its own."""
    for _ in range(200):
        if open_files() <= before:
            return True
        await asyncio.sleep(0.01)
    return False


# ---- names ----


@pytest.mark.parametrize("name", ["1a", "", "a b", "#block1", "-a", "ä", "a/b"])
async def test_names_that_are_not_well_formed(graph: Graph, name: str) -> None:
    with pytest.raises(BlockError, match=f"Invalid node-name: '{re.escape(name)}'"):
        await graph.add(null(name))


async def test_names(graph: Graph) -> None:
    await graph.add(null("a" * 31))
    await graph.add(null("A-b_c.9"))
    with pytest.raises(BlockError, match="Node name too long"):
        await graph.add(null("a" * 32))
    with pytest.raises(BlockError, match=r"Duplicate nodes with node-name='A-b_c\.9'"):
        await graph.add(null("A-b_c.9"))
    with pytest.raises(BlockError, match="'node-name' must be specified for the root node"):
        await graph.add({"driver": "null-co"})
    with pytest.raises(BlockError, match="Cannot find device='' nor node-name='b'"):
        graph.get("b")


async def test_inline_children_get_a_name_that_users_cannot_give(graph: Graph, disk: Path) -> None:
    node = await graph.add({"driver": "raw", "node-name": "r", "file": file_options(disk)})
    child = node.children["file"].node
    assert child.name.startswith("#block") and graph.nodes[child.name] is child
    assert child.label == "node 'r' child 'file'"


# ---- inheritance ----


async def test_inline_children_inherit(graph: Graph, disk: Path) -> None:
    options = {"read-only": True, "auto-read-only": True, "cache": {"no-flush": True}, "discard": "ignore"}
    node = await graph.add({"driver": "raw", "node-name": "r", "file": file_options(disk), **options})
    assert node.settings == Settings(read_only=True, auto_read_only=True, no_flush=True)
    assert node.children["file"].node.settings == Settings(
        read_only=True, auto_read_only=True, no_flush=True, discard="unmap"
    )


async def test_own_options_come_before_inherited_ones(graph: Graph, disk: Path) -> None:
    inner = file_options(disk, **{"read-only": False, "cache": {"no-flush": False}, "discard": "ignore"})
    outer = {"read-only": True, "cache": {"no-flush": True}}
    node = await graph.add({"driver": "raw", "node-name": "r", "file": inner, **outer})
    assert node.children["file"].node.settings == Settings()


async def test_backing_is_read_only(graph: Graph, scratch: Path) -> None:
    (scratch / "base").write_text("")
    (scratch / "top").write_text(f"{scratch}/base\n")
    options = file_options(scratch / "top")
    node = await graph.add({"driver": "test-graph-chain", "node-name": "c", "file": options})
    backing = node.children["backing"].node
    assert backing.read_only and backing.children["file"].node.read_only
    assert node.children["backing"].perm == Perm.NONE


async def test_references_inherit_nothing(graph: Graph) -> None:
    await graph.add(null("n"))
    await graph.add({"driver": "raw", "node-name": "r", "file": "n", "read-only": True})
    assert graph.get("n").settings == Settings()


# ---- life ----


async def test_remove(graph: Graph, disk: Path) -> None:
    before = open_files()
    await graph.add({"driver": "raw", "node-name": "r", "file": file_options(disk)})
    edge = await graph.attach_root("block export 'e'", graph.get("r"), CR, Perm.ALL)
    with pytest.raises(BlockError, match="Node r is in use: by block export 'e' as 'root' child"):
        await graph.remove("r")
    await graph.detach_root(edge)
    await graph.remove("r")
    assert graph.nodes == {} and await all_closed(before)
    with pytest.raises(BlockError, match="Failed to find node with node-name='r'"):
        await graph.remove("r")


async def test_a_child_by_name_outlives_its_parent(graph: Graph) -> None:
    await graph.add(null("n"))
    await graph.add({"driver": "raw", "node-name": "r", "file": "n"})
    with pytest.raises(BlockError, match="Block device n is in use: by node 'r' as 'file' child"):
        await graph.remove("n")
    await graph.remove("r")
    assert list(graph.nodes) == ["n"]


async def test_an_inline_child_with_a_name_is_its_parents(graph: Graph) -> None:
    await graph.add({"driver": "raw", "node-name": "r", "file": null("n")})
    with pytest.raises(BlockError, match="Node n is not owned by the monitor"):
        await graph.remove("n")
    await graph.add({"driver": "raw", "node-name": "s", "file": "n"})
    await graph.remove("r")
    assert sorted(graph.nodes) == ["n", "s"]
    await graph.remove("s")
    assert graph.nodes == {}


async def test_an_open_that_fails_leaves_nothing(graph: Graph, disk: Path) -> None:
    before = open_files()
    options = {"driver": "test-graph-memory", "node-name": "m", "file": file_options(disk), "fail": "open"}
    with pytest.raises(BlockError, match="node 'm': No space left on device"):
        await graph.add(options)
    assert graph.nodes == {} and await all_closed(before)


async def test_close_goes_on_past_errors(graph: Graph, disk: Path) -> None:
    before = open_files()
    await graph.add(
        {"driver": "test-graph-memory", "node-name": "m", "file": file_options(disk), "fail": "close"}
    )
    await graph.add(null("n"))
    with pytest.raises(OSError, match="close"):
        await graph.close()
    assert graph.nodes == {} and await all_closed(before)


# ---- chains ----


def make_chain(scratch: Path, *names: str) -> dict[str, Any]:
    for name, backing in itertools.pairwise(names):
        (scratch / name).write_text(f"{scratch}/{backing}\n")
    return {"driver": "test-graph-chain", "node-name": "c", "file": file_options(scratch / names[0])}


@pytest.mark.parametrize("names", [("a", "a"), ("a", "b", "a"), ("a", "b", "c", "b")])
async def test_loops_are_refused(graph: Graph, scratch: Path, names: tuple[str, ...]) -> None:
    options = make_chain(scratch, *names)
    with pytest.raises(BlockError, match=f"node 'c': the backing chain has a loop at '.*/{names[-1]}'"):
        await graph.add(options)
    assert graph.nodes == {}


async def test_deep_chains(graph: Graph, scratch: Path) -> None:
    names = [f"f{i}" for i in range(DEPTH_MAX)]
    (scratch / names[-1]).write_text("")
    await graph.add(make_chain(scratch, *names))
    await graph.remove("c")
    (scratch / "end").write_text("")
    with pytest.raises(BlockError, match=f"node 'c': the chain of nodes is deeper than {DEPTH_MAX}"):
        await graph.add(make_chain(scratch, *names, "end"))
    assert graph.nodes == {}


async def test_a_deep_node_has_a_short_name_in_messages(graph: Graph, scratch: Path) -> None:
    with pytest.raises(BlockError) as caught:
        await graph.add(make_chain(scratch, *(f"f{i}" for i in range(100)), "absent"))
    assert f"node 'c' child 'backing' (100 deep) child 'file': Could not open '{scratch}" in str(caught.value)


@pytest.mark.parametrize("nested", [False, True])
async def test_a_node_is_not_its_own_child(graph: Graph, nested: bool) -> None:
    """A name is taken, but means nothing yet, while its node is being opened."""
    child = {"driver": "raw", "file": "r"} if nested else "r"
    with pytest.raises(BlockError, match=r"node 'r'.*: Cannot find device='r' nor node-name='r'"):
        await graph.add({"driver": "raw", "node-name": "r", "file": child})
    assert graph.nodes == {}


# ---- requests ----


async def test_a_node_in_python_serves_through_the_datapath(graph: Graph) -> None:
    node = await graph.add({"driver": "test-graph-memory", "node-name": "m", "discard": "unmap"})
    assert isinstance(node, Memory)
    edge = await graph.attach_root("a user", node, CR | W, Perm.ALL)
    gate = edge.gate
    await gate.write(5000, b"hello")
    assert await gate.read(4999, 7) == b"\0hello\0"
    await gate.zeroes(5000, 2)
    assert await gate.read(5000, 5) == b"\0\0llo"
    await gate.discard(4096, 512)
    await gate.flush()
    assert node.log == ["discard 4096+512", "flush"]
    assert await gate.status(0, 1 << 20) == [Extent(4096, 0), Extent((1 << 20) - 4096, 3)]
    assert node.counters()["faults"]["upcall"] >= 7
    await graph.detach_root(edge)


async def test_an_error_of_a_node_in_python_has_its_errno(graph: Graph) -> None:
    node = await graph.add({"driver": "test-graph-memory", "node-name": "m", "fail": "read"})
    edge = await graph.attach_root("a user", node, CR, Perm.ALL)
    with pytest.raises(OSError) as info:
        await edge.gate.read(0, 512)
    assert info.value.errno == errno.ENODEV
    await graph.detach_root(edge)


async def test_discard_is_dropped_unless_the_node_has_it(graph: Graph) -> None:
    node = await graph.add({"driver": "test-graph-memory", "node-name": "m"})
    assert isinstance(node, Memory)
    edge = await graph.attach_root("a user", node, CR | W, Perm.ALL)
    await edge.gate.discard(0, 4096)
    assert node.log == []
    await graph.detach_root(edge)


@pytest.mark.parametrize(("mode", "discard", "holes"), [("off", "unmap", False), ("unmap", "unmap", True)])
async def test_detect_zeroes(graph: Graph, disk: Path, mode: str, discard: str, holes: bool) -> None:
    disk.write_bytes(b"x" * (1 << 20))
    options = {"detect-zeroes": mode, "discard": discard}
    node = await graph.add({**file_options(disk), "node-name": "f", **options})
    await node.write(0, bytes(1 << 19))
    await node.flush()
    assert (disk.stat().st_blocks * 512 < 1 << 20) == holes
    assert disk.read_bytes() == bytes(1 << 19) + b"x" * (1 << 19)


async def test_resize_reaches_the_users(graph: Graph, disk: Path) -> None:
    node = await graph.add({"driver": "raw", "node-name": "r", "file": file_options(disk)})
    edge = await graph.attach_root("a user", node, CR | W, Perm.ALL)
    told: list[int] = []
    edge.on_resize = told.append
    await graph.resize(node, 1 << 20)
    assert told[-1:] == [1 << 20]
    assert (node.size, edge.gate.size, disk.stat().st_size) == (1 << 20, 1 << 20, 1 << 20)
    await graph.resize(node.children["file"].node, 20_000)
    assert (told[-1], node.size, edge.gate.size) == (20_480, 20_480, 20_480)
    await graph.detach_root(edge)


# ---- raw ----


async def test_raw_window(graph: Graph, disk: Path) -> None:
    disk.write_bytes(bytes(range(256)) * 16)
    options = {"driver": "raw", "node-name": "r", "file": file_options(disk), "offset": 100, "size": 1024}
    node = await graph.add(options)
    assert node.size == 1024
    assert await node.read(0, 8) == bytes(range(100, 108))
    await node.write(1020, b"\xff" * 4)
    assert disk.read_bytes()[1119:1125] == bytes([95]) + b"\xff" * 4 + bytes([100])
    with pytest.raises(BlockError, match="node 'r': Cannot resize fixed-size raw disks"):
        await node.truncate(2048)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 1000}, "node 'r': Specified size is not multiple of 512"),
        ({"offset": 20_000}, "Offset (20000) cannot be greater than size of the containing file (10240)"),
        (
            {"offset": 512, "size": 10240},
            "The sum of offset (512) and size (10240) has to be smaller or equal to the actual size of the"
            " containing file (10240)",
        ),
        ({"offset": 1 << 62, "size": 1 << 62}, "Offset (4611686018427387904) cannot be greater than size"),
    ],
)
async def test_raw_errors(graph: Graph, disk: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BlockError, match=re.escape(message)):
        await graph.add({"driver": "raw", "node-name": "r", "file": file_options(disk), **options})


# ---- file ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"filename": "/nowhere/x"}, "node 'f': Could not open '/nowhere/x': No such file or directory"),
        ({"filename": "/tmp"}, "node 'f': Could not open '/tmp': Is a directory"),
        ({"filename": "/dev/null"}, "node 'f': 'file' driver requires '/dev/null' to be a regular file"),
        ({"filename": "/dev/fdset/3"}, "Failed to find fdset /dev/fdset/3"),
        ({"filename": "/dev/fdset/x"}, "Could not parse fdset /dev/fdset/x"),
        ({"filename": "a\0b"}, "Parameter 'filename' must not contain a null character"),
        (
            {"aio": "native"},
            "aio=native was specified, but it requires cache.direct=on, which was not specified.",
        ),
        ({"aio-max-batch": 3}, "node 'f': option 'aio-max-batch': only 0 is supported, not 3"),
        ({"detect-zeroes": "unmap"}, "setting detect-zeroes to unmap is not allowed without setting discard"),
        ({"driver": "host_device"}, "node 'f': 'host_device' driver requires"),
    ],
)
async def test_file_errors(graph: Graph, disk: Path, options: dict[str, Any], message: str) -> None:
    before = open_files()
    with pytest.raises(BlockError, match=re.escape(message)):
        await graph.add({**file_options(disk), "node-name": "f", **options})
    assert await all_closed(before)


async def test_a_fifo_does_not_block(graph: Graph, scratch: Path) -> None:
    os.mkfifo(scratch / "fifo")
    options = {**file_options(scratch / "fifo"), "node-name": "f", "read-only": True}
    with pytest.raises(BlockError, match="to be a regular file"):
        await graph.add(options)


async def test_file_size_rounds_up(graph: Graph, disk: Path) -> None:
    node = await graph.add({**file_options(disk), "node-name": "f"})
    assert node.size == 10_240
    assert await node.read(9_999, 4) == b"x\0\0\0"


async def test_auto_read_only(graph: Graph, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refusing(path: Any, flags: int, *rest: Any) -> int:
        if path == str(disk) and flags & os.O_RDWR:
            raise OSError(errno.EROFS, "read-only file system")
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(BlockError, match=r"Could not open .*: Read-only file system"):
        await graph.add({**file_options(disk), "node-name": "f"})
    inner = file_options(disk)
    node = await graph.add({"driver": "raw", "node-name": "r", "file": inner, "auto-read-only": True})
    assert node.read_only and node.children["file"].node.read_only
    with pytest.raises(BlockError, match="node 'r': Block node is read-only"):
        await graph.attach_root("a user", node, W, Perm.ALL)


async def test_io_uring_that_cannot_be_used(
    graph: Graph, disk: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(file, "lib", SimpleNamespace(bt_probe_io_uring=lambda: 0))
    file.io_uring_works.cache_clear()
    for name in ("f", "g"):
        node = await graph.add({**file_options(disk), "node-name": name, "aio": "io_uring"})
    file.io_uring_works.cache_clear()
    (record,) = caplog.records
    assert "aio=io_uring" in record.getMessage() and "thread pool" in record.getMessage()
    assert await node.read(0, 4) == b"xxxx"


@pytest.mark.parametrize("aio", ["threads", "native", "io_uring"])
async def test_direct(graph: Graph, aio: str) -> None:
    path = Path(__file__).with_name("direct.tmp")  # /tmp may be a tmpfs, which has no O_DIRECT
    path.write_bytes(b"x" * 8192)
    try:
        node = await graph.add(
            {**file_options(path), "node-name": "f", "aio": aio, "cache": {"direct": True}}
        )
        assert isinstance(node, file.File)
        assert node.align.request in (512, 4096)
        await node.write(1000, b"hello")
        assert await node.read(998, 9) == b"xxhelloxx"
        await graph.remove("f")
        assert path.read_bytes()[998:1007] == b"xxhelloxx"
    finally:
        path.unlink()


def test_alignment_by_reading_agrees_with_the_kernel() -> None:
    path = Path(__file__).with_name("align.tmp")
    path.write_bytes(bytes(65536))
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        found = alignment._by_reading(fd)
        assert found.request in (512, 1024, 2048, 4096)
        told = alignment._statx(fd)
        if told is not None:
            assert found.request >= told.request and found.memory >= told.memory
    finally:
        os.close(fd)
        path.unlink()


# ---- host_device ----


@pytest.fixture
def loop_device(scratch: Path) -> Iterator[Callable[..., Path]]:
    """loop_device(*flags) is a block device of 1 MiB."""
    if os.geteuid() != 0 or not os.path.exists("/dev/loop-control"):
        pytest.skip("block devices for a test take root and the kernel's loop driver")
    made: list[str] = []

    def make(*flags: str) -> Path:
        (scratch / "loop.raw").write_bytes(b"x" * (1 << 20))
        argv = ["losetup", "--find", "--show", *flags, str(scratch / "loop.raw")]
        made.append(subprocess.check_output(argv, text=True).strip())
        return Path(made[-1])

    yield make
    for device in made:
        subprocess.run(["losetup", "--detach", device], check=True)


def device_options(path: Path, **options: Any) -> dict[str, Any]:
    return {"driver": "host_device", "node-name": "d", "filename": str(path), **options}


@pytest.mark.parametrize("direct", [False, True])
async def test_host_device(graph: Graph, loop_device: Callable[..., Path], direct: bool) -> None:
    path = loop_device()
    node = await graph.add(device_options(path, discard="unmap", cache={"direct": direct}))
    assert node.size == 1 << 20
    await node.write(1000, b"hello")
    await node.write_zeroes(4096, 8192)
    await node.flush()
    assert await node.read(999, 7) == b"xhellox"
    assert await node.read(4095, 8194) == b"x" + bytes(8192) + b"x"
    await node.discard(65536, 65536)
    with pytest.raises(BlockError, match="node 'd': Cannot resize device files"):
        await graph.resize(node, 2 << 20)
    with pytest.raises(BlockError, match=r"'file' driver requires '.*' to be a regular file"):
        await graph.add({"driver": "file", "node-name": "f", "filename": str(path)})


async def test_read_only_host_device(graph: Graph, loop_device: Callable[..., Path]) -> None:
    path = loop_device("--read-only")
    with pytest.raises(BlockError, match="node 'd': Could not open"):
        await graph.add(device_options(path))
    node = await graph.add(device_options(path, **{"auto-read-only": True}))
    assert node.read_only


class Plain(Node, driver="test-graph-plain"):
    """The least that a driver can be."""

    async def open(self) -> None:
        self.data = bytearray(b"x" * 4096)

    def make_object(self) -> None:
        return None

    @property
    def size(self) -> int:
        return len(self.data)

    async def read(self, offset: int, length: int) -> bytes:
        return bytes(self.data[offset : offset + length])

    async def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        self.data[offset : offset + len(data)] = data


async def test_a_driver_of_read_and_write_alone_serves_every_request(graph: Graph) -> None:
    node = await graph.add({"driver": "test-graph-plain", "node-name": "plain"})
    assert await node.object.status(0, 4096) == [Extent(4096, 0)]
    await node.object.zeroes(512, 1024)
    await node.object.discard(0, 4096)
    await node.object.flush()
    assert await node.object.read(0, 4096) == b"x" * 512 + bytes(1024) + b"x" * 2560
