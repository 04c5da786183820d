# SPDX-License-Identifier: Apache-2.0
"""blkdebug: makes requests fail, wait, or be small, so that what is above it can be tested.

QEMU's filter, but for the events that its format drivers raise by name: drivers here raise none, so rules are
in force from the start (event ``none``), and what depends on events and states is refused by name. Members
that begin with ``x-`` are our own: they pick the n-th request.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from target.config.options import Notation, OptionError, Size, Unsigned, parse
from target.datapath import Extent
from target.drivers.filter.passing import Aligned, PassingFilter
from target.graph.node import BlockdevRef, NodeOptions
from target.graph.permissions import Perm

SECTOR = 512
EIO = 5
NO_STATE, FIRST_STATE = 0, 1

IoType = Literal["read", "write", "write-zeroes", "discard", "flush", "block-status"]
PermName = Literal["consistent-read", "write", "write-unchanged", "resize"]
BY_DEFAULT = ("read", "write", "write-zeroes", "discard", "flush")


class InjectError(msgspec.Struct, rename="kebab", kw_only=True, forbid_unknown_fields=True):
    """A rule. The first that matches a request decides.

    ``errno`` 0 lets the request succeed (after its delay). ``x-after``: so many matching requests pass first.
    ``x-delay-ns``: the request waits first. ``x-short``: so many bytes of a write are done before it fails.
    """

    event: str
    state: Unsigned = NO_STATE
    iotype: IoType | UnsetType = UNSET
    errno: Unsigned = EIO
    sector: int = -1
    once: bool = False
    immediately: bool = False
    x_after: Unsigned = 0
    x_delay_ns: Unsigned = 0
    x_short: Size = 0


class SetState(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Known, so that it is refused in words."""

    event: str
    state: Unsigned = NO_STATE
    new_state: Unsigned


class BlkDebug(PassingFilter, driver="blkdebug"):
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
    rules: list[Rule]
    aligned: Aligned

    async def open(self) -> None:
        options = self.options
        given = list(options.inject_error)
        if options.set_state:
            raise self.error("option 'set-state': drivers here raise no events, so states never change")
        if options.config is not UNSET:
            given += await asyncio.to_thread(self._read_config, options.config)
        self.rules = [self._rule(rule) for rule in given]
        self._check_limits()
        await self.attach("file", options.image)
        self.operations = dict.fromkeys((*BY_DEFAULT, "block-status"), 0)
        self.injected = 0
        self.aligned = Aligned(_Limited(self), max(options.align, 1))

    def _rule(self, options: InjectError) -> Rule:
        if options.event != "none":
            what = f"option 'inject-error': event '{options.event}'"
            raise self.error(f"{what}: drivers here raise no events, only 'none' works")
        if options.state not in (NO_STATE, FIRST_STATE):
            raise self.error(f"option 'inject-error': state {options.state} is never reached")
        if options.x_short and (options.iotype not in (UNSET, "write") or not options.errno):
            raise self.error("option 'inject-error': x-short is for writes that fail")
        return Rule(options)

    def _read_config(self, path: str) -> list[InjectError]:
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

    def child_permissions(self, role: str, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        perm, shared = super().child_permissions(role, perm, shared)
        for name in self.options.take_child_perms:
            perm |= Perm[name.replace("-", "_").upper()]
        for name in self.options.unshare_child_perms:
            shared &= ~Perm[name.replace("-", "_").upper()]
        return perm, shared

    def counters(self) -> dict[str, Any]:
        return super().counters() | {"operations": dict(self.operations), "injected": self.injected}

    # ---- requests ----

    async def read(self, offset: int, length: int) -> bytes:
        return await self.aligned.read(offset, length)

    async def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        await self.aligned.write(offset, data, flags)

    async def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        await self.aligned.write_zeroes(offset, length, flags)

    async def discard(self, offset: int, length: int) -> None:
        await self.aligned.discard(offset, length)

    async def flush(self) -> None:
        await self.inject("flush", 0, 0)
        await self.below.flush()

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        await self.inject("block-status", offset, length)
        return await self.below.block_status(offset, length)

    async def inject(self, kind: IoType, offset: int, length: int, data: bytes = b"") -> None:
        """What the rules do to a request before it is passed on. OSError: it is not."""
        self.operations[kind] += 1
        rule = next((rule for rule in self.rules if rule.hits(kind, offset, length)), None)
        if rule is None:
            return
        options = rule.options
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


@dataclass
class Rule:
    """A rule in force, and how many requests have matched it."""

    options: InjectError
    matched: int = 0

    def hits(self, kind: IoType, offset: int, length: int) -> bool:
        """Counts a request that matches; whether it is one to act on."""
        options = self.options
        if kind not in BY_DEFAULT if options.iotype is UNSET else kind != options.iotype:
            return False
        at = options.sector * SECTOR
        if options.sector != -1 and not offset <= at < offset + length:
            return False
        self.matched += 1
        past = self.matched - options.x_after
        return past == 1 if options.once else past >= 1


class _Limited:
    """Aligned requests: cuts them to the limits and lets each part meet the rules."""

    def __init__(self, node: BlkDebug) -> None:
        self.node = node
        self.options = node.options

    async def read(self, offset: int, length: int) -> bytes:
        parts: list[bytes] = []
        for at, n in pieces(offset, length, self.options.max_transfer):
            await self.node.inject("read", at, n)
            parts.append(await self.node.below.read(at, n))
        return b"".join(parts)

    async def write(self, offset: int, data: bytes, flags: int) -> None:
        for at, n in pieces(offset, len(data), self.options.max_transfer):
            part = data[at - offset : at - offset + n]
            await self.node.inject("write", at, n, part)
            await self.node.below.write(at, part, flags)

    async def write_zeroes(self, offset: int, length: int, flags: int) -> None:
        """What is smaller than the preferred unit becomes data."""
        unit = self.options.opt_write_zero or 1
        for at, n in split(offset, length, unit):
            if at % unit or n % unit:
                await self.write(at, bytes(n), flags)
                continue
            for first, part in pieces(at, n, self.options.max_write_zero):
                await self.node.inject("write-zeroes", first, part)
                await self.node.below.write_zeroes(first, part, flags)

    async def discard(self, offset: int, length: int) -> None:
        """What is smaller than the preferred unit is left alone."""
        unit = self.options.opt_discard or 1
        for at, n in split(offset, length, unit):
            if at % unit or n % unit:
                continue
            for first, part in pieces(at, n, self.options.max_discard):
                await self.node.inject("discard", first, part)
                await self.node.below.discard(first, part)


def pieces(offset: int, length: int, most: int) -> list[tuple[int, int]]:
    """The range in pieces of at most so many bytes; 0: whole."""
    most = most or max(length, 1)
    return [(offset + at, min(most, length - at)) for at in range(0, length, most)]


def split(offset: int, length: int, unit: int) -> list[tuple[int, int]]:
    """The head, the whole units, and the tail of a range, without those that are empty."""
    end = offset + length
    first, last = -(-offset // unit) * unit, end // unit * unit
    if first >= last:
        return [(offset, length)] if length else []
    parts = [(offset, first - offset), (first, last - first), (last, end - last)]
    return [(at, n) for at, n in parts if n]


def parse_config(text: str) -> list[InjectError]:
    """The rules of a file in QEMU's notation: groups in brackets, members as key = "value". OptionError."""
    rules: list[dict[str, str]] = []
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        if line == "[inject-error]":
            rules.append({})
            continue
        key, separator, value = line.partition("=")
        if line.startswith("[") or not separator or not rules:
            raise OptionError(f"line {number}: '{line}' is not supported")
        rules[-1][key.strip()] = value.strip().removeprefix('"').removesuffix('"')
    return [
        parse(rule, InjectError, Notation.KEYVAL, path=f"inject-error.{i}") for i, rule in enumerate(rules)
    ]
