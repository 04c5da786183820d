# SPDX-License-Identifier: Apache-2.0
"""blklogwrites: passes requests on to ``file`` and logs every change to ``log``, in dm-log-writes' format.

A change is logged when it is complete, in the order in which changes became complete. A flush stands where
it *began*: it makes durable what was complete then, and a write that ended during it comes after it.
``blocktarget replay-log`` rebuilds the image from the log.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from msgspec import UNSET, UnsetType

from target.config.options import Size, Unsigned
from target.datapath import FUA
from target.drivers.filter.passing import Aligned, AlignedFilter
from target.graph.node import BlockdevRef, Node, NodeOptions
from target.graph.permissions import Perm
from target.replay import layout
from target.replay.layout import Flag, Head, Super

DEFAULT_SECTOR = 512


class BlkLogWrites(AlignedFilter, driver="blklogwrites"):
    """QEMU's filter. It also takes marks (``mark``), as dm-log-writes does."""

    class Options(NodeOptions):
        file: BlockdevRef
        log: BlockdevRef
        log_sector_size: Size | UnsetType = UNSET
        log_append: bool = False
        log_super_update_interval: Unsigned = 4096

    options: Options
    sector_size = 0
    position = 1  # the sector of the log where the next entry goes
    entries = 0
    ready = False

    # ---- opening and closing ----

    async def open(self) -> None:
        options = self.options
        if not options.log_super_update_interval:
            raise self.error("Invalid log superblock update interval 0")
        if options.log_append and options.log_sector_size is not UNSET:
            raise self.error("log-append and log-sector-size are mutually exclusive")
        await self.attach("file", options.file)
        changes = Perm.NONE if self.read_only else Perm.WRITE | Perm.RESIZE
        shared = Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED
        log = await self.attach("log", options.log, perm=Perm.CONSISTENT_READ | changes, shared=shared)
        size = options.log_sector_size
        self.sector_size = DEFAULT_SECTOR if size is UNSET else size
        try:
            layout.check_sector_size(self.sector_size)
            if options.log_append and log.size:
                await self._find_end(log)
        except ValueError as error:
            raise self.error(str(error)) from None
        self._last: asyncio.Future[None] | None = None
        self.aligned = Aligned(_Logged(self), self.sector_size)
        self.ready = True

    async def _find_end(self, log: Node) -> None:
        """Walks over the entries of a log that is there."""
        head = layout.unpack_super(await log.read(0, layout.MIN_SECTOR))
        self.sector_size, self.entries = head.sector_size, head.entries
        for index in range(head.entries):
            offset = self.position * self.sector_size
            if offset >= log.size:
                raise ValueError(f"the log ends before log entry {index} of {head.entries}")
            entry = layout.unpack_head(await log.read(offset, layout.ENTRY_SIZE), index)
            self.position += 1 + entry.data_sectors

    async def close(self) -> None:
        if self.ready and not self.read_only:
            async with self._turn():
                await self._write_super()

    @property
    def log(self) -> Node:
        return self.children["log"].node

    # ---- requests ----

    async def read(self, offset: int, length: int) -> bytes:
        return await self.below.read(offset, length)

    async def flush(self) -> None:
        async with self._turn(self.below.flush()):
            await self._append(Head(0, 0, Flag.FLUSH))
            await self._write_super()

    async def mark(self, name: str) -> None:
        """Puts a name into the log, for the replay to stop at."""
        inline = name.encode()
        if len(inline) > self.sector_size - layout.ENTRY_SIZE:
            raise self.error(f"a mark of {len(inline)} bytes is too long")
        async with self._turn():
            await self._append(Head(0, 0, Flag.MARK, len(inline)), inline=inline)
            await self._write_super()

    # ---- the log ----

    async def log_change(self, offset: int, length: int, flags: Flag, data: bytes | None) -> None:
        """Logs a write that is complete, or of zeros (no data), or a discard (by flags)."""
        head = Head(offset // self.sector_size, length // self.sector_size, flags)
        async with self._turn():
            await self._append(head, data)
            if self.entries % self.options.log_super_update_interval == 0:
                await self._write_super()

    @contextlib.asynccontextmanager
    async def _turn(self, work: Coroutine[Any, Any, None] | None = None) -> AsyncIterator[None]:
        """A place in the log, in the order in which turns are asked for; ``work`` is done before it comes.

        A flush asks when it begins, so that what ends meanwhile waits, and is logged behind it.
        """
        before, self._last = self._last, asyncio.get_running_loop().create_future()
        mine = self._last
        try:
            if work is not None:
                await work
            if before is not None:
                await before
            yield
        finally:
            if before is not None:  # a flush that failed: those behind it wait for those before it
                await before
            mine.set_result(None)

    async def _append(self, head: Head, data: bytes | None = None, inline: bytes = b"") -> None:
        offset = self.position * self.sector_size
        entry = head.pack(self.sector_size, inline)
        await self.log.write(offset, entry + (data or b""))
        if head.data_sectors and data is None:
            await self.log.write_zeroes(offset + len(entry), head.sectors * self.sector_size)
        self.position += 1 + head.data_sectors
        self.entries += 1

    async def _write_super(self) -> None:
        await self.log.write(0, Super(self.entries, self.sector_size).pack())
        await self.log.flush()


class _Logged:
    """Whole sectors: does the change, then logs it."""

    def __init__(self, node: BlkLogWrites) -> None:
        self.node = node

    async def read(self, offset: int, length: int) -> bytes:
        return await self.node.below.read(offset, length)

    async def write(self, offset: int, data: bytes, flags: int) -> None:
        fua = Flag.FUA if flags & FUA else Flag.NONE
        async with self._logging(offset, len(data), fua, data):
            await self.node.below.write(offset, data, flags)

    async def write_zeroes(self, offset: int, length: int, flags: int) -> None:
        fua = Flag.FUA if flags & FUA else Flag.NONE
        async with self._logging(offset, length, fua, None):
            await self.node.below.write_zeroes(offset, length, flags)

    async def discard(self, offset: int, length: int) -> None:
        async with self._logging(offset, length, Flag.DISCARD, None):
            await self.node.below.discard(offset, length)

    @contextlib.asynccontextmanager
    async def _logging(
        self, offset: int, length: int, flags: Flag, data: bytes | None
    ) -> AsyncIterator[None]:
        """Logs what the body does; what it failed to do may be there in part, but is not durable."""
        try:
            yield
        except OSError:
            await self.node.log_change(offset, length, flags & ~Flag.FUA, data)
            raise
        await self.node.log_change(offset, length, flags, data)
