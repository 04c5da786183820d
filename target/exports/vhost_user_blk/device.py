# SPDX-License-Identifier: Apache-2.0
"""The virtio block device that a guest sees: feature bits, configuration space, cache mode.

Source: virtio specification 1.2, section 5.2. Requests are the datapath's (vhost_blk.c), not here.
"""

from __future__ import annotations

import struct
from enum import IntFlag

SECTOR = 512
PHYSICAL_BLOCK = 4096  # what is told to be a good unit; the page cache's


class Feature(IntFlag):
    SEG_MAX = 1 << 2
    RO = 1 << 5
    BLK_SIZE = 1 << 6
    FLUSH = 1 << 9
    TOPOLOGY = 1 << 10
    CONFIG_WCE = 1 << 11
    MQ = 1 << 12
    DISCARD = 1 << 13
    WRITE_ZEROES = 1 << 14
    RING_INDIRECT_DESC = 1 << 28
    RING_EVENT_IDX = 1 << 29
    PROTOCOL_FEATURES = 1 << 30  # of vhost-user, never shown to the guest
    VERSION_1 = 1 << 32


# struct virtio_blk_config up to write_zeroes_may_unmap
CONFIG = struct.Struct(
    "<"
    "Q"  # capacity, in sectors
    "II"  # size_max, seg_max
    "HBB"  # geometry: cylinders, heads, sectors
    "I"  # blk_size
    "BBHI"  # topology: physical_block_exp, alignment_offset, min_io_size, opt_io_size
    "BBH"  # writeback, unused0, num_queues
    "III"  # max_discard_sectors, max_discard_seg, discard_sector_alignment
    "II"  # max_write_zeroes_sectors, max_write_zeroes_seg
    "B3x"  # write_zeroes_may_unmap
)
WRITEBACK_OFFSET = 32


class BlockDevice:
    """State that outlives a connection: the size. State of a connection: features taken, cache mode.

    capacity is in bytes, a multiple of block_size. writethrough makes every write durable whatever the guest
    negotiates, and takes the choice of the cache mode from it.
    """

    def __init__(
        self,
        *,
        capacity: int,
        block_size: int,
        queues: int,
        writable: bool,
        writethrough: bool,
        seg_max: int,
        max_segments: int,
        max_sectors: int,
    ) -> None:
        self.capacity = capacity
        self.block_size = block_size
        self.queues = queues
        self.writable = writable
        self.writethrough = writethrough
        self.seg_max = seg_max
        self.max_segments = max_segments
        self.max_sectors = max_sectors
        self.taken = Feature(0)
        self._writeback: bool | None = None  # None: as the features decide

    @property
    def offered(self) -> Feature:
        features = (
            Feature.SEG_MAX | Feature.BLK_SIZE | Feature.FLUSH | Feature.TOPOLOGY
            | Feature.MQ | Feature.RING_INDIRECT_DESC | Feature.RING_EVENT_IDX
            | Feature.VERSION_1 | Feature.PROTOCOL_FEATURES
        )  # fmt: skip
        if not self.writable:
            return features | Feature.RO
        features |= Feature.DISCARD | Feature.WRITE_ZEROES
        return features if self.writethrough else features | Feature.CONFIG_WCE

    def reset(self) -> None:
        """For a new connection."""
        self.taken = Feature(0)
        self._writeback = None

    def take(self, features: int) -> None:
        """The driver's choice. ValueError for bits that were not offered."""
        unknown = features & ~int(self.offered)
        if unknown:
            raise ValueError(f"features {unknown:#x} were not offered")
        self.taken = Feature(features)

    @property
    def writeback(self) -> bool:
        """Whether writes may be completed before they are durable (section 5.2.5.2).

        A driver that took neither FLUSH nor CONFIG_WCE does not know of a cache. One that took CONFIG_WCE
        alone starts without one.
        """
        if self.writethrough:
            return False
        if Feature.CONFIG_WCE in self.taken and self._writeback is not None:
            return self._writeback
        return Feature.FLUSH in self.taken

    def config(self) -> bytes:
        """The whole configuration space as it is now."""
        blocks = PHYSICAL_BLOCK // self.block_size if self.block_size < PHYSICAL_BLOCK else 1
        # Before a driver took features, what it finds is the mode that FLUSH will give it.
        writeback = self.writeback if self.taken else not self.writethrough
        change = self.writable
        return CONFIG.pack(
            self.capacity // SECTOR,
            0, self.seg_max,
            0, 0, 0,
            self.block_size,
            blocks.bit_length() - 1, 0, blocks, 0,
            writeback, 0, self.queues,
            self.max_sectors * change, self.max_segments * change, self.block_size // SECTOR * change,
            self.max_sectors * change, self.max_segments * change,
            change,
        )  # fmt: skip

    def read_config(self, offset: int, size: int, limit: int) -> bytes | None:
        """A part of the configuration space, zeros behind it; None when it is empty or goes past limit."""
        if not 0 < size <= limit - offset:
            return None
        return self.config()[offset : offset + size].ljust(size, b"\0")

    def write_config(self, offset: int, data: bytes) -> bool:
        """A driver's write: only the cache mode may be written. False when it is refused."""
        if (
            Feature.CONFIG_WCE not in self.offered
            or offset != WRITEBACK_OFFSET
            or len(data) != 1
            or data[0] > 1
        ):
            return False
        self._writeback = bool(data[0])
        return True
