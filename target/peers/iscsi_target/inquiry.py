# SPDX-License-Identifier: Apache-2.0
"""INQUIRY data and VPD pages of the disk in memory (SPC-4 sections 6.6 and 7.8, SBC-3 section 6.5)."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from target.peers.iscsi_target.disk import Disk

VENDOR, PRODUCT, REVISION = b"BLOCKTGT", b"MOCK DISK       ", b"1   "


def standard(disk: Disk) -> bytes:
    third_party = 0x08 if disk.features.third_party_copy else 0
    head = struct.pack(">BBBBBBBB", 0, 0, 6, 0x02, 91, third_party, 0, 0x02)
    versions = struct.pack(">HHH", 0x00A0, 0x0460, 0x04C0)  # SAM-5, SPC-4, SBC-3
    data = head + VENDOR + PRODUCT + REVISION
    return (data.ljust(58, b"\0") + versions).ljust(96, b"\0")


def vital_product_data(disk: Disk, page: int) -> bytes | None:
    """The whole page with its header, or None for one that the disk has not."""
    pages = {
        0x80: lambda: b"mock%04d" % disk.number,
        0x83: lambda: _identification(disk),
        0xB0: lambda: _block_limits(disk),
        0xB1: lambda: struct.pack(">HBB56x", 1, 0, 0),
        0xB2: lambda: _provisioning(disk),
    }
    if disk.features.third_party_copy:
        pages[0x8F] = lambda: _third_party_copy(disk)
    if page == 0x00:
        body = bytes(sorted((0, *pages)))
    elif page in pages:
        body = pages[page]()
    else:
        return None
    return struct.pack(">BBH", 0, page, len(body)) + body


def _identification(disk: Disk) -> bytes:
    """The NAA designator that EXTENDED COPY names the disk by, and a vendor's."""
    naa = struct.pack(">BBBB", 0x01, 0x03, 0, len(disk.naa)) + disk.naa
    vendor = VENDOR + b"%04d" % disk.number
    return naa + struct.pack(">BBBB", 0x02, 0x01, 0, len(vendor)) + vendor


def _block_limits(disk: Disk) -> bytes:
    features = disk.features
    return struct.pack(
        ">BBHIIIIIIIQ20x",
        1,  # WSNZ
        1,
        1,
        features.max_transfer,
        0,
        0,
        features.max_unmap if features.unmap else 0,
        features.max_unmap_descriptors if features.unmap else 0,
        features.unmap_granularity,
        0,
        features.max_write_same,
    )


def _provisioning(disk: Disk) -> bytes:
    features = disk.features
    flags = (0x80 if features.unmap else 0) | (0x60 if features.unmap and features.write_same else 0)
    flags |= 0x04 if features.reads_zeros else 0
    return struct.pack(">BBBB", 0, flags, 2 if features.thin else 0, 0)


def _third_party_copy(disk: Disk) -> bytes:
    """SPC-4 section 7.8.17: commands, parameter limits, descriptors, general copy operations."""
    commands = struct.pack(">BBB BBBB", 0x83, 1, 0, 0x84, 2, 0, 3)
    return b"".join(
        _descriptor(kind, body)
        for kind, body in (
            (0x0001, bytes((len(commands),)) + commands),
            (0x0004, struct.pack(">4xHHII12x", 2, 4, 1024, 0)),
            (0x0008, bytes((2, 0x02, 0xE4))),
            (0x8001, struct.pack(">IIIBB18x", 1, 1, disk.features.max_copy_bytes, 9, 0)),
        )
    )


def _descriptor(kind: int, body: bytes) -> bytes:
    body += bytes(-len(body) % 4)
    return struct.pack(">HH", kind, len(body)) + body
