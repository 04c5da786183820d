# SPDX-License-Identifier: Apache-2.0
"""The order of prepare, commit, abort and clean."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from target.graph.errors import BlockError
from target.qmp.registry import Arguments
from target.service import Service
from target.transactions.action import Action
from target.transactions.run import Request, run

told: list[str] = []


class Recorder(Action, type="x-test-recorder"):
    """Tells what is called; fails where it is asked to."""

    class Data(Arguments):
        name: str
        fail: str = ""

    data: Data

    def tell(self, what: str) -> None:
        told.append(f"{what} {self.data.name}")
        if self.data.fail == what:
            raise BlockError(f"{what} {self.data.name} failed")

    async def prepare(self) -> None:
        self.change.undo(lambda: told.append(f"undo {self.data.name}"))
        self.change.later(lambda: told.append(f"later {self.data.name}"))
        self.tell("prepare")

    async def commit(self) -> None:
        self.tell("commit")

    async def abort(self) -> None:
        self.tell("abort")

    async def clean(self) -> None:
        self.tell("clean")


@pytest_asyncio.fixture
async def service() -> AsyncIterator[Service]:
    told.clear()
    made = Service()
    yield made
    assert await made.close() == []


async def carry_out(service: Service, *fails: str) -> list[str]:
    requests = [Request(Recorder, Recorder.Data(name=str(i), fail=fail)) for i, fail in enumerate(fails)]
    if any(fails):
        with pytest.raises(BlockError, match="failed"):
            await asyncio.wait_for(run(service, requests), 5)
    else:
        await asyncio.wait_for(run(service, requests), 5)
    return told


async def test_all_are_prepared_before_one_is_committed(service: Service) -> None:
    assert await carry_out(service, "", "") == [
        *("prepare 0", "prepare 1", "commit 0", "commit 1", "later 0", "later 1", "clean 0", "clean 1")
    ]


async def test_one_that_fails_in_prepare_is_not_aborted_but_those_before_it_are(service: Service) -> None:
    assert await carry_out(service, "", "", "prepare") == [
        *("prepare 0", "prepare 1", "prepare 2", "undo 2", "abort 1", "undo 1", "abort 0", "undo 0"),
        *("clean 0", "clean 1"),
    ]


async def test_one_that_fails_at_commit_aborts_all(service: Service) -> None:
    assert await carry_out(service, "", "commit", "") == [
        *("prepare 0", "prepare 1", "prepare 2", "commit 0", "commit 1"),
        *("abort 2", "undo 2", "abort 1", "undo 1", "abort 0", "undo 0", "clean 0", "clean 1", "clean 2"),
    ]


async def test_grouped_is_for_actions_that_know_it(service: Service) -> None:
    request = Request(Recorder, Recorder.Data(name="x"))
    with pytest.raises(
        BlockError,
        match="Action 'x-test-recorder' does not support transaction property completion-mode = grouped",
    ):
        await run(service, [request], "grouped")
    assert told == []
