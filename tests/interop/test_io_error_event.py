# SPDX-License-Identifier: Apache-2.0
"""BLOCK_IO_ERROR: failed requests of clients are told, not each of them, and not what a client may not do."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from target.config.yaml_file import parse_config
from target.events import Event
from target.exports.failures import BlockIoError
from target.peers.nbd_client import NbdClient
from target.service import Service

CONFIG = """
blockdevs:
  - driver: blkdebug
    node-name: disk
    image: {driver: null-co, size: 1M}
    inject-error: [{event: none, iotype: write, errno: 28, x-after: 1}]
nbd-server: {addr: {type: unix, path: PATH}}
exports: [{type: nbd, id: e, node-name: disk, name: d, writable: true}]
"""


@contextlib.asynccontextmanager
async def serving(path: Path) -> AsyncIterator[tuple[NbdClient, list[Event]]]:
    service = Service()
    told: list[Event] = []
    service.events.listen(told.append)
    try:
        for entry in parse_config(CONFIG.replace("PATH", str(path))):
            await entry.run(service)
        client = await NbdClient.connect(str(path), "d")
        yield client, told
        await client.close()
    finally:
        await service.close()


async def test_a_failed_request_is_told_now_and_then(scratch: Path) -> None:
    async with serving(scratch / "nbd.sock") as (client, told):
        await client.read(0, 4096)
        await client.write(0, bytes(4096))
        assert told == []
        for _ in range(20):
            with pytest.raises(OSError, match="No space"):
                await client.write(0, bytes(4096))
        await asyncio.sleep(0.05)
        assert told == [
            BlockIoError(
                qom_path="",
                device="e",
                node_name="disk",
                operation="write",
                action="report",
                nospace=True,
                reason="No space left on device",
            )
        ]
        await asyncio.sleep(0.1)
        with pytest.raises(OSError, match="No space"):
            await client.write(0, bytes(4096))
        await asyncio.sleep(0.05)
        assert len(told) == 2
        with pytest.raises(OSError):
            await client.read(2 << 20, 4096)  # past the end: its own fault
        await asyncio.sleep(0.15)
        assert len(told) == 2
