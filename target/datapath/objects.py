# SPDX-License-Identifier: Apache-2.0
"""Handles on C objects, counted by reference; their coroutines are single requests on an I/O thread."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from target.datapath._datapath import ffi, lib
from target.datapath.constants import POPULATE, Data, Entries, Extent, Op, Reason, check
from target.datapath.fault import FaultHandler

if TYPE_CHECKING:
    from target.datapath import Datapath

DETECT_ZEROES = {"off": 0, "on": 1, "unmap": 2}
NO_THRESHOLD = (1 << 64) - 1


class Object:
    """A datapath object. Its requests run on I/O thread 0, below any gate; they raise OSError."""

    def __init__(self, datapath: Datapath, tag: int, ptr: Any) -> None:
        if ptr == ffi.NULL:
            number = ffi.errno or errno.ENOMEM
            raise OSError(number, os.strerror(number))
        self.datapath = datapath
        self.tag = tag
        self._ptr = ptr
        self.handler: FaultHandler | None = None
        self.on_low_grants: Callable[[int], None] | None = None
        self.on_threshold: Callable[[int, int], None] | None = None  # threshold, bytes behind it

    @property
    def ptr(self) -> Any:
        """The object in C. OSError once it is released: it may be gone, and C must not see it then."""
        if self._ptr is None:
            raise OSError(errno.EBADF, "the object is released")
        return self._ptr

    @property
    def released(self) -> bool:
        return self._ptr is None

    @property
    def size(self) -> int:
        """bytes"""
        return int(lib.bt_object_size(self.ptr))

    @size.setter
    def size(self, size: int) -> None:
        lib.bt_object_set_size(self.ptr, size)

    def set_policy(self, discard_unmap: bool, detect_zeroes: Literal["off", "on", "unmap"]) -> None:
        lib.bt_object_set_policy(self.ptr, discard_unmap, DETECT_ZEROES[detect_zeroes])

    def replace_child(self, old: Object, new: Object) -> None:
        """Puts new where this object has old below it. To be called while nothing from above is inside."""
        lib.bt_object_replace_child(self.ptr, old.ptr, new.ptr)

    def set_child(self, index: int, child: Object | None) -> None:
        """The same for one place, by number: see bt_object_set_child."""
        lib.bt_object_set_child(self.ptr, index, child.ptr if child is not None else ffi.NULL)

    @property
    def write_threshold(self) -> int | None:
        """Bytes; ``on_threshold`` is called once when a write ends behind it, and there is none any more."""
        offset = int(lib.bt_object_write_threshold(self.ptr))
        return None if offset == NO_THRESHOLD else offset

    @write_threshold.setter
    def write_threshold(self, offset: int | None) -> None:
        lib.bt_object_set_write_threshold(self.ptr, NO_THRESHOLD if offset is None else offset)

    def counters(self) -> dict[str, Any]:
        """Sums over all I/O threads: requests and bytes by operation, faults by reason, and the rest."""
        raw = ffi.new("struct bt_counters *")
        lib.bt_object_counters(self.ptr, raw)
        plain = ("inline_done", "engine_done", "bounced", "grants", "hits", "misses", "written_end")
        return {
            "requests": {op.name.lower(): raw.requests[op] for op in Op},
            "bytes": {op.name.lower(): raw.bytes[op] for op in Op},
            "failed": {op.name.lower(): raw.failed[op] for op in Op},
            "failed_bytes": {op.name.lower(): raw.failed_bytes[op] for op in Op},
            "faults": {reason.name.lower(): raw.faults[reason] for reason in Reason},
            **{name.removesuffix("_done"): getattr(raw, name) for name in plain},
        }

    def succeed(self, old: Object) -> None:
        """Takes over what queries show, and the threshold, of the object whose place it takes under drain."""
        lib.bt_object_succeed(self.ptr, old.ptr)
        self.on_threshold = old.on_threshold

    def release(self) -> None:
        """Drops Python's reference; the object goes when nothing else holds it."""
        if self._ptr is not None:
            ptr, self._ptr = self._ptr, None
            lib.bt_object_unref(ptr)

    async def _submit(self, op: Op, offset: int, length: int, buffer: Any = ffi.NULL, flags: int = 0) -> None:
        ptr = self.ptr
        cookie, future = self.datapath.cookie()
        check(lib.bt_submit(self.datapath.dp, 0, ptr, op, flags, offset, length, buffer, cookie))
        # A cancelled waiter must not let go of the buffer while C writes into it: the cookie keeps it.
        self.datapath.keep(cookie, buffer)
        check(await future)

    async def read(self, offset: int, length: int) -> bytes:
        data = bytearray(length)
        await self.read_into(offset, data)
        return bytes(data)

    async def read_into(self, offset: int, data: bytearray | memoryview | Entries) -> None:
        buffer = ffi.from_buffer(data)
        await self._submit(Op.READ, offset, len(buffer), buffer)

    async def write(self, offset: int, data: Data, flags: int = 0) -> None:
        buffer = ffi.from_buffer(data)
        await self._submit(Op.WRITE, offset, len(buffer), buffer, flags)

    async def zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        await self._submit(Op.ZEROES, offset, length, flags=flags)

    async def discard(self, offset: int, length: int) -> None:
        await self._submit(Op.DISCARD, offset, length)

    async def flush(self) -> None:
        await self._submit(Op.FLUSH, 0, 0)

    async def cache(self, offset: int, length: int) -> None:
        await self._submit(Op.CACHE, offset, length)

    async def populate(self, offset: int, length: int) -> None:
        """Copies what the first map below has not from its backing."""
        await self._submit(Op.CACHE, offset, length, flags=POPULATE)

    async def status(self, offset: int, length: int, max: int = 1024) -> list[Extent]:
        """Extents from offset on; they cover length bytes unless there are more than max."""
        ptr, out = self.ptr, ffi.new("struct bt_extent[]", max)
        cookie, future = self.datapath.cookie()
        check(lib.bt_submit_status(self.datapath.dp, 0, ptr, offset, length, out, max, cookie))
        self.datapath.keep(cookie, out)
        count = check(await future)
        return [Extent(out[i].length, out[i].flags) for i in range(count)]

    async def synchronize(self) -> None:
        """Returns when all I/O that was in flight below this object has finished."""
        ptr = self.ptr
        cookie, future = self.datapath.cookie()
        lib.bt_synchronize(ptr, cookie)
        await future


class Gate(Object):
    """The top of an edge: can hold what comes from above."""

    on_failure: Callable[[Op, int, int, int], None] | None = None
    """op, offset, length and errno of a request that failed; see ``tell_failure``"""

    def tell_failure(self) -> None:
        """The next request that fails is told to ``on_failure``; then none, until this is called again."""
        if not self.released:
            lib.bt_gate_tell_failure(self.ptr)

    async def drain(self, deadline: float | None = None) -> None:
        """Holds new requests; returns when none is left inside.

        TimeoutError after ``deadline`` seconds: then, and when it is cancelled, requests go on as before.
        """
        drained = self.start_drain()
        try:
            async with asyncio.timeout(deadline):
                await drained
        except (TimeoutError, asyncio.CancelledError):
            self.resume()
            raise

    def start_drain(self) -> asyncio.Future[int]:
        """Holds new requests; the future is done when none is left inside. ``resume`` ends it in any case."""
        ptr = self.ptr
        cookie, future = self.datapath.cookie()
        lib.bt_gate_drain(ptr, cookie)
        return future

    def resume(self, child: Object | None = None) -> None:
        """Lets held requests go on, into ``child`` when it is given."""
        lib.bt_gate_resume(self.ptr, child.ptr if child else ffi.NULL)
