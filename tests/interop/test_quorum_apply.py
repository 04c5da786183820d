# SPDX-License-Identifier: Apache-2.0
"""Quorums and blkverify come, change and go by applying configurations, while a client reads and writes."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from target.config.yaml_file import lists
from target.declarative.plan import Plan
from target.declarative.state import desired, running
from target.peers.nbd_client import NbdClient
from target.service import Service
from tests.interop.test_apply import SIZE, Client, Config, apply, graph, running_service


def with_votes(scratch: Path, children: list[str], **options: Any) -> Config:
    """The disk below a quorum, with further files."""
    config = graph(scratch, export="votes")
    others = [name for name in children if name != "disk"]
    for name in others:
        config["blockdevs"].append({"driver": "file", "node-name": name, "filename": str(scratch / name)})
    votes = {"driver": "quorum", "node-name": "votes", "children": children, "vote-threshold": 1, **options}
    config["blockdevs"].append(votes)
    return config


def graphs(scratch: Path) -> dict[str, Config]:
    below = graph(scratch)
    disk = below["blockdevs"].pop()
    below["blockdevs"] += [
        {"driver": "quorum", "node-name": "below", "children": ["file"], "vote-threshold": 1},
        disk | {"file": "below"},
    ]
    return {
        "plain": graph(scratch),
        "below": below,
        "above": with_votes(scratch, ["disk"]),
        "fifo": with_votes(scratch, ["disk"], **{"read-pattern": "fifo"}),
        "two": with_votes(scratch, ["disk", "second"], **{"read-pattern": "fifo"}),
    }


PAIRS = list(itertools.permutations(("plain", "below", "above", "fifo", "two"), 2))
SAME = {"above", "fifo", "two"}  # the same node with other options
# It cannot have other children while it is used.
REFUSED = [pair for pair in PAIRS if "two" in pair and SAME.issuperset(pair)]


@contextlib.asynccontextmanager
async def used(scratch: Path, config: Config) -> AsyncIterator[tuple[Service, Client]]:
    """A service with a client that finds all it writes."""
    for name in ("disk.raw", "second"):
        (scratch / name).write_bytes(bytes(SIZE))
    async with running_service(config) as service:
        client = Client(await NbdClient.connect(str(scratch / "nbd.sock"), "d"))
        await client.some()
        yield service, client
        await client.some()
        await client.close()


@pytest.mark.parametrize(("start", "end"), [pair for pair in PAIRS if pair not in REFUSED])
async def test_a_quorum_comes_and_goes(scratch: Path, start: str, end: str) -> None:
    all_graphs = graphs(scratch)
    async with used(scratch, all_graphs[start]) as (service, client):
        for there in (end, start):
            plan = await apply(service, all_graphs[there])
            assert plan.refused == []
            assert running(service).config() == desired(lists(all_graphs[there])).config()
            assert await apply(service, all_graphs[there]) == Plan()
            await client.some()


@pytest.mark.parametrize(("start", "end"), REFUSED)
async def test_its_options_stay_while_it_is_used(scratch: Path, start: str, end: str) -> None:
    all_graphs = graphs(scratch)
    async with used(scratch, all_graphs[start]) as (service, _client):
        before = running(service).config()
        plan = await apply(service, all_graphs[end])
        [refused] = plan.refused
        assert re.match(
            r"node 'votes': Cannot change the option '[a-z-]+', and it is used by export 'e'$", refused
        )
        assert running(service).config() == before


async def test_children_that_were_added_are_saved(scratch: Path) -> None:
    """What is saved after x-blockdev-change is what runs."""
    all_graphs = graphs(scratch)
    two = with_votes(scratch, ["disk", "second"])
    async with used(scratch, all_graphs["above"]) as (service, _client):
        votes = service.graph.get("votes")
        async with service.graph.change() as change:
            second = {"driver": "file", "node-name": "second", "filename": str(scratch / "second")}
            await votes.add_child(change, await change.add(second))
        assert running(service).config() == desired(lists(two)).config()
        assert await apply(service, two) == Plan()
        async with service.graph.change() as change:
            await votes.remove_child(change, votes.children["children.1"])
            change.remove("second")
        assert await apply(service, all_graphs["above"]) == Plan()
