# SPDX-License-Identifier: Apache-2.0
"""kill -9 of a real target under load, a hundred times: leaks at most, and all that was flushed is there."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from target.peers.nbd_client import NbdClient
from tests.crash import images
from tests.crash.history import History
from tests.crash.images import KINDS, SIZE
from tests.crash.load import Load
from tests.crash.targets import Nursery, Target
from tests.support.tools import check_image, qemu_img

KILLS = 13  # of each of eight kinds of image
CHOSEN = ("64k-chain", *(name for name in KINDS if name != "64k-chain"))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", CHOSEN)
async def test_kill(nursery: Nursery, scratch: Path, scale: int, seed: str, name: str) -> None:
    kind = KINDS[name]
    disk = images.make(kind, scratch)
    source = random.Random(f"{seed} {name}")
    files = [
        images.file(disk),
        images.slow_file(disk, read=2),
        images.file(disk),
        images.slow_file(disk, read=source.random(), write=source.random() * 3, flush=2),
    ]
    before = images.content(disk)
    fixed = images.untouchable(kind, disk)
    for number in range(KILLS * scale):
        history = History(before, number + 1)
        options = images.qcow2(kind, files[number % len(files)])
        with Target(nursery, options, grants=kind.grants) as target:
            assert await target.ready(), target.output()
            clients = [await target.connect() for _ in range(2)]
            assert await clients[0].read(0, SIZE) == before, "the restarted target reads something else"
            load = Load(clients, history, f"{seed} {name} {number}", kind.largest)
            await killed(target, load, source)
            await asyncio.gather(*(client.abort() for client in clients))
        images.check(disk)
        before = images.content(disk)
        history.check_content(before)
        assert images.untouchable(kind, disk) == fixed
    await clean_end(nursery, kind, disk, History(before, KILLS * scale + 1))


async def killed(target: Target, load: Load, source: random.Random) -> None:
    """Kills the target at some request, or between one and the next."""
    running = asyncio.ensure_future(load.run(10_000, in_flight=8))
    requests, moment = int(400 ** source.random()), source.random() * 0.003
    while load.done < requests and not running.done():
        await asyncio.sleep(0)
    await asyncio.sleep(moment)
    target.kill()
    await running
    assert load.gone and not load.errors


async def clean_end(nursery: Nursery, kind: images.Kind, disk: Path, history: History) -> None:
    """After the leaks are repaired, a run that ends cleanly leaves none."""
    qemu_img("check", "-q", "-r", "leaks", "-f", "qcow2", disk)
    with Target(nursery, images.qcow2(kind, images.file(disk)), grants=kind.grants) as target:
        assert await target.ready()
        clients: list[NbdClient] = [await target.connect() for _ in range(2)]
        load = Load(clients, history, "end", kind.largest)
        await load.run(100, in_flight=8)
        assert not load.errors and not load.gone
        history.complete_flush(history.begin_flush())  # a clean stop flushes
        for client in clients:
            await client.close()
        assert await target.stop() == 0
    check_image(disk)
    history.check_content(images.content(disk))
