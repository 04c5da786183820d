# SPDX-License-Identifier: Apache-2.0
"""SCSI status and sense data (SAM-5 section 5.3, SPC-4 section 4.5), and the errors that they become."""

from __future__ import annotations

from typing import NamedTuple

GOOD, CHECK_CONDITION, BUSY, RESERVATION_CONFLICT, TASK_SET_FULL = 0x00, 0x02, 0x08, 0x18, 0x28
STATUS_NAMES = {
    CHECK_CONDITION: "CHECK CONDITION",
    BUSY: "BUSY",
    RESERVATION_CONFLICT: "RESERVATION CONFLICT",
    TASK_SET_FULL: "TASK SET FULL",
    0x40: "TASK ABORTED",
}
UNIT_ATTENTION = 0x06
KEY_NAMES = {
    0x00: "NO SENSE",
    0x01: "RECOVERED ERROR",
    0x02: "NOT READY",
    0x03: "MEDIUM ERROR",
    0x04: "HARDWARE ERROR",
    0x05: "ILLEGAL REQUEST",
    0x06: "UNIT ATTENTION",
    0x07: "DATA PROTECT",
    0x08: "BLANK CHECK",
    0x09: "VENDOR SPECIFIC",
    0x0A: "COPY ABORTED",
    0x0B: "ABORTED COMMAND",
    0x0D: "VOLUME OVERFLOW",
    0x0E: "MISCOMPARE",
}
# Those that commands for reservations meet; the others are shown as numbers.
CODE_NAMES = {
    (0x04, 0x00): "logical unit not ready",
    (0x08, 0x00): "logical unit communication failure",
    (0x0E, 0x03): "command timeout",
    (0x1A, 0x00): "parameter list length error",
    (0x20, 0x00): "invalid command operation code",
    (0x24, 0x00): "invalid field in CDB",
    (0x25, 0x00): "logical unit not supported",
    (0x26, 0x00): "invalid field in parameter list",
    (0x26, 0x04): "invalid release of persistent reservation",
    (0x29, 0x00): "power on, reset, or bus device reset occurred",
    (0x29, 0x07): "I_T nexus loss occurred",
    (0x2A, 0x03): "reservations preempted",
    (0x2A, 0x04): "reservations released",
    (0x2A, 0x05): "registrations preempted",
    (0x2A, 0x09): "capacity data has changed",
    (0x55, 0x04): "insufficient registration resources",
}


class Sense(NamedTuple):
    """Sense key, additional sense code and its qualifier."""

    key: int
    asc: int
    ascq: int

    def __str__(self) -> str:
        code = CODE_NAMES.get((self.asc, self.ascq))
        numbers = f"{self.asc:02x}/{self.ascq:02x}"
        return f"{KEY_NAMES.get(self.key, f'sense key {self.key}')}, {code or 'additional sense'} ({numbers})"


def parse_sense(data: bytes) -> Sense | None:
    """From fixed or descriptor format; None for what is neither, or too short."""
    if not data:
        return None
    code = data[0] & 0x7F
    if code in (0x70, 0x71) and len(data) >= 3:
        # The codes are there only if the additional length says so.
        length = min(len(data), 8 + (data[7] if len(data) > 7 else 0))
        asc, ascq = (data[12], data[13]) if length >= 14 else (0, 0)
        return Sense(data[2] & 0x0F, asc, ascq)
    if code in (0x72, 0x73) and len(data) >= 4:
        return Sense(data[1] & 0x0F, data[2], data[3])
    return None


def fixed_sense(sense: Sense) -> bytes:
    """Sense data in fixed format."""
    return bytes((0x70, 0, sense.key, 0, 0, 0, 0, 10, 0, 0, 0, 0, sense.asc, sense.ascq, 0, 0, 0, 0))


class ScsiError(Exception):
    """A command did not end with GOOD."""

    def __init__(self, status: int, message: str = "") -> None:
        name = STATUS_NAMES.get(status, f"SCSI status {status:#04x}")
        super().__init__(message or f"the device answered {name}")
        self.status = status


class Conflict(ScsiError):
    """RESERVATION CONFLICT: another initiator's reservation, or a key that is not registered."""

    def __init__(self) -> None:
        super().__init__(RESERVATION_CONFLICT)


class CheckCondition(ScsiError):
    """CHECK CONDITION; ``sense`` is None where the device gave none that can be read."""

    def __init__(self, data: bytes) -> None:
        self.sense = parse_sense(data)
        detail = str(self.sense) if self.sense else "CHECK CONDITION without sense data"
        super().__init__(CHECK_CONDITION, f"the device refused the command: {detail}")


def check_status(status: int, sense: bytes) -> None:
    """Raises what the status stands for, if it is not GOOD."""
    if status == GOOD:
        return
    if status == RESERVATION_CONFLICT:
        raise Conflict
    if status == CHECK_CONDITION:
        raise CheckCondition(sense)
    raise ScsiError(status)
