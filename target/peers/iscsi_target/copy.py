# SPDX-License-Identifier: Apache-2.0
"""EXTENDED COPY (LID1) between disks of one target, RECEIVE COPY RESULTS (SPC-4 sections 6.4, 6.24, 6.25)."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from target.peers.iscsi_target.sense import CheckCondition

if TYPE_CHECKING:
    from target.peers.iscsi_target.disk import Disk

IDENTIFICATION_DESCRIPTOR, BLOCK_TO_BLOCK = 0xE4, 0x02
CSCD_SIZE, SEGMENT_SIZE = 32, 28
MAX_CSCDS, MAX_SEGMENTS, MAX_LIST = 2, 4, 1024
INVALID_PARAMETER = (5, 0x26, 0)
UNREACHABLE = (0xA, 0x0D, 2)  # COPY ABORTED, copy target device not reachable


class ThirdPartyCopy:
    """The copy manager of one disk."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.copied = 0  # bytes, by this manager, without an initiator
        self.segments = 0
        self._status: dict[int, int] = {}

    def extended_copy(self, nexus: str, data: bytes) -> None:
        if not data:
            return
        if len(data) < 16:
            raise CheckCondition(5, 0x1A, 0)
        list_id = data[0]
        cscd_length, segment_length, inline = struct.unpack_from(">H4xII", data, 2)
        end = 16 + cscd_length + segment_length
        if inline or end > len(data) or end > MAX_LIST or cscd_length % CSCD_SIZE:
            raise CheckCondition(*INVALID_PARAMETER)
        disks = [self._disk(data[at : at + CSCD_SIZE]) for at in range(16, 16 + cscd_length, CSCD_SIZE)]
        segments = data[16 + cscd_length : end]
        if len(segments) % SEGMENT_SIZE or len(segments) // SEGMENT_SIZE > MAX_SEGMENTS:
            raise CheckCondition(*INVALID_PARAMETER)
        self._status[list_id] = 2  # with errors, until it is done
        for at in range(0, len(segments), SEGMENT_SIZE):
            self._copy(nexus, disks, segments[at : at + SEGMENT_SIZE])
        self._status[list_id] = 1

    def _disk(self, descriptor: bytes) -> Disk:
        """The disk that an identification descriptor CSCD names."""
        if descriptor[0] != IDENTIFICATION_DESCRIPTOR:
            raise CheckCondition(5, 0x26, 7)
        length = descriptor[7]
        if length > 20:
            raise CheckCondition(*INVALID_PARAMETER)
        found = self.disk.peers.get(descriptor[8 : 8 + length])
        if found is None or descriptor[4] & 0x0F != 1 or descriptor[5] & 0x3F != 3:
            raise CheckCondition(*UNREACHABLE)
        if int.from_bytes(descriptor[29:32], "big") != found.block_size:
            raise CheckCondition(*INVALID_PARAMETER)
        return found

    def _copy(self, nexus: str, disks: list[Disk], segment: bytes) -> None:
        kind, flags, length, source, destination, blocks, from_lba, to_lba = struct.unpack(
            ">BBHHH2xHQQ", segment
        )
        if kind != BLOCK_TO_BLOCK or length != SEGMENT_SIZE - 4:
            raise CheckCondition(5, 0x26, 8)
        if source >= len(disks) or destination >= len(disks):
            raise CheckCondition(5, 0x26, 7)
        reader, writer = disks[source], disks[destination]
        unit = (writer if flags & 0x02 else reader).block_size
        size = blocks * unit
        start, to = from_lba * reader.block_size, to_lba * writer.block_size
        if size > self.disk.features.max_copy_bytes:
            raise CheckCondition(*INVALID_PARAMETER)
        if start + size > len(reader.data) or to + size > len(writer.data) or size % writer.block_size:
            raise CheckCondition(5, 0x21, 0)
        reader.reservations.check(nexus, writes=False)
        writer.reservations.check(nexus, writes=True)
        writer.fill(to, bytes(reader.data[start : start + size]))
        self.copied += size
        self.segments += 1

    def results(self, action: int, list_id: int) -> bytes:
        """COPY STATUS and OPERATING PARAMETERS."""
        if action == 0:
            if list_id not in self._status:
                raise CheckCondition(5, 0x24, 0)
            status = self._status.pop(list_id)
            return struct.pack(">IBHBI", 8, status, 1, 0, 0)
        if action == 3:
            descriptors = bytes((BLOCK_TO_BLOCK, IDENTIFICATION_DESCRIPTOR))
            body = struct.pack(
                ">B3xHHIIIII2xHBBBB3xB",
                1,  # SNLID
                MAX_CSCDS,
                MAX_SEGMENTS,
                MAX_LIST,
                self.disk.features.max_copy_bytes,
                0,
                0,
                0,
                1,
                1,
                9,
                0,
                0,
                len(descriptors),
            )
            body += descriptors
            return struct.pack(">I", len(body)) + body
        raise CheckCondition(5, 0x24, 0)
