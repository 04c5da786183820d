# SPDX-License-Identifier: Apache-2.0
"""What is measured, against whom, and the bars: the rows of the benchmark, as data. Nothing is run here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

Transport = Literal["vhost", "nbd"]
Image = Literal["raw", "qcow2", "null", "empty", "direct", "sparse", "remote", "throttled", "populated"]
# Graphs over an image: it is served by a second process of the same program over NBD; a throttle far from its
# limit; copy-on-read has nothing to copy.
OVER: dict[Image, Image] = {"remote": "raw", "throttled": "raw", "populated": "qcow2"}
Operation = Literal["randread", "randwrite", "seqread", "seqwrite"]

TARGET, QSD, QEMU_NBD, NBDKIT = "blocktarget", "qemu-storage-daemon", "qemu-nbd", "nbdkit file"
LIMIT_RING, LIMIT_CALLS = "fio io_uring", "fio psync"
SERVERS: dict[Transport, tuple[str, ...]] = {
    "vhost": (TARGET, QSD),
    "nbd": (TARGET, QSD, QEMU_NBD, NBDKIT),
}
LIMITS = (LIMIT_RING, LIMIT_CALLS)

EMPTY_SIZE, CLUSTER, FIRST_TOUCHES = 16 * GIB, 64 * KIB, 8000


@dataclass(frozen=True)
class Work:
    """What the client does. ``stride``: each multiple of it is taken once; ``ios`` 0: until time is over."""

    op: Operation
    block: int
    depth: int
    stride: int = 0
    ios: int = 0

    @property
    def writes(self) -> bool:
        return self.op.endswith("write")

    @property
    def size_and_depth(self) -> str:
        return f"{self.block // KIB}k-qd{self.depth}"


@dataclass(frozen=True)
class Bar:
    """Our median has to be at least (``iops``) or at most (``cpu``) ``times`` the one of ``against``.

    ``against`` is a server on the same row, or the name of another row, which means our own figure there.
    """

    measure: Literal["iops", "cpu"]
    against: str
    times: float


@dataclass(frozen=True)
class Row:
    transport: Transport
    image: Image
    work: Work
    bars: tuple[Bar, ...]

    @property
    def name(self) -> str:
        if self.image == "empty":
            return f"{self.transport}-qcow2-first-touch-{self.work.size_and_depth}"
        return f"{self.transport}-{self.image}-{self.work.op}-{self.work.size_and_depth}"

    @property
    def reference(self) -> str:
        """The peer that the plot compares with."""
        return QSD if self.transport == "vhost" or self.image == "remote" else NBDKIT

    def backends(self) -> tuple[str, ...]:
        """Who runs it. A null device has no limit; one psync job has no depth, so it is none for O_DIRECT."""
        if self.image in OVER:
            return (TARGET, QSD)
        limits = {"null": (), "direct": (LIMIT_RING,)}.get(self.image, LIMITS)
        return SERVERS[self.transport] + limits


def _row(transport: Transport, image: Image, work: Work, cpu: float, *more: Bar, **bars: float) -> Row:
    against = {"qsd": QSD, "nbdkit": NBDKIT}
    speed = tuple(Bar("iops", against[name], times) for name, times in bars.items())
    return Row(transport, image, work, (*speed, *more, Bar("cpu", QSD, cpu)))


def _vhost_4k() -> Iterable[Row]:
    """raw and, beside it, the fully allocated qcow2 image."""
    for depth, read, write in ((32, 1.5, 2.5), (1, 3.0, 3.0)):
        work: tuple[tuple[Operation, float, float], ...]
        work = (("randread", read, 1.2), ("randwrite", write, 2.5))
        for op, raw_bar, qcow2_bar in work:
            raw = _row("vhost", "raw", Work(op, 4 * KIB, depth), 0.6, qsd=raw_bar)
            own = Bar("iops", raw.name, 0.9)
            yield raw
            yield _row("vhost", "qcow2", Work(op, 4 * KIB, depth), 0.6, own, qsd=qcow2_bar)


def _vhost_sequential() -> Iterable[Row]:
    operations: tuple[Operation, ...] = ("seqread", "seqwrite")
    for op in operations:
        raw = _row("vhost", "raw", Work(op, 128 * KIB, 8), 1.0, qsd=1.0)
        yield raw
        yield _row("vhost", "qcow2", raw.work, 1.0, Bar("iops", raw.name, 0.9), qsd=1.0)


IDLE = "vhost-raw-randread-4k-qd32"  # what filters with nothing to do are compared with

ROWS: tuple[Row, ...] = (
    *_vhost_4k(),
    *_vhost_sequential(),
    _row("vhost", "throttled", Work("randread", 4 * KIB, 32), 0.6, Bar("iops", IDLE, 0.9), qsd=1.5),
    _row("vhost", "populated", Work("randread", 4 * KIB, 32), 0.6, Bar("iops", IDLE, 0.9), qsd=1.2),
    _row("vhost", "null", Work("randread", 4 * KIB, 32), 1.0, qsd=1.0),
    _row("vhost", "null", Work("randread", 4 * KIB, 1), 1.0, qsd=1.0),
    _row("vhost", "empty", Work("randwrite", 4 * KIB, 32, CLUSTER, FIRST_TOUCHES), 0.6, qsd=3.0),
    _row("vhost", "direct", Work("randread", 4 * KIB, 32), 1.0, qsd=1.0),
    _row("vhost", "direct", Work("randwrite", 4 * KIB, 32), 1.0, qsd=1.3),
    _row("nbd", "raw", Work("randread", 4 * KIB, 32), 0.6, nbdkit=1.5),
    _row("nbd", "raw", Work("randwrite", 4 * KIB, 32), 0.6, nbdkit=1.2),
    _row("nbd", "raw", Work("seqread", 128 * KIB, 8), 1.0, nbdkit=1.0),
    _row("nbd", "raw", Work("seqwrite", 128 * KIB, 8), 1.0, nbdkit=1.0),
    _row("nbd", "remote", Work("randread", 4 * KIB, 32), 0.6, qsd=1.3),
    _row("nbd", "remote", Work("seqread", 128 * KIB, 8), 1.0, qsd=1.3),
)


@dataclass(frozen=True)
class MemoryRow:
    """Anonymous memory after every table of an image was touched; the bar is in MiB."""

    transport: Transport
    image: Literal["empty-1TiB", "full-20GiB"]
    bar: float = 150.0

    @property
    def name(self) -> str:
        return f"memory-{self.transport}-{self.image}"


MEMORY_ROWS: tuple[MemoryRow, ...] = (
    MemoryRow("nbd", "empty-1TiB"),
    MemoryRow("nbd", "full-20GiB"),
    MemoryRow("vhost", "empty-1TiB"),
    MemoryRow("vhost", "full-20GiB"),
)


def chosen(name: str, patterns: list[str]) -> bool:
    """Whether a row of this name is to be run; a pattern need only match a part of it."""
    return not patterns or any(fnmatchcase(name, f"*{pattern}*") for pattern in patterns)
