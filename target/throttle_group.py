# SPDX-License-Identifier: Apache-2.0
"""throttle-group: limits that throttle nodes share, with QEMU's rules about what may be combined."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import msgspec
from msgspec import UNSET, UnsetType

from target.config.options import Notation, parse
from target.datapath.throttle import BUCKETS, Group, Limit
from target.graph.errors import BlockError
from target.objects import ObjectOptions, UserObject

VALUE_MAX = 10**15
UINT_MAX = (1 << 32) - 1
IOPS_SIZE = "iops-size"
LIMITS = "limits"
ENDS = ("", "-max", "-max-length")
NAMES = [*(bucket + end for bucket in BUCKETS for end in ENDS), IOPS_SIZE]
UNSTABLE = "x-"
BOTH = "bps/iops/max total values and read/write values cannot be used at the same time"


def _structure(name: str, base: type[msgspec.Struct], prefix: str, **more: Any) -> Any:
    """A structure of integers that need not be given."""
    fields = [(f"{prefix}{field}".replace("-", "_"), int | UnsetType, UNSET) for field in NAMES]
    fields += [(field, kind | UnsetType, UNSET) for field, kind in more.items()]
    return msgspec.defstruct(
        name, fields, bases=(base,), rename="kebab", kw_only=True, forbid_unknown_fields=True
    )


class _Empty(msgspec.Struct):
    pass


ThrottleLimits = _structure("ThrottleLimits", _Empty, "")
ThrottleGroupOptions = cast(
    type[ObjectOptions],
    _structure("ThrottleGroupOptions", ObjectOptions, UNSTABLE, limits=ThrottleLimits),
)


def _given(options: msgspec.Struct, prefix: str = "") -> dict[str, int]:
    """The numbers that were given, by the names of ThrottleLimits."""
    values = {name: getattr(options, (prefix + name).replace("-", "_")) for name in NAMES}
    return {name: value for name, value in values.items() if value is not UNSET}


def defaults() -> dict[str, int]:
    """No limits."""
    return {name: int(name.endswith("-length")) for name in NAMES}


def limits_of(numbers: Mapping[str, int]) -> dict[str, Limit]:
    """What the numbers mean, bucket by bucket. BlockError when they do not fit together."""
    limits = {bucket: Limit(*(numbers[bucket + end] for end in ENDS)) for bucket in BUCKETS}
    for kind in ("bps", "iops"):
        total, read, write = (limits[f"{kind}-{which}"] for which in ("total", "read", "write"))
        if (total.average and (read.average or write.average)) or (total.max and (read.max or write.max)):
            raise BlockError(
                "bps/iops/max total values and read/write values cannot be used at the same time"
            )
    if numbers[IOPS_SIZE] and not any(limits[name].average for name in BUCKETS if name.startswith("iops")):
        raise BlockError("iops size requires an iops value to be set")
    for limit in limits.values():
        _check(limit)
    return limits


def _check(limit: Limit) -> None:
    if not (0 <= limit.average <= VALUE_MAX and 0 <= limit.max <= VALUE_MAX):
        raise BlockError(f"bps/iops/max values must be within [0, {VALUE_MAX}]")
    if not limit.burst_length:
        raise BlockError("the burst length cannot be 0")
    if limit.burst_length > 1 and not limit.max:
        raise BlockError("burst length set without burst rate")
    if limit.max and limit.burst_length > VALUE_MAX // limit.max:
        raise BlockError("burst length too high for this burst rate")
    if limit.max and not limit.average:
        raise BlockError("bps_max/iops_max require corresponding bps/iops values")
    if limit.max and limit.max < limit.average:
        raise BlockError("bps_max/iops_max cannot be lower than bps/iops")


def _check_each(numbers: Mapping[str, int], prefix: str) -> None:
    """In the numbers that were given: what QEMU refuses before it looks at them together."""
    for name, value in numbers.items():
        if prefix == UNSTABLE and value < 0:
            raise BlockError("Property values cannot be negative")
        if name.endswith("-length") and not 0 <= value <= UINT_MAX:
            raise BlockError(f"{prefix}{name} value must be in the range [0, {UINT_MAX}]")
        if name == IOPS_SIZE and value < 0:
            raise BlockError(f"iops-size value must be in the range [0, {VALUE_MAX}]")


class ThrottleGroup(UserObject, type="throttle-group"):
    """``limits`` may change at any time: what is not given keeps its value, what was used up is forgotten."""

    Options = ThrottleGroupOptions
    live = frozenset({LIMITS})
    options: Any
    group: Group
    numbers: dict[str, int]
    users = 0  # nodes

    def start(self) -> None:
        self.numbers = defaults()
        for prefix, options in ((UNSTABLE, self.options), ("", self.options.limits)):
            if options is not UNSET:
                given = _given(options, prefix)
                _check_each(given, prefix)
                self.numbers |= given
        limits = limits_of(self.numbers)
        self.group = Group(self.datapath)
        self.group.set(limits, self.numbers[IOPS_SIZE])

    async def close(self) -> None:
        self.group.release()

    @property
    def in_use(self) -> bool:
        return self.users > 0

    def set_limits(self, given: Mapping[str, int]) -> None:
        """Changes those that are given, in one step. BlockError when they do not fit; then nothing has."""
        _check_each(given, "")
        numbers = {**self.numbers, **given}
        limits = limits_of(numbers)
        self.group.set(limits, numbers[IOPS_SIZE])
        self.numbers = numbers
        changed = {name: number for name, number in numbers.items() if number != defaults()[name]}
        limits_now = msgspec.convert(changed, ThrottleLimits)
        self.options = type(self.options)(id=self.options.id, limits=limits_now)

    # ---- as properties ----

    @classmethod
    def properties(cls) -> dict[str, str]:
        return {LIMITS: "ThrottleLimits", **dict.fromkeys((UNSTABLE + name for name in NAMES), "int")}

    @classmethod
    def default(cls, name: str) -> Any:
        return defaults() if name == LIMITS else super().default(name)

    def get(self, name: str) -> Any:
        return dict(self.numbers) if name == LIMITS else self.numbers[name.removeprefix(UNSTABLE)]

    async def set(self, name: str, value: Any) -> None:
        if name != LIMITS:
            raise BlockError("Property cannot be set after initialization")
        self.set_limits(_given(parse(value, ThrottleLimits, Notation.JSON, path=LIMITS)))
