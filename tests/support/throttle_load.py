# SPDX-License-Identifier: Apache-2.0
"""Clients that ask for as much as a throttle gives, and what each of them got, window by window."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from target.peers.nbd_client import NbdClient
from tests.support.daemon import blockdev, nbd_export, nbd_server_unix

SIZE = 64 << 20


@dataclass(frozen=True)
class Load:
    """One client's requests: ``depth`` at a time, of ``length`` bytes, on the disk of that number."""

    depth: int = 16
    length: int = 4096
    write: bool = False
    disk: int = 0


@dataclass(frozen=True)
class Case:
    """Limits, who comes, and how many requests a second each of them is to get."""

    limits: dict[str, int]
    loads: Sequence[Load]
    rates: Sequence[float]


KIB, MIB = 1 << 10, 1 << 20
CASES = {
    "requests": Case({"iops-total": 500}, [Load()], [500]),
    "bytes": Case({"bps-write": 8 * MIB}, [Load(8, 64 * KIB, True)], [128]),
    "iops-size": Case({"iops-total": 1000, "iops-size": 4 * KIB}, [Load(length=16 * KIB)], [250]),
    "both-ways": Case({"iops-read": 400, "iops-write": 200}, [Load(), Load(write=True)], [400, 200]),
    "total": Case({"iops-total": 600}, [Load(), Load(write=True)], [300, 300]),
    "group": Case({"iops-total": 900}, [Load(32), Load(4, disk=1), Load(1, disk=2)], [300, 300, 300]),
}


@dataclass
class Got:
    """Requests that were answered, in windows of so many seconds."""

    window: float
    counts: list[int] = field(default_factory=list)

    def rate(self, skip: int = 0) -> float:
        counts = self.counts[skip:]
        return sum(counts) / len(counts) / self.window


def daemon_argv(socket: Path, limits: dict[str, int], disks: int) -> list[str]:
    """Disks that share one group, as exports disk0, disk1..."""
    given = ",".join(["throttle-group,id=g", *(f"limits.{name}={value}" for name, value in limits.items())])
    words = ["--object", given, *nbd_server_unix(socket)]
    for i in range(disks):
        below = {"driver": "null-co", "size": SIZE, "read-zeroes": True}
        words += blockdev(driver="throttle", node_name=f"disk{i}", throttle_group="g", file=below)
        words += nbd_export(node=f"disk{i}", name=f"disk{i}")
    return words


async def measure(socket: Path, loads: Sequence[Load], windows: int, window: float) -> list[Got]:
    """Runs all loads at the same time."""
    clients = [await NbdClient.connect(str(socket), f"disk{load.disk}", structured=False) for load in loads]
    done = [0] * len(loads)
    stopping = False

    async def lane(index: int) -> None:
        load, client, rng = loads[index], clients[index], random.Random(index)
        data = bytes(load.length)
        while not stopping:
            at = rng.randrange(SIZE // load.length) * load.length
            await (client.write(at, data) if load.write else client.read(at, load.length))
            done[index] += 1

    lanes = [asyncio.ensure_future(lane(i)) for i, load in enumerate(loads) for _ in range(load.depth)]
    got = [Got(window) for _ in loads]
    began, before = time.monotonic(), [0] * len(loads)
    for i in range(windows):
        await asyncio.sleep(began + (i + 1) * window - time.monotonic())
        for number, each in enumerate(got):
            each.counts.append(done[number] - before[number])
        before = list(done)
    stopping = True
    await asyncio.wait(lanes)
    for client in clients:
        await client.close()
    return got
