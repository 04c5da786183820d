# SPDX-License-Identifier: Apache-2.0
"""The Python face of fences and views (fence.c): changes held back, and what was there before them."""

from __future__ import annotations

from enum import IntEnum

from target.datapath import Datapath, FaultHandler, Object, Op, ffi, lib

UNLIMITED = (1 << 64) - 2  # but it is noted what is reached
CHILD, SAVED = 0, 1  # for Object.set_child


class Mark(IntEnum):
    OPEN = lib.BT_FENCE_OPEN
    SAVED = lib.BT_FENCE_SAVED
    HIDDEN = lib.BT_FENCE_HIDDEN


class Fence(Object):
    """Passes all on to its child, but for changes of granules not marked OPEN, and those past the limit."""

    def mark(self, mark: Mark, first: int, end: int) -> None:
        lib.bt_fence_mark(self.ptr, mark, first, end - first)

    def mark_all(self, mark: Mark) -> None:
        lib.bt_fence_mark_all(self.ptr, mark)

    @property
    def reached(self) -> int:
        """After set_limit: where what was written ends, or what was told here, if that is more."""
        return int(lib.bt_fence_reached(self.ptr))

    @reached.setter
    def reached(self, end: int) -> None:
        lib.bt_fence_set_reached(self.ptr, end)

    def reach(self, end: int) -> None:
        """So much is there, at least."""
        lib.bt_fence_reach(self.ptr, end)

    def set_saving(self, size: int, read_through: bool) -> None:
        """The datapath saves what it would hold back; see bt_fence_set_saving. Before the first request."""
        lib.bt_fence_set_saving(self.ptr, size, read_through)

    def set_timeout(self, seconds: float) -> None:
        """How long a request waits for what it changes to be saved; 0: for ever."""
        lib.bt_fence_set_timeout(self.ptr, int(seconds * 1e9))

    @property
    def saved(self) -> int:
        """Granules that were copied."""
        return int(lib.bt_fence_saved(self.ptr))

    async def save(self, offset: int, length: int) -> None:
        """A change of these bytes does not have to wait any more when it returns. Raises OSError."""
        await self._submit(Op.CACHE, offset, length, flags=lib.BT_SAVE)

    async def settle(self) -> None:
        """Returns when nothing is being saved, while no change comes."""
        ptr = self.ptr
        cookie, future = self.datapath.cookie()
        lib.bt_fence_settle(ptr, cookie)
        await future

    async def wait_readers(self) -> None:
        """Returns when all that is read of its views now has been read."""
        ptr = self.ptr
        cookie, future = self.datapath.cookie()
        lib.bt_fence_wait_readers(ptr, cookie)
        await future

    def set_limit(self, limit: int | None) -> None:
        """Writes and zeroes past it are held back."""
        lib.bt_fence_set_limit(self.ptr, UNLIMITED if limit is None else limit)


def make_fence(
    datapath: Datapath,
    child: Object,
    handler: FaultHandler,
    *,
    saved: Object | None = None,
    granule_bits: int = 0,
    granules: int = 0,
) -> Fence:
    """``saved``: where views read granules that are marked SAVED. The handler gets the changes held back."""
    below = saved.ptr if saved is not None else ffi.NULL
    made: Fence = datapath.adopt(
        lambda tag: lib.bt_fence_new(datapath.dp, tag, child.ptr, below, granule_bits, granules), Fence
    )
    made.handler = handler
    return made


def make_view(datapath: Datapath, fence: Fence, size: int, handler: FaultHandler) -> Object:
    """What the fence's child held before. The handler gets all changes."""
    made: Object = datapath.adopt(lambda tag: lib.bt_view_new(datapath.dp, tag, fence.ptr, size))
    made.handler = handler
    return made
