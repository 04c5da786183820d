# SPDX-License-Identifier: Apache-2.0
"""What the driver needs of the node that the image is stored in, and of the map in the datapath.

Both are narrow faces of target.graph.node.Node and target.datapath.Map, so that tests can stand in for them.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from target.datapath import Grant

Entries = NDArray[np.uint64]


class Backend(Protocol):
    """The child node. Offsets and lengths in bytes; all raise OSError."""

    @property
    def size(self) -> int: ...
    async def read(self, offset: int, length: int) -> bytes: ...
    async def write(self, offset: int, data: bytes) -> None: ...
    async def write_zeroes(self, offset: int, length: int) -> None: ...
    async def discard(self, offset: int, length: int) -> None: ...
    async def flush(self) -> None: ...
    async def truncate(self, size: int) -> None: ...
    def debug_event(self, event: str) -> None: ...


class MapFace(Protocol):
    """The table of entries in the datapath; see target.datapath.Map."""

    @property
    def bytes(self) -> int: ...

    size: int

    @property
    def granted(self) -> int: ...
    @property
    def claims(self) -> int: ...
    def load(self, slice: int, entries: Entries, writable: bool) -> bool: ...
    def set_writable(self, slice: int, writable: bool) -> None: ...
    def loaded(self) -> list[int]: ...
    def get(self, granule: int, count: int = 1) -> Entries | None: ...
    def set(self, granule: int, expected: int, entry: int, dirty: bool = True) -> bool: ...
    def reserve(self, size: int) -> None: ...
    def fill(self, granule: int, count: int, entry: int, dirty: bool = True) -> int: ...
    def dirty(self) -> list[int]: ...
    def clean(self, slice: int) -> Entries: ...
    def redirty(self, slice: int) -> None: ...
    def hold_flush(self, hold: bool) -> None: ...
    def shrink(self, bytes: int) -> int: ...
    def grant(self, host_offset: int, count: int, zeroed: bool) -> None: ...
    def revoke(self) -> list[Grant]: ...
    def set_low_water(self, granules: int) -> None: ...
    async def synchronize(self) -> None: ...


class Store:
    """The image file: the backend, with reads past its end as zeros and the file's growth tracked.

    ``growable``: a regular file, whose new clusters read as zeros. ``limit``: where a file that is not ends.
    ``event``: what a request is for, in the words of blkdebug.
    """

    def __init__(self, backend: Backend, growable: bool) -> None:
        self.use(backend, growable)

    def use(self, backend: Backend, growable: bool) -> None:
        """The image is reached through another node from here on."""
        self.backend = backend
        self.growable = growable

    @property
    def size(self) -> int:
        return self.backend.size

    def event(self, name: str) -> None:
        if name:
            self.backend.debug_event(name)

    async def read(self, offset: int, length: int, event: str = "") -> bytes:
        """Exactly ``length`` bytes; zeros past the end of the file."""
        self.event(event)
        inside = max(0, min(length, self.size - offset))
        data = await self.backend.read(offset, inside) if inside else b""
        return data if inside == length else data + bytes(length - inside)

    async def write(self, offset: int, data: bytes, event: str = "") -> None:
        self.event(event)
        await self.backend.write(offset, data)

    async def write_zeroes(self, offset: int, length: int) -> None:
        await self.backend.write_zeroes(offset, length)

    async def discard(self, offset: int, length: int) -> None:
        await self.backend.discard(offset, length)

    async def flush(self) -> None:
        await self.backend.flush()

    async def truncate(self, size: int) -> None:
        """Cuts off the end of the file, or raises BlockError when the backend cannot."""
        await self.backend.truncate(size)
