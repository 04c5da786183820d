# SPDX-License-Identifier: Apache-2.0
"""The rules of blkdebug: which events make which of them active, states, and what an active one matches.

The names of events and the order in which rules count are QEMU's. Members that begin with ``x-`` are our own.
"""

from __future__ import annotations

from collections import Counter
from typing import Literal, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from target.config.options import Notation, OptionError, Size, Unsigned, parse

SECTOR = 512
EIO = 5
ANY_STATE, FIRST_STATE = 0, 1

IoType = Literal["read", "write", "write-zeroes", "discard", "flush", "block-status"]
BY_DEFAULT = ("read", "write", "write-zeroes", "discard", "flush")

# fmt: off
Event = Literal[
    "none",
    "l1_update", "l1_grow_alloc_table", "l1_grow_write_table", "l1_grow_activate_table",
    "l1_shrink_write_table", "l1_shrink_free_l2_clusters",
    "l2_load", "l2_update", "l2_update_compressed", "l2_alloc_cow_read", "l2_alloc_write",
    "read_aio", "read_backing_aio", "read_compressed", "write_aio", "write_compressed",
    "vmstate_load", "vmstate_save", "cow_read", "cow_write", "cor_write",
    "reftable_load", "reftable_grow", "reftable_update",
    "refblock_load", "refblock_update", "refblock_update_part", "refblock_alloc", "refblock_alloc_hookup",
    "refblock_alloc_write", "refblock_alloc_write_blocks", "refblock_alloc_write_table",
    "refblock_alloc_switch_table",
    "cluster_alloc", "cluster_alloc_bytes", "cluster_alloc_space", "cluster_free",
    "flush_to_os", "flush_to_disk", "empty_image_prepare",
    "pwritev_rmw_head", "pwritev_rmw_after_head", "pwritev_rmw_tail", "pwritev_rmw_after_tail",
    "pwritev", "pwritev_zero", "pwritev_done",
]
# Nothing here ever comes to where QEMU raises these: the datapath copies by itself, and images are made and
# compressed clusters written by no driver.
NEVER = frozenset({
    "cow_read", "cow_write", "cor_write", "read_backing_aio", "l2_update_compressed", "write_compressed",
    "vmstate_load", "vmstate_save", "cluster_alloc_bytes", "cluster_alloc_space", "empty_image_prepare",
    "refblock_update", "reftable_update",
})
# fmt: on


class InjectError(
    msgspec.Struct, rename="kebab", kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """Makes requests fail while it is active. The first that matches a request decides.

    ``errno`` 0 lets the request succeed (after its delay). ``x-after``: so many matching requests pass first.
    ``x-delay-ns``: the request waits first. ``x-short``: so many bytes of a write are done before it fails.
    """

    event: Event
    state: Unsigned = ANY_STATE
    iotype: IoType | UnsetType = UNSET
    errno: Unsigned = EIO
    sector: int = -1
    once: bool = False
    immediately: bool = False
    x_after: Unsigned = 0
    x_delay_ns: Unsigned = 0
    x_short: Size = 0


class SetState(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Changes the state when its event comes."""

    event: Event
    state: Unsigned = ANY_STATE
    new_state: Unsigned


class Rule:
    """An InjectError, and how many requests have matched it."""

    def __init__(self, options: InjectError) -> None:
        self.options = options
        self.matched = 0

    def hits(self, kind: IoType, offset: int, length: int) -> bool:
        """Counts a request that matches; whether it is one to act on."""
        options = self.options
        if kind not in BY_DEFAULT if options.iotype is UNSET else kind != options.iotype:
            return False
        at = options.sector * SECTOR
        if options.sector != -1 and not offset <= at < offset + length:
            return False
        self.matched += 1
        return self.matched > options.x_after


class Rules:
    """What is active follows from the events: an event that activates rules ends what others activated."""

    def __init__(self, inject: list[InjectError], set_state: list[SetState]) -> None:
        self.state = FIRST_STATE
        self._inject = [Rule(options) for options in inject]
        self._set_state = set_state
        self._active: list[Rule] = []
        self.events: Counter[str] = Counter()  # all that have come
        self._known = {rule.event for rule in inject} | {rule.event for rule in set_state}
        self.event("none")

    def event(self, name: str) -> None:
        self.events[name] += 1
        if name not in self._known:
            return
        begins = [rule for rule in self._inject if self._concerns(rule.options, name)]
        states = [rule.new_state for rule in self._set_state if self._concerns(rule, name)]
        if begins:
            self._active = begins
        if states:
            self.state = states[0]

    def _concerns(self, rule: InjectError | SetState, event: str) -> bool:
        return rule.event == event and rule.state in (ANY_STATE, self.state)

    def find(self, kind: IoType, offset: int, length: int) -> InjectError | None:
        """What decides about a request."""
        rule = next((rule for rule in self._active if rule.hits(kind, offset, length)), None)
        if rule is None:
            return None
        if rule.options.once:
            self._active.remove(rule)
            self._inject.remove(rule)
        return rule.options


T = TypeVar("T", InjectError, SetState)


def parse_config(text: str) -> tuple[list[InjectError], list[SetState]]:
    """The rules of a file in QEMU's notation: groups in brackets, members as key = "value". OptionError."""
    groups: dict[str, list[dict[str, str]]] = {"inject-error": [], "set-state": []}
    current: dict[str, str] | None = None
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        group = groups.get(line.removeprefix("[").removesuffix("]")) if line.startswith("[") else None
        if group is not None:
            current = {}
            group.append(current)
            continue
        key, separator, value = line.partition("=")
        if line.startswith("[") or not separator or current is None:
            raise OptionError(f"line {number}: '{line}' is not supported")
        current[key.strip()] = value.strip().removeprefix('"').removesuffix('"')
    return _parsed(groups, "inject-error", InjectError), _parsed(groups, "set-state", SetState)


def _parsed(groups: dict[str, list[dict[str, str]]], name: str, kind: type[T]) -> list[T]:
    found = enumerate(groups[name])
    return [parse(group, kind, Notation.KEYVAL, path=f"{name}.{i}") for i, group in found]
