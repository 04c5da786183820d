# SPDX-License-Identifier: Apache-2.0
"""blkdebug: makes requests fail, wait, or be small, so that what is above it can be tested.

QEMU's filter, with its events: drivers above raise them by name (``Node.debug_event``) where they do what the
name says. Those that nothing here raises are refused by name.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from target.config.options import OptionError, Size
from target.datapath import Extent, Fault, Op
from target.drivers.filter.blkdebug.limits import Limited
from target.drivers.filter.blkdebug.rules import (
    BY_DEFAULT,
    NEVER,
    InjectError,
    IoType,
    Rules,
    SetState,
    parse_config,
)
from target.drivers.filter.passing import Aligned, AlignedFilter
from target.graph.node import BlockdevRef, Node, NodeOptions
from target.graph.permissions import Perm

PermName = Literal["consistent-read", "write", "write-unchanged", "resize"]


class BlkDebug(AlignedFilter, driver="blkdebug"):
    """Counts requests by type (``operations`` in its counters), so that each of them can be made to fail."""

    class Options(NodeOptions):
        image: BlockdevRef
        config: str | UnsetType = UNSET
        inject_error: list[InjectError] = msgspec.field(default_factory=list)
        set_state: list[SetState] = msgspec.field(default_factory=list)
        align: Size = 1
        max_transfer: Size = 0
        opt_write_zero: Size = 0
        max_write_zero: Size = 0
        opt_discard: Size = 0
        max_discard: Size = 0
        take_child_perms: list[PermName] = msgspec.field(default_factory=list)
        unshare_child_perms: list[PermName] = msgspec.field(default_factory=list)

    options: Options
    rules: Rules

    async def open(self) -> None:
        options = self.options
        inject, set_state = list(options.inject_error), list(options.set_state)
        if options.config is not UNSET:
            more = await asyncio.to_thread(self._read_config, options.config)
            inject, set_state = inject + more[0], set_state + more[1]
        for inject_rule in inject:
            self._check_event("inject-error", inject_rule.event)
            if inject_rule.x_short and (inject_rule.iotype not in (UNSET, "write") or not inject_rule.errno):
                raise self.error("option 'inject-error': x-short is for writes that fail")
        for state_rule in set_state:
            self._check_event("set-state", state_rule.event)
        self._check_limits()
        await self.attach("file", options.image)
        self.rules = Rules(inject, set_state)
        self.operations = dict.fromkeys((*BY_DEFAULT, "block-status"), 0)
        self.injected = 0
        self.aligned = Aligned(Limited(self), max(options.align, 1), self.rules.event)

    def _check_event(self, option: str, event: str) -> None:
        if event in NEVER:
            raise self.error(f"option '{option}': event '{event}' is raised by no driver here")

    def _read_config(self, path: str) -> tuple[list[InjectError], list[SetState]]:
        try:
            with open(path, encoding="utf-8") as file:
                return parse_config(file.read())
        except OSError as error:
            raise self.error(f"Could not read blkdebug config file '{path}': {error.strerror}") from None
        except (OptionError, UnicodeDecodeError) as error:
            raise self.error(f"Could not parse blkdebug config file '{path}': {error}") from None

    def _check_limits(self) -> None:
        """QEMU's constraints: powers of two, and each limit a multiple of what it holds."""
        options = self.options
        align = options.align
        if not 0 < align < 1 << 31 or align & (align - 1):
            raise self.error(f"Cannot meet constraints with align {align}")
        zero, discard = max(options.opt_write_zero, align), max(options.opt_discard, align)
        for name, value, unit in (
            ("max-transfer", options.max_transfer, align),
            ("opt-write-zero", options.opt_write_zero, align),
            ("max-write-zero", options.max_write_zero, zero),
            ("opt-discard", options.opt_discard, align),
            ("max-discard", options.max_discard, discard),
        ):
            if value % unit or value >= 1 << 31:
                raise self.error(f"Cannot meet constraints with {name} {value}")

    def role_of(self, option: str) -> str:
        return "file" if option == "image" else option

    def option_of(self, role: str) -> str:
        return "image" if role == "file" else role

    def child_permissions(self, role: str, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        perm, shared = super().child_permissions(role, perm, shared)
        for name in self.options.take_child_perms:
            perm |= Perm[name.replace("-", "_").upper()]
        for name in self.options.unshare_child_perms:
            shared &= ~Perm[name.replace("-", "_").upper()]
        return perm, shared

    def counters(self) -> dict[str, Any]:
        return super().counters() | {
            "operations": dict(self.operations),
            "injected": self.injected,
            "state": self.rules.state,
            "events": dict(self.rules.events),
        }

    # ---- events ----

    def debug_event(self, event: str) -> None:
        self.rules.event(event)

    async def serve(self, fault: Fault) -> None:
        """Of a format, only data and flushes come through the datapath; its metadata it asks for itself."""
        if fault.op is Op.FLUSH:
            self.debug_event("flush_to_os")
        elif fault.op in (Op.READ, Op.WRITE) and _below_format(self):
            self.debug_event("read_aio" if fault.op is Op.READ else "write_aio")
        await super().serve(fault)

    # ---- requests ----

    async def read(self, offset: int, length: int) -> bytes:
        return await self.aligned.read(offset, length)

    async def flush(self) -> None:
        self.debug_event("flush_to_disk")
        await self.inject("flush", 0, 0)
        await self.below.flush()

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        await self.inject("block-status", offset, length)
        return await self.below.block_status(offset, length)

    async def inject(self, kind: IoType, offset: int, length: int, data: bytes = b"") -> None:
        """What the rules do to a request before it is passed on. OSError: it is not."""
        self.operations[kind] += 1
        options = self.rules.find(kind, offset, length)
        if options is None:
            return
        if options.x_delay_ns:
            await asyncio.sleep(options.x_delay_ns / 1e9)
        if not options.errno:
            return
        self.injected += 1
        if options.x_short and data:
            await self.below.write(offset, data[: options.x_short])
        if not options.immediately:
            await asyncio.sleep(0)
        raise OSError(options.errno, os.strerror(options.errno))


def _below_format(node: Node) -> bool:
    """Whether a format, raw too, uses the node, filters between them left out."""
    users = [edge.parent for edge in node.parents if edge.parent is not None]
    return any(
        user.is_format or user.driver == "raw" or (user.is_filter and _below_format(user)) for user in users
    )
