# SPDX-License-Identifier: Apache-2.0
"""All short sequences of operations on one place, and a power cut at every entry of each one's log.

Most bugs of crash consistency need few operations (Mohan et al., "Finding Crash-Consistency Bugs with Bounded
Black-Box Crash Testing", OSDI 2018): two here, three when the run may take longer.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from target.datapath import FUA, UNMAP
from target.drivers.filter.blklogwrites import BlkLogWrites
from target.graph.node import Node
from target.replay import Discarded, PowerCut, WriteLog
from tests.crash import images
from tests.crash.history import SECTOR, Kind
from tests.crash.images import KINDS
from tests.crash.recording import Recording
from tests.support.qcow2 import running_graph

# Kind, first sector, sectors, flags. The place is two clusters of 4 KiB.
CHANGES: dict[str, tuple[Kind, int, int, int]] = {
    "write": (Kind.WRITE, 0, 8, 0),
    "write-part": (Kind.WRITE, 3, 2, 0),
    "write-across": (Kind.WRITE, 5, 6, 0),
    "write-fua": (Kind.WRITE, 8, 8, FUA),
    "zeroes": (Kind.ZEROES, 0, 16, 0),
    "zeroes-part": (Kind.ZEROES, 6, 4, UNMAP),
    "zeroes-unmap": (Kind.ZEROES, 0, 8, UNMAP),
    "discard": (Kind.DISCARD, 0, 16, 0),
}
STEPS = (*CHANGES, "flush")


class Sequence(Recording):
    """A recording of operations one after another, in this process."""

    async def perform(self, steps: tuple[str, ...]) -> None:
        log = {"driver": "file", "filename": str(self.log)}
        file: dict[str, Any] = {"driver": "blklogwrites", "file": images.file(self.disk), "log": log}
        async with running_graph() as graph:
            disk = await graph.add(images.qcow2(self.kind, file))
            recorder = disk.children["file"].node
            assert isinstance(recorder, BlkLogWrites)
            for step in steps:
                await self._step(disk, step)
                await recorder.mark(step)

    async def _step(self, disk: Node, step: str) -> None:
        if step == "flush":
            begun = self.history.begin_flush()
            await disk.object.flush()
            self.history.complete_flush(begun)
            self.note_durable()
            return
        kind, first, count, flags = CHANGES[step]
        change = self.history.begin(kind, first, count)
        match kind:
            case Kind.WRITE:
                await disk.object.write(change.offset, change.data(), flags)
            case Kind.ZEROES:
                await disk.object.zeroes(change.offset, change.length, flags)
            case Kind.DISCARD:
                await disk.object.discard(change.offset, change.length)
        assert len(await disk.object.read(0, 16 * SECTOR)) == 16 * SECTOR
        self.history.complete(change, bool(flags & FUA))
        if flags & FUA:
            self.note_durable()


@pytest.mark.timeout(7200)
async def test_every_prefix_of_every_short_sequence(scratch: Path, scale: int) -> None:
    names, length = (["4k-snapshot"], 2) if scale == 1 else (["4k-snapshot", "512-chain-one-slice"], 3)
    for name in names:
        root = scratch / name
        root.mkdir()
        recording = Sequence(KINDS[name], root)
        for steps in itertools.product(STEPS, repeat=length):
            await every_prefix(recording, steps)


async def every_prefix(recording: Sequence, steps: tuple[str, ...]) -> None:
    recording.again()
    await recording.perform(steps)
    with WriteLog(recording.log) as log:
        for at in range(1, len(log.entries) + 1):
            if log.entries[at - 1].is_write or at == len(log.entries):
                check(recording, log, PowerCut(at, keep=at % 2, discarded=Discarded.POISON), steps)


def check(recording: Recording, log: WriteLog, cut: PowerCut, steps: tuple[str, ...]) -> None:
    try:
        recording.crash(log, cut)
    except AssertionError as error:
        raise AssertionError(f"{' '.join(steps)}: {cut}: {error}") from None
