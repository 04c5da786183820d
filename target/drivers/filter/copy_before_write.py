# SPDX-License-Identifier: Apache-2.0
"""copy-before-write: before a part of ``file`` is changed for the first time, its old data go to ``target``.

The datapath does that (a fence that saves); what a failed copy means is decided here. ``file`` as it was
when the node was opened is what snapshot-access reads.
"""

from __future__ import annotations

import asyncio
import errno
import os
from typing import Any, Literal

from msgspec import UNSET

from target.config.options import Refused, Size, UInt32
from target.datapath import Fault, Object
from target.datapath.fence import Fence, Mark, make_fence
from target.graph.change import Change
from target.graph.edge import Edge
from target.graph.errors import BlockError
from target.graph.node import BlockdevRef, Node, NodeOptions
from target.graph.options import Settings
from target.graph.permissions import Perm

CLUSTER_DEFAULT = 1 << 16
OPEN_END = 1 << 62


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
            self._not_copied,
            saved=self.target.object,
            granule_bits=self.bits,
            granules=self._clusters_to(self.snapshot_size),
        )
        # Without an end of its own: a format above may grow the child by writing.
        self.fence.size = OPEN_END
        self.fence.set_saving(self.snapshot_size, self.fleecing)
        self.fence.set_timeout(self.options.cbw_timeout)
        return self.fence

    async def close(self) -> None:
        if self.opened:
            await self.fence.settle()

    async def quiesce(self) -> None:
        await self.fence.settle()

    async def reopen(self, change: Change, options: NodeOptions, settings: Settings) -> None:
        change.undo(self._set_timeout)  # after that of the options
        await super().reopen(change, options, settings)
        self._set_timeout()

    def _set_timeout(self) -> None:
        self.fence.set_timeout(self.options.cbw_timeout)

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
                await self.fence.save(size, self.snapshot_size - size)
            except OSError as error:
                raise BlockError.from_os(f"{self.label}: Could not copy what is cut off", error) from None

    def counters(self) -> dict[str, Any]:
        error = None if self.snapshot_error is None else os.strerror(self.snapshot_error.errno or errno.EIO)
        mine = {"cluster_size": 1 << self.bits, "copied": self.copied, "snapshot_error": error}
        return super().counters() | mine

    @property
    def copied(self) -> int:
        return self.fence.saved

    # ---- for snapshot-access ----

    async def forget(self, offset: int, length: int) -> None:
        """Nobody needs these bytes of the snapshot: whole clusters are not copied any more, nor readable."""
        first = -(-offset >> self.bits)
        end = self._clusters_to(offset + length)
        if offset + length < self.snapshot_size:
            end = (offset + length) >> self.bits
        if first >= end:
            return
        self.fence.mark(Mark.HIDDEN, first, end)
        start = first << self.bits
        length = min(end << self.bits, self.snapshot_size) - start
        try:
            await self.fence.save(start, length)
        except OSError:  # a copy that was under way; there is none from here on
            await self.fence.save(start, length)
        await self.fence.wait_readers()
        await self.target.discard(start, length)

    # ---- what the datapath could not copy ----

    async def _not_copied(self, fault: Fault) -> None:
        if self.options.on_cbw_error == "break-guest-write":
            fault.done(fault.result)
            return
        await self._break(OSError(-fault.result, os.strerror(-fault.result)))
        fault.retry()

    async def _break(self, error: OSError) -> None:
        """The guest goes on; the snapshot is lost, for good."""
        if self._breaking is None:
            self.snapshot_error = error
            self._breaking = asyncio.ensure_future(self._give_up())
        await asyncio.shield(self._breaking)

    async def _give_up(self) -> None:
        self.fence.mark_all(Mark.HIDDEN)
        await self.fence.wait_readers()
        if self.fleecing:
            await self.target.object.synchronize()
        self.fence.mark_all(Mark.OPEN)

    def _clusters_to(self, offset: int) -> int:
        return -(-offset >> self.bits)


def _contains(top: Node, node: Node) -> bool:
    return top is node or any(_contains(edge.node, node) for edge in top.children.values())
