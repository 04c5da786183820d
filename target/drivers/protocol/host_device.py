# SPDX-License-Identifier: Apache-2.0
"""host_device: a block device of the host as a disk."""

from __future__ import annotations

import asyncio
import fcntl
import stat
import struct
from typing import TYPE_CHECKING

from target.drivers.protocol.alignment import Alignment
from target.drivers.protocol.file import PosixNode
from target.graph.errors import BlockError

if TYPE_CHECKING:
    from target.graph.change import Change

# ioctl numbers of linux/fs.h
BLKROGET = 0x125E
BLKSSZGET = 0x1268
BLKGETSIZE64 = 0x80081272


class HostDevice(PosixNode, driver="host_device"):
    """Its size is the device's; discards and zeroes go to the device."""

    block_device = True

    def _check_type(self, mode: int) -> None:
        name = self.options.filename
        if not stat.S_ISBLK(mode):
            raise self.error(f"'host_device' driver requires '{name}' to be a block device")

    def _find_size(self) -> int:
        try:
            if not self.read_only and _ioctl(self.fd, BLKROGET, "@i"):
                self._refuse_writing()
            sector = _ioctl(self.fd, BLKSSZGET, "@i")
            size = _ioctl(self.fd, BLKGETSIZE64, "@Q")
        except OSError as error:
            name = self.options.filename
            raise BlockError.from_os(f"{self.label}: Could not query '{name}'", error) from None
        if self.settings.direct:
            self.align = Alignment(max(self.align.request, sector), self.align.memory)
        return size

    def _refuse_writing(self) -> None:
        """A device may be opened for writing although it is set read-only."""
        if not self.settings.auto_read_only:
            raise self.error(f"Could not open '{self.options.filename}': the device is read-only")
        self.read_only = True

    async def resize(self, change: Change, size: int) -> None:
        """Only to what the device has become by itself."""
        if size != await asyncio.to_thread(self._find_size):
            raise self.error("Cannot resize device files")
        before = self.object.size
        change.undo(lambda: setattr(self.object, "size", before))
        self.object.size = size


def _ioctl(fd: int, number: int, form: str) -> int:
    buffer = bytearray(struct.calcsize(form))
    fcntl.ioctl(fd, number, buffer)
    value: int = struct.unpack(form, buffer)[0]
    return value
