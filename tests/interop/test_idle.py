# SPDX-License-Identifier: Apache-2.0
"""Adaptive polling is bounded: a target whose clients are connected and silent uses no processor."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from target.peers.nbd_client import NbdClient
from target.peers.vhost_user_front_end import FrontEnd
from tests.support.daemon import Daemon, image_node, nbd_export, nbd_server_unix, vhost_user_export
from tests.support.tools import create_image

pytestmark = pytest.mark.timed

LOAD_SECONDS, IDLE_SECONDS = 1.5, 3.0
BUSY, IDLE = 0.05, 0.05  # shares of one processor
QUEUES = 2
Start = Callable[..., Daemon]


class Share:
    """The share of one processor that a process has used since this was made, with all its threads."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._begun, self._before = time.monotonic(), self._seconds()

    def _seconds(self) -> float:
        after_name = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()
        return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")

    def now(self) -> float:
        return (self._seconds() - self._before) / (time.monotonic() - self._begun)


async def falls_silent(pid: int) -> None:
    """Asserts it of a target whose load has just ended."""
    await asyncio.sleep(0.2)
    share = Share(pid)
    await asyncio.sleep(IDLE_SECONDS)
    assert share.now() < IDLE


@pytest.mark.parametrize("format", ["raw", "qcow2"])
async def test_nbd_after_load(scratch: Path, start: Start, format: str) -> None:
    image = create_image(scratch / "disk", "64M", format=format)
    pid = start(*image_node(image, format), *nbd_server_unix(scratch / "s"), *nbd_export()).process.pid
    clients = [await NbdClient.connect(str(scratch / "s"), "disk") for _ in range(4)]
    share = Share(pid)
    end = time.monotonic() + LOAD_SECONDS

    async def load(client: NbdClient, offset: int) -> None:
        while time.monotonic() < end:
            await asyncio.gather(*(client.write(offset + i * 4096, b"i" * 4096) for i in range(8)))
            await client.read(offset, 1 << 20)

    await asyncio.gather(*(load(client, i << 20) for i, client in enumerate(clients)))
    assert share.now() > BUSY
    await falls_silent(pid)
    for client in clients:
        assert await client.read(0, 1) == b"i"
        await client.close()


@pytest.mark.parametrize("format", ["raw", "qcow2"])
async def test_vhost_user_blk_after_load(scratch: Path, start: Start, format: str) -> None:
    image = create_image(scratch / "disk", "64M", format=format)
    pid = start(*image_node(image, format), *vhost_user_export(scratch / "s", queues=QUEUES)).process.pid
    with FrontEnd.connect(str(scratch / "s"), queues=QUEUES) as front_end:
        share = Share(pid)
        end = time.monotonic() + LOAD_SECONDS
        while time.monotonic() < end:
            for queue in range(QUEUES):
                front_end.write(8 * queue, b"i" * 65536, queue=queue)
                front_end.read(8 * queue, 65536, queue=queue)
        assert share.now() > BUSY
        await falls_silent(pid)
        assert front_end.read(0, 512) == b"i" * 512


async def test_new_client_of_a_thread_that_polls_for_long(scratch: Path, start: Start) -> None:
    """Its first request came after the thread's whole time of polling, which looked at known clients only."""
    image = create_image(scratch / "disk", "1M", format="raw")
    polling = ("--object", "iothread,id=t0,poll-max-ns=2000000000")
    *words, options = nbd_export()
    export = [*words, f"{options},iothread=t0"]
    start(*polling, *image_node(image, "raw"), *nbd_server_unix(scratch / "s"), *export)
    for _ in range(3):
        client = await NbdClient.connect(str(scratch / "s"), "disk")
        begun = time.monotonic()
        await client.read(0, 4096)
        assert time.monotonic() - begun < 0.5
        await client.close()
