# SPDX-License-Identifier: Apache-2.0
"""A symbolic link as the file of a new overlay: the image is where the link points, as QEMU does."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from target import drivers
from target.graph.errors import BlockError
from target.service import Service
from target.transactions import actions
from target.transactions.actions.abort import Abort
from target.transactions.actions.snapshot import SnapshotSync
from target.transactions.run import Request, run

drivers.load()
actions.load()


@pytest_asyncio.fixture
async def service(scratch: Path) -> AsyncIterator[Service]:
    (scratch / "disk.raw").write_bytes(bytes(1 << 20))
    (scratch / "link").symlink_to("made.qcow2")
    made = Service()
    await made.graph.add({"driver": "file", "node-name": "disk", "filename": str(scratch / "disk.raw")})
    yield made
    assert await made.close() == []


def snapshot(scratch: Path) -> Request:
    file = str(scratch / "link")
    data = SnapshotSync.Data(node_name="disk", snapshot_file=file, snapshot_node_name="snap")
    return Request(SnapshotSync, data)


async def test_the_file_that_the_link_names_is_made(service: Service, scratch: Path) -> None:
    await run(service, [snapshot(scratch)])
    assert (scratch / "link").is_symlink()
    assert (scratch / "made.qcow2").read_bytes()[:4] == b"QFI\xfb"
    assert "snap" in service.graph.nodes


async def test_a_file_behind_the_link_is_back_when_it_is_undone(service: Service, scratch: Path) -> None:
    (scratch / "made.qcow2").write_bytes(b"precious")
    with pytest.raises(BlockError):
        await run(service, [snapshot(scratch), Request(Abort, Abort.Data())])
    assert (scratch / "link").is_symlink()
    assert (scratch / "made.qcow2").read_bytes() == b"precious"
    assert sorted(path.name for path in scratch.iterdir()) == ["disk.raw", "link", "made.qcow2"]
