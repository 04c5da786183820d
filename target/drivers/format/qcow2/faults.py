# SPDX-License-Identifier: Apache-2.0
"""Answers the datapath's faults for one image: loads, compressed clusters, an empty grant pool, flushes."""

from __future__ import annotations

import errno

from target.datapath import ENTRY_FAULT, Fault, Op, Reason
from target.drivers.format.qcow2 import spec
from target.drivers.format.qcow2.compressed import CompressedClusters
from target.drivers.format.qcow2.errors import CorruptError
from target.drivers.format.qcow2.image import Image
from target.drivers.format.qcow2.loader import Loader
from target.drivers.format.qcow2.space import Space
from target.drivers.format.qcow2.store import MapFace
from target.drivers.format.qcow2.table import DATA_OWN, UNALLOCATED, ZERO_PLAIN, entry


class Faults:
    """The fault handler of one map. ``space`` is set while the image may be written."""

    def __init__(
        self,
        image: Image,
        map: MapFace,
        loader: Loader,
        compressed: CompressedClusters,
        has_backing: bool,
    ) -> None:
        self.image = image
        self.map = map
        self.loader = loader
        self.compressed = compressed
        self.space: Space | None = None
        self.bits = image.header.cluster_bits
        self.has_backing = has_backing

    @property
    def zero_entry(self) -> int | None:
        """What a cluster becomes that is zeroed; None: there is no word for it in this image."""
        word: int = ZERO_PLAIN if self.image.header.version >= 3 else UNALLOCATED
        return None if word == UNALLOCATED and self.has_backing else word

    async def handle(self, fault: Fault) -> None:
        try:
            await self._handle(fault)
        except CorruptError as error:
            self.image.mark_broken(error.message)
            fault.done(-errno.EIO)
        except OSError as error:
            fault.done(-(error.errno or errno.EIO))

    async def _handle(self, fault: Fault) -> None:
        match fault.reason:
            case Reason.LOAD:
                await self.loader.load(fault.offset >> self.bits >> self.loader.slice_bits)
                fault.retry()
            case Reason.ENTRY:
                await self._entry(fault)
            case Reason.WRITE if self.space is not None and self.image.writable:
                index = fault.offset >> self.bits >> self.image.header.l2_bits
                await self.space.take(lambda: self.loader.reserve(index))
                fault.retry()
            case Reason.GRANT if self.space is not None and not self.image.broken:
                await self.space.take(self.space.grants.refill)
                fault.retry()
            case Reason.FLUSH if self.space is not None:
                await self.space.write_back.flush()
                fault.done(0)
            case _:
                fault.done(-errno.EIO if self.image.broken else -errno.EPERM)

    # ---- entries that the datapath cannot follow: compressed, or invalid ----

    async def _entry(self, fault: Fault) -> None:
        granule = fault.offset >> self.bits
        if fault.op in (Op.WRITE, Op.ZEROES, Op.DISCARD) and not self.image.writable:
            fault.done(-errno.EIO if self.image.broken else -errno.EPERM)
            return
        raw = await self._raw_entry(granule)
        if not self._is_fault(granule):
            fault.retry()
        elif not raw & spec.OFLAG_COMPRESSED:
            raise CorruptError(f"the L2 entry of offset {granule << self.bits:#x} is invalid ({raw:#x})")
        elif fault.op == Op.STATUS:
            fault.put_extent(fault.length, 0)
            fault.done(0)
        elif fault.op == Op.READ:
            await self._read(fault, granule, raw)
        elif fault.op in (Op.WRITE, Op.ZEROES, Op.DISCARD):
            await self._change(fault, granule, raw)
        else:
            fault.done(0)

    def _is_fault(self, granule: int) -> bool:
        """Whether the entry is still loaded and still FAULT: then what was read before is true."""
        entries = self.map.get(granule)
        return entries is not None and int(entries[0]) == ENTRY_FAULT

    async def _raw_entry(self, granule: int) -> int:
        index = granule >> self.image.header.l2_bits
        offset = self.loader.check_table(index)
        if not offset:
            return 0
        at = (granule & (1 << self.image.header.l2_bits) - 1) << 3
        return int.from_bytes(await self.image.store.read(offset + at, 8), "big")

    async def _read(self, fault: Fault, granule: int, raw: int) -> None:
        freed = self.image.freed
        data = await self.compressed.read(raw)
        if freed != self.image.freed and not self._is_fault(granule):
            fault.retry()
            return
        start = fault.offset & (1 << self.bits) - 1
        fault.put_data(0, memoryview(data)[start : start + fault.length])
        fault.done(0)

    async def _change(self, fault: Fault, granule: int, raw: int) -> None:
        """Makes the cluster a standard one; then the datapath does the rest."""
        assert self.space is not None
        index = granule >> self.image.header.l2_bits
        if not self.image.may_change(index):
            await self.space.take(lambda: self.loader.reserve(index))
        if fault.op != Op.WRITE:
            if self._covers(fault, granule):
                if self.zero_entry is not None:
                    self._replace(granule, self.zero_entry)
                    fault.retry()
                    return
            elif fault.op == Op.DISCARD:
                fault.done(0)
                return
        await self._unpack(granule, raw)
        fault.retry()

    def _covers(self, fault: Fault, granule: int) -> bool:
        """Whether the request covers all of the cluster that is in the image."""
        start = granule << self.bits
        end = min(start + (1 << self.bits), self.image.header.size)
        return fault.offset <= start and fault.offset + fault.length >= end

    async def _unpack(self, granule: int, raw: int) -> None:
        """Decompresses the cluster into a new one. Whoever is first wins."""
        assert self.space is not None
        grants, allocator = self.space.grants, self.space.allocator
        data = await self.compressed.read(raw)
        run = await self.space.take(lambda: allocator.take(1))
        host = run.first << self.bits
        try:
            await self.image.store.write(host, data)
        except BaseException:
            await allocator.give(run.first, 1)
            raise
        if self._replace(granule, entry(host, DATA_OWN)):
            grants.outstanding.add(run.first)
        else:
            await allocator.give(run.first, 1)

    def _replace(self, granule: int, new: int) -> bool:
        """False when the entry has changed or was dropped meanwhile: the retry finds out."""
        try:
            return self.map.set(granule, ENTRY_FAULT, new)
        except (BlockingIOError, KeyError):
            return False
