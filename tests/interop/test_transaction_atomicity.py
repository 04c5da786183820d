# SPDX-License-Identifier: Apache-2.0
"""Each action with each other, made to fail in prepare and at commit: all is as before, byte for byte."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from target.config.yaml_file import parse_config
from target.declarative.state import running
from target.drivers import load as load_drivers
from target.graph.errors import BlockError
from target.peers.nbd_client import NbdClient
from target.service import Service
from target.transactions import actions
from target.transactions.action import types
from target.transactions.request import parse_action
from target.transactions.run import Request, run
from tests.support.graph_shape import shape
from tests.support.tools import qemu_img

load_drivers()
actions.load()

MIB = 1 << 20
SIZE = 4 * MIB

CONFIG = """
objects:
  - {qom-type: iothread, id: io0}
  - {qom-type: iothread, id: io1}
  - {qom-type: throttle-group, id: group, limits: {iops-total: 1000000}}
blockdevs:
  - {driver: file, node-name: file, filename: disk.raw}
  - {driver: raw, node-name: disk, file: file}
  - {driver: qcow2, node-name: image, file: {driver: file, filename: image.qcow2}}
  - {driver: qcow2, node-name: overlay, backing: null, file: {driver: file, filename: overlay.qcow2}}
  - {driver: null-co, node-name: spare, size: 4M}
  - {driver: null-co, node-name: more, size: 4M}
  - {driver: null-co, node-name: child, size: 4M}
  - {driver: quorum, node-name: votes, vote-threshold: 1, children: [child]}
nbd-servers:
  - {addr: {type: unix, path: nbd.sock}}
  - {addr: {type: unix, path: second.sock}}
exports:
  - {type: nbd, id: e, node-name: disk, name: d, writable: true}
  - {type: nbd, id: idle, node-name: image, writable: true, iothread: io0}
  - {type: vhost-user-blk, id: v, node-name: votes, addr: {type: unix, path: v.sock}}
"""

# One or more examples of each action, all possible in the graph above.
EXAMPLES: list[tuple[str, dict[str, Any]]] = [
    ("blockdev-add", {"driver": "null-co", "node-name": "new"}),
    (
        "blockdev-add",
        {"driver": "qcow2", "node-name": "new2", "file": {"driver": "file", "filename": "other.qcow2"}},
    ),
    ("blockdev-del", {"node-name": "spare"}),
    ("blockdev-del", {"node-name": "spare", "x-now": True}),
    (
        "blockdev-reopen",
        {"options": [{"driver": "raw", "node-name": "disk", "file": "file", "discard": "unmap"}]},
    ),
    (
        "blockdev-reopen",
        {
            "options": [
                {
                    "driver": "qcow2",
                    "node-name": "overlay",
                    "read-only": True,
                    "backing": None,
                    "file": {"driver": "file", "filename": "overlay.qcow2"},
                }
            ]
        },
    ),
    ("block_resize", {"node-name": "disk", "size": 2 * SIZE}),
    ("block_resize", {"node-name": "disk", "size": MIB}),
    ("block_resize", {"node-name": "overlay", "size": 2 * SIZE}),
    ("blockdev-snapshot", {"node": "image", "overlay": "overlay"}),
    (
        "blockdev-snapshot-sync",
        {"node-name": "disk", "snapshot-file": "snapshot.qcow2", "snapshot-node-name": "snap"},
    ),
    (
        "blockdev-snapshot-sync",
        {"node-name": "spare", "snapshot-file": "existing.qcow2", "snapshot-node-name": "snap2"},
    ),
    ("x-blockdev-change", {"parent": "votes", "node": "more"}),
    ("x-blockdev-replace", {"export": "idle", "new-child": "spare"}),
    ("x-blockdev-replace", {"parent": "disk", "child": "file", "new-child": "more"}),
    ("block-export-add", {"type": "nbd", "id": "added", "node-name": "disk", "name": "added"}),
    (
        "block-export-add",
        {
            "type": "vhost-user-blk",
            "id": "added2",
            "node-name": "spare",
            "addr": {"type": "unix", "path": "added.sock"},
        },
    ),
    ("block-export-del", {"id": "idle"}),
    ("block-export-del", {"id": "e", "mode": "hard"}),
    ("block-export-del", {"id": "v", "mode": "soft"}),
    ("x-export-set-iothread", {"id": "e", "iothread": ["io1", "io0"]}),
    ("object-add", {"qom-type": "iothread", "id": "io2"}),
    ("object-del", {"id": "io1"}),
    ("qom-set", {"path": "/objects/group", "property": "limits", "value": {"iops-total": 5}}),
    ("qom-set", {"path": "/objects/io0", "property": "poll-max-ns", "value": 1}),
    ("x-image-create", {"driver": "qcow2", "filename": "made.qcow2", "size": SIZE}),
    ("x-nbd-server-start", {"addr": {"type": "unix", "path": "third.sock"}}),
    ("x-nbd-server-stop", {"addr": {"type": "unix", "path": "second.sock"}}),
]


def test_every_action_has_an_example() -> None:
    """What no transaction can be tried with is not tested."""
    assert {name for name, _ in EXAMPLES} == set(types()) - {"abort", "x-test-recorder"}


def files(directory: Path) -> dict[str, bytes | None]:
    """All that lies there; None: a socket."""
    return {
        name: path.read_bytes() if (path := directory / name).is_file() else None
        for name in sorted(os.listdir(directory))
    }


def state(service: Service, directory: Path) -> dict[str, Any]:
    return {
        "graph": shape(service.graph, identity=False),
        "running": running(service),
        "exports": dict(service.exports),
        "objects": {id: (item, item.options) for id, item in service.objects.items()},
        "servers": [server.id for server in service.nbd_servers],
        "files": files(directory),
    }


@contextlib.asynccontextmanager
async def serving(directory: Path) -> AsyncIterator[tuple[Service, NbdClient]]:
    (directory / "disk.raw").write_bytes(bytes(range(256)) * (SIZE // 256))
    for name in ("image", "overlay", "other"):
        qemu_img("create", "-q", "-f", "qcow2", directory / f"{name}.qcow2", str(SIZE))
    (directory / "existing.qcow2").write_bytes(b"something else")
    service = Service()
    try:
        for entry in parse_config(CONFIG):
            await entry.run(service)
        client = await NbdClient.connect("nbd.sock", "d")
        yield service, client
        await client.close()
    finally:
        assert await service.close() == []


async def carry_out(service: Service, *requests: tuple[str, dict[str, Any]]) -> None:
    typed: list[Request] = [parse_action({"type": type, "data": data}) for type, data in requests]
    async with asyncio.timeout(20):
        await run(service, typed)


FAILURES = {
    "last in prepare": lambda first, second: (first, second, ("abort", {})),
    "last at commit": lambda first, second: (first, second, ("abort", {"x-at": "commit"})),
    "first at commit": lambda first, second: (("abort", {"x-at": "commit"}), first, second),
}


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
async def test_nothing_has_changed(scratch: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """One action with each of the others after it, and each way to fail. A client reads all the time."""
    monkeypatch.chdir(scratch)
    first = EXAMPLES[number]
    async with serving(scratch) as (service, client):
        before = state(service, scratch)
        for second, failing in itertools.product(EXAMPLES, FAILURES.values()):
            reading = asyncio.ensure_future(client.read(SIZE // 2, 4096))
            with pytest.raises((BlockError, OSError)):
                await carry_out(service, *failing(first, second))
            after = state(service, scratch)
            changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
            assert not changed, second
            assert await reading == bytes(range(256)) * 16


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
async def test_each_example_is_possible(scratch: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Or its failures would prove nothing."""
    monkeypatch.chdir(scratch)
    async with serving(scratch) as (service, client):
        before = state(service, scratch)
        await carry_out(service, EXAMPLES[number])
        assert state(service, scratch) != before
        if EXAMPLES[number] != ("block-export-del", {"id": "e", "mode": "hard"}):
            assert len(await client.read(0, 4096)) == 4096
