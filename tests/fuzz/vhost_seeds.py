# SPDX-License-Identifier: Apache-2.0
"""First inputs of the fuzz target vhost_ring: guest memory with rings and requests of every type."""

from __future__ import annotations

import struct

from target.peers.vhost_user_front_end import (
    BLK_HEADER,
    DESC,
    DISCARD,
    FLUSH,
    GET_ID,
    IN,
    INDIRECT,
    NEXT,
    OUT,
    SEGMENT,
    UNMAP,
    WRITE,
    WRITE_ZEROES,
)

RING, TABLE, AREA = 16, 0x40, 0x200
HEADER, SEGMENTS, STATUS, INNER = 0x200, 0x240, 0x300, 0x400
WRITABLE, LARGE_BLOCKS, INDIRECT_FEATURE, EVENT_IDX, RANGES = 1, 2, 4, 8, 16


def memory(heads: list[int], descriptors: list[bytes], parts: dict[int, bytes]) -> bytes:
    """Guest memory from address 0 on."""
    content = bytearray(0x600)
    content[: 4 + 2 * len(heads)] = struct.pack(f"<HH{len(heads)}H", 0, len(heads), *heads)
    table = b"".join(descriptors)
    content[TABLE : TABLE + len(table)] = table
    for address, data in parts.items():
        content[address : address + len(data)] = data
    return bytes(content)


def set_up(flags: int) -> bytes:
    return bytes([4, flags, 3, 1, 0, 1, 0, 0])


def plain(kind: int, out: bytes = b"", into: int = 0, sector: int = 0) -> bytes:
    """One request in direct descriptors."""
    descriptors = [DESC.pack(HEADER, 16, NEXT, 1)]
    if out:
        descriptors.append(DESC.pack(SEGMENTS, len(out), NEXT, len(descriptors) + 1))
    if into:
        descriptors.append(DESC.pack(0x100000000, into, NEXT | WRITE, len(descriptors) + 1))
    descriptors.append(DESC.pack(STATUS, 1, WRITE, 0))
    parts = {HEADER: BLK_HEADER.pack(kind, 0, sector), SEGMENTS: out}
    return memory([0], descriptors, parts)


def ring_seeds() -> list[bytes]:
    every = WRITABLE | INDIRECT_FEATURE | EVENT_IDX | RANGES
    ranges = SEGMENT.pack(0, 8, 0) + SEGMENT.pack(16, 1, UNMAP)
    table = (
        DESC.pack(HEADER, 16, NEXT, 1)
        + DESC.pack(0x7F00, 512, NEXT | WRITE, 2)
        + DESC.pack(STATUS, 1, WRITE, 0)
    )
    inner = memory(
        [0], [DESC.pack(INNER, len(table), INDIRECT, 0)], {HEADER: BLK_HEADER.pack(IN, 0, 1), INNER: table}
    )
    loop = memory([0], [DESC.pack(HEADER, 16, NEXT, 1), DESC.pack(HEADER, 16, NEXT, 0)], {})
    pieces = [DESC.pack(HEADER + i, 1, NEXT, i + 1) for i in range(15)] + [DESC.pack(STATUS, 1, WRITE, 0)]
    many = memory([0] * RING, [DESC.pack(HEADER, 16, NEXT, 1), DESC.pack(STATUS, 1, WRITE, 0)], {})
    cases = [plain(IN, into=4096), plain(IN, into=512, sector=2047), plain(OUT, b"x" * 128), plain(FLUSH),
             plain(GET_ID, into=20), plain(DISCARD, ranges[:16]), plain(WRITE_ZEROES, ranges), inner, loop,
             memory([0], pieces, {}), many]  # fmt: skip
    return [
        set_up(flags) + case for case in cases for flags in (every, every ^ EVENT_IDX, every | LARGE_BLOCKS)
    ]
