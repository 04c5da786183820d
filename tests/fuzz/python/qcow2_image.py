# SPDX-License-Identifier: Apache-2.0
"""Fuzz target: a qcow2 image in memory is opened, its tables loaded, its compressed clusters read, and
clusters allocated in it; a dirty one is repaired first. Only ImageError, CorruptError and OSError may come
out.

What the map would be given points into the file and, in an image open for writing, at no metadata. An
allocation never takes a cluster twice or where metadata is known to be, and leaves the header's pointers
alone.

Input: a base image and changes to it (offset, length, bytes); or, with the highest bit, the whole image.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import atheris
import numpy as np

from tests.fuzz.python.common import Input, main

with atheris.instrument_imports(include=["target.drivers.format.qcow2"]):
    from target.datapath import ENTRY_DATA, ENTRY_HOST
    from target.drivers.format.qcow2.allocate import Allocator
    from target.drivers.format.qcow2.compressed import CompressedClusters
    from target.drivers.format.qcow2.errors import ImageError
    from target.drivers.format.qcow2.header import Header
    from target.drivers.format.qcow2.image import Image, read_header
    from target.drivers.format.qcow2.loader import Loader
    from target.drivers.format.qcow2.rebuild import rebuild
    from target.drivers.format.qcow2.store import Entries, Store
    from target.drivers.format.qcow2.table import hosts_of

from tests.fuzz.python.images import BASES

LOOP = asyncio.new_event_loop()
MAX_FILE = 1 << 26  # a file that grew past this is a finding


class Memory:
    """The image file."""

    def __init__(self, data: bytearray) -> None:
        self.data = data

    @property
    def size(self) -> int:
        return len(self.data)

    async def read(self, offset: int, length: int) -> bytes:
        assert offset >= 0 and offset + length <= len(self.data)
        return bytes(self.data[offset : offset + length])

    async def write(self, offset: int, data: bytes) -> None:
        assert offset >= 0
        if offset + len(data) > MAX_FILE:
            raise OSError(27, "too large")
        if offset + len(data) > len(self.data):
            self.data.extend(bytes(offset + len(data) - len(self.data)))
        self.data[offset : offset + len(data)] = data

    async def write_zeroes(self, offset: int, length: int) -> None:
        await self.write(offset, bytes(length))

    async def discard(self, offset: int, length: int) -> None:
        await self.write(offset, bytes(length))

    async def flush(self) -> None:
        pass

    async def truncate(self, size: int) -> None:
        del self.data[size:]

    def debug_event(self, event: str) -> None:
        pass


class Map:
    """Takes slices, as the datapath's would."""

    bytes = 0

    def __init__(self) -> None:
        self.loaded: dict[int, Entries] = {}

    def load(self, slice: int, entries: Entries, writable: bool) -> bool:
        self.loaded[slice] = entries
        return True

    def set_writable(self, slice: int, writable: bool) -> None:
        if slice not in self.loaded:
            raise KeyError(slice)


def take_image(input: Input) -> bytearray:
    mode = input.number()
    if mode & 0x80:
        return bytearray(input.rest())
    disk = bytearray(BASES[mode % len(BASES)])
    while input.left:
        offset = input.number(2) % len(disk)
        data = input.take(1 + input.number() % 16)
        disk[offset : offset + len(data)] = data[: len(disk) - offset]
    return disk


def check_entries(image: Image, entries: Entries) -> None:
    kinds = entries & np.uint64(7)
    hosted = (kinds == ENTRY_DATA) | ((entries & np.uint64(ENTRY_HOST)) != 0)
    hosts = hosts_of(entries[hosted])
    assert bool((hosts < np.uint64(image.store.size)).all())
    assert not bool((hosts & np.uint64(image.header.cluster_size - 1)).any())
    if image.allocator is not None:
        assert not bool(image.metadata.contains(hosts >> np.uint64(image.header.cluster_bits)).any())


async def load_tables(image: Image) -> None:
    face: Any = Map()
    slice_bits = min(5, image.header.l2_bits)
    loader = Loader(image, face, slice_bits, 1 << 30)
    compressed = CompressedClusters(image.store, image.header)
    slices = -(-image.header.size >> image.header.cluster_bits + slice_bits)
    wanted = {0, 1, 2, 3, slices - 1}
    for slice in sorted(n for n in wanted if 0 <= n < slices):
        try:
            await loader.load(slice)
            check_entries(image, face.loaded[slice])
            await read_compressed(compressed, await loader.read_raw(slice))
            if image.allocator is not None and slice == 1:
                await loader.reserve(loader.l1_index(slice))
        except OSError:  # CorruptError is one
            continue
    loader.close()


async def read_compressed(compressed: CompressedClusters, raw: Entries) -> None:
    packed = raw[(raw >> np.uint64(62) & np.uint64(1)) == 1]
    for entry in packed[:3].tolist():
        try:
            assert len(await compressed.read(entry)) == compressed.header.cluster_size
        except OSError:
            continue


async def allocate(image: Image, allocator: Allocator) -> None:
    taken: set[int] = set()
    for want in (1, 3, 40):
        run = await allocator.take(want)
        clusters = set(range(run.first, run.first + run.length))
        assert 0 < run.length <= want and not clusters & taken
        assert not image.metadata.overlaps(run.first, run.length)
        taken |= clusters
    table = await allocator.take_table() >> image.header.cluster_bits
    assert table not in taken
    await allocator.give(min(taken), 1)
    await allocator.write_back()


def pointers(header: Header) -> tuple[int, ...]:
    return header.version, header.cluster_bits, header.size, header.l1_size, header.l1_table_offset


async def exercise(store: Store) -> None:
    header = await read_header(store)
    image = Image("node 'fuzz'", store, header)
    await image.open()
    await load_tables(image)
    refcounts = await image.open_for_writing(1 << 16)
    if header.dirty:
        await rebuild(image, refcounts)
        await image.set_features(0)
    assert image.allocator is not None
    await load_tables(image)
    with contextlib.suppress(OSError):
        await allocate(image, image.allocator)
    assert pointers(await read_header(store)) == pointers(header)


def test_one_input(data: bytes) -> None:
    store = Store(Memory(take_image(Input(data))), True)
    try:
        LOOP.run_until_complete(exercise(store))
    except (ImageError, OSError) as error:
        assert "\n" not in str(error)


if __name__ == "__main__":
    main(test_one_input)
