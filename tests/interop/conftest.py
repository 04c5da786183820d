# SPDX-License-Identifier: Apache-2.0
"""Fixtures: a graph in this process; and for hostile vhost-user front ends a target for each format."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import pytest_asyncio

from target import drivers
from target.datapath import Datapath
from target.graph.graph import Graph
from tests.support.vhost_victim import Case, Victim

drivers.load()


@pytest_asyncio.fixture
async def graph() -> AsyncIterator[Graph]:
    """Nodes in this process, on two I/O threads."""
    datapath = Datapath()
    datapath.start(asyncio.get_running_loop())
    for _ in range(2):
        datapath.add_thread(poll_max_ns=0)
    made = Graph(datapath)
    yield made
    await made.close()
    await datapath.close()


@pytest.fixture(scope="module", params=["raw", "qcow2"])
def victim_of_format(request: pytest.FixtureRequest) -> Iterator[Victim]:
    with TemporaryDirectory(prefix="bt-") as directory:
        victim = Victim(Path(directory), request.param)
        yield victim
        victim.close()


@pytest.fixture
def victim(victim_of_format: Victim) -> Iterator[Victim]:
    yield victim_of_format
    victim_of_format.check()


@pytest.fixture
def case(victim: Victim) -> Iterator[Case]:
    with victim.connect() as front_end:
        yield Case(front_end)
