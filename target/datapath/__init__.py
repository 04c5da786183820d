# SPDX-License-Identifier: Apache-2.0
"""The thin Python face of the C datapath.

Objects are handles on C objects, counted by reference; their coroutines are single requests on an I/O thread.
Events come from one eventfd that the loop watches. Nothing here knows a format or an export.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from target.datapath._datapath import ffi, lib
from target.datapath.constants import (
    ENTRY_ALLOC,
    ENTRY_DATA,
    ENTRY_FAULT,
    ENTRY_HOST,
    ENTRY_KIND,
    ENTRY_UNALLOCATED,
    ENTRY_WRITABLE,
    ENTRY_ZERO,
    FAST_ZERO,
    FUA,
    HOLE,
    POPULATE,
    REQ_ONE,
    UNMAP,
    ZERO,
    Data,
    Entries,
    Extent,
    Grant,
    Op,
    Reason,
    check,
)
from target.datapath.events import Events
from target.datapath.fault import Fault, FaultHandler
from target.datapath.objects import Gate, Object
from target.datapath.tables import Map

__all__ = [
    "ENTRY_ALLOC",
    "ENTRY_DATA",
    "ENTRY_FAULT",
    "ENTRY_HOST",
    "ENTRY_KIND",
    "ENTRY_UNALLOCATED",
    "ENTRY_WRITABLE",
    "ENTRY_ZERO",
    "FAST_ZERO",
    "FUA",
    "HOLE",
    "POPULATE",
    "REQ_ONE",
    "UNMAP",
    "ZERO",
    "Data",
    "Datapath",
    "Entries",
    "Extent",
    "Fault",
    "FaultHandler",
    "Gate",
    "Grant",
    "Map",
    "Object",
    "Op",
    "Reason",
    "check",
    "ffi",
    "lib",
]

ENGINES = {
    "threads": lib.BT_ENGINE_THREADS,
    "native": lib.BT_ENGINE_NATIVE,
    "io_uring": lib.BT_ENGINE_IO_URING,
}


class Datapath(Events):
    """One for each process: I/O threads, objects by tag, and the events that C sends."""

    def __init__(self) -> None:
        super().__init__()
        self.dp = lib.bt_datapath_new()
        if self.dp == ffi.NULL:
            raise OSError(ffi.errno, f"datapath: {os.strerror(ffi.errno)}")
        self.threads = 0
        self._parked: list[int] = []
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
        objects, offsets = (source.ptr, destination.ptr), (source_offset, destination_offset)
        cookie, future = self.cookie()
        check(lib.bt_copy(self.dp, thread, *objects, *offsets, length, cookie))
        check(await future)
