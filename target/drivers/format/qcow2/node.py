# SPDX-License-Identifier: Apache-2.0
"""qcow2: opening an image with its backing chain, the map that serves it, and a clean close."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from msgspec import UNSET

from target.datapath import Object
from target.drivers.format.qcow2 import spec
from target.drivers.format.qcow2.allocate import Allocator
from target.drivers.format.qcow2.backing import backing_options
from target.drivers.format.qcow2.compressed import CompressedClusters
from target.drivers.format.qcow2.create import Plan, create
from target.drivers.format.qcow2.describe import describe
from target.drivers.format.qcow2.errors import ImageCorrupted, ImageError
from target.drivers.format.qcow2.flush import Discard
from target.drivers.format.qcow2.image import Image, read_header
from target.drivers.format.qcow2.options import (
    REOPENABLE,
    TUNING,
    Caches,
    Qcow2CreateOptions,
    Qcow2Options,
    caches,
    check_options,
)
from target.drivers.format.qcow2.rebuild import rebuild
from target.drivers.format.qcow2.resize import Resizer, check_size
from target.drivers.format.qcow2.serving import Serving
from target.drivers.format.qcow2.store import Store
from target.graph.describe import Description
from target.graph.errors import BlockError
from target.graph.node import ImageOptions, Node, NodeOptions, Settings
from target.graph.options import Ref

if TYPE_CHECKING:
    from target.graph.change import Change


class Qcow2(Node, driver="qcow2"):
    """A qcow2 image of version 2 or 3 in the child ``file``, over the child ``backing`` if it has one."""

    is_format = True
    may_be_inactive = True
    supports_backing = True
    reopenable = REOPENABLE
    Options = Qcow2Options
    tuning = TUNING
    CreateOptions = Qcow2CreateOptions
    options: Qcow2Options
    grant_limit: int | None = None  # clusters in the grant pool at most; tests make it small

    image: Image
    caches: Caches
    compressed: CompressedClusters
    serving: Serving

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
        await self._load(file)
        await self._open_backing(file)

    async def _load(self, file: Node) -> None:
        store = Store(file, _is_growable(file))
        try:
            header = await read_header(store)
            check_options(self.options, header)
            self.caches = caches(self.options, header)
            self.image = Image(self.label, store, header)
            self.image.tell_broken = self._tell_broken
            self.compressed = CompressedClusters(store, header)
            await self.image.open()
            await self._open_for_writing()
        except ImageError as error:
            raise self.error(str(error)) from None

    async def _open_for_writing(self) -> None:
        """Leaves the node read-only, with auto-read-only, when the image may not be written."""
        if self.read_only or not self.active:
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
        self.serving = self._make_serving()
        if self.image.allocator is not None:
            self.serving.start_writing(self._discard(), self.grant_limit)
        return self.serving.map

    def _make_serving(self) -> Serving:
        backing = self.children.get("backing")
        file = self.children["file"].node.object
        below = None if backing is None else backing.node.object
        return Serving(self.datapath, self.image, self.compressed, self.caches, file, below)

    @property
    def cluster_size(self) -> int:
        return self.image.header.cluster_size

    def _discard(self) -> Discard:
        if self.options.pass_discard_other is True:
            return Discard.ALL
        passed = self.options.pass_discard_request
        wanted = self.settings.discard == "unmap" if passed is UNSET else passed
        return Discard.REQUEST if wanted else Discard.NONE

    def _tell_broken(self, message: str) -> None:
        event = ImageCorrupted(device="", node_name=self.name, msg=message, fatal=not self.read_only)
        self.graph.events.send(event)

    def describe(self) -> Description:
        return describe(self.image, _filename(self.children["file"].node))

    def counters(self) -> dict[str, Any]:
        return super().counters() | {"table_bytes": self.serving.map.bytes}

    async def quiesce(self) -> None:
        await self.serving.quiesce()

    async def resume(self) -> None:
        self.serving.resume()

    # ---- changes while it is used ----

    async def resize(self, change: Change, size: int) -> None:
        serving = self.serving
        if serving.space is None:
            raise self.error("Image is read-only")
        if serving.map.size != self.image.header.size:
            raise self.error("it cannot be resized again in the change that makes it smaller")
        resizer = Resizer(self.image, serving.space, serving.map.read, self._backing_size)
        try:
            check_size(self.image.header, size)
            await (resizer.grow if size > self.size else resizer.shrink)(change, size)
        except ImageError as error:
            raise self.error(str(error)) from None
        except OSError as error:
            raise BlockError.from_os(f"{self.label}: Failed to resize the image to {size}", error) from None
        serving.loader.budget = caches(self.options, replace(self.image.header, size=size)).l2

    def _backing_size(self) -> int:
        backing = self.children.get("backing")
        return 0 if backing is None else backing.node.size

    async def change_backing_file(self, change: Change, name: str, format: str | None) -> None:
        """Another backing file name in the image; what is open stays. An empty name: none."""
        if self.serving.space is None:
            raise self.error("Image is read-only")
        try:
            async with self.serving.space.write_back.lock:
                change.undo(await self.image.rename_backing(name or None, format if name else None))
        except (ImageError, OSError) as error:
            reason = os.strerror(error.errno or 0) if isinstance(error, OSError) else str(error)
            raise self.error(f"Could not change backing file to '{name}': {reason}") from None

    def relink(self, role: str, old: Object | None, new: Object | None) -> None:
        if role == "backing":
            self.serving.map.set_child(1, new)
            self.serving.faults.has_backing = new is not None
            return
        super().relink(role, old, new)
        file = self.children["file"].node
        self.image.store.use(file, _is_growable(file))
        if self.image.allocator is not None:
            self.image.allocator.fit()

    async def reopen(self, change: Change, options: NodeOptions, settings: Settings) -> None:
        assert isinstance(options, Qcow2Options)
        change.undo(self._tune)
        await super().reopen(change, options, settings)
        if self.children["file"].node.read_only and settings.auto_read_only:
            self.read_only = True
        try:
            check_options(options, self.image.header)
            await self._reopen(change, caches(options, self.image.header))
        except ImageError as error:
            raise self.error(str(error)) from None
        except OSError as error:
            raise BlockError.from_os(f"{self.label}: Could not reopen the image", error) from None
        self._tune()

    async def _reopen(self, change: Change, wanted: Caches) -> None:
        allocator = self.image.allocator
        other_map = wanted.slice_bits != self.caches.slice_bits
        if allocator is not None and (self.read_only or other_map):
            await self._stop_writing(change, allocator)
        if other_map:
            await self._replace_map(change, wanted)
        if not self.read_only and self.image.allocator is None:
            await self._start_writing(change, allocator)

    def _tune(self) -> None:
        """Puts options in force that need nothing else; also when a change of them is undone."""
        self.caches = caches(self.options, self.image.header)
        self.serving.loader.budget = self.caches.l2
        allocator = self.image.allocator
        if allocator is not None:
            allocator.check_overlap = self.options.overlap_check != "none"
            allocator.refcounts.cache_bytes = self.caches.refcount
        if self.serving.space is not None:
            self.serving.space.write_back.discard = self._discard()

    async def _stop_writing(self, change: Change, allocator: Allocator) -> None:
        def start_again() -> None:
            self.image.allocator = allocator
            self.serving.start_writing(self._discard(), self.grant_limit)

        change.undo(start_again)
        await self.serving.stop_writing()
        self.image.allocator = None

    async def _start_writing(self, change: Change, allocator: Allocator | None) -> None:
        """``allocator``: the one that was in use until now; what it knows is still true."""
        header = self.image.header

        async def stop_again() -> None:
            await self.serving.stop_writing()
            self.image.allocator = None
            if self.image.header.autoclear_features != header.autoclear_features:
                await self.image.set_features(header.incompatible_features, header.autoclear_features)

        change.refresh([self])  # locks, before the file is written to
        change.undo(stop_again)
        self.image.allocator = allocator
        if allocator is None:
            await self._open_for_writing()
        if self.image.allocator is not None:
            self.serving.start_writing(self._discard(), self.grant_limit)

    async def _replace_map(self, change: Change, wanted: Caches) -> None:
        """Another map, whose slices have another size."""
        old, self.caches = self.serving, wanted
        made = self._make_serving()
        change.undo(lambda: setattr(self, "serving", old))
        await change.replace_object(self, made.map)
        self.serving = made
        change.later(old.loader.close)

    async def inactivate(self, change: Change) -> None:
        if self.image.allocator is not None:
            await self._stop_writing(change, self.image.allocator)

    async def activate(self, change: Change) -> None:
        before = self.image, self.compressed, self.caches, self.serving

        def use_again() -> None:
            self.image, self.compressed, self.caches, self.serving = before

        change.undo(use_again)
        try:
            await self._load(self.children["file"].node)
        except OSError as error:
            raise BlockError.from_os(f"{self.label}: Could not activate the image", error) from None
        made = self.make_object()
        change.undo(self.serving.stop_writing)  # also when it does not get to the other's place
        await change.replace_object(self, made)
        change.undo(self.serving.stop_writing)  # before it is released
        change.later(before[3].loader.close)

    # ---- closing ----

    async def close(self) -> None:
        if self.opened:
            await self.serving.close()


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
