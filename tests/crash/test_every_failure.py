# SPDX-License-Identifier: Apache-2.0
"""Every read, write, flush, write-zeroes and discard of the image file in a short life fails in turn.

The life is one request at a time over NBD, so that it can be said what must become of each failure. One that
nobody heard of must be without any effect: all that was answered is there, and not even a cluster has leaked.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from target import drivers
from target.config.options import Notation
from target.drivers.filter.blkdebug import BlkDebug
from target.drivers.format.qcow2 import Qcow2
from target.exports.address import UnixAddress
from target.exports.base import parse_export
from target.exports.nbd import NbdServerOptions
from target.graph.errors import BlockError
from target.graph.registry import parse_blockdev
from target.objects import parse_object
from target.peers.nbd_client import NbdClient
from target.service import Service
from tests.crash import images
from tests.crash.history import History, Kind, numbered
from tests.crash.images import KINDS, SECTORS
from tests.crash.load import Load
from tests.crash.reopening import goes_on

OPERATIONS = ("read", "write", "flush", "write-zeroes", "discard")
PAUSE = 0.02  # enough for a write-back that nobody waits for

Step = tuple[Kind, int, int] | tuple[str, int, int]
W, Z, D = Kind.WRITE, Kind.ZEROES, Kind.DISCARD

# Clusters hold 8 sectors, slices of the table 512. Between two flushes one slice is changed, so that with a
# cache of one slice nothing is written back but by a flush; each return to a slice reads it again.
CALM: tuple[Step, ...] = (
    (W, 0, 24),
    ("flush", 0, 0),
    (W, 13, 2),
    ("read", 0, 64),
    (W, 523, 10),
    ("flush", 0, 0),
    (Z, 0, 8),
    ("fua", 36, 8),
    (Z, 37, 2),
    ("read", 512, 64),
    (D, 520, 16),
    ("flush", 0, 0),
    (Z, 531, 2),
    (W, 520, 16),
    ("flush", 0, 0),
    ("fua zeroes", 16, 11),
    ("flush", 0, 0),
)
# Four slices are changed, for which the cache has no room.
PRESSED: tuple[Step, ...] = (
    *((W, 512 * slice + 3, 10) for slice in range(4)),
    ("pause", 0, 0),
    (D, 0, 16),
    (W, 1040, 8),
    ("pause", 0, 0),
    ("read", 0, 16),
    ("flush", 0, 0),
    (Z, 1536, 16),
    (W, 16, 8),
    ("pause", 0, 0),
)
LIVES = {"calm": CALM, "pressed": PRESSED}


@dataclass
class Outcome:
    """How a life went: errors that clients got, and those of the opening and the closing."""

    requests: list[int] = field(default_factory=list)
    others: list[Exception] = field(default_factory=list)
    injected: int = 0

    @property
    def heard(self) -> int:
        return len(self.requests) + len(self.others)


async def life(
    options: dict[str, Any], file: dict[str, Any], steps: tuple[Step, ...], history: History, socket: Path
) -> Outcome:
    """Opens the image on ``file``, which may fail, does the steps through two clients, and closes it."""
    drivers.load()
    service = Service()
    outcome = Outcome()
    try:
        for name in ("io0", "io1"):
            service.add_object(*parse_object({"qom-type": "iothread", "id": name}, Notation.JSON))
        await service.add_blockdev(parse_blockdev(file))
        debug = service.graph.get("debug")
        assert isinstance(debug, BlkDebug)
        try:
            await service.add_blockdev(parse_blockdev(options))
        except BlockError as error:
            assert "'disk'" in str(error)
            outcome.others.append(error)
        else:
            outcome.requests = await served(service, steps, history, socket)
    finally:
        closing = await service.close()
    outcome.others += closing
    outcome.injected = debug.injected
    if not outcome.others:
        history.complete_flush(history.begin_flush())  # a clean close flushes
    return outcome


async def served(service: Service, steps: tuple[Step, ...], history: History, socket: Path) -> list[int]:
    """The steps, in turns over two connections on two I/O threads. The errors that came back."""
    await service.start_nbd_server(NbdServerOptions(addr=UnixAddress(str(socket))))
    export = {"type": "nbd", "id": "e", "node-name": "disk", "name": "disk", "writable": True}
    await service.add_export(*parse_export({**export, "iothread": ["io0", "io1"]}))
    clients = [await NbdClient.connect(str(socket), "disk") for _ in range(2)]
    load = Load(clients, history, "steps")
    for step, client in zip(steps, itertools.cycle(clients), strict=False):
        try:
            await do(load, client, *step)
        except OSError as error:
            load.errors.append(error.errno or 0)
    for client in clients:
        await client.close()
    return load.errors


async def do(load: Load, client: NbdClient, what: Kind | str, first: int, count: int) -> None:
    match what:
        case Kind():
            await load.change(client, what, first, count)
        case "fua":
            await load.change(client, Kind.WRITE, first, count, fua=True)
        case "fua zeroes":
            await load.change(client, Kind.ZEROES, first, count, fua=True)
        case "read":
            await load.read(client, first, count)
        case "flush":
            await load.flush(client)
        case "pause":
            await asyncio.sleep(PAUSE)
        case _:
            raise AssertionError(what)


@dataclass
class Bench:
    """An image that each life begins with anew. Without a kind it is raw."""

    kind: images.Kind | None
    disk: Path

    def __post_init__(self) -> None:
        self.start = self.disk.read_bytes()
        self.content = images.flat(self.kind, self.disk)
        self.fixed = self.untouchable()

    def untouchable(self) -> dict[str, bytes]:
        return {} if self.kind is None else images.untouchable(self.kind, self.disk)

    async def live(self, steps: tuple[Step, ...], rule: dict[str, Any]) -> Outcome:
        """One life, after which the image must check, hold what it has to, and open again."""
        self.disk.write_bytes(self.start)
        history = History(self.content)
        file = {
            "driver": "blkdebug",
            "node-name": "debug",
            "image": images.file(self.disk),
            "discard": "unmap",
        }
        rules = [{"event": "none", "errno": errno.EIO} | rule]
        socket = self.disk.with_name("socket")
        outcome = await life(
            images.node(self.kind, "debug"), file | {"inject-error": rules}, steps, history, socket
        )
        assert set(outcome.requests) <= {errno.EIO}
        leaks = self.kind is not None and images.check(self.disk)
        assert outcome.heard or not leaks, "clusters leaked, and nobody was told"
        content = images.flat(self.kind, self.disk)
        history.check_content(content)
        assert self.untouchable() == self.fixed
        await goes_on(self.disk, self.kind, content)
        return outcome


def bench(name: str, root: Path) -> Bench:
    if name != "raw":
        return Bench(KINDS[name], images.make(KINDS[name], root))
    disk = root / "disk.raw"
    disk.write_bytes(numbered(1, SECTORS))
    return Bench(None, disk)


def must_be_heard(name: str, steps: str, operation: str, once: bool) -> bool:
    """Whether each failure reaches somebody. The others are of what no request waits for, and is tried again:

    counts read to fill the grant pool ahead of need, and a write-back for want of room in the cache. To qcow2
    a discard is a hint about a cluster that is free.
    """
    if name == "raw":
        return True
    if operation == "discard":
        return False
    return not once or (steps == "calm" and operation != "read")


CASES = [
    ("4k-one-slice", "calm", True),
    ("4k-one-slice", "calm", False),
    ("4k-one-slice", "pressed", True),
    ("4k-snapshot", "calm", True),
    ("raw", "calm", True),
    ("raw", "calm", False),
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("name", "steps", "once"), CASES, ids=[f"{n}-{s}-{'once' if o else 'sticky'}" for n, s, o in CASES]
)
async def test_every_failure(
    scratch: Path, name: str, steps: str, once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = bench(name, scratch)
    monkeypatch.setattr(Qcow2, "grant_limit", 1)
    for operation in OPERATIONS:
        for after in itertools.count():
            what = f"{operation} {after} fails"
            try:
                outcome = await tried.live(
                    LIVES[steps], {"iotype": operation, "x-after": after, "once": once}
                )
            except AssertionError as error:
                raise AssertionError(f"{what}: {error}") from None
            if not outcome.injected:
                break
            assert outcome.heard or not must_be_heard(name, steps, operation, once), f"{what}: nobody heard"
            assert outcome.heard <= 1 or not once, f"{what}: {outcome}"
        print(f"{after} of {operation}")
        assert after or steps != "calm", f"no {operation} came down"
