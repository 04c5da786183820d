# SPDX-License-Identifier: Apache-2.0
"""Tells of requests of clients that failed."""

from __future__ import annotations

import asyncio
import errno
import os
from typing import TYPE_CHECKING, Literal

from target.datapath import Op
from target.events import SECOND_NS, Event

if TYPE_CHECKING:
    from target.exports.base import Export

PAUSE = 0.1  # seconds from one failure of an export that is looked at to the next


class BlockIoError(Event, kw_only=True):
    """A request of an export's client failed. ``device``: the export."""

    name = "BLOCK_IO_ERROR"
    rate_ns = SECOND_NS

    qom_path: str
    device: str
    node_name: str
    operation: Literal["read", "write"]
    action: Literal["ignore", "report", "stop"]
    nospace: bool
    reason: str

    def key(self) -> object:
        return self.device, self.operation


def tell_failures(export: Export) -> None:
    """From here on, as long as the export's gate is there."""
    gate = export.edge.gate
    loop = asyncio.get_running_loop()

    def failed(op: Op, offset: int, length: int, number: int) -> None:
        export.node.graph.events.send(
            BlockIoError(
                qom_path="",
                device=export.options.id,
                node_name=export.node.name,
                operation="read" if op in (Op.READ, Op.STATUS, Op.CACHE) else "write",
                action="report",
                nospace=number == errno.ENOSPC,
                reason=os.strerror(number),
            )
        )
        loop.call_later(PAUSE, gate.tell_failure)

    gate.on_failure = failed
    gate.tell_failure()
