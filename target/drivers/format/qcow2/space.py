# SPDX-License-Identifier: Apache-2.0
"""Takes clusters for requests, when there may be none left: whoever finds none frees what can be freed.

Nobody else takes a cluster from then on until that one has what it asked for. Without this order others take
ahead of their need what was freed, and a request fails although the file has room for all of them.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from typing import TypeVar

from target.drivers.format.qcow2.flush import WriteBack

T = TypeVar("T")


class Space:
    """One image's, while it may be written."""

    def __init__(self, write_back: WriteBack) -> None:
        self.write_back = write_back
        self.grants = write_back.grants
        self.allocator = write_back.allocator
        self._scarce = asyncio.Lock()  # held by whoever found none
        self._taking = 0  # others, who began before
        self._none_taking = asyncio.Event()

    async def take(self, allocate: Callable[[], Awaitable[T]]) -> T:
        """What ``allocate`` returns. OSError: its own; ENOSPC only when no cluster can be freed."""
        if not self._scarce.locked():
            try:
                return await self._with_others(allocate)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
        async with self._scarce:
            return await self._alone(allocate)

    async def _with_others(self, allocate: Callable[[], Awaitable[T]]) -> T:
        self._taking += 1
        try:
            return await allocate()
        finally:
            self._taking -= 1
            if not self._taking:
                self._none_taking.set()

    async def _alone(self, allocate: Callable[[], Awaitable[T]]) -> T:
        self.grants.scarce = True
        try:
            await self.grants.idle()
            while self._taking:
                self._none_taking.clear()
                await self._none_taking.wait()
            try:  # who was before may have freed enough
                return await allocate()
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
            await self.write_back.reclaim()
            return await allocate()
        finally:
            self.grants.scarce = False
