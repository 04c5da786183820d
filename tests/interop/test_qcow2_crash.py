# SPDX-License-Identifier: Apache-2.0
"""The order of writes below qcow2, and failing ones, with a file node that records and can fail.

From the record an image is built as a power cut may leave it: everything before a flush, and any part of what
came after it. qemu-img may find leaks in it, nothing else, and all data that a flush covered must be there.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest

from target.datapath import Extent, Object
from target.drivers.format.qcow2 import Qcow2, node
from target.graph.errors import BlockError
from target.graph.node import Node, NodeOptions
from tests.support.qcow2 import SECTOR, Workload, content, running_graph
from tests.support.tools import check_image, create_image, qemu_img, qemu_io

MIB = 1 << 20
SIZE = 4 * MIB


class Recorder(Node, driver="test-recorder"):
    """A file in memory. ``log`` holds writes as (offset, data) and flushes as None."""

    class Options(NodeOptions):
        pass

    is_protocol = True
    data: ClassVar[bytearray]
    log: ClassVar[list[tuple[int, bytes] | None]]
    fail_at: ClassVar[int | None] = None  # the number of the operation that fails
    fail_with: ClassVar[int] = errno.EIO
    operations: ClassVar[int] = 0
    pages: ClassVar[set[int]]  # of 4 KiB, that take room
    room: ClassVar[int | None] = None  # pages

    async def open(self) -> None:
        return None

    def make_object(self) -> Object:
        return self.datapath.upcall(1 << 50, self.serve)

    @property
    def size(self) -> int:
        return len(self.data)

    @classmethod
    def count(cls) -> None:
        cls.operations += 1
        if cls.operations - 1 == cls.fail_at:
            raise OSError(cls.fail_with, "injected")

    async def read(self, offset: int, length: int) -> bytes:
        self.count()
        return bytes(self.data[offset : offset + length].ljust(length, b"\0"))

    async def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        self.count()
        self.take_room(offset, len(data))
        self.log.append((offset, bytes(data)))
        apply(self.data, offset, data)

    def take_room(self, offset: int, length: int) -> None:
        pages = self.pages | set(range(offset >> 12, (offset + length - 1 >> 12) + 1))
        if self.room is not None and len(pages) > self.room:
            raise OSError(errno.ENOSPC, "no room")
        Recorder.pages = pages

    async def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        await self.write(offset, bytes(length))

    async def discard(self, offset: int, length: int) -> None:
        """Worse than what a disk does: content that somebody still needs is destroyed for sure."""
        await self.write(offset, b"\xdc" * length)

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        return [Extent(length, 0)]

    async def flush(self) -> None:
        self.count()
        self.log.append(None)


def apply(image: bytearray, offset: int, data: bytes) -> None:
    if len(image) < offset + len(data):
        image.extend(bytes(offset + len(data) - len(image)))
    image[offset : offset + len(data)] = data


@pytest.fixture(autouse=True)
def recorder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "_is_growable", lambda _: True)
    monkeypatch.setattr(Recorder, "fail_at", None)
    monkeypatch.setattr(Recorder, "operations", 0)
    monkeypatch.setattr(Recorder, "room", None)
    monkeypatch.setattr(Recorder, "pages", set(), raising=False)
    monkeypatch.setattr(Recorder, "log", [], raising=False)
    monkeypatch.setattr(Recorder, "data", bytearray(), raising=False)


def options(**extra: Any) -> dict[str, Any]:
    file = {"driver": "test-recorder"}
    return {"driver": "qcow2", "node-name": "disk", "discard": "unmap", "file": file} | extra


IMAGES = {
    "64k": "cluster_size=64k",
    "4k": "cluster_size=4k",
    "512": "cluster_size=512",
    "512-wide": "cluster_size=512,refcount_bits=64",
    "v2": "cluster_size=4k,compat=0.10",
}


def make(scratch: Path, name: str, snapshot: bool) -> None:
    path = create_image(scratch / "disk.qcow2", str(SIZE), options=IMAGES[name])
    if snapshot:
        qemu_io(path, "write -P 1 0 1M", format="qcow2")
        qemu_img("snapshot", "-c", "one", path)
        qemu_io(path, "write -P 2 512k 64k", format="qcow2")
    Recorder.data[:] = path.read_bytes()


def check(path: Path, image: bytes | bytearray) -> bool:
    """No error but leaks; whether there are any."""
    path.write_bytes(image)
    done = qemu_img("check", "-f", "qcow2", path, check=False)
    assert done.returncode in (0, 3), done.stdout + done.stderr
    return done.returncode == 3


# ---- power cuts ----


class Flushed(Workload):
    """Notes what the disk must hold if the power goes between one acknowledged flush and the next."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.points: list[Point] = [Point(0, bytes(self.model), set())]

    async def _one(self, offset: int, length: int) -> None:
        self.points[-1].touched.update(range(offset // SECTOR, (offset + length) // SECTOR))
        await super()._one(offset, length)

    async def flush_point(self) -> None:
        await self.node.flush()
        self.points.append(Point(len(Recorder.log), bytes(self.model), set()))


class Point(NamedTuple):
    """A flush was acknowledged at ``position`` in the log; then the sectors ``touched`` were changed."""

    position: int
    content: bytes
    touched: set[int]


def images_after_power_cut(start: bytes, seed: int) -> Iterator[tuple[int, bytearray]]:
    """At each flush (its place in the log) what is durable, and a random part of the writes after it."""
    source = random.Random(seed)
    durable = bytearray(start)
    pending: list[tuple[int, bytes]] = []
    for position, item in enumerate([*Recorder.log, None]):
        if item is not None:
            pending.append(item)
            continue
        for kept in (0.0, 0.5, 0.9):
            image = bytearray(durable)
            for offset, data in pending:
                for at in range(0, len(data), SECTOR):
                    if source.random() < kept:
                        apply(image, offset + at, data[at : at + SECTOR])
            yield position, image
        for offset, data in pending:
            apply(durable, offset, data)
        pending = []


@pytest.mark.slow
@pytest.mark.parametrize("snapshot", [False, True], ids=["plain", "snapshot"])
@pytest.mark.parametrize("name", IMAGES)
async def test_power_cut(scratch: Path, name: str, snapshot: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    make(scratch, name, snapshot)
    start = bytes(Recorder.data)
    monkeypatch.setattr(Qcow2, "grant_limit", 4)
    async with running_graph() as graph:
        disk = await graph.add(options())
        work = Flushed(disk, bytearray(await content(disk)), seed=7, largest=30_000)
        for _ in range(6):
            await work.run(12, in_flight=6)
            await work.flush_point()
    path = scratch / "crashed.qcow2"
    for position, image in images_after_power_cut(start, seed=9):
        check(path, image)
        assert_flushed(path, scratch, [point for point in work.points if point.position <= position][-1])
    path.write_bytes(Recorder.data)
    check_image(path)


def assert_flushed(path: Path, scratch: Path, point: Point) -> None:
    """Sectors that were not touched since the flush are as they were then."""
    flat = scratch / "flat.raw"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", path, flat)
    data = flat.read_bytes()
    for sector in range(SIZE // SECTOR):
        if sector not in point.touched:
            at = sector * SECTOR
            assert data[at : at + SECTOR] == point.content[at : at + SECTOR], sector


# ---- operations that fail ----


class Unreliable(Workload):
    """Goes on after errors; ``unknown`` are the sectors of requests that failed."""

    unknown: set[int]
    failures = 0

    async def _one(self, offset: int, length: int) -> None:
        try:
            await super()._one(offset, length)
        except OSError as error:
            assert error.errno == Recorder.fail_with
            self.failures += 1
            self.unknown.update(range(offset // SECTOR, (offset + length) // SECTOR))
        else:
            written = self.model[offset : offset + length] == await self.retried(offset, length)
            assert written or self.unknown & set(range(offset // SECTOR, (offset + length) // SECTOR))

    async def retried(self, offset: int, length: int) -> bytes:
        try:
            return await self.node.read(offset, length)
        except OSError:
            self.failures += 1
            return await self.node.read(offset, length)


async def life(seed: int) -> Unreliable | None:
    """A short life of an image in which operation ``fail_at`` fails. None: it could not be opened."""
    async with AsyncExitStack() as stack:
        graph = await stack.enter_async_context(running_graph())
        try:
            disk = await graph.add(options())
        except BlockError as error:
            assert "'disk'" in str(error)
            return None
        work = Unreliable(disk, bytearray(SIZE), seed, largest=30_000)
        work.unknown = set()
        work.model = bytearray(await work.retried(0, SIZE))
        await work.run(30, in_flight=4)
        for _ in range(2):
            try:
                await disk.flush()
            except OSError as error:
                assert error.errno == Recorder.fail_with
                work.failures += 1
        try:
            await graph.remove("disk")
        except OSError:
            work.failures += 1
        return work
    raise AssertionError


@pytest.mark.slow
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("snapshot", [False, True], ids=["plain", "snapshot"])
async def test_nth_operation_fails(scratch: Path, snapshot: bool, error: int) -> None:
    """The n-th operation on the file fails, for each n: somebody hears of it, or it has no effect."""
    make(scratch, "4k", snapshot)
    start = bytes(Recorder.data)
    Recorder.fail_with = error
    await life(seed=3)
    total = Recorder.operations
    unheard = 0
    for n in range(total):
        Recorder.data[:] = start
        Recorder.operations, Recorder.fail_at = 0, n
        work = await life(seed=3)
        Recorder.fail_at = None
        leaks = check(scratch / "failed.qcow2", Recorder.data)
        flat = content_by_qemu(scratch)
        if work is not None:
            unheard += not work.failures
            assert work.failures or not leaks, f"{n}: clusters leaked, and nobody was told"
            assert_known(flat, work)
        await assert_opens(flat)
        check(scratch / "failed.qcow2", Recorder.data)
    assert unheard <= total // 10  # what is tried again: ahead of need, or after space was made


def content_by_qemu(scratch: Path) -> bytes:
    flat = scratch / "flat.raw"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", scratch / "failed.qcow2", flat)
    return flat.read_bytes()


async def assert_opens(flat: bytes) -> None:
    """Our own driver opens what is left for writing, and reads what qemu-img reads."""
    async with running_graph() as graph:
        disk = await graph.add(options())
        assert await content(disk) == flat
        await disk.write(0, b"again" * 1024)
        await disk.flush()


def assert_known(data: bytes, work: Unreliable) -> None:
    for sector in set(range(SIZE // SECTOR)) - work.unknown:
        at = sector * SECTOR
        assert data[at : at + SECTOR] == work.model[at : at + SECTOR], sector


@pytest.mark.parametrize("name", IMAGES)
async def test_full_disk(scratch: Path, name: str) -> None:
    """Data fills the disk below: what was acknowledged can be flushed, as its metadata has room already."""
    make(scratch, name, snapshot=False)
    Recorder.pages = set(range(len(Recorder.data) >> 12))
    Recorder.room = 300
    model: dict[int, bytes] = {}
    async with running_graph() as graph:
        disk = await graph.add(options())
        full = 0
        for at in range(0, SIZE, 1 << 16):
            data = bytes([at >> 16 | 0x80]) * (1 << 16)
            try:
                await disk.write(at, data)
                model[at] = data
            except OSError as error:
                assert error.errno == errno.ENOSPC
                full += 1
        assert model and full
        await disk.flush()
        assert all([await disk.read(at, len(data)) == data for at, data in model.items()])
    assert_image(scratch, model)


def assert_image(scratch: Path, model: dict[int, bytes]) -> None:
    path = scratch / "full.qcow2"
    path.write_bytes(Recorder.data)
    check_image(path)
    for at, data in model.items():
        qemu_io(path, f"read -P {data[0]} {at} {len(data)}", format="qcow2")
