# SPDX-License-Identifier: Apache-2.0
"""The datapath's map of one open image and what answers for it. Writing can be turned on and off."""

from __future__ import annotations

import asyncio
import contextlib

from target.datapath import Datapath, Fault, Object
from target.drivers.format.qcow2 import spec
from target.drivers.format.qcow2.compressed import CompressedClusters
from target.drivers.format.qcow2.faults import Faults
from target.drivers.format.qcow2.flush import Discard, WriteBack
from target.drivers.format.qcow2.grants import Grants
from target.drivers.format.qcow2.image import Image
from target.drivers.format.qcow2.loader import Loader
from target.drivers.format.qcow2.options import Caches
from target.drivers.format.qcow2.space import Space


class Serving:
    """``grants`` and ``write_back`` exist while the image may be written."""

    def __init__(
        self,
        datapath: Datapath,
        image: Image,
        compressed: CompressedClusters,
        caches: Caches,
        child: Object,
        backing: Object | None,
    ) -> None:
        header = image.header
        self.image = image
        self.map = datapath.map(
            granule_bits=header.cluster_bits,
            slice_bits=caches.slice_bits,
            size=header.size,
            child=child,
            backing=backing,
            handler=self._handle,
            on_low_grants=self._on_low_grants,
        )
        if header.version < 3:
            self.map.set_zero_entries(False)
        self.loader = Loader(image, self.map, caches.slice_bits, caches.l2)
        self.faults = Faults(image, self.map, self.loader, compressed, backing is not None)
        self.space: Space | None = None  # while the image may be written
        self._marking: asyncio.Task[None] | None = None

    async def _handle(self, fault: Fault) -> None:
        await self.faults.handle(fault)

    def _on_low_grants(self, left: int) -> None:
        if self.space is not None:
            self.space.grants.on_low(left)

    # ---- writing ----

    def start_writing(self, discard: Discard, grant_limit: int | None = None) -> None:
        """The image has an allocator. ``grant_limit``: clusters in the grant pool at most."""
        image = self.image
        assert image.allocator is not None
        self.loader.check_loaded()
        grants = Grants(image.allocator, self.map, grant_limit)
        write_back = WriteBack(image, self.map, self.loader, grants, discard)
        grants.on_pressure = self.loader.on_pressure = write_back.request
        self.space = self.faults.space = Space(write_back)
        image.on_broken = self._on_broken

    async def stop_writing(self) -> None:
        """All is on disk and nothing is granted or reserved afterwards. OSError: then some of it may be."""
        if self._marking is not None:
            await self._marking
        if self.space is None:
            return
        await self.space.write_back.close()
        self.space = self.faults.space = None
        self.loader.on_pressure = self.image.on_broken = lambda: None
        self._protect(self.map.loaded())

    def _protect(self, slices: list[int]) -> None:
        for slice in slices:
            with contextlib.suppress(KeyError):  # dropped meanwhile
                self.map.set_writable(slice, False)

    async def close(self) -> None:
        self.loader.close()
        await self.stop_writing()

    # ---- what goes on by itself ----

    async def quiesce(self) -> None:
        """Nothing is written, granted or dropped until ``resume``, but on request."""
        self.loader.quiet = True
        if self.space is not None:
            await self.space.write_back.quiesce()

    def resume(self) -> None:
        self.loader.quiet = False
        if self.space is not None:
            self.space.write_back.resume()
        self.loader.trim()

    # ---- a corrupt image ----

    def _on_broken(self) -> None:
        self._marking = asyncio.ensure_future(self._mark_corrupt())

    async def _mark_corrupt(self) -> None:
        """No slice may be changed any more, and other programs see that the image needs a repair."""
        self._protect(self.map.loaded())
        await self.map.synchronize()
        if self.image.header.version >= 3:
            with contextlib.suppress(OSError):
                await self.image.set_features(spec.INCOMPAT_CORRUPT)
