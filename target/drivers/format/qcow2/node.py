# SPDX-License-Identifier: Apache-2.0
"""qcow2: opening an image with its backing chain, the map that serves it, and a clean close."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from msgspec import UNSET

from target.datapath import Map, Object
from target.drivers.format.qcow2 import spec
from target.drivers.format.qcow2.backing import backing_options
from target.drivers.format.qcow2.compressed import CompressedClusters
from target.drivers.format.qcow2.create import Plan, create
from target.drivers.format.qcow2.describe import describe
from target.drivers.format.qcow2.errors import ImageError
from target.drivers.format.qcow2.faults import Faults
from target.drivers.format.qcow2.flush import Discard, WriteBack
from target.drivers.format.qcow2.grants import Grants
from target.drivers.format.qcow2.image import Image, read_header
from target.drivers.format.qcow2.loader import Loader
from target.drivers.format.qcow2.options import (
    TUNING,
    Caches,
    Qcow2CreateOptions,
    Qcow2Options,
    caches,
    check_options,
)
from target.drivers.format.qcow2.rebuild import rebuild
from target.drivers.format.qcow2.resize import Resizer, check_size
from target.drivers.format.qcow2.store import Store
from target.graph.describe import Description
from target.graph.errors import BlockError
from target.graph.node import ImageOptions, Node
from target.graph.options import Ref

if TYPE_CHECKING:
    from target.graph.change import Change


class Qcow2(Node, driver="qcow2"):
    """A qcow2 image of version 2 or 3 in the child ``file``, over the child ``backing`` if it has one."""

    is_format = True
    Options = Qcow2Options
    tuning = TUNING
    CreateOptions = Qcow2CreateOptions
    options: Qcow2Options
    grant_limit: int | None = None  # clusters in the grant pool at most; tests make it small

    image: Image
    caches: Caches
    compressed: CompressedClusters
    map: Map | None = None
    loader: Loader | None = None
    grants: Grants | None = None
    write_back: WriteBack | None = None
    faults: Faults
    marking: asyncio.Task[None] | None = None

    @classmethod
    async def create(cls, options: ImageOptions) -> None:
        assert isinstance(options, Qcow2CreateOptions)
        plan = Plan(
            size=-(-options.size // 512) * 512,
            cluster_size=options.cluster_size,
            version=3 if options.version == "v3" else 2,
            refcount_bits=options.refcount_bits,
            lazy_refcounts=options.lazy_refcounts,
            backing_file=options.backing_file,
            backing_format=options.backing_fmt,
        )
        try:
            await asyncio.to_thread(create, options.filename, plan)
        except ImageError as error:
            raise BlockError(f"image '{options.filename}': {error}") from None

    # ---- opening ----

    async def open(self) -> None:
        file = await self.attach("file", self.options.file)
        store = Store(file, _is_growable(file))
        try:
            header = await read_header(store)
            check_options(self.options, header)
            self.caches = caches(self.options, header)
            self.image = Image(self.label, store, header)
            self.compressed = CompressedClusters(store, header)
            await self.image.open()
            await self._open_for_writing()
        except ImageError as error:
            raise self.error(str(error)) from None
        await self._open_backing(file)

    async def _open_for_writing(self) -> None:
        """Leaves the node read-only, with auto-read-only, when the image may not be written."""
        if self.read_only:
            return
        try:
            _check_writable(self.image)
            refcounts = await self.image.open_for_writing(self.caches.refcount)
            assert self.image.allocator is not None
            self.image.allocator.check_overlap = self.options.overlap_check != "none"
            if self.image.header.dirty:
                await rebuild(self.image, refcounts)
            await self._clear_features()
        except ImageError as error:
            self.image.allocator = None
            if not self.settings.auto_read_only:
                raise ImageError(f"{error} (read-only=on opens it for reading)") from None
            self.read_only = True

    async def _clear_features(self) -> None:
        """Clears the dirty bit, as the counts are right, and autoclear bits, whose promise nobody keeps."""
        header = self.image.header
        if header.dirty or header.autoclear_features:
            await self.image.set_features(0)

    async def _open_backing(self, file: Node) -> None:
        ref: Ref | None
        if self.options.backing is UNSET:
            try:
                overlay = _filename(file)
                ref = await asyncio.to_thread(backing_options, self.image.header, overlay)
            except ImageError as error:
                raise self.error(str(error)) from None
            except OSError as error:
                name = self.image.header.backing_file
                what = f"{self.label}: Could not open backing file '{name}'"
                raise BlockError.from_os(what, error) from None
        else:
            ref = self.options.backing
        if ref is not None:
            # In a task of its own, so that a deep chain does not make a deep stack.
            await asyncio.create_task(self._attach_backing(ref))

    async def _attach_backing(self, ref: Ref) -> None:
        try:
            await self.attach("backing", ref)
        except BlockError as error:
            if self.label in str(error):
                raise
            raise self.error(f"backing: {error}") from None

    # ---- serving ----

    def make_object(self) -> Object:
        header = self.image.header
        backing = self.children.get("backing")
        self.map = map = self.datapath.map(
            granule_bits=header.cluster_bits,
            slice_bits=self.caches.slice_bits,
            size=header.size,
            child=self.children["file"].node.object,
            backing=backing.node.object if backing else None,
            handler=lambda fault: self.faults.handle(fault),
            on_low_grants=lambda left: self.grants.on_low(left) if self.grants else None,
        )
        if header.version < 3:
            map.set_zero_entries(False)
        self.loader = Loader(self.image, map, self.caches.slice_bits, self.caches.l2)
        if self.image.allocator is not None:
            self._make_writable(map, self.loader)
        self.faults = Faults(
            self.image, map, self.loader, self.compressed, self.grants, self.write_back, backing is not None
        )
        return map

    @property
    def cluster_size(self) -> int:
        return self.image.header.cluster_size

    def _make_writable(self, map: Map, loader: Loader) -> None:
        assert self.image.allocator is not None
        self.grants = Grants(self.image.allocator, map, self.grant_limit)
        self.write_back = WriteBack(self.image, map, loader, self.grants, self._discard())
        self.grants.on_pressure = loader.on_pressure = self.write_back.request
        self.image.on_broken = self._broken

    # ---- resizing ----

    async def resize(self, change: Change, size: int) -> None:
        if self.write_back is None:
            raise self.error("Image is read-only")
        assert self.map is not None and self.loader is not None and self.grants is not None
        resizer = Resizer(
            self.image, self.map, self.loader, self.grants, self.write_back, self.map.read, self._backing_size
        )
        try:
            check_size(self.image.header, size)
            await (resizer.grow if size > self.size else resizer.shrink)(change, size)
        except ImageError as error:
            raise self.error(str(error)) from None
        except OSError as error:
            raise BlockError.from_os(f"{self.label}: Failed to resize the image to {size}", error) from None
        self.loader.budget = caches(self.options, replace(self.image.header, size=size)).l2

    def _backing_size(self) -> int:
        backing = self.children.get("backing")
        return 0 if backing is None else backing.node.size

    def _discard(self) -> Discard:
        if self.options.pass_discard_other is True:
            return Discard.ALL
        passed = self.options.pass_discard_request
        wanted = self.settings.discard == "unmap" if passed is UNSET else passed
        return Discard.REQUEST if wanted else Discard.NONE

    def _broken(self) -> None:
        self.marking = asyncio.ensure_future(self._mark_corrupt())

    async def _mark_corrupt(self) -> None:
        """No slice may be changed any more, and other programs see that the image needs a repair."""
        assert self.map is not None
        for slice in range(self.map.slices):
            with contextlib.suppress(KeyError):  # not loaded
                self.map.set_writable(slice, False)
            if slice % 4096 == 4095:
                await asyncio.sleep(0)
        await self.map.synchronize()
        if self.image.header.version >= 3:
            with contextlib.suppress(OSError):
                await self.image.set_features(spec.INCOMPAT_CORRUPT)

    def describe(self) -> Description:
        return describe(self.image, _filename(self.children["file"].node))

    def counters(self) -> dict[str, Any]:
        return super().counters() | {"table_bytes": self.map.bytes if self.map else 0}

    # ---- closing ----

    async def close(self) -> None:
        if self.loader is not None:
            self.loader.close()
        if self.marking is not None:
            await self.marking
        if self.write_back is not None:
            write_back, self.write_back = self.write_back, None
            await write_back.close()


def _check_writable(image: Image) -> None:
    header = image.header
    if header.corrupt:
        raise ImageError("the image is marked corrupt; repair it with 'qemu-img check -r all' to write to it")
    if header.has_bitmaps or header.autoclear_features & spec.AUTOCLEAR_BITMAPS:
        raise ImageError("the image has persistent bitmaps, which are not supported for writing")


def _is_growable(node: Node) -> bool:
    """Whether clusters past the end of the image can be had by writing, and then read as zeros."""
    if node.is_filter and "file" in node.children:
        return _is_growable(node.children["file"].node)
    if node.driver == "raw" and "file" in node.children:
        return getattr(node.options, "size", UNSET) is UNSET and _is_growable(node.children["file"].node)
    return node.driver == "file"


def _filename(node: Node) -> str | None:
    """The path of what the node lies in, for relative names; None when there is none."""
    while not node.is_protocol and "file" in node.children:
        node = node.children["file"].node
    name = getattr(node.options, "filename", None)
    return name if isinstance(name, str) else None
