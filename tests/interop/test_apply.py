# SPDX-License-Identifier: Apache-2.0
"""From one configuration to another while a client reads and writes: it arrives, or nothing is touched."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from target.config.yaml_file import lists, parse_config
from target.declarative.apply import carry_out, make_plan
from target.declarative.plan import Plan
from target.declarative.state import desired, running
from target.drivers import load as load_drivers
from target.graph.errors import BlockError
from target.peers.nbd_client import NbdClient
from target.service import Service
from target.transactions import actions
from tests.support.verifying import VerifyingClient

load_drivers()
actions.load()

MIB = 1 << 20
SIZE = 4 * MIB
BLOCK = 4096

Config = dict[str, Any]


class Client(VerifyingClient):
    """An NBD client of the disk."""

    def __init__(self, nbd: NbdClient) -> None:
        super().__init__(nbd, SIZE)
        self.nbd = nbd

    async def close(self) -> None:
        await self.verify()
        await self.nbd.close()


@contextlib.asynccontextmanager
async def running_service(config: Config) -> AsyncIterator[Service]:
    service = Service()
    try:
        for entry in parse_config(yaml.safe_dump(config)):
            await entry.run(service)
        yield service
    finally:
        assert await service.close() == []


async def apply(service: Service, config: Config, force: bool = False) -> Plan:
    plan = make_plan(service, desired(lists(copy.deepcopy(config))), force)
    if plan.steps and not plan.refused:
        await carry_out(service, plan)
    return plan


# ---- configurations, all with an export 'e' of one disk ----


def graph(scratch: Path, *, export: str = "disk", nodes: tuple[str, ...] = ("disk",), **more: Any) -> Config:
    """Nodes by name from those below; the export shows one of them."""
    file = {"driver": "file", "node-name": "file", "filename": str(scratch / "disk.raw")}
    overlay = {"driver": "file", "filename": str(scratch / "snap.qcow2")}
    known: dict[str, Config] = {
        "file": file,
        "disk": {"driver": "raw", "node-name": "disk", "file": "file"},
        "disk-unmap": {"driver": "raw", "node-name": "disk", "file": "file", "discard": "unmap"},
        "disk-slow": {"driver": "raw", "node-name": "disk", "file": "slow"},
        "disk-debug": {"driver": "raw", "node-name": "disk", "file": "debug"},
        "slow": {"driver": "throttle", "node-name": "slow", "throttle-group": "group", "file": "file"},
        "fast": {"driver": "throttle", "node-name": "fast", "throttle-group": "group", "file": "disk"},
        "debug": {"driver": "blkdebug", "node-name": "debug", "image": "file"},
        "above": {"driver": "copy-on-read", "node-name": "above", "file": "disk"},
        "snap": {"driver": "qcow2", "node-name": "snap", "file": overlay, "backing": "disk"},
        "fast_snap": {
            "driver": "throttle",
            "node-name": "fast_snap",
            "throttle-group": "group",
            "file": "snap",
        },
        "other": {"driver": "null-co", "node-name": "other", "size": SIZE},
    }
    chosen = [known[name] for name in ("file", *nodes)]
    config: Config = {
        "objects": [],
        "blockdevs": chosen,
        "nbd-servers": [{"addr": {"type": "unix", "path": str(scratch / "nbd.sock")}}],
        "exports": [{"type": "nbd", "id": "e", "node-name": export, "name": "d", "writable": True}],
    }
    if any("throttle-group" in node for node in chosen):
        limits = more.pop("limits", {"iops-total": 1_000_000})
        config["objects"].append({"qom-type": "throttle-group", "id": "group", "limits": limits})
    if "snap" in nodes:
        name = str(scratch / "snap.qcow2")
        image = {"driver": "qcow2", "filename": name, "size": SIZE, "backing-file": str(scratch / "disk.raw")}
        config["images"] = [{**image, "backing-fmt": "raw"}]
    for key, value in more.items():
        config[key.replace("_", "-")] = [*config.get(key, []), *value]
    return config


def graphs(scratch: Path) -> dict[str, Config]:
    """States that can be reached from one another without the client seeing anything."""
    second = {"type": "nbd", "id": "e2", "node-name": "file", "name": "second"}
    plain = graph(scratch)
    with_second = copy.deepcopy(plain)
    with_second["exports"].append(second)
    return {
        "plain": plain,
        "discard": graph(scratch, nodes=("disk-unmap",)),
        "throttled below": graph(scratch, nodes=("slow", "disk-slow")),
        "throttled above": graph(scratch, nodes=("disk", "fast"), export="fast"),
        "debug below": graph(scratch, nodes=("debug", "disk-debug")),
        "copy-on-read": graph(scratch, nodes=("disk", "above"), export="above"),
        "second export": with_second,
    }


PAIRS = list(
    itertools.permutations(
        (
            "plain",
            "discard",
            "throttled below",
            "throttled above",
            "debug below",
            "copy-on-read",
            "second export",
        ),
        2,
    )
)


@pytest.mark.parametrize(("start", "end"), PAIRS)
async def test_it_arrives_while_a_client_reads_and_writes(scratch: Path, start: str, end: str) -> None:
    (scratch / "disk.raw").write_bytes(bytes(SIZE))
    all_graphs = graphs(scratch)
    async with running_service(all_graphs[start]) as service:
        client = Client(await NbdClient.connect(str(scratch / "nbd.sock"), "d"))
        for there in (end, start):
            await client.some()
            plan = await apply(service, all_graphs[there])
            assert plan.refused == []
            assert running(service).config() == desired(lists(all_graphs[there])).config()
            again = await apply(service, all_graphs[there])
            assert again == Plan()
        await client.some()
        await client.close()


async def test_a_snapshot_is_taken_by_naming_it(scratch: Path) -> None:
    (scratch / "disk.raw").write_bytes(bytes(SIZE))
    plain, snap = graph(scratch), graph(scratch, nodes=("disk", "snap"), export="snap")
    async with running_service(plain) as service:
        client = Client(await NbdClient.connect(str(scratch / "nbd.sock"), "d"))
        await client.some(30)
        plan = await apply(service, snap)
        assert [step.text for step in plan.steps] == [
            f"+ image '{scratch}/snap.qcow2' (qcow2), if there is none",
            "+ node 'snap' (qcow2 over disk)",
            "~ export 'e': node 'disk' -> 'snap' (a snapshot)",
        ]
        await client.some(30)
        before = (scratch / "disk.raw").read_bytes()
        await client.some(30)
        assert (scratch / "disk.raw").read_bytes() == before
        plan = await apply(service, plain)
        assert plan.refused == [
            "export 'e': node 'disk' has other data than 'snap', and clients would see that"
        ]
        await client.close()


REFUSED: dict[str, tuple[Config, str]] = {
    "the client's export goes": ({"exports": []}, "export 'e': it has 1 client, and to remove it"),
    "it is read-only": (
        {"exports": [{"type": "nbd", "id": "e", "node-name": "disk", "name": "d"}]},
        "export 'e': it has 1 client, and writable True -> (default) cannot change without",
    ),
    "its server goes": ({"nbd-servers": []}, "nbd.sock: it has 1 client"),
    "another file": (
        {
            "blockdevs": [
                {"driver": "null-co", "node-name": "file", "size": SIZE},
                {"driver": "raw", "node-name": "disk", "file": "file"},
            ]
        },
        "node 'file': Cannot change the option 'driver', and it is used by export 'e'",
    ),
    "other data": (
        {
            "blockdevs": [
                {"driver": "null-co", "node-name": "zeros", "size": SIZE},
                {"driver": "raw", "node-name": "disk", "file": "zeros"},
            ]
        },
        "node 'disk': file 'zeros' has other data than 'file'",
    ),
    "a file that is not there": (
        {
            "blockdevs": [
                {"driver": "file", "node-name": "file", "filename": "disk.raw"},
                {"driver": "raw", "node-name": "disk", "file": "file"},
                {"driver": "file", "node-name": "more", "filename": "/nonexistent/file"},
            ]
        },
        "Could not open '/nonexistent/file': No such file or directory",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_it_is_refused_and_nothing_is_touched(
    scratch: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(scratch)
    (scratch / "disk.raw").write_bytes(bytes(SIZE))
    plain = graph(scratch)
    plain["blockdevs"][0]["filename"] = "disk.raw"
    change, reason = REFUSED[name]
    async with running_service(plain) as service:
        client = Client(await NbdClient.connect(str(scratch / "nbd.sock"), "d"))
        await client.some()
        before = running(service)
        nodes = dict(service.graph.nodes)
        try:
            plan = await apply(service, {**plain, **change})
            said = "; ".join(plan.refused)
        except BlockError as error:
            said = str(error)
        assert reason in said
        assert running(service) == before
        assert service.graph.nodes == nodes
        await client.some()
        await client.close()


async def test_what_nobody_uses_is_made_anew(scratch: Path) -> None:
    """Options that cannot change, of nodes that no client sees: closed and opened, in the same file."""
    (scratch / "a.raw").write_bytes(b"x" * SIZE)
    file = {"driver": "file", "node-name": "file", "filename": str(scratch / "a.raw")}
    start: Config = {"blockdevs": [file, {"driver": "raw", "node-name": "top", "file": "file"}]}
    end: Config = {
        "blockdevs": [
            {**file, "filename": str(scratch / "a.raw"), "aio": "io_uring", "locking": "on"},
            {"driver": "raw", "node-name": "top", "file": "file", "offset": 512, "size": MIB},
        ]
    }
    async with running_service(start) as service:
        plan = await apply(service, end)
        assert plan.refused == []
        assert running(service).config() == desired(lists(end)).config()
        assert service.graph.get("top").size == MIB


async def test_limits_of_a_group_change_while_it_is_used(scratch: Path) -> None:
    (scratch / "disk.raw").write_bytes(bytes(SIZE))
    start = graph(scratch, nodes=("disk", "fast"), export="fast")
    end = graph(scratch, nodes=("disk", "fast"), export="fast", limits={"iops-total": 500_000})
    async with running_service(start) as service:
        client = Client(await NbdClient.connect(str(scratch / "nbd.sock"), "d"))
        await client.some()
        plan = await apply(service, end)
        assert [step.type for step in plan.steps] == ["qom-set"]
        assert running(service).config() == desired(lists(end)).config()
        await client.some()
        await client.close()


async def test_what_is_saved_makes_the_same_graph_again(scratch: Path) -> None:
    """After changes that no file has asked for: a filter put in, a node reopened."""
    (scratch / "disk.raw").write_bytes(bytes(SIZE))
    async with running_service(graph(scratch)) as service:
        async with service.graph.change() as change:
            debug = await change.add(
                {"driver": "blkdebug", "node-name": "debug", "image": "file", "align": 4096}
            )
            await change.replace(service.graph.get("disk").children["file"], debug)
            await change.replace(service.exports["e"].edge, service.graph.get("debug"))
            change.remove("disk")
        saved = running(service).config()
    async with running_service(saved) as service:
        assert running(service).config() == saved
        assert service.exports["e"].edge.node.name == "debug"


def fleecing(scratch: Path, where: str) -> Config:
    """A copy-before-write filter below the disk or above it, and an export of what was before."""
    config = graph(scratch)
    file = "file" if where == "below" else "disk"
    config["blockdevs"] += [
        {"driver": "file", "node-name": "target", "filename": str(scratch / "target.raw")},
        {"driver": "copy-before-write", "node-name": "cbw", "file": file, "target": "target"},
        {"driver": "snapshot-access", "node-name": "before", "file": "cbw"},
    ]
    if where == "below":
        config["blockdevs"][1]["file"] = "cbw"
    else:
        config["exports"][0]["node-name"] = "cbw"
    config["exports"].append({"type": "nbd", "id": "s", "node-name": "before", "name": "s"})
    return config


@pytest.mark.parametrize("where", ["below", "above"])
async def test_a_view_of_what_was_before_comes_and_goes(scratch: Path, where: str) -> None:
    for name in ("disk.raw", "target.raw"):
        (scratch / name).write_bytes(bytes(SIZE))
    plain, with_view = graph(scratch), fleecing(scratch, where)
    async with running_service(plain) as service:
        client = Client(await NbdClient.connect(str(scratch / "nbd.sock"), "d"))
        for config in (with_view, plain) * 2:
            plan = await apply(service, config)
            assert plan.refused == []
            await client.some()
        await client.close()


async def test_an_export_shows_the_size_of_the_node_that_has_taken_the_place(scratch: Path) -> None:
    (scratch / "disk.raw").write_bytes(bytes(SIZE))
    socket = str(scratch / "nbd.sock")
    async with running_service(graph(scratch)) as service:
        await apply(service, graph(scratch, nodes=("disk", "snap"), export="snap"))
        await apply(service, graph(scratch, nodes=("disk", "snap", "fast_snap"), export="fast_snap"))
        await service.graph.resize(service.graph.get("fast_snap"), 2 * SIZE)
        client = await NbdClient.connect(socket, "d")
        assert client.export.size == 2 * SIZE
        await client.write(SIZE + MIB, b"x" * BLOCK)
        assert await client.read(SIZE + MIB, BLOCK) == b"x" * BLOCK
        await client.close()
        assert service.counters()["exports"]["e"]["node-name"] == "fast_snap"
