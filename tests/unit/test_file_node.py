# SPDX-License-Identifier: Apache-2.0
"""The file node: how it opens what it is given."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from target.graph.graph import Graph

YEAR_AGO = 365 * 24 * 3600


@pytest.fixture
def image(scratch: Path) -> Path:
    """A file so long unread that even a file system with relatime would note a read."""
    path = scratch / "disk.raw"
    path.write_bytes(b"x" * 4096)
    changed = path.stat().st_mtime
    os.utime(path, (changed - YEAR_AGO, changed))
    return path


async def test_reading_leaves_the_access_time(graph: Graph, image: Path) -> None:
    before = image.stat().st_atime_ns
    node = await graph.add({"driver": "file", "node-name": "n", "filename": str(image)})
    assert await node.object.read(0, 4096) == b"x" * 4096
    assert image.stat().st_atime_ns == before


async def test_file_of_somebody_else_is_read_all_the_same(
    graph: Graph, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the owner may leave the access time alone; the kernel refuses it to others."""
    real, refused = fcntl.fcntl, []

    def strict(fd: int, command: int, argument: Any = 0) -> Any:
        if command == fcntl.F_SETFL and argument & os.O_NOATIME:
            refused.append(argument)
            raise PermissionError(1, "Operation not permitted")
        return real(fd, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", strict)
    node = await graph.add({"driver": "file", "node-name": "n", "filename": str(image)})
    monkeypatch.undo()
    assert refused
    assert await node.object.read(0, 4096) == b"x" * 4096
