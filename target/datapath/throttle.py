# SPDX-License-Identifier: Apache-2.0
"""The Python face of throttling (throttle.c): groups with limits, and their members."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from typing import NamedTuple

from target.datapath import Datapath, Object, ffi, lib

BUCKETS = {
    "bps-total": lib.BT_THROTTLE_BPS_TOTAL,
    "bps-read": lib.BT_THROTTLE_BPS_READ,
    "bps-write": lib.BT_THROTTLE_BPS_WRITE,
    "iops-total": lib.BT_THROTTLE_IOPS_TOTAL,
    "iops-read": lib.BT_THROTTLE_IOPS_READ,
    "iops-write": lib.BT_THROTTLE_IOPS_WRITE,
}


class Limit(NamedTuple):
    average: int = 0
    """units a second; 0: no limit"""
    max: int = 0
    """the same in a burst; 0: a tenth of a second's worth may come at once"""
    burst_length: int = 1
    """seconds"""


class Group:
    """Leaky buckets that members share. Goes when nobody holds it any more."""

    def __init__(self, datapath: Datapath) -> None:
        self.datapath = datapath
        self.ptr = lib.bt_throttle_group_new(datapath.dp)
        if self.ptr == ffi.NULL:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    def release(self) -> None:
        """Drops Python's reference; members keep theirs."""
        ptr, self.ptr = self.ptr, ffi.NULL
        if ptr != ffi.NULL:
            lib.bt_throttle_group_unref(ptr)

    def set(self, limits: Mapping[str, Limit], iops_size: int) -> None:
        """Limits by the names in BUCKETS, at once. ``iops_size``: bytes; larger requests count as several."""
        raw = ffi.new("struct bt_throttle_limits *")
        for name, limit in limits.items():
            bucket = raw.buckets[BUCKETS[name]]
            bucket.average, bucket.max, bucket.burst_length = limit
        raw.iops_size = iops_size
        lib.bt_throttle_group_set(self.ptr, raw)


class Throttle(Object):
    """Passes all on to its child, when the group's limits permit it."""

    def move(self, group: Group) -> None:
        """To another group; what waits goes on."""
        lib.bt_throttle_move(self.ptr, group.ptr)

    @property
    def waited(self) -> int:
        """Requests that have had to wait here."""
        return int(lib.bt_throttle_waited(self.ptr))


def make_throttle(datapath: Datapath, child: Object, group: Group) -> Throttle:
    made: Throttle = datapath.adopt(
        lambda tag: lib.bt_throttle_new(datapath.dp, tag, child.ptr, group.ptr), Throttle
    )
    return made
