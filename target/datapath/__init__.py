# SPDX-License-Identifier: Apache-2.0
"""The thin Python face of the C datapath.

Objects are handles on C objects, counted by reference; their coroutines are single requests on an I/O thread.
Events come from one eventfd that the loop watches. Nothing here knows a format or an export.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Callable, Coroutine
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from target.datapath._datapath import ffi, lib

__all__ = ["Datapath", "Extent", "Fault", "Gate", "Grant", "Map", "Object", "Op", "Reason", "ffi", "lib"]

Entries = npt.NDArray[np.uint64]
Data = bytes | bytearray | memoryview | Entries

FUA, UNMAP, FAST_ZERO = lib.BT_FUA, lib.BT_UNMAP, lib.BT_FAST_ZERO
REQ_ONE, POPULATE = lib.BT_REQ_ONE, lib.BT_POPULATE
HOLE, ZERO = lib.BT_EXTENT_HOLE, lib.BT_EXTENT_ZERO
ENTRY_FAULT, ENTRY_UNALLOCATED = lib.BT_ENTRY_FAULT, lib.BT_ENTRY_UNALLOCATED
ENTRY_ZERO, ENTRY_DATA, ENTRY_KIND = lib.BT_ENTRY_ZERO, lib.BT_ENTRY_DATA, lib.BT_ENTRY_KIND
ENTRY_WRITABLE, ENTRY_ALLOC, ENTRY_HOST = lib.BT_ENTRY_WRITABLE, lib.BT_ENTRY_ALLOC, lib.BT_ENTRY_HOST

ENGINES = {
    "threads": lib.BT_ENGINE_THREADS,
    "native": lib.BT_ENGINE_NATIVE,
    "io_uring": lib.BT_ENGINE_IO_URING,
}
DETECT_ZEROES = {"off": 0, "on": 1, "unmap": 2}
EVENTS_AT_ONCE = 256
NO_THRESHOLD = (1 << 64) - 1
IO_MAX = 32 << 20


class Op(IntEnum):
    READ = lib.BT_READ
    WRITE = lib.BT_WRITE
    ZEROES = lib.BT_ZEROES
    DISCARD = lib.BT_DISCARD
    FLUSH = lib.BT_FLUSH
    STATUS = lib.BT_STATUS
    CACHE = lib.BT_CACHE


class Reason(IntEnum):
    LOAD = lib.BT_FAULT_LOAD
    ENTRY = lib.BT_FAULT_ENTRY
    WRITE = lib.BT_FAULT_WRITE
    GRANT = lib.BT_FAULT_GRANT
    FLUSH = lib.BT_FAULT_FLUSH
    UPCALL = lib.BT_FAULT_UPCALL
    SAVE = lib.BT_FAULT_SAVE


class Extent(NamedTuple):
    length: int
    """bytes"""
    flags: int
    """HOLE, ZERO"""


class Grant(NamedTuple):
    host_offset: int
    granules: int
    zeroed: bool


def check(result: int) -> int:
    """The result, or OSError when it is a negative errno."""
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


class Fault:
    """One parked request, or a part of one. It gets exactly one answer: retry() or done()."""

    __slots__ = ("_request", "flags", "length", "offset", "op", "reason", "result")

    def __init__(self, event: Any) -> None:
        self._request = event.request
        self.op = Op(event.op)
        self.flags: int = event.flags
        self.reason = Reason(event.reason)
        self.offset: int = event.offset
        self.length: int = event.length
        self.result: int = event.result  # the number of its I/O thread; for SAVE a negative errno

    def __repr__(self) -> str:
        return f"<Fault {self.reason.name} {self.op.name} {self.offset}+{self.length}>"

    @property
    def answered(self) -> bool:
        return self._request is None

    def _take(self) -> Any:
        request, self._request = self._request, None
        if request is None:
            raise RuntimeError(f"{self!r} was answered before")
        return request

    def retry(self) -> None:
        """The request resolves again: the table has changed."""
        lib.bt_fault_retry(self._take())

    def done(self, result: int = 0) -> None:
        """The part is done (0), or the request failed (negative errno)."""
        lib.bt_fault_done(self._take(), result)

    def get_data(self, at: int = 0, length: int | None = None) -> bytes:
        """A copy of the data that a WRITE carries, from ``at`` bytes into the part on."""
        data = bytearray(self.length - at if length is None else length)
        check(lib.bt_fault_get_data(self._request, at, ffi.from_buffer(data), len(data)))
        return bytes(data)

    def put_data(self, at: int, data: bytes | bytearray | memoryview) -> None:
        """Gives a READ the data for ``at`` bytes into the part on."""
        check(lib.bt_fault_put_data(self._request, at, ffi.from_buffer(data), len(data)))

    def get_into(self, buffer: Any, at: int, length: int) -> None:
        """Copies what a WRITE carries, from ``at`` bytes into the part on, into a buffer of C."""
        check(lib.bt_fault_get_data(self._request, at, buffer, length))

    def put_from(self, buffer: Any, at: int, length: int) -> None:
        """Gives a READ what a buffer of C holds."""
        check(lib.bt_fault_put_data(self._request, at, buffer, length))

    def put_extent(self, length: int, flags: int) -> bool:
        """Appends an extent to the answer of a STATUS; False when it takes no more."""
        result = lib.bt_fault_put_extent(self._request, length, flags)
        if result == -errno.ENOSPC:
            return False
        check(result)
        return True


# A handler that is no coroutine function answers later, by itself.
FaultHandler = Callable[[Fault], Coroutine[Any, Any, None] | None]


class Object:
    """A datapath object. Its requests run on I/O thread 0, below any gate; they raise OSError."""

    def __init__(self, datapath: Datapath, tag: int, ptr: Any) -> None:
        if ptr == ffi.NULL:
            number = ffi.errno or errno.ENOMEM
            raise OSError(number, os.strerror(number))
        self.datapath = datapath
        self.tag = tag
        self.ptr = ptr
        self.handler: FaultHandler | None = None
        self.on_low_grants: Callable[[int], None] | None = None
        self.on_threshold: Callable[[int, int], None] | None = None  # threshold, bytes behind it
        self.released = False

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
        if not self.released:
            self.released = True
            lib.bt_object_unref(self.ptr)

    async def _submit(self, op: Op, offset: int, length: int, buffer: Any = ffi.NULL, flags: int = 0) -> None:
        if self.released:
            raise OSError(errno.EBADF, "the object is released")
        cookie, future = self.datapath.cookie()
        check(lib.bt_submit(self.datapath.dp, 0, self.ptr, op, flags, offset, length, buffer, cookie))
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
        out = ffi.new("struct bt_extent[]", max)
        cookie, future = self.datapath.cookie()
        check(lib.bt_submit_status(self.datapath.dp, 0, self.ptr, offset, length, out, max, cookie))
        self.datapath.keep(cookie, out)
        count = check(await future)
        return [Extent(out[i].length, out[i].flags) for i in range(count)]

    async def synchronize(self) -> None:
        """Returns when all I/O that was in flight below this object has finished."""
        cookie, future = self.datapath.cookie()
        lib.bt_synchronize(self.ptr, cookie)
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
        cookie, future = self.datapath.cookie()
        lib.bt_gate_drain(self.ptr, cookie)
        return future

    def resume(self, child: Object | None = None) -> None:
        """Lets held requests go on, into ``child`` when it is given."""
        lib.bt_gate_resume(self.ptr, child.ptr if child else ffi.NULL)


class Map(Object):
    """A table of entries over a child; see datapath.h for their bits."""

    slice_bits: int

    @property
    def slices(self) -> int:
        return int(lib.bt_map_slices(self.ptr))

    def reserve(self, size: int) -> None:
        """Makes room for slices up to this size, which ``size`` may be set to then. OSError."""
        check(lib.bt_map_reserve(self.ptr, size))

    @property
    def slice_entries(self) -> int:
        return 1 << self.slice_bits

    @property
    def bytes(self) -> int:
        """Memory of the loaded slices."""
        return int(lib.bt_map_bytes(self.ptr))

    def load(self, slice: int, entries: Entries, writable: bool) -> bool:
        """Installs a slice; False when it is there already."""
        if len(entries) != self.slice_entries:
            raise ValueError(f"a slice has {self.slice_entries} entries, not {len(entries)}")
        result = lib.bt_map_load(self.ptr, slice, ffi.from_buffer("uint64_t[]", entries), writable)
        if result == -errno.EEXIST:
            return False
        check(result)
        return True

    def set_writable(self, slice: int, writable: bool) -> None:
        self._found(lib.bt_map_set_writable(self.ptr, slice, writable), slice)

    def set_zero_entries(self, supported: bool) -> None:
        lib.bt_map_set_zero_entries(self.ptr, supported)

    def get(self, granule: int, count: int = 1) -> Entries | None:
        """Entries from granule on, claims looked through; None when one is not loaded."""
        out = np.empty(count, np.uint64)
        if lib.bt_map_get(self.ptr, granule, count, ffi.from_buffer("uint64_t[]", out)) < 0:
            return None
        return out

    def set(self, granule: int, expected: int, entry: int, dirty: bool = True) -> bool:
        """Replaces an entry if it equals expected; BlockingIOError when claimed, KeyError when not loaded."""
        result = self._found(lib.bt_map_set(self.ptr, granule, expected, entry, dirty), granule)
        return result == 0

    def fill(self, granule: int, count: int, entry: int, dirty: bool = True) -> int:
        """Sets entries outside of the map's size; returns how many, before one in a slice not loaded."""
        return check(lib.bt_map_fill(self.ptr, granule, count, entry, dirty))

    def loaded(self) -> list[int]:
        """The slices that are there."""
        return self._slices(lib.bt_map_loaded)

    def dirty(self) -> list[int]:
        """The dirty slices."""
        return self._slices(lib.bt_map_dirty)

    def _slices(self, list_them: Callable[[Any, Any, int], int]) -> list[int]:
        out = np.empty(max(1, self.bytes // (8 * self.slice_entries) + 64), np.uint64)
        count = list_them(self.ptr, ffi.from_buffer("uint64_t[]", out), len(out))
        return [int(index) for index in out[:count]]

    def clean(self, slice: int) -> Entries:
        """Step 1 of a flush: the slice is clean from here on; returns its entries."""
        out = np.empty(self.slice_entries, np.uint64)
        self._found(lib.bt_map_clean(self.ptr, slice, ffi.from_buffer("uint64_t[]", out)), slice)
        return out

    def redirty(self, slice: int) -> None:
        self._found(lib.bt_map_redirty(self.ptr, slice), slice)

    def hold_flush(self, hold: bool) -> None:
        """While held every flush faults."""
        lib.bt_map_hold_flush(self.ptr, hold)

    def shrink(self, bytes: int) -> int:
        """Drops clean slices down to this budget; returns what is still used."""
        return int(lib.bt_map_shrink(self.ptr, bytes))

    def grant(self, host_offset: int, count: int, zeroed: bool) -> None:
        """Gives the datapath count granules of the child to place."""
        check(lib.bt_map_grant(self.ptr, host_offset, count, zeroed))

    def revoke(self) -> list[Grant]:
        """Takes all unused grants back."""
        grants: list[Grant] = []
        raw = ffi.new("struct bt_grant[]", 64)
        while count := lib.bt_map_revoke(self.ptr, raw, 64):
            grants += [Grant(raw[i].host_offset, raw[i].count, bool(raw[i].zeroed)) for i in range(count)]
        return grants

    @property
    def granted(self) -> int:
        """Granules left in the grant pool."""
        return int(lib.bt_map_granted(self.ptr))

    @property
    def claims(self) -> int:
        """Claims under way; see bt_map_claims."""
        return int(lib.bt_map_claims(self.ptr))

    def set_low_water(self, granules: int) -> None:
        lib.bt_map_set_low_water(self.ptr, granules)

    @staticmethod
    def _found(result: int, what: int) -> int:
        if result == -errno.ENOENT:
            raise KeyError(what)
        if result == -errno.ESTALE:
            return result
        if result == -errno.EBUSY:
            raise BlockingIOError(errno.EBUSY, f"{what} is claimed")
        return check(result)


class Datapath:
    """One for each process: I/O threads, objects by tag, and the events that C sends."""

    def __init__(self) -> None:
        self.dp = lib.bt_datapath_new()
        if self.dp == ffi.NULL:
            raise OSError(ffi.errno, f"datapath: {os.strerror(ffi.errno)}")
        self.threads = 0
        self._parked: list[int] = []
        self._tag = 0
        self._objects: dict[int, Object] = {}
        self._futures: dict[int, asyncio.Future[int]] = {}
        self._kept: dict[int, Any] = {}
        self._sessions: dict[int, Callable[[int], None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._events = ffi.new("struct bt_event[]", EVENTS_AT_ONCE)
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Watches the events in this loop, from here to close()."""
        self._loop = loop
        loop.add_reader(lib.bt_datapath_eventfd(self.dp), self._drain)

    async def close(self) -> None:
        """Releases what is left and joins the threads. Exports and nodes are closed before."""
        for held in list(self._objects.values()):
            held.release()
        while self._objects or self._tasks:
            await asyncio.sleep(0.001)
        if self._loop is not None:
            self._loop.remove_reader(lib.bt_datapath_eventfd(self.dp))
        lib.bt_datapath_free(self.dp)
        self.dp = ffi.NULL

    def add_thread(self, poll_max_ns: int = 32768) -> int:
        """An I/O thread that spins up to poll_max_ns before it sleeps; returns its index."""
        if self._parked:
            index = self._parked.pop()
        else:
            index = check(lib.bt_thread_new(self.dp, poll_max_ns))
            self.threads = index + 1
        self.set_poll(index, poll_max_ns)
        return index

    def park_thread(self, thread: int) -> None:
        """Gives a thread back, for the next add_thread. It sleeps meanwhile.

        It is not ended: what is shared by all threads, such as connections of NBD clients, may be with it.
        """
        self.set_poll(thread, 0)
        self._parked.append(thread)

    @staticmethod
    def thread_ids() -> dict[int, int]:
        """The kernel's numbers of the I/O threads of this process."""
        found: dict[int, int] = {}
        for task in Path("/proc/self/task").iterdir():
            with contextlib.suppress(OSError):  # one that has just ended
                name = (task / "comm").read_text().strip()
                if name.startswith("bt-io"):
                    found[int(name.removeprefix("bt-io"))] = int(task.name)
        return found

    def set_poll(self, thread: int, max_ns: int, grow: int = 0, shrink: int = 0) -> None:
        """How a thread spins before it sleeps: up to max_ns, longer and shorter by these factors (0: 2)."""
        check(lib.bt_thread_set_poll(self.dp, thread, max_ns, grow, shrink))

    # objects

    async def freed(self, held: Object) -> None:
        """Returns when a released object is gone: nothing holds it any more."""
        while held.tag in self._objects:
            await asyncio.sleep(0.001)

    def _new_tag(self) -> int:
        self._tag += 1
        return self._tag

    def adopt(self, make: Callable[[int], Any], kind: type[Object] = Object) -> Any:
        """The handle on an object that ``make`` makes, given its tag."""
        tag = self._new_tag()
        adopted = kind(self, tag, make(tag))
        self._objects[tag] = adopted
        return adopted

    def null(self, size: int, latency_ns: int = 0, read_zeroes: bool = False) -> Object:
        made: Object = self.adopt(lambda tag: lib.bt_null_new(self.dp, tag, size, latency_ns, read_zeroes))
        return made

    def file(
        self,
        fd: int,
        size: int,
        *,
        direct: bool = False,
        no_flush: bool = False,
        block_device: bool = False,
        engine: str = "threads",
        align: int = 1,
        mem_align: int = 1,
    ) -> Object:
        """A file or block device; fd is duplicated. align, mem_align: bytes, powers of two."""
        flags = (
            (lib.BT_FILE_DIRECT if direct else 0)
            | (lib.BT_FILE_NO_FLUSH if no_flush else 0)
            | (lib.BT_FILE_BLOCK if block_device else 0)
        )
        made: Object = self.adopt(
            lambda tag: lib.bt_file_new(self.dp, tag, fd, size, flags, ENGINES[engine], align, mem_align)
        )
        return made

    def upcall(self, size: int, handler: FaultHandler, *, takes_fua: bool = False) -> Object:
        """Every request becomes a fault for the handler. takes_fua: so does FUA; else a flush follows."""
        made: Object = self.adopt(lambda tag: lib.bt_upcall_new(self.dp, tag, size))
        lib.bt_object_set_fua(made.ptr, takes_fua)
        made.handler = handler
        return made

    def window(self, child: Object, offset: int, size: int) -> Object:
        made: Object = self.adopt(lambda tag: lib.bt_window_new(self.dp, tag, child.ptr, offset, size))
        return made

    def align(self, child: Object, block: int) -> Object:
        """In front of a child that takes only whole blocks of so many bytes."""
        made: Object = self.adopt(lambda tag: lib.bt_align_new(self.dp, tag, child.ptr, block))
        return made

    def concat(self, children: list[Object]) -> Object:
        pointers = ffi.new("bt_object *[]", [child.ptr for child in children])
        made: Object = self.adopt(lambda tag: lib.bt_concat_new(self.dp, tag, pointers, len(children)))
        return made

    def map(
        self,
        *,
        granule_bits: int,
        slice_bits: int,
        size: int,
        child: Object,
        backing: Object | None,
        handler: FaultHandler,
        on_low_grants: Callable[[int], None] | None = None,
    ) -> Map:
        """A table of granules. on_low_grants gets the bytes left in the pool."""
        shape = (granule_bits, slice_bits, size, child.ptr, backing.ptr if backing else ffi.NULL)
        made: Map = self.adopt(lambda tag: lib.bt_map_new(self.dp, tag, *shape), Map)
        made.slice_bits = slice_bits
        made.handler = handler
        made.on_low_grants = on_low_grants
        return made

    def gate(self, child: Object, writable: bool) -> Gate:
        made: Gate = self.adopt(lambda tag: lib.bt_gate_new(self.dp, tag, child.ptr, writable), Gate)
        return made

    async def copy(
        self,
        source: Object,
        destination: Object,
        source_offset: int,
        destination_offset: int,
        length: int,
        thread: int = 0,
    ) -> None:
        """Copies bytes in the datapath, on an I/O thread, zeros as zeroes. Raises OSError."""
        cookie, future = self.cookie()
        offsets = source_offset, destination_offset
        check(lib.bt_copy(self.dp, thread, source.ptr, destination.ptr, *offsets, length, cookie))
        check(await future)

    # events

    def cookie(self) -> tuple[int, asyncio.Future[int]]:
        """A cookie for a call into C, and the future that gets its DONE event's result."""
        tag = self._new_tag()
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._futures[tag] = future
        return tag, future

    def keep(self, cookie: int, buffer: Any) -> None:
        """Holds a buffer until the cookie's DONE event."""
        self._kept[cookie] = buffer

    def session(self, on_event: Callable[[int], None]) -> int:
        """A tag for a session of an export or a device; on_event gets the results of its SESSION events."""
        tag = self._new_tag()
        self._sessions[tag] = on_event
        return tag

    def end_session(self, tag: int) -> None:
        self._sessions.pop(tag, None)

    def _drain(self) -> None:
        while True:
            count = lib.bt_events(self.dp, self._events, EVENTS_AT_ONCE)
            for i in range(count):
                self._dispatch(self._events[i])
            if count < EVENTS_AT_ONCE:
                return

    def _dispatch(self, event: Any) -> None:
        kind = event.type
        if kind == lib.BT_EVENT_FAULT:
            self._fault(self._objects[event.tag], Fault(event))
        elif kind == lib.BT_EVENT_DONE:
            self._kept.pop(event.tag, None)
            future = self._futures.pop(event.tag)
            if not future.cancelled():
                future.set_result(event.result)
        elif kind == lib.BT_EVENT_GRANTS:
            on_low_grants = self._objects[event.tag].on_low_grants
            if on_low_grants is not None:
                on_low_grants(event.length)
        elif kind == lib.BT_EVENT_SESSION:
            on_event = self._sessions.get(event.tag)
            if on_event is not None:
                on_event(event.result)
        elif kind == lib.BT_EVENT_FAILED:
            gate = self._objects[event.tag]
            assert isinstance(gate, Gate)
            if gate.on_failure is not None:
                gate.on_failure(Op(event.op), event.offset, event.length, -event.result)
        elif kind == lib.BT_EVENT_THRESHOLD:
            on_threshold = self._objects[event.tag].on_threshold
            if on_threshold is not None:
                on_threshold(event.offset, event.length)
        elif kind == lib.BT_EVENT_RELEASED:
            del self._objects[event.tag]

    def _fault(self, target: Object, fault: Fault) -> None:
        """Steps the handler at once; only one that suspends becomes a task (several times dearer)."""
        if target.handler is None:
            fault.done(-errno.EIO)
            return
        try:
            coroutine = target.handler(fault)
            if coroutine is None:
                return
            waits_for = coroutine.send(None)
        except StopIteration:
            self._answer(fault, None)
        except Exception as error:  # noqa: BLE001 - whatever a driver raises fails its request, and is shown
            self._answer(fault, error)
        else:
            task = asyncio.ensure_future(self._finish(coroutine, waits_for, fault))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _finish(self, coroutine: Coroutine[Any, Any, None], waits_for: Any, fault: Fault) -> None:
        try:
            await _Resumed(coroutine, waits_for)
        except Exception as error:  # noqa: BLE001 - as in _fault
            self._answer(fault, error)
        except asyncio.CancelledError as error:
            self._answer(fault, error)
            raise
        else:
            self._answer(fault, None)

    @staticmethod
    def _answer(fault: Fault, error: BaseException | None) -> None:
        """Every fault is answered: what the handler left open, or died of, fails with the matching errno."""
        if error is not None and not (isinstance(error, OSError) and error.errno):
            traceback.print_exception(error, file=sys.stderr)
        if fault.answered:
            return
        number = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
        fault.done(-number)


class _Resumed:
    """Awaits a coroutine that has been stepped once outside of a task, and waits for something now."""

    def __init__(self, coroutine: Coroutine[Any, Any, None], waits_for: Any) -> None:
        self.coroutine = coroutine
        self.waits_for = waits_for

    def __await__(self) -> Any:
        waits_for = self.waits_for
        while True:
            try:
                value = yield waits_for
            except BaseException as error:  # noqa: BLE001 - it is for the coroutine
                try:
                    waits_for = self.coroutine.throw(error)
                except StopIteration:
                    return
            else:
                try:
                    waits_for = self.coroutine.send(value)
                except StopIteration:
                    return
