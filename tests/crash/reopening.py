# SPDX-License-Identifier: Apache-2.0
"""Our own driver opens again what a crash or a failure left of an image."""

from __future__ import annotations

from pathlib import Path

from target.datapath import FUA
from tests.crash import images
from tests.crash.images import Kind
from tests.support.qcow2 import running_graph

_OFFSET, _LENGTH = 4096, 100_000


async def goes_on(left: Path, kind: Kind | None, before: bytes | None = None) -> None:
    """It opens for writing, reads ``before`` (what qemu-img reads, when not given), takes a write, and closes
    without an error; then qemu-img finds that write, all else as it was, and leaks at most."""
    before = images.flat(kind, left) if before is None else before
    data = b"\1" * _LENGTH
    async with running_graph() as graph:
        node = await graph.add(images.node(kind, images.file(left)))
        assert await node.read(0, node.size) == before
        await node.write(_OFFSET, data, FUA)
    if kind is not None:
        images.check(left)
    assert images.flat(kind, left) == before[:_OFFSET] + data + before[_OFFSET + _LENGTH :]
