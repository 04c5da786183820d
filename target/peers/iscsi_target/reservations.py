# SPDX-License-Identifier: Apache-2.0
"""The device server's side of persistent reservations (SPC-4 section 5.9, 6.15, 6.16): state and rules.

Its encoding is its own, not that of target.reservations, so that one can be tested against the other.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from target.peers.iscsi_target.sense import CheckCondition, Conflict, Sense

WRITE_EXCLUSIVE, EXCLUSIVE_ACCESS = 1, 3
TYPES = (1, 3, 5, 6, 7, 8)
ALL_REGISTRANTS = (7, 8)
REGISTRANTS = (5, 6, 7, 8)
PARAMETERS = struct.Struct(">QQ4xB3x")
APTPL, ALL_TARGET_PORTS, SPEC_I_PT = 1, 4, 8
# Service actions of PERSISTENT RESERVE OUT
REGISTER, RESERVE, RELEASE, CLEAR, PREEMPT, PREEMPT_AND_ABORT, REGISTER_AND_IGNORE = range(7)

RESERVATIONS_PREEMPTED = Sense(6, 0x2A, 3)
RESERVATIONS_RELEASED = Sense(6, 0x2A, 4)
REGISTRATIONS_PREEMPTED = Sense(6, 0x2A, 5)


class Reservations:
    """Keys by nexus (initiator name and ISID), and the reservation. ``tell`` reports a unit attention."""

    def __init__(self, tell: Callable[[str, Sense], None]) -> None:
        self.generation = 0
        self.keys: dict[str, int] = {}
        self.holder: str | None = None
        self.type = 0
        self._tell = tell

    # ---- what others may do ----

    def check(self, nexus: str, writes: bool) -> None:
        """Conflict when the reservation forbids this nexus a medium access. SPC-4 table 67."""
        if not self.type or self._holds(nexus):
            return
        if self.type in REGISTRANTS and nexus in self.keys:
            return
        if writes or self.type in (3, 6, 8):
            raise Conflict

    def _holds(self, nexus: str) -> bool:
        if self.type in ALL_REGISTRANTS:
            return nexus in self.keys
        return nexus == self.holder

    # ---- PERSISTENT RESERVE IN ----

    def serve_in(self, action: int) -> bytes:
        match action:
            case 0:
                keys = b"".join(key.to_bytes(8, "big") for key in self.keys.values())
                return struct.pack(">II", self.generation, len(keys)) + keys
            case 1:
                return self._read_reservation()
            case 2:
                # CRH, ATP_C; type mask valid, all types
                return bytes((0, 8, 0x14, 0x80, 0xEA, 0x01, 0, 0))
            case 3:
                return self._read_full_status()
        raise CheckCondition(5, 0x24, 0)

    def _read_reservation(self) -> bytes:
        if not self.type:
            return struct.pack(">II", self.generation, 0)
        key = 0 if self.type in ALL_REGISTRANTS else self.keys[self.holder or ""]
        return struct.pack(">IIQ4xxB2x", self.generation, 16, key, self.type)

    def _read_full_status(self) -> bytes:
        descriptors = b""
        for nexus, key in self.keys.items():
            name = nexus.encode() + b"\0"
            name += bytes(-len(name) % 4)
            transport = struct.pack(">BxH", 0x45, len(name)) + name
            holds = self.type and self._holds(nexus)
            flags, kind = (1, self.type) if holds else (0, 0)
            descriptors += struct.pack(">Q4xBB4xHI", key, flags, kind, 1, len(transport)) + transport
        return struct.pack(">II", self.generation, len(descriptors)) + descriptors

    # ---- PERSISTENT RESERVE OUT ----

    def serve_out(self, nexus: str, action: int, scope_type: int, parameters: bytes) -> None:
        if len(parameters) != PARAMETERS.size:
            raise CheckCondition(5, 0x1A, 0)
        key, new, flags = PARAMETERS.unpack(parameters)
        if flags & (APTPL | SPEC_I_PT):
            raise CheckCondition(5, 0x26, 0)
        if action in (REGISTER, REGISTER_AND_IGNORE):
            self._register(nexus, key, new, ignore=action == REGISTER_AND_IGNORE)
            return
        if self.keys.get(nexus) != key:
            raise Conflict
        if action in (RESERVE, RELEASE, PREEMPT, PREEMPT_AND_ABORT) and scope_type >> 4:
            raise CheckCondition(5, 0x24, 0)
        kind = scope_type & 0x0F
        match action:
            case 1:
                self._reserve(nexus, kind)
            case 2:
                self._release(nexus, kind)
            case 3:
                self._clear(nexus)
            case 4 | 5:
                self._preempt(nexus, new, kind)
            case _:
                raise CheckCondition(5, 0x24, 0)

    def _register(self, nexus: str, key: int, new: int, ignore: bool) -> None:
        if not ignore and key != self.keys.get(nexus, 0):
            raise Conflict
        if new:
            self.keys[nexus] = new
        elif nexus in self.keys:
            self._unregister(nexus)
        self.generation += 1

    def _unregister(self, nexus: str) -> None:
        """SPC-4 section 5.9.11.3: a holder's reservation goes with its key."""
        held = self.type and self._holds(nexus)
        del self.keys[nexus]
        if held and (self.type not in ALL_REGISTRANTS or not self.keys):
            self._drop(nexus)

    def _drop(self, cause: str) -> None:
        kind, self.type, self.holder = self.type, 0, None
        if kind in REGISTRANTS:
            for other in self.keys:
                if other != cause:
                    self._tell(other, RESERVATIONS_RELEASED)

    def _reserve(self, nexus: str, kind: int) -> None:
        if kind not in TYPES:
            raise CheckCondition(5, 0x24, 0)
        if self.type and not (self._holds(nexus) and self.type == kind):
            raise Conflict
        self.type, self.holder = kind, nexus

    def _release(self, nexus: str, kind: int) -> None:
        if not self.type or not self._holds(nexus):
            return
        if kind != self.type:
            raise CheckCondition(5, 0x26, 4)
        self._drop(nexus)

    def _clear(self, nexus: str) -> None:
        others = [other for other in self.keys if other != nexus]
        self.keys.clear()
        self.type, self.holder = 0, None
        self.generation += 1
        for other in others:
            self._tell(other, RESERVATIONS_PREEMPTED)

    def _preempt(self, nexus: str, victim: int, kind: int) -> None:
        """SPC-4 section 5.9.11.4."""
        if kind not in TYPES:
            raise CheckCondition(5, 0x24, 0)
        holder_key = self.keys.get(self.holder or "") if self.type not in ALL_REGISTRANTS else None
        takes = bool(self.type) and (victim == holder_key or (self.type in ALL_REGISTRANTS and victim == 0))
        gone = [other for other, key in self.keys.items() if other != nexus and (key == victim or not victim)]
        if not takes and not victim:
            raise CheckCondition(5, 0x26, 0)
        if not takes and victim not in self.keys.values():
            raise Conflict
        for other in gone:
            del self.keys[other]
            self._tell(other, REGISTRATIONS_PREEMPTED)
        if takes:
            changed = self.type != kind and self.type in REGISTRANTS
            self.type, self.holder = kind, nexus
            for other in self.keys if changed else ():
                if other != nexus:
                    self._tell(other, RESERVATIONS_RELEASED)
        self.generation += 1
