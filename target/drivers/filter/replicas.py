# SPDX-License-Identifier: Apache-2.0
"""What quorum and blkverify share: children that hold the same data, and the device that asks all of them."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from target.datapath import Extent, Object, Op, ffi, lib
from target.events import SECOND_NS, Event
from target.graph.edge import Edge
from target.graph.node import BlockdevRef, Features, Node

if TYPE_CHECKING:
    from target.graph.change import Change

OPEN_END = 1 << 62
SECTOR = 512
PROMISES = ("flush", "fua", "trim", "fast_zero", "cache", "multi_conn")

OpType = Literal["read", "write", "flush"]


class Report(msgspec.Struct, frozen=True):
    """One report of the device: see quorum.h."""

    type: int
    op: Op
    child: int
    offset: int
    length: int
    at: int
    error: int
    other: int

    @property
    def sectors(self) -> tuple[int, int]:
        """The first one and how many, in which the bytes lie."""
        first = self.offset // SECTOR
        return first, -(-(self.offset + self.length) // SECTOR) - first

    @property
    def kind(self) -> OpType:
        if self.op is Op.FLUSH:
            return "flush"
        return "write" if self.op in (Op.WRITE, Op.ZEROES) else "read"


class QuorumReportBad(Event, kw_only=True):
    """A child failed, or has other data than the majority (then there is no error)."""

    name = "QUORUM_REPORT_BAD"
    rate_ns = SECOND_NS

    type: OpType
    error: str | None = None
    node_name: str
    sector_num: int
    sectors_count: int

    def key(self) -> object:
        return self.node_name


class QuorumFailure(Event, kw_only=True):
    """Too few children agree for a request to succeed."""

    name = "QUORUM_FAILURE"
    rate_ns = SECOND_NS

    reference: str
    sector_num: int
    sectors_count: int


class Replicas(Node):
    """Its children are the slots of its device, in the order of ``children``."""

    session = 0

    def make_replicas(self, threshold: int, flags: int) -> Object:
        """The device over the children that are attached; without an end of its own, as it may grow."""
        children = [edge.node.object.ptr for edge in self.children.values()]
        pointers = ffi.new("bt_object *[]", children)
        self.session = self.datapath.session(self._on_event)
        made: Object = self.datapath.adopt(
            lambda tag: lib.bt_quorum_new(
                self.datapath.dp, tag, self.session, OPEN_END, pointers, len(children), threshold, flags
            )
        )
        return made

    async def replace_replicas(self, change: Change) -> None:
        """Another device with the options as they are now."""
        before = self.session
        made = self.make_object()
        assert made is not None
        after = self.session

        def use(session: int) -> None:
            self.session = session

        change.undo(lambda: self.datapath.end_session(after))
        change.undo(lambda: use(before))
        await change.replace_object(self, made)
        change.later(lambda: self.datapath.end_session(before))

    async def close(self) -> None:
        self.datapath.end_session(self.session)

    async def attach_replica(self, role: str, ref: BlockdevRef) -> Node:
        node = await self.attach(role, ref)
        first = next(iter(self.children.values())).node
        if node.size != first.size:
            raise self.error(
                f"Could not refresh total sector count: {os.strerror(errno.EIO)}"
                f" (node '{node.name}' has {node.size} bytes, node '{first.name}' {first.size})"
            )
        return node

    def combine_features(self) -> None:
        """Promises what all children keep."""
        all_features = [edge.node.features for edge in self.children.values()]
        kept: dict[str, Any] = {name: all(getattr(each, name) for each in all_features) for name in PROMISES}
        self.features = Features(**kept, rotational=any(each.rotational for each in all_features))

    @property
    def size(self) -> int:
        """A child that fails its writes does not grow with the others."""
        return max(edge.node.size for edge in self.children.values())

    def child_resized(self, edge: Edge) -> None:
        self.resized()

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        return await self.object.status(offset, min(length, self.size - offset))

    # ---- reports ----

    def _on_event(self, _result: int) -> None:
        raw = ffi.new("struct bt_quorum_report *")
        while lib.bt_quorum_report(self.object.ptr, raw):
            self.reported(
                Report(
                    type=raw.type,
                    op=Op(raw.op),
                    child=raw.child,
                    offset=raw.offset,
                    length=raw.length,
                    at=raw.at,
                    error=raw.error,
                    other=raw.other,
                )
            )

    def reported(self, report: Report) -> None:
        first, count = report.sectors
        if report.type == lib.BT_QUORUM_FAILURE:
            self.graph.events.send(QuorumFailure(reference=self.name, sector_num=first, sectors_count=count))
        elif report.type == lib.BT_QUORUM_BAD:
            self._report_bad(report, first, count)
        else:
            self.graph.fatal(self.describe_end(report))

    def _report_bad(self, report: Report, first: int, count: int) -> None:
        for edge in self.children.values():
            if edge.node.object.tag == report.child:
                self.graph.events.send(
                    QuorumReportBad(
                        type=report.kind,
                        error=os.strerror(report.error) if report.error else None,
                        node_name=edge.node.name,
                        sector_num=first,
                        sectors_count=count,
                    )
                )
                return

    def describe_end(self, report: Report) -> str:
        """The last words of the process when the children differ; as QEMU's."""
        raise NotImplementedError
