# SPDX-License-Identifier: Apache-2.0
"""Fixtures for unit tests: a graph with a running datapath, closed at the end; C programs of the datapath."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from target import drivers
from target.datapath import Datapath
from target.graph.graph import Graph
from tests.support.c_programs import CPrograms

drivers.load()


@pytest_asyncio.fixture
async def graph() -> AsyncIterator[Graph]:
    datapath = Datapath()
    datapath.start(asyncio.get_running_loop())
    datapath.add_thread(poll_max_ns=0)
    made = Graph(datapath)
    yield made
    await made.close()
    await datapath.close()


@pytest.fixture(scope="session")
def c_programs(tmp_path_factory: pytest.TempPathFactory) -> CPrograms:
    return CPrograms(tmp_path_factory.mktemp("c"))
