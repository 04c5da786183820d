# SPDX-License-Identifier: Apache-2.0
"""PERSISTENT RESERVE IN and OUT (SPC-4 sections 6.15 and 6.16): CDBs, parameter lists, and what comes back.

What a device sends is hostile: its lengths are checked here, once.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

PERSISTENT_RESERVE_IN, PERSISTENT_RESERVE_OUT = 0x5E, 0x5F
CDB_SIZE = 10
ALLOCATION_MAX = 8192  # bytes; also the most that a helper for reservations takes
KEY_MAX = (1 << 64) - 1

_CDB_OUT = struct.Struct(">BBBxxIx")
_CDB_IN = struct.Struct(">BB5xHx")
_PARAMETERS = struct.Struct(">QQ4xBxxx")
_HEADER = struct.Struct(">II")
_RESERVATION = struct.Struct(">Q5xB2x")
_CAPABILITIES = struct.Struct(">HBBHxx")
_FULL_STATUS = struct.Struct(">Q4xBB4xHI")
# Flags of the parameter list and of the full status
APTPL, ALL_TARGET_PORTS = 0x01, 0x04
HOLDER, STATUS_ALL_PORTS = 0x01, 0x02


class OutAction(IntEnum):
    """Service actions of PERSISTENT RESERVE OUT (table 213)."""

    REGISTER = 0
    RESERVE = 1
    RELEASE = 2
    CLEAR = 3
    PREEMPT = 4
    PREEMPT_ABORT = 5
    REGISTER_IGNORE = 6


class InAction(IntEnum):
    """Service actions of PERSISTENT RESERVE IN (table 202)."""

    READ_KEYS = 0
    READ_RESERVATION = 1
    REPORT_CAPABILITIES = 2
    READ_FULL_STATUS = 3


class Type(IntEnum):
    """Who may read and write under a reservation (table 208)."""

    WRITE_EXCLUSIVE = 1
    EXCLUSIVE_ACCESS = 3
    WRITE_EXCLUSIVE_REGISTRANTS_ONLY = 5
    EXCLUSIVE_ACCESS_REGISTRANTS_ONLY = 6
    WRITE_EXCLUSIVE_ALL_REGISTRANTS = 7
    EXCLUSIVE_ACCESS_ALL_REGISTRANTS = 8

    @property
    def label(self) -> str:
        """As users write it: write-exclusive-registrants-only."""
        return self.name.lower().replace("_", "-")


class Scope(IntEnum):
    """SPC-4 keeps one scope."""

    LOGICAL_UNIT = 0


# Bits of the PERSISTENT RESERVATION TYPE MASK (table 212)
_TYPE_BITS = {
    0x8000: Type.WRITE_EXCLUSIVE_ALL_REGISTRANTS,
    0x4000: Type.EXCLUSIVE_ACCESS_REGISTRANTS_ONLY,
    0x2000: Type.WRITE_EXCLUSIVE_REGISTRANTS_ONLY,
    0x0800: Type.EXCLUSIVE_ACCESS,
    0x0200: Type.WRITE_EXCLUSIVE,
    0x0001: Type.EXCLUSIVE_ACCESS_ALL_REGISTRANTS,
}


class Malformed(Exception):
    """A device's answer breaks the standard."""


class Command(NamedTuple):
    """One command as a transport takes it; lengths in bytes."""

    cdb: bytes
    data_out: bytes = b""
    data_in_length: int = 0


class Keys(NamedTuple):
    generation: int
    keys: list[int]
    more: bool
    """the device has more of them than fitted"""


class Reservation(NamedTuple):
    """``key`` is 0 where all registrants hold it together."""

    generation: int
    key: int
    scope: int
    type: Type


class Capabilities(NamedTuple):
    """What the device supports (section 6.15.4). ``types`` is None where it does not tell."""

    replaces_reserve: bool
    specify_initiator_ports: bool
    all_target_ports: bool
    persist_through_power_loss: bool
    power_loss_active: bool
    types: list[Type] | None


class Registration(NamedTuple):
    """One registered nexus (section 6.15.5). ``type`` is None where it holds no reservation."""

    key: int
    holder: bool
    all_target_ports: bool
    type: Type | None
    target_port: int
    initiator: str


# ---- commands ----


def reserve_out(
    action: OutAction,
    *,
    key: int = 0,
    sa_key: int = 0,
    type: Type | None = None,
    aptpl: bool = False,
    all_target_ports: bool = False,
) -> Command:
    """``key``: the one registered for this nexus; ``sa_key``: the new one, or that to be preempted.

    ``aptpl``: registrations persist through power loss. ValueError for a key that has more than 64 bits.
    """
    for number in (key, sa_key):
        if not 0 <= number <= KEY_MAX:
            raise ValueError(f"a key has 64 bits: {number:#x}")
    flags = (APTPL if aptpl else 0) | (ALL_TARGET_PORTS if all_target_ports else 0)
    scope_type = Scope.LOGICAL_UNIT << 4 | (type or 0)
    cdb = _CDB_OUT.pack(PERSISTENT_RESERVE_OUT, action, scope_type, _PARAMETERS.size)
    return Command(cdb, _PARAMETERS.pack(key, sa_key, flags))


def reserve_in(action: InAction, allocation: int = ALLOCATION_MAX) -> Command:
    return Command(_CDB_IN.pack(PERSISTENT_RESERVE_IN, action, allocation), b"", allocation)


def transfer_length(cdb: bytes) -> int:
    """Bytes of parameters, or of the allocation, that a CDB announces. ValueError for other commands."""
    if cdb[0] == PERSISTENT_RESERVE_OUT:
        return int.from_bytes(cdb[5:9], "big")
    if cdb[0] == PERSISTENT_RESERVE_IN:
        return int.from_bytes(cdb[7:9], "big")
    raise ValueError(f"operation code {cdb[0]:#04x} is no persistent reservation")


# ---- answers ----


def parse_keys(data: bytes) -> Keys:
    generation, length, body = _body(data)
    if length % 8:
        raise Malformed(f"a list of keys with {length} bytes")
    whole = len(body) // 8 * 8
    keys = [int.from_bytes(body[at : at + 8], "big") for at in range(0, whole, 8)]
    return Keys(generation, keys, length > whole)


def parse_reservation(data: bytes) -> Reservation | None:
    """None when there is no reservation."""
    generation, length, body = _body(data)
    if not length:
        return None
    if len(body) < _RESERVATION.size:
        raise Malformed(f"a reservation with {len(body)} bytes")
    key, scope_type = _RESERVATION.unpack_from(body)
    return Reservation(generation, key, scope_type >> 4, _type(scope_type & 0x0F))


def parse_capabilities(data: bytes) -> Capabilities:
    if len(data) < _CAPABILITIES.size:
        raise Malformed(f"capabilities with {len(data)} bytes")
    length, first, second, mask = _CAPABILITIES.unpack_from(data)
    if length < _CAPABILITIES.size:
        raise Malformed(f"capabilities with a length of {length}")
    types = [kind for bit, kind in _TYPE_BITS.items() if mask & bit] if second & 0x80 else None
    return Capabilities(
        replaces_reserve=bool(first & 0x10),
        specify_initiator_ports=bool(first & 0x08),
        all_target_ports=bool(first & 0x04),
        persist_through_power_loss=bool(first & 0x01),
        power_loss_active=bool(second & 0x01),
        types=sorted(types) if types is not None else None,
    )


def parse_full_status(data: bytes) -> list[Registration]:
    """The descriptors that fitted whole."""
    _, _, body = _body(data)
    found: list[Registration] = []
    while len(body) >= _FULL_STATUS.size:
        key, flags, scope_type, port, length = _FULL_STATUS.unpack_from(body)
        if length > len(body) - _FULL_STATUS.size:
            break
        holder = bool(flags & HOLDER)
        found.append(
            Registration(
                key,
                holder,
                bool(flags & STATUS_ALL_PORTS),
                _type(scope_type & 0x0F) if holder else None,
                port,
                _initiator(body[_FULL_STATUS.size : _FULL_STATUS.size + length]),
            )
        )
        body = body[_FULL_STATUS.size + length :]
    return found


def _body(data: bytes) -> tuple[int, int, bytes]:
    """Generation, the length that the device states, and so much of it as came."""
    if len(data) < _HEADER.size:
        raise Malformed(f"an answer of {len(data)} bytes")
    generation, length = _HEADER.unpack_from(data)
    return generation, length, data[_HEADER.size : _HEADER.size + length]


def _type(number: int) -> Type:
    try:
        return Type(number)
    except ValueError:
        raise Malformed(f"reservation type {number}") from None


def _initiator(transport_id: bytes) -> str:
    """A TransportID (section 7.6.4) for people: iSCSI's is text, others are shown in hexadecimal."""
    if len(transport_id) >= 4 and transport_id[0] & 0x0F == 5:
        length = int.from_bytes(transport_id[2:4], "big")
        text = transport_id[4 : 4 + length].partition(b"\0")[0]
        return text.decode("ascii", errors="replace")
    return transport_id.hex()
