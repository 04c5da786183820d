# SPDX-License-Identifier: Apache-2.0
"""A session's drain and its end, when both come at once; on a backend whose queues stop when told to."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from target.exports.vhost_user_blk.session import Session


class Queues:
    """A backend of two queues that run; a stop takes until ``idle`` is set."""

    def __init__(self) -> None:
        self.running = {0, 1}
        self.idle = asyncio.Event()
        self.closed = False

    async def stop(self, queue: int) -> None:
        await self.idle.wait()
        self.running.discard(queue)

    async def give_up_stop(self, queue: int) -> None:
        pass

    def start(self, queue: int) -> None:
        assert not self.closed
        self.running.add(queue)

    async def close(self) -> None:
        for queue in sorted(self.running):
            await self.stop(queue)
        self.closed = True


def session(queues: Queues) -> Session:
    async def flush() -> None:
        pass

    made = Session(cast(Any, SimpleNamespace(queues=2)), cast(Any, queues), flush)
    for queue in made.queues:
        queue.started = queue.enabled = True
    return made


async def both(task: asyncio.Future[None], other: asyncio.Future[None]) -> None:
    async with asyncio.timeout(5):
        await asyncio.gather(task, other)


async def test_a_front_end_that_leaves_while_its_export_drains_holds_up_nobody() -> None:
    """The session's end waited for the drain's lock, and the change that drained for the session's end."""
    queues = Queues()
    ends = session(queues)
    drain = asyncio.ensure_future(ends.drain(5))
    await asyncio.sleep(0)
    close = asyncio.ensure_future(ends.close())
    await asyncio.sleep(0)
    queues.idle.set()
    await both(drain, close)
    assert queues.closed
    ends.undrain()
    assert not queues.running


async def test_a_session_that_ends_does_not_start_its_queues_after_a_move() -> None:
    queues = Queues()
    ends = session(queues)
    move = asyncio.ensure_future(ends.move([1], 5))
    await asyncio.sleep(0)
    close = asyncio.ensure_future(ends.close())
    await asyncio.sleep(0)
    queues.idle.set()
    await both(move, close)
    assert queues.closed and not queues.running


async def test_a_drain_holds_the_queues_until_it_ends() -> None:
    queues = Queues()
    queues.idle.set()
    goes_on = session(queues)
    await goes_on.drain(5)
    assert not queues.running
    goes_on.undrain()
    assert queues.running == {0, 1}
    await goes_on.drain(5)
    await goes_on.close()
    assert queues.closed


async def test_a_drain_that_takes_too_long_lets_the_session_end() -> None:
    queues = Queues()
    ends = session(queues)
    with pytest.raises(TimeoutError):
        await ends.drain(0.01)
    queues.idle.set()
    async with asyncio.timeout(5):
        await ends.close()
    assert queues.closed
