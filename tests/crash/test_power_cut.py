# SPDX-License-Identifier: Apache-2.0
"""Power cuts: the image is rebuilt from a log of what a real target wrote and flushed, as a disk may hold it.

At each flush and at the end with what was not flushed dropped, and there and at random places with a random
part of it.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from target.replay import Discarded, Flag, PowerCut, WriteLog
from tests.crash.images import KINDS
from tests.crash.recording import ROUNDS, Recording
from tests.crash.reopening import goes_on
from tests.crash.targets import Nursery

CUTS = 20  # of each kind of image, beside three at each flush and at the end


def cuts(log: WriteLog, count: int, source: random.Random) -> Iterator[PowerCut]:
    for at in (*log.flushes(), len(log.entries)):
        yield PowerCut(at, discarded=Discarded.POISON)
        for _ in range(2):
            yield PowerCut(at, 0.5, source.randrange(1 << 32), Discarded.POISON)
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
