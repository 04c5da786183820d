# SPDX-License-Identifier: Apache-2.0
"""Power cuts: the image is rebuilt from a log of what a real target wrote and flushed, as a disk may hold it.

At each flush with what was not flushed dropped, and there and at random places with a random part of it.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from target.datapath import FUA
from target.replay import Discarded, Flag, PowerCut, WriteLog
from tests.crash import images
from tests.crash.images import KINDS, Kind
from tests.crash.recording import ROUNDS, Recording
from tests.crash.targets import Nursery
from tests.support.qcow2 import running_graph

CUTS = 20  # of each kind of image, beside three at each flush


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
