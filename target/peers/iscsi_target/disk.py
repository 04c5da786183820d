# SPDX-License-Identifier: Apache-2.0
"""A SCSI disk in memory: the commands of SBC-3 and SPC-4 that initiators use, by their bytes.

It knows no transport. A nexus is a string (for iSCSI the initiator's name and ISID).
"""

from __future__ import annotations

import struct
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from target.peers.iscsi_target import inquiry
from target.peers.iscsi_target.copy import ThirdPartyCopy
from target.peers.iscsi_target.reservations import Reservations
from target.peers.iscsi_target.sense import (
    CAPACITY_CHANGED,
    CHECK_CONDITION,
    GOOD,
    RESERVATION_CONFLICT,
    CheckCondition,
    Conflict,
    Result,
    Sense,
)

INVALID_OPCODE = (5, 0x20, 0)
INVALID_FIELD = (5, 0x24, 0)
INVALID_PARAMETER = (5, 0x26, 0)
OUT_OF_RANGE = (5, 0x21, 0)
WRITE_PROTECTED = (7, 0x27, 0)
LUN_NOT_SUPPORTED = Sense(5, 0x25, 0)
MISCOMPARE = (0xE, 0x1D, 0)

# Block commands by opcode: their writing and their CDB's fields (SBC-3 section 5).
READS = {0x08: 6, 0x28: 10, 0xA8: 12, 0x88: 16}
WRITES = {0x0A: 6, 0x2A: 10, 0xAA: 12, 0x8A: 16, 0x2E: 10, 0x8E: 16}
WRITE_SAMES = {0x41: 10, 0x93: 16}
SYNCS = {0x35: 10, 0x91: 16}
# Commands that read or write the medium, for which a reservation matters.
WRITERS = {*WRITES, *WRITE_SAMES, *SYNCS, 0x42, 0x83, 0x89}
MODE_SENSES = (0x1A, 0x5A)
# Commands that leave a unit attention for the next one (SPC-4 section 5.14).
NO_ATTENTION = (0x12, 0xA0, 0x03)


@dataclass
class Features:
    """What the disk says it can do. Lengths are in blocks, 0: no limit stated."""

    unmap: bool = True
    write_same: bool = True
    lba_status: bool = True
    reads_zeros: bool = True
    third_party_copy: bool = True
    max_transfer: int = 0
    max_unmap: int = 1 << 16
    max_unmap_descriptors: int = 8
    unmap_granularity: int = 1
    max_write_same: int = 1 << 16
    max_copy_bytes: int = 32 << 20
    thin: bool = True
    read_capacity_16: bool = True


def block_range(cdb: bytes, size: int) -> tuple[int, int]:
    """LBA and number of blocks of a CDB of 6, 10, 12 or 16 bytes."""
    if size == 6:
        return int.from_bytes(cdb[1:4], "big") & 0x1FFFFF, cdb[4] or 256
    lba, blocks = {10: (">I", ">7xH"), 12: (">I", ">6xI"), 16: (">Q", ">10xI")}[size]
    first: int = struct.unpack_from(lba, cdb, 2)[0]
    count: int = struct.unpack_from(blocks, cdb)[0]
    return first, count


@dataclass(eq=False)
class Disk:
    """One logical unit. ``peers`` are those that EXTENDED COPY may name, itself among them, by designator."""

    size: int
    block_size: int = 512
    number: int = 1
    features: Features = field(default_factory=Features)
    read_only: bool = False
    write_cache: bool = True
    peers: dict[bytes, Disk] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.data = bytearray(self.size)
        self.mapped = bytearray(self.size // self.block_size)  # one byte a block
        self.lock = threading.RLock()
        self.commands: Counter[int] = Counter()
        self.bytes_moved: Counter[str] = Counter()  # "read" and "write": through initiators
        self.attentions: dict[str, list[Sense]] = {}
        self.reservations = Reservations(self.tell)
        self.copies = ThirdPartyCopy(self)
        self.naa = bytes.fromhex("6001405a") + self.number.to_bytes(12, "big")
        self.peers[self.naa] = self

    @property
    def blocks(self) -> int:
        return len(self.data) // self.block_size

    # ---- for tests ----

    def fill(self, offset: int, data: bytes) -> None:
        """Content that no command has written."""
        self.data[offset : offset + len(data)] = data
        first, last = offset // self.block_size, -(-(offset + len(data)) // self.block_size)
        self.mapped[first:last] = b"\1" * (last - first)

    def resize(self, size: int, tell: bool = True) -> None:
        """A new capacity; every nexus gets a unit attention, if ``tell``."""
        with self.lock:
            del self.data[size:]
            self.data.extend(bytes(size - len(self.data)))
            count = size // self.block_size
            del self.mapped[count:]
            self.mapped.extend(bytes(count - len(self.mapped)))
            for nexus in self.attentions if tell else ():
                self.tell(nexus, CAPACITY_CHANGED)

    def tell(self, nexus: str, sense: Sense) -> None:
        """A unit attention that the nexus gets with its next command."""
        self.attentions.setdefault(nexus, []).append(sense)

    # ---- commands ----

    def execute(self, nexus: str, cdb: bytes, data: bytes) -> Result:
        """Runs a command with the data that came for it."""
        with self.lock:
            self.commands[cdb[0]] += 1
            waiting = self.attentions.setdefault(nexus, [])
            if waiting and cdb[0] not in NO_ATTENTION:
                return Result(CHECK_CONDITION, sense=waiting.pop(0).encode())
            try:
                return Result(GOOD, self._run(nexus, cdb, data))
            except CheckCondition as refusal:
                return Result(CHECK_CONDITION, sense=refusal.sense.encode())
            except Conflict:
                return Result(RESERVATION_CONFLICT)

    def _run(self, nexus: str, cdb: bytes, data: bytes) -> bytes:
        opcode = cdb[0]
        writes = opcode in WRITERS
        if writes or opcode in READS or opcode in MODE_SENSES:
            self.reservations.check(nexus, writes or opcode in MODE_SENSES)
        if writes and self.read_only and opcode not in SYNCS:
            raise CheckCondition(*WRITE_PROTECTED)
        if opcode in READS:
            return self._read(*self._range(*block_range(cdb, READS[opcode])))
        if opcode in WRITES:
            return self._write(*self._range(*block_range(cdb, WRITES[opcode])), data)
        if opcode in WRITE_SAMES:
            return self._write_same(cdb, data)
        if opcode in SYNCS:
            self._range(*block_range(cdb, SYNCS[opcode]))
            return b""
        handler = _OTHERS.get(opcode)
        if handler is None:
            raise CheckCondition(*INVALID_OPCODE)
        return handler(self, nexus, cdb, data)

    def _range(self, lba: int, blocks: int, limit: int = 0) -> tuple[int, int]:
        """Bytes: offset and length."""
        if lba + blocks > self.blocks:
            raise CheckCondition(*OUT_OF_RANGE)
        limit = limit or self.features.max_transfer
        if limit and blocks > limit:
            raise CheckCondition(*INVALID_FIELD)
        return lba * self.block_size, blocks * self.block_size

    def _read(self, offset: int, length: int) -> bytes:
        self.bytes_moved["read"] += length
        return bytes(self.data[offset : offset + length])

    def _write(self, offset: int, length: int, data: bytes) -> bytes:
        if len(data) < length:
            raise CheckCondition(0xB, 0x4B, 0)  # aborted: data phase error
        self.bytes_moved["write"] += length
        self.fill(offset, data[:length])
        return b""

    def _unmap(self, offset: int, length: int) -> None:
        first, count = offset // self.block_size, length // self.block_size
        self.mapped[first : first + count] = bytes(count)
        self.data[offset : offset + length] = bytes(length)

    def _write_same(self, cdb: bytes, data: bytes) -> bytes:
        if not self.features.write_same:
            raise CheckCondition(*INVALID_OPCODE)
        lba, blocks = block_range(cdb, WRITE_SAMES[cdb[0]])
        if not blocks:
            raise CheckCondition(*INVALID_FIELD)  # WSNZ of Block Limits
        offset, length = self._range(lba, blocks, self.features.max_write_same)
        unmaps, no_data = cdb[1] & 0x08, cdb[1] & 0x01
        pattern = bytes(self.block_size) if no_data and cdb[0] == 0x93 else data
        if len(pattern) != self.block_size:
            raise CheckCondition(*INVALID_FIELD)
        if unmaps and not self.features.unmap:
            raise CheckCondition(*INVALID_FIELD)
        if unmaps and not any(pattern):
            self._unmap(offset, length)
        else:
            self.fill(offset, pattern * blocks)
        return b""

    # ---- the rest, by opcode ----

    def _test_unit_ready(self, nexus: str, cdb: bytes, data: bytes) -> bytes:
        return b""

    def _request_sense(self, nexus: str, cdb: bytes, data: bytes) -> bytes:
        waiting = self.attentions[nexus]
        return (waiting.pop(0) if waiting else Sense(0, 0, 0)).encode()[: cdb[4]]

    def _inquiry(self, nexus: str, cdb: bytes, data: bytes) -> bytes:
        allocation = int.from_bytes(cdb[3:5], "big")
        if not cdb[1] & 1:
            return inquiry.standard(self)[:allocation]
        page = inquiry.vital_product_data(self, cdb[2])
        if page is None:
            raise CheckCondition(*INVALID_FIELD)
        return page[:allocation]

    def _read_capacity_10(self, nexus: str, cdb: bytes, data: bytes) -> bytes:
        return struct.pack(">II", min(self.blocks - 1, 0xFFFFFFFF), self.block_size)

    def _service_action_in(self, nexus: str, cdb: bytes, data: bytes) -> bytes:
        allocation = int.from_bytes(cdb[10:14], "big")
        match cdb[1] & 0x1F:
            case 0x10 if self.features.read_capacity_16:
                flags = (0x80 if self.features.thin else 0) | (0x40 if self.features.reads_zeros else 0)
                capacity = struct.pack(">QIBBB17x", self.blocks - 1, self.block_size, 0, 0, flags)
                return capacity[:allocation]
            case 0x12 if self.features.lba_status:
                lba = int.from_bytes(cdb[2:10], "big")
                if lba >= self.blocks:
                    raise CheckCondition(*OUT_OF_RANGE)
                return self._lba_status(lba, allocation)
        raise CheckCondition(*INVALID_OPCODE)

    def _lba_status(self, lba: int, allocation: int) -> bytes:
        """As many descriptors as fit (SBC-3 section 5.5)."""
        descriptors = b""
        while lba < self.blocks and 8 + len(descriptors) + 16 <= max(allocation, 24):
            state = self.mapped[lba]
            end = self.mapped.find(1 - state, lba)
            end = self.blocks if end < 0 else end
            descriptors += struct.pack(">QIB3x", lba, end - lba, 0 if state else 1)
            lba = end
        return (struct.pack(">I4x", 4 + len(descriptors)) + descriptors)[:allocation]

    def _mode_sense(self, nexus: str, cdb: bytes, data: bytes) -> bytes:
        protected = 0x80 if self.read_only else 0
        page = cdb[2] & 0x3F
        pages = b""
        if page in (0x08, 0x3F):
            pages += struct.pack(">BBB17x", 0x08, 18, 0x04 if self.write_cache else 0)
        if page in (0x0A, 0x3F):
            pages += struct.pack(">BB10x", 0x0A, 10)
        if not pages:
            raise CheckCondition(*INVALID_FIELD)
        if cdb[0] == 0x1A:
            header = struct.pack(">BBBB", 3 + len(pages), 0, protected | 0x10, 0)
            return (header + pages)[: cdb[4]]
        header = struct.pack(">HBB4x", 6 + len(pages), 0, protected | 0x10)
        return (header + pages)[: int.from_bytes(cdb[7:9], "big")]

    def _unmap_command(self, nexus: str, cdb: bytes, data: bytes) -> bytes:
        if not self.features.unmap:
            raise CheckCondition(*INVALID_OPCODE)
        if not data:
            return b""
        if len(data) < 8:
            raise CheckCondition(5, 0x1A, 0)
        length = struct.unpack_from(">H", data, 2)[0]
        count = length // 16
        if len(data) < 8 + count * 16 or count > self.features.max_unmap_descriptors:
            raise CheckCondition(*INVALID_PARAMETER)
        found = [struct.unpack_from(">QI", data, 8 + 16 * i) for i in range(count)]
        if sum(blocks for _, blocks in found) > self.features.max_unmap:
            raise CheckCondition(*INVALID_PARAMETER)
        ranges = [self._range(lba, blocks, 1 << 32) for lba, blocks in found]
        for offset, size in ranges:
            self._unmap(offset, size)
        return b""

    def _compare_and_write(self, nexus: str, cdb: bytes, data: bytes) -> bytes:
        lba, blocks = int.from_bytes(cdb[2:10], "big"), cdb[13]
        offset, length = self._range(lba, blocks)
        if len(data) != 2 * length:
            raise CheckCondition(*INVALID_FIELD)
        if self.data[offset : offset + length] != data[:length]:
            raise CheckCondition(*MISCOMPARE)
        self.fill(offset, data[length:])
        return b""

    def _reserve_in(self, nexus: str, cdb: bytes, data: bytes) -> bytes:
        return self.reservations.serve_in(cdb[1] & 0x1F)[: int.from_bytes(cdb[7:9], "big")]

    def _reserve_out(self, nexus: str, cdb: bytes, data: bytes) -> bytes:
        length = int.from_bytes(cdb[5:9], "big")
        self.reservations.serve_out(nexus, cdb[1] & 0x1F, cdb[2], data[:length])
        return b""

    def _extended_copy(self, nexus: str, cdb: bytes, data: bytes) -> bytes:
        self._need_copy(cdb[1] & 0x1F == 0)
        self.copies.extended_copy(nexus, data)
        return b""

    def _receive_copy_results(self, nexus: str, cdb: bytes, data: bytes) -> bytes:
        self._need_copy(True)
        allocation = int.from_bytes(cdb[10:14], "big")
        return self.copies.results(cdb[1] & 0x1F, cdb[2])[:allocation]

    def _need_copy(self, supported: bool) -> None:
        if not self.features.third_party_copy or not supported:
            raise CheckCondition(*INVALID_OPCODE)


_Handler = Callable[[Disk, str, bytes, bytes], bytes]
_OTHERS: Mapping[int, _Handler] = {
    0x00: Disk._test_unit_ready,
    0x03: Disk._request_sense,
    0x12: Disk._inquiry,
    0x1A: Disk._mode_sense,
    0x1B: Disk._test_unit_ready,
    0x25: Disk._read_capacity_10,
    0x34: Disk._test_unit_ready,
    0x90: Disk._test_unit_ready,
    0x42: Disk._unmap_command,
    0x5A: Disk._mode_sense,
    0x5E: Disk._reserve_in,
    0x5F: Disk._reserve_out,
    0x83: Disk._extended_copy,
    0x84: Disk._receive_copy_results,
    0x89: Disk._compare_and_write,
    0x9E: Disk._service_action_in,
}
