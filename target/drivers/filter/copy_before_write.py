# SPDX-License-Identifier: Apache-2.0
"""copy-before-write: before a part of ``file`` is changed for the first time, its old data go to ``target``.

The datapath holds such changes back (a fence); this copies, within the datapath, and lets them go. What has
been copied is passed on without asking. ``file`` as it was when the node was opened is what snapshot-access
reads.
"""

from __future__ import annotations

import asyncio
import errno
import os
from dataclasses import dataclass
from typing import Any, Literal

from msgspec import UNSET

from target.config.options import Refused, Size, UInt32
from target.datapath import Fault, Object
from target.datapath.fence import Fence, Mark, make_fence
from target.graph.change import Change
from target.graph.edge import Edge
from target.graph.errors import BlockError
from target.graph.node import BlockdevRef, Node, NodeOptions
from target.graph.permissions import Perm

CLUSTER_DEFAULT = 1 << 16
AT_ONCE = 16 << 20  # bytes that one copy moves
PARALLEL = 32  # copies; each needs up to 4 MiB
AHEAD = PARALLEL * AT_ONCE  # bytes that one request has copied before it goes on
OPEN_END = 1 << 62


@dataclass(eq=False)
class Copy:
    """Clusters [first, end) on their way."""

    first: int
    end: int
    task: asyncio.Task[None]


class CopyBeforeWrite(Node, driver="copy-before-write"):
    """Counts in clusters where it does not say bytes."""

    is_filter = True
    reopenable = frozenset({"on-cbw-error", "cbw-timeout"})
    tuning = frozenset({"on_cbw_error", "cbw_timeout", "min_cluster_size"})
    named_as_file = True

    class Options(NodeOptions):
        file: BlockdevRef
        target: BlockdevRef
        bitmap: Refused = UNSET
        on_cbw_error: Literal["break-guest-write", "break-snapshot"] = "break-guest-write"
        cbw_timeout: UInt32 = 0
        min_cluster_size: Size = 0

    options: Options
    fence: Fence
    bits = 0  # log2 of a cluster
    snapshot_size = 0  # bytes
    snapshot_error: OSError | None = None  # it is of no use any more
    copied = 0
    fleecing = False  # the target's backing chain leads to ``file``: whoever reads the target reads that, too

    # ---- opening and closing ----

    async def open(self) -> None:
        options = self.options
        if options.bitmap is not UNSET:
            raise self.error("option 'bitmap': there are no dirty bitmaps yet")
        file = await self.attach("file", options.file)
        perm, shared = Perm.WRITE, Perm.ALL & ~Perm.RESIZE
        target = await self.attach("target", options.target, perm=perm, shared=shared)
        self.snapshot_size = file.size
        if target.size < file.size:
            raise self.error(
                f"target '{target.name}' ({target.size} bytes) is smaller than file '{file.name}'"
                f" ({file.size} bytes)"
            )
        self.bits = self._cluster_size(target).bit_length() - 1
        self.fleecing = _contains(target, file)
        self._views: list[Object] = []
        self._copies: list[Copy] = []
        self._slots = asyncio.Semaphore(PARALLEL)
        self._breaking: asyncio.Task[None] | None = None

    def _cluster_size(self, target: Node) -> int:
        least = self.options.min_cluster_size
        if least & (least - 1):
            raise self.error("Cannot create block-copy-state: min-cluster-size needs to be a power of 2")
        return max(CLUSTER_DEFAULT, target.cluster_size or 0, least)

    def make_object(self) -> Object:
        self.fence = make_fence(
            self.datapath,
            self.below.object,
            self._before_change,
            saved=self.target.object,
            granule_bits=self.bits,
            granules=self._clusters_to(self.snapshot_size),
        )
        # Without an end of its own: a format above may grow the child by writing.
        self.fence.size = OPEN_END
        return self.fence

    async def close(self) -> None:
        if self.opened:
            await self._ended(self._copies)

    async def quiesce(self) -> None:
        await self._ended(self._copies)

    @property
    def below(self) -> Node:
        return self.children["file"].node

    @property
    def target(self) -> Node:
        return self.children["target"].node

    @property
    def size(self) -> int:
        return self.below.size

    def child_permissions(self, role: str, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        """Whoever changes the file past this node changes the snapshot."""
        if self.parents:
            return perm | Perm.CONSISTENT_READ, shared & ~(Perm.WRITE | Perm.RESIZE)
        return perm, shared

    def child_resized(self, edge: Edge) -> None:
        if edge.role == "file":
            self.resized()

    async def truncate(self, size: int) -> None:
        await self._save_past(size)
        await self.below.truncate(size)

    async def resize(self, change: Change, size: int) -> None:
        await self._save_past(size)
        await self.below.resize(change, size)

    async def _save_past(self, size: int) -> None:
        """What is cut off is copied before; what is added is not part of the snapshot."""
        if size < self.snapshot_size and self.snapshot_error is None:
            try:
                await self._save(size >> self.bits, self._clusters_to(self.snapshot_size))
            except OSError as error:
                raise BlockError.from_os(f"{self.label}: Could not copy what is cut off", error) from None

    def counters(self) -> dict[str, Any]:
        error = None if self.snapshot_error is None else os.strerror(self.snapshot_error.errno or errno.EIO)
        mine = {"cluster_size": 1 << self.bits, "copied": self.copied, "snapshot_error": error}
        return super().counters() | mine

    # ---- for snapshot-access ----

    def add_view(self, view: Object) -> None:
        self._views.append(view)

    def remove_view(self, view: Object) -> None:
        self._views.remove(view)

    async def forget(self, offset: int, length: int) -> None:
        """Nobody needs these bytes of the snapshot: whole clusters are not copied any more, nor readable."""
        first = -(-offset >> self.bits)
        end = self._clusters_to(offset + length)
        if offset + length < self.snapshot_size:
            end = (offset + length) >> self.bits
        if first >= end:
            return
        self.fence.mark(Mark.HIDDEN, first, end)
        await self._ended([copy for copy in self._copies if copy.first < end and first < copy.end])
        await self._no_reader()
        self.fence.mark(Mark.OPEN, first, end)
        start = first << self.bits
        await self.target.discard(start, min(end << self.bits, self.snapshot_size) - start)

    # ---- changes that the datapath holds back ----

    async def _before_change(self, fault: Fault) -> None:
        try:
            await self._save(*self._clusters(fault.offset, min(fault.length, AHEAD)), fault.thread)
        except OSError as error:
            fault.done(-(error.errno or errno.EIO))
            return
        fault.retry()

    async def _save(self, first: int, end: int, thread: int = 0) -> None:
        """The clusters may be changed when it returns. OSError: they may not, and the user gets to know.

        ``thread``: the I/O thread that copies what nobody copies yet.
        """
        try:
            tasks = self._tasks_for(first, end, thread)
            if not tasks:
                return
            _, late = await asyncio.wait(tasks, timeout=self.options.cbw_timeout or None)
            if late:
                raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
            for task in tasks:
                task.result()
        except OSError as error:
            if self.options.on_cbw_error == "break-guest-write":
                raise
            await self._break(error)

    def _tasks_for(self, first: int, end: int, thread: int) -> list[asyncio.Task[None]]:
        """The copies, under way or begun now, after which all of the range is open."""
        found = [copy for copy in self._copies if copy.first < end and first < copy.end]
        tasks = [copy.task for copy in found]
        at = first
        for gap_end, gap_next in [*sorted((copy.first, copy.end) for copy in found), (end, end)]:
            while (at := self.fence.find(Mark.OPEN, at, gap_end, False)) < gap_end:
                stop = min(self.fence.find(Mark.OPEN, at, gap_end, True), at + max(AT_ONCE >> self.bits, 1))
                tasks.append(self._begin(at, stop, thread))
                at = stop
            at = gap_next
        return tasks

    def _begin(self, first: int, end: int, thread: int) -> asyncio.Task[None]:
        copy = Copy(first, end, asyncio.ensure_future(self._copy(first, end, thread)))
        self._copies.append(copy)
        copy.task.add_done_callback(lambda task: self._done(copy))
        return copy.task

    def _done(self, copy: Copy) -> None:
        self._copies.remove(copy)
        if not copy.task.cancelled():
            copy.task.exception()  # taken note of, when nobody waits any more

    async def _copy(self, first: int, end: int, thread: int) -> None:
        offset = first << self.bits
        length = min(end << self.bits, self.snapshot_size) - offset
        async with self._slots:
            source, target = self.below.object, self.target.object
            await self.datapath.copy(source, target, offset, offset, length, thread)
        self.copied += end - first
        self.fence.mark(Mark.SAVED, first, end)
        await self._no_reader()
        self.fence.mark(Mark.OPEN, first, end)

    async def _no_reader(self) -> None:
        """Whoever still reads the snapshot from ``file``, as he found it before, is done."""
        if self._views:
            await self._views[0].synchronize()
        if self.fleecing:
            await self.target.object.synchronize()

    async def _break(self, error: OSError) -> None:
        """The guest goes on; the snapshot is lost, for good."""
        if self._breaking is None:
            self.snapshot_error = error
            self._breaking = asyncio.ensure_future(self._give_up())
        await asyncio.shield(self._breaking)

    async def _give_up(self) -> None:
        self.fence.mark_all(Mark.HIDDEN)
        await self._no_reader()
        self.fence.mark_all(Mark.OPEN)

    @staticmethod
    async def _ended(copies: list[Copy]) -> None:
        if copies:
            await asyncio.wait([copy.task for copy in copies])

    def _clusters(self, offset: int, length: int) -> tuple[int, int]:
        return offset >> self.bits, self._clusters_to(offset + length)

    def _clusters_to(self, offset: int) -> int:
        return -(-offset >> self.bits)


def _contains(top: Node, node: Node) -> bool:
    return top is node or any(_contains(edge.node, node) for edge in top.children.values())
