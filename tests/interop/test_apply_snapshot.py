# SPDX-License-Identifier: Apache-2.0
"""A snapshot for a backup comes and goes by two configurations, below or above a disk in use."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from target.peers.nbd_client import NbdClient
from tests.interop.test_apply import SIZE, Client, Config, apply, graph, running_service


def with_snapshot(scratch: Path, where: str) -> Config:
    config = graph(scratch)
    disk, export = config["blockdevs"][1], config["exports"][0]
    below = "file" if where == "below" else "disk"
    config["blockdevs"] += [
        {"driver": "file", "node-name": "old", "filename": str(scratch / "old")},
        {"driver": "copy-before-write", "node-name": "cbw", "file": below, "target": "old"},
        {"driver": "snapshot-access", "node-name": "moment", "file": "cbw"},
    ]
    if where == "below":
        disk["file"] = "cbw"
    else:
        export["node-name"] = "cbw"
    config["exports"].append({"type": "nbd", "id": "m", "node-name": "moment", "name": "m"})
    return config


@pytest.mark.parametrize("where", ["below", "above"])
async def test_there_and_back(scratch: Path, where: str) -> None:
    for name in ("disk.raw", "old"):
        (scratch / name).write_bytes(bytes(SIZE))
    without, with_it = graph(scratch), with_snapshot(scratch, where)
    async with running_service(without) as service:
        client = Client(await NbdClient.connect(str(scratch / "nbd.sock"), "d"))
        for _ in range(3):
            assert not (await apply(service, with_it)).refused
            backup = await NbdClient.connect(str(scratch / "nbd.sock"), "m")
            first = await backup.read(0, SIZE)
            await client.some(30)
            assert await backup.read(0, SIZE) == first
            await backup.close()
            while service.exports["m"].clients():  # until the server has seen it go
                await asyncio.sleep(0.005)
            assert not (await apply(service, without)).refused
            await client.some()
        await client.close()
