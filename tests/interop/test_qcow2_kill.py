# SPDX-License-Identifier: Apache-2.0
"""A target that is killed while it writes: the image has leaks at most, and all that was flushed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from target.peers.nbd_client import NbdClient
from target.peers.nbd_raw import ServerError
from tests.support.daemon import Daemon, image_node, nbd_export, nbd_server_unix
from tests.support.tools import create_image, qemu_img

MIB = 1 << 20
SIZE = 64 * MIB
BLOCK = 4096
LANES = 8


class Lane:
    """One writer in its own part of the disk. ``flushed`` holds what must be there, by block."""

    def __init__(self, client: NbdClient, number: int, seed: int) -> None:
        self.client = client
        self.base = number * (SIZE // LANES)
        self.random = random.Random(seed * LANES + number)
        self.flushed: dict[int, bytes] = {}
        self.touched: set[int] = set()  # since the last flush: either content, or torn

    async def run(self) -> None:
        try:
            while True:
                await self._round()
        except (OSError, EOFError, ServerError):
            return  # the target is gone

    async def _round(self) -> None:
        written: dict[int, bytes] = {}
        for _ in range(self.random.randrange(1, 12)):
            block = self.random.randrange(SIZE // LANES // BLOCK)
            self.touched.add(block)
            if self.random.random() < 0.25:
                written[block] = bytes(BLOCK)
                await self.client.write_zeroes(self.base + block * BLOCK, BLOCK)
            else:
                written[block] = self.random.randbytes(64) * (BLOCK // 64)
                await self.client.write(self.base + block * BLOCK, written[block])
        await self.client.flush()
        self.flushed |= written
        self.touched.clear()

    def check(self, disk: bytes) -> None:
        for block, content in self.flushed.items():
            if block not in self.touched:
                at = self.base + block * BLOCK
                assert disk[at : at + BLOCK] == content, (self.base, block)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", ["cluster_size=64k", "cluster_size=4k", "cluster_size=512,refcount_bits=64"]
)
async def test_kill(scratch: Path, start: Callable[..., Daemon], options: str) -> None:
    path = create_image(scratch / "disk.qcow2", str(SIZE), options=options)
    flat = scratch / "flat.raw"
    for point in range(8):
        socket = scratch / f"{point}.sock"
        daemon = start(*image_node(path, "qcow2"), *nbd_server_unix(socket), *nbd_export())
        client = await NbdClient.connect(str(socket), "disk")
        lanes = [Lane(client, number, point) for number in range(LANES)]
        work = [asyncio.create_task(lane.run()) for lane in lanes]
        await asyncio.sleep(random.Random(point).uniform(0.02, 0.5))
        daemon.kill()
        await asyncio.wait(work)
        await client.abort()
        done = qemu_img("check", "-f", "qcow2", path, check=False)
        assert done.returncode in (0, 3), done.stdout + done.stderr
        qemu_img("convert", "-f", "qcow2", "-O", "raw", path, flat)
        disk = flat.read_bytes()
        assert any(lane.flushed for lane in lanes) or point == 0
        for lane in lanes:
            lane.check(disk)
