# SPDX-License-Identifier: Apache-2.0
"""Who takes clusters, and when, once there are none left."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from target.drivers.format.qcow2.space import Space


class Clusters:
    """``free`` can be taken now; ``pool`` is free after a write-back; each step takes a while."""

    def __init__(self, free: int, pool: int, idle: Callable[[], Awaitable[None]] | None = None) -> None:
        self.free = free
        self.pool = pool
        self.reclaims = 0
        self.grants = SimpleNamespace(scarce=False, idle=idle or self._pause)
        write_back = SimpleNamespace(reclaim=self._reclaim, grants=self.grants, allocator=None)
        self.space = Space(cast(Any, write_back))

    async def _pause(self) -> None:
        for _ in range(3):
            await asyncio.sleep(0)

    async def _reclaim(self) -> None:
        assert self.grants.scarce
        self.reclaims += 1
        await self._pause()
        self.free, self.pool = self.free + self.pool, 0
        await self._pause()

    async def take(self, count: int = 1) -> int:
        await self._pause()
        if self.free < count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.free -= count
        return count


async def test_what_was_freed_is_for_the_one_who_freed_it() -> None:
    clusters = Clusters(free=0, pool=4)

    async def greedy() -> int:
        """Comes while the first one frees, and would take ahead all there is."""
        while not clusters.reclaims:
            await asyncio.sleep(0)
        return await clusters.space.take(lambda: clusters.take(max(1, clusters.free)))

    first = asyncio.ensure_future(clusters.space.take(lambda: clusters.take(2)))
    assert list(await asyncio.gather(first, greedy())) == [2, 2]
    assert clusters.reclaims == 1 and not clusters.grants.scarce


async def test_who_began_before_has_ended_before_anything_is_freed() -> None:
    """A transient user of the last cluster gives it back; that is no reason for a write-back."""
    clusters = Clusters(free=1, pool=0)

    async def transient() -> None:
        await clusters.take()
        for _ in range(20):
            await asyncio.sleep(0)
        clusters.free += 1

    held = asyncio.ensure_future(clusters.space.take(transient))
    await clusters._pause()
    await asyncio.sleep(0)
    assert await clusters.space.take(clusters.take) == 1
    assert held.done() and not clusters.reclaims


async def test_an_error_that_is_not_about_space_is_not_tried_again() -> None:
    clusters = Clusters(free=0, pool=1)
    tried = 0

    async def broken() -> None:
        nonlocal tried
        tried += 1
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(OSError, match="Input/output"):
        await clusters.space.take(broken)
    assert tried == 1 and not clusters.reclaims


async def test_nothing_to_free_is_the_error_for_each_and_blocks_nobody() -> None:
    clusters = Clusters(free=0, pool=0)
    results = await asyncio.gather(
        *(clusters.space.take(clusters.take) for _ in range(5)), return_exceptions=True
    )
    assert [getattr(result, "errno", None) for result in results] == [errno.ENOSPC] * 5
    clusters.free = 1
    assert await clusters.space.take(clusters.take) == 1
    assert not clusters.grants.scarce


async def test_a_request_that_is_given_up_while_it_frees_blocks_nobody() -> None:
    clusters = Clusters(free=0, pool=1)
    task = asyncio.ensure_future(clusters.space.take(clusters.take))
    while not clusters.reclaims:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not clusters.grants.scarce
    assert await clusters.space.take(clusters.take) == 1
