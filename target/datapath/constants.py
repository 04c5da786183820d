# SPDX-License-Identifier: Apache-2.0
"""The numbers that C and Python share, and what a result says."""

from __future__ import annotations

import os
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from target.datapath._datapath import lib

Entries = npt.NDArray[np.uint64]
Data = bytes | bytearray | memoryview | Entries

FUA, UNMAP, FAST_ZERO = lib.BT_FUA, lib.BT_UNMAP, lib.BT_FAST_ZERO
REQ_ONE, POPULATE = lib.BT_REQ_ONE, lib.BT_POPULATE
HOLE, ZERO = lib.BT_EXTENT_HOLE, lib.BT_EXTENT_ZERO
ENTRY_FAULT, ENTRY_UNALLOCATED = lib.BT_ENTRY_FAULT, lib.BT_ENTRY_UNALLOCATED
ENTRY_ZERO, ENTRY_DATA, ENTRY_KIND = lib.BT_ENTRY_ZERO, lib.BT_ENTRY_DATA, lib.BT_ENTRY_KIND
ENTRY_WRITABLE, ENTRY_ALLOC, ENTRY_HOST = lib.BT_ENTRY_WRITABLE, lib.BT_ENTRY_ALLOC, lib.BT_ENTRY_HOST


class Op(IntEnum):
    READ = lib.BT_READ
    WRITE = lib.BT_WRITE
    ZEROES = lib.BT_ZEROES
    DISCARD = lib.BT_DISCARD
    FLUSH = lib.BT_FLUSH
    STATUS = lib.BT_STATUS
    CACHE = lib.BT_CACHE


class Reason(IntEnum):
    LOAD = lib.BT_FAULT_LOAD
    ENTRY = lib.BT_FAULT_ENTRY
    WRITE = lib.BT_FAULT_WRITE
    GRANT = lib.BT_FAULT_GRANT
    FLUSH = lib.BT_FAULT_FLUSH
    UPCALL = lib.BT_FAULT_UPCALL
    SAVE = lib.BT_FAULT_SAVE


class Extent(NamedTuple):
    length: int
    """bytes"""
    flags: int
    """HOLE, ZERO"""


class Grant(NamedTuple):
    host_offset: int
    granules: int
    zeroed: bool


def check(result: int) -> int:
    """The result, or OSError when it is a negative errno."""
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result
