# SPDX-License-Identifier: Apache-2.0
"""How a device server says no: status codes and sense data (SAM-5 section 5.3, SPC-4 section 4.5)."""

from __future__ import annotations

import struct
from typing import NamedTuple

GOOD, CHECK_CONDITION, BUSY, RESERVATION_CONFLICT, TASK_SET_FULL = 0x00, 0x02, 0x08, 0x18, 0x28
FIXED, DESCRIPTOR = 0x70, 0x72


class Sense(NamedTuple):
    """Sense key, additional sense code and its qualifier."""

    key: int
    asc: int
    ascq: int

    def encode(self, response_code: int = FIXED) -> bytes:
        if response_code == DESCRIPTOR:
            return bytes((DESCRIPTOR, self.key, self.asc, self.ascq, 0, 0, 0, 0))
        return struct.pack(">BxB4xB4xBB4x", FIXED, self.key, 10, self.asc, self.ascq)


CAPACITY_CHANGED = Sense(6, 0x2A, 0x09)
POWER_ON = Sense(6, 0x29, 0x00)


class CheckCondition(Exception):
    """Ends a command with CHECK CONDITION."""

    def __init__(self, key: int, asc: int, ascq: int) -> None:
        super().__init__(f"sense {key:x}/{asc:02x}/{ascq:02x}")
        self.sense = Sense(key, asc, ascq)


class Conflict(Exception):
    """Ends a command with RESERVATION CONFLICT."""


class Result(NamedTuple):
    """What a command came to: SCSI status, data for the initiator, sense data."""

    status: int
    data: bytes = b""
    sense: bytes = b""
