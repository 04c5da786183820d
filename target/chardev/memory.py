# SPDX-License-Identifier: Apache-2.0
"""Devices that are nowhere: null, and a ring buffer that QMP reads and writes."""

from __future__ import annotations

from target.chardev.base import Chardev
from target.chardev.options import RingbufOptions
from target.chardev.stream import SinkStream
from target.graph.errors import BlockError

RINGBUF_MAX = 64 << 20


class Null(Chardev, type="null"):
    """Takes everything, gives nothing."""

    async def _open(self) -> None:
        pass

    def _attached(self) -> None:
        self._start(SinkStream(self._log))


class Ringbuf(Chardev, type="ringbuf"):
    """Keeps the last ``size`` bytes that were written."""

    options: RingbufOptions

    async def _open(self) -> None:
        size = self.options.size
        if size <= 0 or size & (size - 1):
            raise BlockError("size of ringbuf chardev must be power of two")
        if size > RINGBUF_MAX:
            raise BlockError(f"size of ringbuf chardev must be at most {RINGBUF_MAX} bytes")
        self._data = bytearray()

    def _attached(self) -> None:
        self._start(SinkStream(self.write))

    def write(self, data: bytes) -> None:
        self._log(data)
        self._data += data[-self.options.size :]
        del self._data[: -self.options.size]

    def read(self, size: int) -> bytes:
        """Takes the oldest bytes out, at most ``size``."""
        taken = bytes(self._data[:size])
        del self._data[:size]
        return taken


class Memory(Ringbuf, type="memory"):
    """The old name of ringbuf."""
