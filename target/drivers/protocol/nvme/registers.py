# SPDX-License-Identifier: Apache-2.0
"""The registers of a controller in mapped memory. Accesses are of 32 bits, aligned (section 3.1)."""

from __future__ import annotations

import mmap

from target.drivers.protocol.nvme.spec import DOORBELLS


class Registers:
    """BAR 0, little endian. ``close`` lets go of the mapping, and does not unmap it."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._bytes = memoryview(memory)
        self._words = self._bytes.cast("I")
        self.length = len(memory)

    def close(self) -> None:
        self._words.release()
        self._bytes.release()

    def read32(self, offset: int) -> int:
        return self._words[offset // 4]

    def write32(self, offset: int, value: int) -> None:
        self._words[offset // 4] = value

    def read64(self, offset: int) -> int:
        return self.read32(offset) | self.read32(offset + 4) << 32

    def write64(self, offset: int, value: int) -> None:
        self.write32(offset, value & 0xFFFF_FFFF)
        self.write32(offset + 4, value >> 32)

    def ring(self, doorbell: int, stride: int, value: int) -> None:
        """Writes a doorbell: 2 * queue for its submission tail, one more for its completion head."""
        self.write32(DOORBELLS + doorbell * stride, value)
