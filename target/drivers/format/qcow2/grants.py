# SPDX-License-Identifier: Apache-2.0
"""The map's grant pool: clusters allocated ahead, which the datapath places without asking.

It sizes the pool by demand, and keeps account of what was granted and has not yet been seen in an entry:
clusters that came into use and were dropped again between two write-backs are in no table, and are found
by an audit.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from target.datapath import Grant
from target.drivers.format.qcow2.allocate import Allocator
from target.drivers.format.qcow2.store import Entries, MapFace

_FIRST_BYTES = 1 << 20
_MAX_BYTES = 64 << 20
_MAX_CLUSTERS = 2048
_BUSY_SECONDS = 0.02
_IDLE_SECONDS = 5.0
_CLAIM_SECONDS = 0.0005
_AUDIT_SECONDS = 1.0
_SCARCE_SECONDS = 30.0


class Grants:
    """Refills one map's pool from one image's allocator. Counts in clusters."""

    def __init__(self, allocator: Allocator, map: MapFace, limit: int | None = None) -> None:
        self.allocator = allocator
        self.map = map
        self.bits = allocator.header.cluster_bits
        self.most = max(1, min(_MAX_CLUSTERS, _MAX_BYTES >> self.bits))
        if limit is not None:
            self.most = limit
        self.want = min(self.most, max(8, _FIRST_BYTES >> self.bits))
        self.outstanding: set[int] = set()
        self.on_pressure: Callable[[], None] = lambda: None  # much is outstanding: time to write back
        self._lock = asyncio.Lock()
        self._generation = 0
        self._last = 0.0
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        self.quiet = False  # no refill ahead of need
        self.scarce = False  # nor while one takes the last clusters

    # ---- filling ----

    def on_low(self, bytes_left: int) -> None:
        """The datapath reports that the pool runs low."""
        if self._task is None and not (self._closed or self.quiet or self.scarce):
            self._task = asyncio.ensure_future(self._refill_quietly())

    async def _refill_quietly(self) -> None:
        """Ahead of need: an error is met again, and reported, by the request that finds the pool empty."""
        try:
            await self.refill()
        except OSError:
            return
        finally:
            self._task = None

    async def refill(self) -> None:
        """Puts clusters into the pool; callers that come meanwhile share one refill.

        OSError: none left, neither in the file nor in the pool, which may have been filled since it ran dry.
        """
        generation = self._generation
        async with self._lock:
            if generation != self._generation or self._closed:
                return
            self._adapt()
            try:
                await self._grant(self.want)
            except OSError:
                if not self.map.granted:
                    raise
            self._generation += 1
        if len(self.outstanding) > 16 * self.most:
            self.on_pressure()

    def _adapt(self) -> None:
        now = time.monotonic()
        if now - self._last < _BUSY_SECONDS:
            self.want = min(self.most, self.want * 2)
        elif now - self._last > _IDLE_SECONDS:
            self.want = max(1, self.want // 2)
        self._last = now
        self.map.set_low_water(self.want // 2)

    async def _grant(self, want: int) -> None:
        granted = 0
        while granted < want:
            try:
                run = await self.allocator.take(want - granted)
            except OSError:
                if not granted:
                    raise
                return
            self.outstanding.update(range(run.first, run.first + run.length))
            self.map.grant(run.first << self.bits, run.length, run.zeroed)
            granted += run.length

    # ---- accounting ----

    def seen(self, hosts: Entries) -> None:
        """These host offsets were found in entries: they are in use."""
        self.outstanding.difference_update((hosts >> self.bits).tolist())

    def needs_audit(self) -> bool:
        """After a write-back: much more is outstanding than is left in the pool, so some must be lost."""
        return len(self.outstanding) - self.map.granted > self.want // 4 + 64

    async def audit(self, give_back: bool = False) -> set[int]:
        """The clusters that are in entries of dirty slices, or lost; empty when that cannot be told now.

        Take it before a write-back's step 1; what ``seen`` has not removed from ``outstanding`` afterwards is
        lost. ``give_back``: the unused ones go back to the allocator instead of the pool, which then starts
        small again, so that they are there for tables too when space is short.
        """
        async with self._lock:
            unused = self.map.revoke()
            settled = await self._claims_end(_SCARCE_SECONDS if give_back else _AUDIT_SECONDS)
            unused += self.map.revoke()
            for grant in unused:
                first = grant.host_offset >> self.bits
                self.outstanding.difference_update(range(first, first + grant.granules))
            suspects = set(self.outstanding) if settled else set()
            if give_back:
                self.want = 1
                self.map.set_low_water(0)
            for grant in unused:
                await self._return(grant, give_back)
        return suspects

    async def _claims_end(self, seconds: float) -> bool:
        """With the pool empty no claim begins: soon every cluster is published or back in the pool."""
        deadline = time.monotonic() + seconds
        while self.map.claims:
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(_CLAIM_SECONDS)
        return True

    async def _return(self, grant: Grant, give_back: bool) -> None:
        first = grant.host_offset >> self.bits
        if give_back:
            await self.allocator.give(first, grant.granules)
        else:
            self.outstanding.update(range(first, first + grant.granules))
            self.map.grant(grant.host_offset, grant.granules, grant.zeroed)

    def lost(self, suspects: set[int]) -> list[int]:
        """After the write-back: suspects in no entry. They are no longer accounted for here."""
        missing = suspects & self.outstanding
        self.outstanding -= missing
        return sorted(missing)

    async def close(self) -> None:
        """No refill after this."""
        self._closed = True
        await self.idle()

    async def idle(self) -> None:
        """Returns when no refill ahead of need is under way."""
        if self._task is not None:
            await asyncio.wait([self._task])
