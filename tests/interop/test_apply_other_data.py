# SPDX-License-Identifier: Apache-2.0
"""What would put other data under a client is refused, whatever way the file says it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from target.declarative.state import running
from target.peers.nbd_client import NbdClient
from tests.interop.test_apply import BLOCK, SIZE, Config, apply, running_service


def raw(file: Any, **more: Any) -> Config:
    return {"driver": "raw", "node-name": "disk", "file": file, **more}


def debug(image: Any) -> Config:
    return {"driver": "blkdebug", "node-name": "disk", "image": image}


FILE: Config = {"driver": "file", "filename": "disk.raw"}
OTHER: Config = {"driver": "file", "filename": "other.raw", "node-name": "other"}
DEEP: Config = {"driver": "raw", "file": FILE}

CASES: dict[str, tuple[list[Config], list[Config]]] = {
    "inline file, another": ([raw(FILE)], [OTHER, raw("other")]),
    "inline file below, another": ([raw(DEEP)], [OTHER, raw({**DEEP, "file": "other"})]),
    "offset": ([raw(FILE)], [raw(FILE, offset=BLOCK)]),
    "offset below": ([raw(DEEP)], [raw({**DEEP, "offset": BLOCK})]),
    "size": ([raw(FILE)], [raw(FILE, size=BLOCK)]),
    "image of a filter": ([debug(FILE)], [OTHER, debug("other")]),
    "named image of a filter": (
        [{**FILE, "node-name": "one"}, debug("one")],
        [{**FILE, "node-name": "one"}, OTHER, debug("other")],
    ),
}


def overlay(**more: Any) -> Config:
    return {
        "driver": "qcow2",
        "node-name": "disk",
        "file": {"driver": "file", "filename": "top.qcow2"},
        **more,
    }


BACKING: dict[str, tuple[list[Config], list[Config]]] = {
    "implicit, another": ([overlay()], [OTHER, overlay(backing="other")]),
    "implicit, none": ([overlay()], [overlay(backing=None)]),
    "inline, another": ([overlay(backing=FILE)], [OTHER, overlay(backing="other")]),
    "inline, none": ([overlay(backing=FILE)], [overlay(backing=None)]),
}


def config(nodes: list[Config], images: bool = False) -> Config:
    top = {"driver": "qcow2", "filename": "top.qcow2", "size": SIZE, "backing-file": "disk.raw"}
    return {
        "images": [{**top, "backing-fmt": "raw"}] if images else [],
        "blockdevs": nodes,
        "nbd-servers": [{"addr": {"type": "unix", "path": "nbd.sock"}}],
        "exports": [{"type": "nbd", "id": "e", "node-name": "disk", "name": "d", "writable": True}],
    }


@pytest.mark.parametrize("name", [*CASES, *BACKING])
async def test_other_data_for_a_client_is_refused(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(scratch)
    (scratch / "disk.raw").write_bytes(b"d" * SIZE)
    (scratch / "other.raw").write_bytes(b"o" * SIZE)
    start, end = {**CASES, **BACKING}[name]
    async with running_service(config(start, images=name in BACKING)) as service:
        client = await NbdClient.connect(str(scratch / "nbd.sock"), "d")
        before = running(service)
        plan = await apply(service, config(end))
        assert len(plan.refused) == 1
        assert "export 'e': node 'disk' would have other data: node 'disk': " in plan.refused[0]
        assert running(service) == before
        assert (client.export.size, await client.read(0, BLOCK)) == (SIZE, b"d" * BLOCK)
        await client.close()
        assert (await apply(service, config(end), force=True)).refused == []


async def test_options_that_leave_the_data_are_not_refused(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(scratch)
    (scratch / "disk.raw").write_bytes(b"d" * SIZE)
    async with running_service(config([raw(FILE)])) as service:
        client = await NbdClient.connect(str(scratch / "nbd.sock"), "d")
        plan = await apply(service, config([raw({**FILE, "discard": "ignore"}, discard="unmap")]))
        assert plan.refused == []
        assert service.graph.get("disk").settings.discard == "unmap"
        await client.write(0, b"n" * BLOCK)
        await client.close()
