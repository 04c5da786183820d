# SPDX-License-Identifier: Apache-2.0
"""quorum: several children that hold the same data, so that some of them may fail or lie.

Changes go to all children; what is read is put to the vote. Discards are dropped, as QEMU does: children need
not agree on what a discarded range holds.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from target.config.options import MAX_INT
from target.datapath import Object, lib
from target.drivers.filter.replicas import Replicas, Report
from target.graph.change import Change
from target.graph.edge import Edge
from target.graph.node import BlockdevRef, BlockError, Node, NodeOptions, Settings
from target.graph.permissions import Perm

MAX_CHILDREN = lib.BT_QUORUM_MAX_CHILDREN


def number(role: str) -> int:
    return int(role.partition(".")[2])


class Quorum(Replicas, driver="quorum"):
    """The roles of its children are ``children.N``."""

    class Options(NodeOptions):
        children: list[BlockdevRef]
        vote_threshold: int
        blkverify: bool = False
        rewrite_corrupted: bool = False
        read_pattern: Literal["quorum", "fifo"] = "quorum"

    options: Options
    reopenable = frozenset({"vote-threshold", "blkverify", "rewrite-corrupted", "read-pattern"})

    async def open(self) -> None:
        self._check()
        for i, ref in enumerate(self.options.children):
            await self.attach_replica(f"children.{i}", ref)
        self.next_child = len(self.children)
        self.combine_features()

    def _check(self) -> None:
        """QEMU's rules, in its words."""
        options = self.options
        count = len(options.children)
        if count < 1:
            raise self.error("Number of provided children must be 1 or more")
        if count > MAX_CHILDREN:
            raise self.error(f"Too many children: {count}, not more than {MAX_CHILDREN} are supported")
        if not 1 <= options.vote_threshold <= MAX_INT:
            raise self.error("Parameter 'vote-threshold' expects a value >= 1")
        if options.vote_threshold > count:
            raise self.error("threshold may not exceed children count")
        for name, given in (
            ("blkverify", options.blkverify),
            ("rewrite-corrupted", options.rewrite_corrupted),
        ):
            if given and options.read_pattern == "fifo":
                raise self.error(f"{name}=on has no effect with read-pattern=fifo")
        if options.blkverify and (count != 2 or options.vote_threshold != 2):
            raise self.error(
                "blkverify=on can only be set if there are exactly two files and vote-threshold is 2"
            )
        if options.blkverify and options.rewrite_corrupted:
            raise self.error("rewrite-corrupted=on cannot be used with blkverify=on")

    def make_object(self) -> Object:
        options = self.options
        flags = (
            (lib.BT_QUORUM_FIFO if options.read_pattern == "fifo" else 0)
            | (lib.BT_QUORUM_REWRITE if options.rewrite_corrupted else 0)
            | (lib.BT_QUORUM_VERIFY if options.blkverify else 0)
        )
        return self.make_replicas(options.vote_threshold, flags)

    async def reopen(self, change: Change, options: NodeOptions, settings: Settings) -> None:
        """QEMU's quorum cannot; here the device is made anew, with the same children."""
        await super().reopen(change, options, settings)
        self._check()
        self.children = {role: self.children[role] for role in sorted(self.children, key=number)}
        await self.replace_replicas(change)

    def child_permissions(self, role: str, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        """As QEMU's, but one that nobody uses is in nobody's way: so it can be put in above a disk in use."""
        used = perm is not Perm.NONE
        perm |= Perm.WRITE if self.options.rewrite_corrupted else Perm.NONE
        return perm, shared & (Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED) if used else Perm.ALL

    # ---- children that come and go ----

    async def add_child(self, change: Change, node: Node) -> None:
        if self.options.blkverify:
            raise BlockError("Cannot add a child to a quorum in blkverify mode")
        if len(self.children) == MAX_CHILDREN:
            raise BlockError("Too many children")
        if node.parents:
            raise BlockError(f"The node {node.name} already has a parent")
        if node.size != self.size:
            raise self.error(
                f"node '{node.name}' has {node.size} bytes, not {self.size}, and cannot be a child"
            )
        self._count_next(change, self.next_child + 1)
        await change.attach(self, f"children.{self.next_child - 1}", node)
        self._keep_options(change)

    async def remove_child(self, change: Change, edge: Edge) -> None:
        threshold = self.options.vote_threshold
        if len(self.children) <= threshold:
            raise BlockError(f"The number of children cannot be lower than the vote threshold {threshold}")
        if number(edge.role) == self.next_child - 1:
            self._count_next(change, self.next_child - 1)
        await change.detach(edge)
        self._keep_options(change)

    def _count_next(self, change: Change, next_child: int) -> None:
        before, self.next_child = self.next_child, next_child

        def restore() -> None:
            self.next_child = before

        change.undo(restore)

    def _keep_options(self, change: Change) -> None:
        """The node's options name the children that it has."""
        before = self.options
        refs = [BlockdevRef(name=self.children[role].node.name) for role in sorted(self.children, key=number)]

        def use(options: Quorum.Options) -> None:
            self.options = options

        use(msgspec.structs.replace(before, children=refs))
        change.undo(lambda: use(before))

    def relink(self, role: str, old: Object | None, new: Object | None) -> None:
        """The slots of the device are its children without gaps, in the order of their numbers."""
        objects = {edge.role: edge.node.object for edge in self.children.values()}
        objects.pop(role, None)
        if new is not None:
            objects[role] = new
        for i, held in enumerate(sorted(objects, key=number)):
            self.object.set_child(i, objects[held])
        if new is None:
            self.object.set_child(len(objects), None)
        self.combine_features()

    async def truncate(self, size: int) -> None:
        raise self.error("Image format driver does not support resize")

    def describe_end(self, report: Report) -> str:
        return f"quorum: offset={report.offset} bytes={report.length} contents mismatch at offset {report.at}"
