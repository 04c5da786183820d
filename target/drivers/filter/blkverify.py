# SPDX-License-Identifier: Apache-2.0
"""blkverify: compares a node under test with one that holds the same data for sure, at every read.

The first difference, in data or in results, ends the process: the message is QEMU's, nothing more is served,
and the status is 1. Other exports and nodes are closed in order.
"""

from __future__ import annotations

from target.datapath import Object, Op, lib
from target.drivers.filter.replicas import Replicas, Report
from target.graph import permissions
from target.graph.change import Change
from target.graph.node import BlockdevRef, NodeOptions
from target.graph.permissions import Perm


class BlkVerify(Replicas, driver="blkverify"):
    """Only ``test`` is flushed: the other is a copy."""

    class Options(NodeOptions):
        test: BlockdevRef
        raw: BlockdevRef

    options: Options
    is_filter = True

    async def open(self) -> None:
        await self.attach_replica("test", self.options.test)
        await self.attach_replica("raw", self.options.raw)
        self.combine_features()
        self.features = self.features._replace(fast_zero=False)  # neither may refuse what the other does

    def make_object(self) -> Object:
        return self.make_replicas(2, lib.BT_QUORUM_BLKVERIFY)

    def child_permissions(self, role: str, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        """As QEMU: ``raw`` is the filter's child, ``test`` is data that writing may make larger."""
        if role == "raw":
            return permissions.for_filter(perm, shared)
        return perm | Perm.RESIZE if Perm.WRITE in perm else perm, shared & ~Perm.RESIZE

    async def resize(self, change: Change, size: int) -> None:
        for edge in self.children.values():
            await edge.node.resize(change, size)

    def describe_end(self, report: Report) -> str:
        what = "read" if report.op is Op.READ else "write"
        head = f"blkverify: {what} offset={report.offset} bytes={report.length} "
        if report.type == lib.BT_QUORUM_DATA:
            return head + f"contents mismatch at offset {report.at}"
        return head + f"return value mismatch {-report.error} != {-report.other}"
