# SPDX-License-Identifier: Apache-2.0
"""preallocate: makes ``file`` longer ahead of writes past its end, and cuts off what is left over afterwards.

Writes up to the end of what is allocated pass through the datapath; only one past it comes here (a fence with
a limit). To its users the node ends where the last write did.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from target.config.options import Size
from target.datapath import FAST_ZERO, Fault, Object
from target.datapath.fence import Fence, make_fence
from target.graph.change import Change
from target.graph.edge import Edge
from target.graph.errors import BlockError
from target.graph.node import BlockdevRef, Node, NodeOptions
from target.graph.options import Settings
from target.graph.permissions import Perm

log = logging.getLogger("blocktarget")

SECTOR = 512
OPEN_END = 1 << 62
NEEDED = Perm.WRITE | Perm.RESIZE


class Preallocate(Node, driver="preallocate"):
    """Active while its users write and may resize, as a format does. Else it only passes on."""

    is_filter = True
    reopenable = frozenset({"prealloc-align", "prealloc-size"})
    tuning = frozenset({"prealloc_align", "prealloc_size"})

    class Options(NodeOptions):
        file: BlockdevRef
        prealloc_align: Size = 1 << 20
        prealloc_size: Size = 128 << 20

    options: Options
    fence: Fence | None = None
    limit: int | None = None  # where what is allocated ends, in bytes; None: not active
    wanted = False  # the users' permissions are such that it should be active
    grown = 0

    async def open(self) -> None:
        await self.attach("file", self.options.file)
        self._check(self.options)
        self._growing = asyncio.Lock()

    def _check(self, options: Options) -> None:
        what = "prealloc-align parameter of preallocate filter is not aligned to"
        if options.prealloc_align % SECTOR:
            raise self.error(f"{what} {SECTOR}")
        if options.prealloc_align % (unit := self._request_alignment()):
            raise self.error(f"{what} underlying node request alignment ({unit})")

    def _request_alignment(self) -> int:
        node = self.below
        while not node.is_protocol and "file" in node.children:
            node = node.children["file"].node
        alignment = getattr(node, "align", None)
        return 1 if alignment is None else int(alignment.request)

    def make_object(self) -> Object:
        # Without an end of its own: a format above may grow the child by writing.
        self.fence = make_fence(self.datapath, self.below.object, self._grow)
        self.fence.size = OPEN_END
        self.fence.set_limit(None)
        return self.fence

    async def close(self) -> None:
        await self._cut()

    @property
    def below(self) -> Node:
        return self.children["file"].node

    @property
    def size(self) -> int:
        return self.below.size if self.limit is None else self._end

    @property
    def _end(self) -> int:
        """Where data end, while it is active."""
        assert self.fence is not None
        return -(-self.fence.reached // SECTOR) * SECTOR

    def counters(self) -> dict[str, Any]:
        left = 0 if self.limit is None else self.limit - self._end
        return super().counters() | {"preallocations": self.grown, "preallocated_bytes": left}

    # ---- when it is active ----

    def child_permissions(self, role: str, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        """Nobody else changes the file meanwhile, until what is left over is cut off."""
        if self.limit is not None:
            perm |= NEEDED
        return perm, shared & ~NEEDED if NEEDED in perm else shared

    def commit_permissions(self, perm: Perm, shared: Perm) -> None:
        self.wanted = NEEDED in perm
        if self.wanted:
            self._begin()
        elif self.limit is not None:
            self.graph.changing.later(self._end_use)

    async def _end_use(self) -> None:
        """The users that needed it are gone."""
        if not self.wanted and not self.closed:
            await self._cut()
            self.graph.changing.refresh([self], loosen=True)

    def _begin(self) -> None:
        if self.fence is None or self.limit is not None:
            return
        self.fence.reach(self.below.size)  # a write that is under way may have reached further
        self.limit = self.fence.reached
        self.fence.set_limit(self.limit)

    async def _cut(self) -> None:
        """Gives back what was allocated ahead; no longer active."""
        if self.fence is None or self.limit is None:
            return
        async with self._growing:  # whoever wants to write past the end waits
            await self._stop_at_end(self.fence)
            end = self._end
            if end < self.below.size:
                try:
                    await self.below.truncate(end)
                except BlockError as error:
                    log.warning("%s: what was preallocated stays: %s", self.label, error)
            self.limit = None
            self.fence.set_limit(None)

    @staticmethod
    async def _stop_at_end(fence: Fence) -> None:
        """Nothing is written past where data end, when it returns."""
        end = -1
        while end != fence.reached:
            end = fence.reached
            fence.set_limit(end)
            await fence.synchronize()

    async def quiesce(self) -> None:
        await self._cut()

    async def resume(self) -> None:
        if self.wanted:
            self._begin()

    async def reopen(self, change: Change, options: NodeOptions, settings: Settings) -> None:
        assert isinstance(options, Preallocate.Options)
        self._check(options)
        await super().reopen(change, options, settings)

    # ---- sizes ----

    def child_resized(self, edge: Edge) -> None:
        if self.limit is None:
            self._forget_end()
            self.resized()

    def relink(self, role: str, old: Object | None, new: Object | None) -> None:
        super().relink(role, old, new)
        self._forget_end()

    def _forget_end(self) -> None:
        """Somebody else says where the file ends."""
        if self.fence is not None:
            self.fence.reached = 0

    async def truncate(self, size: int) -> None:
        assert self.fence is not None
        async with self._growing:  # whoever wants to write past the new end waits
            if self.limit is not None:
                self.fence.set_limit(min(size, self.limit))
            try:
                await self.below.truncate(size)
                self.fence.reached = size
                self.limit = None if self.limit is None else size
            finally:
                self.fence.set_limit(self.limit)

    async def resize(self, change: Change, size: int) -> None:
        if self.limit is None:
            self._forget_end()
            await self.below.resize(change, size)
        else:
            await super().resize(change, size)

    # ---- growing ----

    async def _grow(self, fault: Fault) -> None:
        await self._extend(fault.offset + fault.length)
        fault.retry()

    async def _extend(self, end: int) -> None:
        """The limit is behind ``end`` when it returns, whether or not more could be allocated."""
        assert self.fence is not None
        async with self._growing:
            if self.limit is None or end <= self.limit:
                return
            align = max(self.options.prealloc_align, self._request_alignment())
            wanted = -(-(end + self.options.prealloc_size) // align) * align
            try:
                await self.below.write_zeroes(self.limit, wanted - self.limit, FAST_ZERO)
                self.grown += 1
                self.limit = wanted
            except OSError:  # no space for so much, or no way to do it fast: the write may fit yet
                self.limit = end
            self.fence.set_limit(self.limit)
