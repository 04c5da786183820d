# SPDX-License-Identifier: Apache-2.0
"""Power cuts: the image is rebuilt from a log of what a real target wrote and flushed, as a disk may hold it.

At each flush with what was not flushed dropped, and there and at random places with a random part of it.
"""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from target.datapath import FUA
from target.replay import Discarded, Flag, PowerCut, WriteLog
from target.replay.layout import SUPER_SIZE, unpack_super
from tests.crash import images
from tests.crash.history import History, Numbers
from tests.crash.images import KINDS, Kind
from tests.crash.load import Load
from tests.crash.targets import Nursery, Target
from tests.support.qcow2 import running_graph

ROUNDS, REQUESTS = 4, 40
CUTS = 20  # of each kind of image, beside three at each flush


class Recording:
    """A life of an image, its log, and what was durable at which place in the log."""

    def __init__(self, kind: Kind, root: Path) -> None:
        self.kind = kind
        self.root = root
        self.disk = images.make(kind, root)
        self.start = self.disk.read_bytes()
        self.fixed = images.untouchable(kind, self.disk)
        self.history = History(images.content(self.disk))
        self.log = root / "log"
        self.log.touch()
        self.floors: list[tuple[int, Numbers]] = [(0, self.history.durable.copy())]

    async def record(self, nursery: Nursery, seed: object) -> None:
        log = {"driver": "file", "filename": str(self.log)}
        file = {"driver": "blklogwrites", "file": images.file(self.disk), "log": log}
        options = images.qcow2(self.kind, file)
        with Target(nursery, options, grants=self.kind.grants) as target:
            assert await target.ready(), target.output()
            clients = [await target.connect() for _ in range(2)]
            load = Load(clients, self.history, seed, self.kind.largest)
            load.on_durable = self.note_durable
            for _ in range(ROUNDS):
                await load.run(REQUESTS, in_flight=6)
                await load.flush(clients[0])
            assert not load.errors and not load.gone
            await asyncio.gather(*(client.close() for client in clients))
            assert await target.stop() == 0, target.output()

    def note_durable(self) -> None:
        """The flush that was acknowledged just now is among the entries that the superblock counts."""
        with self.log.open("rb") as file:
            entries = unpack_super(file.read(SUPER_SIZE)).entries
        self.floors.append((entries, self.history.durable.copy()))

    def floor(self, at: int) -> Numbers:
        """What must be there if the power goes before entry ``at``."""
        return [durable for entries, durable in self.floors if entries <= at][-1]

    def crash(self, log: WriteLog, cut: PowerCut) -> Path:
        """The image after the cut, checked from outside."""
        crashed = self.root / "crashed.qcow2"
        crashed.write_bytes(self.start)
        cut.make(log, crashed)
        images.check(crashed)
        self.history.check_content(images.content(crashed), self.floor(cut.at))
        assert images.untouchable(self.kind, crashed) == self.fixed
        return crashed


def cuts(log: WriteLog, count: int, source: random.Random) -> Iterator[PowerCut]:
    for flush in log.flushes():
        yield PowerCut(flush, discarded=Discarded.POISON)
        for _ in range(2):
            yield PowerCut(flush, 0.5, source.randrange(1 << 32), Discarded.POISON)
    for seed in range(count):
        at = source.randrange(len(log.entries) + 1)
        keep = source.choice((0.2, 0.5, 0.9, 1.0))
        yield PowerCut(at, keep, seed, source.choice(list(Discarded)))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", KINDS)
async def test_power_cut(nursery: Nursery, scratch: Path, scale: int, seed: str, name: str) -> None:
    kind = KINDS[name]
    source = random.Random(f"{seed} {name}")
    for life in range(scale):
        root = scratch / str(life)
        root.mkdir()
        recording = Recording(kind, root)
        await recording.record(nursery, f"{seed} {name} {life}")
        with WriteLog(recording.log) as log:
            assert len(log.flushes()) > ROUNDS
            for number, cut in enumerate(cuts(log, CUTS, source)):
                crashed = recording.crash(log, cut)
                if number % 8 == 0:
                    await goes_on(crashed, kind)
        shutil.rmtree(root)


async def goes_on(crashed: Path, kind: Kind) -> None:
    """Our own driver opens what is left for writing, reads the same, and leaves it without an error."""
    before = images.content(crashed)
    async with running_graph() as graph:
        node = await graph.add(images.qcow2(kind, images.file(crashed)))
        assert await node.read(0, node.size) == before
        await node.write(4096, b"\1" * 100_000, FUA)
    images.check(crashed)
    after = images.content(crashed)
    assert after[4096:104_096] == b"\1" * 100_000
    assert after[:4096] + after[104_096:] == before[:4096] + before[104_096:]


@pytest.mark.parametrize("name", ["4k-one-slice", "64k-chain"])
async def test_the_laboratory_notices_flushes_that_do_nothing(
    nursery: Nursery, scratch: Path, name: str
) -> None:
    """The same log with its flushes taken out: data, or the image itself, must be found lost."""
    recording = Recording(KINDS[name], scratch)
    await recording.record(nursery, "no flush")
    with WriteLog(recording.log) as log:
        log.entries = [entry._replace(flags=entry.flags & ~Flag.FLUSH) for entry in log.entries]
        noticed = 0
        for seed in range(12):
            try:
                recording.crash(log, PowerCut(len(log.entries), 0.7, seed))
            except AssertionError:
                noticed += 1
    assert noticed >= 10
