# SPDX-License-Identifier: Apache-2.0
"""A life of an image below which every write and flush is logged, and what a power cut may leave of it."""

from __future__ import annotations

import asyncio
from pathlib import Path

from target.replay import PowerCut, WriteLog
from target.replay.layout import SUPER_SIZE, unpack_super
from tests.crash import images
from tests.crash.history import History, Numbers
from tests.crash.images import Kind
from tests.crash.load import Load
from tests.crash.targets import Nursery, Target

ROUNDS, REQUESTS = 4, 40


class Recording:
    """A life of an image, its log, and what was durable at which place in the log."""

    def __init__(self, kind: Kind, root: Path) -> None:
        self.kind = kind
        self.root = root
        self.disk = images.make(kind, root)
        self.start = self.disk.read_bytes()
        self.content = images.content(self.disk)
        self.fixed = images.untouchable(kind, self.disk)
        self.log = root / "log"
        self.again()

    def again(self) -> None:
        """The image as it was at first, and an empty log."""
        self.disk.write_bytes(self.start)
        self.log.write_bytes(b"")
        self.history = History(self.content)
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
