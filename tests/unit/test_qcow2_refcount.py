# SPDX-License-Identifier: Apache-2.0
"""Refcount blocks of every width, and allocation that grows blocks and table, on a file in memory."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from target.drivers.format.qcow2.allocate import Allocator
from target.drivers.format.qcow2.create import Plan, pieces
from target.drivers.format.qcow2.errors import CorruptError, ImageError
from target.drivers.format.qcow2.image import Image, read_header
from target.drivers.format.qcow2.refcount import Refcounts, pack, sector_runs, unpack
from target.drivers.format.qcow2.store import Store
from tests.support.fakes import FakeFile


@pytest.mark.parametrize("order", range(7))
def test_pack_is_the_inverse_of_unpack(order: int) -> None:
    data = np.random.default_rng(order).integers(0, 256, 512, dtype=np.uint8).tobytes()
    counts = unpack(data, order)
    assert counts.size == 512 * 8 >> order
    assert pack(counts, order) == data


def test_sub_byte_counts_start_at_the_least_significant_bit() -> None:
    assert unpack(b"\x05", 0).tolist() == [1, 0, 1, 0, 0, 0, 0, 0]
    assert unpack(b"\x1b", 1).tolist() == [3, 2, 1, 0]
    assert unpack(b"\x21", 2).tolist() == [1, 2]
    assert unpack(b"\x01\x02", 4).tolist() == [0x102]


def test_sector_runs() -> None:
    assert sector_runs({0, 5, 70, 200}) == [(0, 128), (192, 256)]
    assert sector_runs(set()) == []


async def opened(plan: Plan, growable: bool = True, extra: int = 0) -> tuple[FakeFile, Allocator, Refcounts]:
    data = bytearray()
    for offset, part in pieces(plan):
        data.extend(bytes(offset - len(data)))
        data.extend(part)
    file = FakeFile(bytes(data) + bytes(extra))
    store = Store(file, growable)
    image = Image("test", store, await read_header(store))
    await image.open()
    refcounts = await image.open_for_writing(1 << 20)
    assert image.allocator is not None
    return file, image.allocator, refcounts


SMALL = Plan(size=1 << 20, cluster_size=512)


async def test_new_clusters_come_from_the_end_and_read_as_zeros() -> None:
    file, allocator, refcounts = await opened(SMALL)
    run = await allocator.take(10)
    assert run == (file.size // 512, 10, True)
    assert await refcounts.get(run.first) == 1 and await refcounts.get(run.first + 10) == 0


async def test_freed_clusters_come_back_not_zeroed() -> None:
    _, allocator, _ = await opened(SMALL)
    run = await allocator.take(10)
    await allocator.give(run.first + 3, 4)
    assert await allocator.take(2) == (run.first + 3, 2, False)
    assert await allocator.take(100) == (run.first + 5, 2, False)
    assert (await allocator.take(1)).first == run.first + 10


async def test_one_reference_of_two_keeps_a_cluster() -> None:
    _, allocator, refcounts = await opened(SMALL)
    run = await allocator.take(1)
    await refcounts.set_run(run.first, 1, 2)
    await allocator.give(run.first, 1)
    assert await refcounts.get(run.first) == 1
    await allocator.give(run.first, 1)
    assert (await allocator.take(1)).first == run.first


async def reopened(file: FakeFile) -> Refcounts:
    store = Store(file, True)
    image = Image("test", store, await read_header(store))
    await image.open()
    return await image.open_for_writing(1 << 20)


@pytest.mark.parametrize("bits", [1, 16, 64])
async def test_blocks_and_table_grow_and_count_themselves(bits: int) -> None:
    """With 512-byte clusters a table of one cluster has 64 blocks: it must move, and the old one is free."""
    file, allocator, refcounts = await opened(Plan(size=1 << 20, cluster_size=512, refcount_bits=bits))
    old = refcounts.place.offset
    wanted = 70 * refcounts.entries
    taken: list[int] = []
    while len(taken) < wanted:
        run = await allocator.take(wanted - len(taken))
        taken.extend(range(run.first, run.first + run.length))
    assert len(set(taken)) == wanted
    await allocator.write_back()
    await allocator.write_back()
    again = await reopened(file)
    assert again.place.offset != old and again.place.clusters > 1
    assert await again.get(old // 512) == 0
    assert all([await again.get(cluster) == 1 for cluster in taken[:: refcounts.entries // 4 or 1]])
    own = [again.place.offset // 512 + i for i in range(again.place.clusters)]
    own += [int(offset) // 512 for offset in again.table if offset]
    assert not set(own) & set(taken)
    assert all([await again.get(cluster) == 1 for cluster in own])


async def test_table_pointer_follows_its_block_to_the_disk() -> None:
    file, allocator, refcounts = await opened(SMALL)
    await allocator.take(refcounts.entries)
    await allocator.take(1)
    file.journal.clear()
    await allocator.write_back()
    table = next(i for i, line in enumerate(file.journal) if line == f"write {refcounts.place.offset:#x} 512")
    block = int(refcounts.table[1])
    assert f"write {block:#x} 512" in file.journal[:table]
    assert "flush" in file.journal[:table]
    assert file.journal[-1] == "flush"


async def test_failed_write_keeps_counts_dirty() -> None:
    file, allocator, _ = await opened(SMALL)
    run = await allocator.take(5)
    file.fail = OSError(errno.EIO, "x")
    with pytest.raises(OSError, match="x"):
        await allocator.write_back()
    await allocator.write_back()
    assert await (await reopened(file)).get(run.first) == 1


async def test_full_device() -> None:
    _, allocator, _ = await opened(SMALL, growable=False, extra=20 * 512)
    run = await allocator.take(100)
    assert not run.zeroed and run.length == 20
    with pytest.raises(OSError, match="no cluster") as caught:
        await allocator.take(1)
    assert caught.value.errno == errno.ENOSPC
    await allocator.give(run.first + 7, 1)
    assert await allocator.take(5) == (run.first + 7, 1, False)


async def test_metadata_that_is_counted_as_free_is_not_given_out() -> None:
    _, allocator, refcounts = await opened(SMALL)
    await refcounts.set_run(0, 1, 0)
    with pytest.raises(CorruptError):
        await allocator.take(1)


async def test_discard_comes_before_the_cluster_is_free() -> None:
    file, allocator, _ = await opened(SMALL)
    run = await allocator.take(6)
    clusters = np.arange(run.first, run.first + 6, dtype=np.uint64)
    await allocator.lower(clusters, clusters[1:3])
    assert file.journal == [f"discard {(run.first + 1) * 512:#x} 1024"]


@pytest.mark.parametrize("pointer", [0x201, 1 << 40, 0])
async def test_wrong_table_pointers(pointer: int) -> None:
    data = bytearray()
    for offset, part in pieces(SMALL):
        data.extend(bytes(offset - len(data)))
        data.extend(part)
    data[512 + 8 : 512 + 16] = (pointer or int.from_bytes(data[512:520], "big")).to_bytes(8, "big")
    with pytest.raises(ImageError, match="refcount table"):
        await reopened(FakeFile(bytes(data)))


async def test_the_last_free_cluster_of_a_file_that_ends_is_found_behind_many_full_blocks() -> None:
    """A search that may go on in new clusters ends after 16 blocks; here there are none."""
    _, allocator, _ = await opened(SMALL, growable=False, extra=40 * 256 * 512)
    taken = []
    with pytest.raises(OSError) as caught:
        while True:
            taken.append(await allocator.take(1 << 20))
    assert caught.value.errno == errno.ENOSPC
    await allocator.give(taken[0].first, 1)
    assert (await allocator.take(1)).first == taken[0].first
    last = taken[-1].first + taken[-1].length - 1
    await allocator.give(last, 1)
    allocator.hint = taken[0].first
    assert (await allocator.take(1)).first == last
