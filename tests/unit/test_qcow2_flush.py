# SPDX-License-Identifier: Apache-2.0
"""The write-back order, its coalescing and its failures, on a file and a map in memory."""

from __future__ import annotations

import asyncio
import errno
from dataclasses import dataclass

import pytest

from target.drivers.format.qcow2 import spec
from target.drivers.format.qcow2.create import Plan, pieces
from target.drivers.format.qcow2.flush import Discard, WriteBack
from target.drivers.format.qcow2.grants import Grants
from target.drivers.format.qcow2.image import Image, read_header
from target.drivers.format.qcow2.loader import Loader
from target.drivers.format.qcow2.refcount import Refcounts
from target.drivers.format.qcow2.store import Store
from target.drivers.format.qcow2.table import ZERO_PLAIN, from_disk
from tests.support.fakes import FakeFile, FakeMap

CLUSTER = 4096
BITS = 12
SLICE_BITS = 6


@dataclass
class Rig:
    file: FakeFile
    map: FakeMap
    image: Image
    refcounts: Refcounts
    loader: Loader
    grants: Grants
    write_back: WriteBack

    async def first_write(self, granule: int) -> int:
        """What the datapath and the fault handler do for it; returns the host offset."""
        await self.loader.load(granule >> SLICE_BITS)
        await self.loader.reserve(granule >> self.image.header.l2_bits)
        if not self.map.pool:
            await self.grants.refill()
        return self.map.place(granule, BITS)

    def discard(self, granule: int) -> None:
        found = self.map.get(granule)
        assert found is not None and self.map.set(granule, int(found[0]), ZERO_PLAIN)

    def l2(self, granule: int) -> int:
        """The entry on disk."""
        header = self.image.header
        l1 = from_disk(bytes(self.file.data[header.l1_table_offset :][: header.l1_size * 8]))
        table = int(l1[granule >> header.l2_bits]) & spec.OFFSET_MASK
        if not table:
            return 0
        at = table + (granule & (1 << header.l2_bits) - 1) * 8
        return int.from_bytes(self.file.data[at : at + 8], "big")

    def position(self, line: str) -> int:
        return next(i for i, item in enumerate(self.file.journal) if item.startswith(line))


async def rig(plan: Plan | None = None) -> Rig:
    file = FakeFile()
    for offset, part in pieces(plan or Plan(size=16 << 20, cluster_size=CLUSTER)):
        await file.write(offset, part)
    file.journal.clear()
    store = Store(file, True)
    image = Image("test", store, await read_header(store))
    await image.open()
    refcounts = await image.open_for_writing(1 << 20)
    assert image.allocator is not None
    map = FakeMap(SLICE_BITS, file.journal)
    loader = Loader(image, map, SLICE_BITS, 1 << 20)
    grants = Grants(image.allocator, map)
    return Rig(
        file, map, image, refcounts, loader, grants, WriteBack(image, map, loader, grants, Discard.REQUEST)
    )


async def test_first_write_in_the_order_of_the_design() -> None:
    r = await rig()
    host = await r.first_write(3)
    table = r.image.reserved[0]
    r.file.journal.clear()
    await r.write_back.flush()
    journal = r.file.journal
    blocks, l2 = int(r.refcounts.table[0]), table
    l1 = r.image.header.l1_table_offset
    clean, flush = r.position("clean"), journal.index("flush")
    assert clean < r.position(f"write {l2:#x}") < flush
    assert clean < r.position(f"write {blocks:#x}") < flush
    assert flush < r.position(f"write {l1:#x}") < len(journal) - 1
    assert journal[-1] == "flush" and journal.count("flush") == 2
    assert r.l2(3) == host | spec.OFLAG_COPIED
    assert host >> BITS not in r.grants.outstanding
    assert not r.map.held and not r.map.dirty()


async def test_second_write_changes_one_sector_of_the_table() -> None:
    r = await rig()
    await r.first_write(3)
    await r.write_back.flush()
    host = await r.first_write(70)
    r.file.journal.clear()
    await r.write_back.flush()
    table = r.image.table_offset(0)
    assert [line for line in r.file.journal if line.startswith(f"write {table + 512:#x}")] == [
        f"write {table + 512:#x} 512"
    ]
    assert r.l2(70) == host | spec.OFLAG_COPIED


async def test_freeing_waits_for_readers_and_for_the_disk() -> None:
    r = await rig()
    host = await r.first_write(3)
    await r.write_back.flush()
    r.discard(3)
    r.file.journal.clear()
    await r.write_back.reclaim()
    journal = r.file.journal
    assert r.l2(3) == spec.OFLAG_ZERO
    last = len(journal) - 1 - journal[::-1].index("flush")
    assert last < journal.index("synchronize") < r.position(f"discard {host:#x} {CLUSTER}")
    assert await r.refcounts.get(host >> BITS) == 0


async def test_nothing_dirty_is_one_flush() -> None:
    r = await rig()
    await r.write_back.flush()
    assert r.file.journal == ["flush"]


async def test_flushes_that_come_together_share_one_write_back() -> None:
    r = await rig()
    await r.first_write(3)
    await asyncio.gather(*(r.write_back.flush() for _ in range(20)))
    assert r.file.journal.count("clean 0") == 1


async def test_a_flush_that_comes_late_gets_a_write_back_of_its_own() -> None:
    r = await rig()
    await r.first_write(3)
    first = asyncio.ensure_future(r.write_back.flush())
    while "clean 0" not in r.file.journal:
        await asyncio.sleep(0)
    host = await r.first_write(4)
    second = asyncio.ensure_future(r.write_back.flush())
    await first
    assert r.l2(4) == 0
    await second
    assert r.l2(4) == host | spec.OFLAG_COPIED


async def test_a_slice_under_write_back_is_loaded_as_it_was_taken() -> None:
    """Evicted while it is written: what is on disk is older."""
    r = await rig()
    host = await r.first_write(3)
    flush = asyncio.ensure_future(r.write_back.flush())
    while "clean 0" not in r.file.journal:
        await asyncio.sleep(0)
    r.map.shrink(0)
    assert r.map.get(3) is None
    await r.loader.load(0)
    entries = r.map.get(3)
    assert entries is not None and int(entries[0]) >> 8 << 9 == host
    await flush


@pytest.mark.parametrize("step", range(6))
async def test_after_a_failure_everything_is_dirty_and_a_retry_succeeds(step: int) -> None:
    r = await rig()
    hosts = {granule: await r.first_write(granule) for granule in (3, 70, 600)}
    writes = 0
    original = r.file._maybe_fail

    def fail() -> None:
        nonlocal writes
        writes += 1
        if writes == step + 1:
            raise OSError(errno.EIO, "injected")
        original()

    r.file._maybe_fail = fail  # type: ignore[method-assign]
    try:
        await r.write_back.flush()
    except OSError:
        assert r.map.dirty() == [0, 1, 9]
        await r.write_back.flush()
    for granule, host in hosts.items():
        assert r.l2(granule) == host | spec.OFLAG_COPIED
        assert host >> BITS not in r.grants.outstanding
    await r.write_back.close()
    for granule, host in hosts.items():
        assert await r.refcounts.get(host >> BITS) == 1, granule


async def fails_in_place(r: Rig, granule: int) -> None:
    """A flush in which the write of the granule's table sector fails."""
    sector = r.image.table_offset(granule >> r.image.header.l2_bits)
    original = r.file.write

    async def write(offset: int, data: bytes) -> None:
        if sector <= offset < sector + CLUSTER:
            raise OSError(errno.EIO, "injected")
        await original(offset, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(r.file, "write", write)
        with pytest.raises(OSError, match="injected"):
            await r.write_back.flush()


async def test_what_a_failed_slice_dropped_waits_for_that_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another batch's success freed it while the entry on disk still pointed to it."""
    r = await rig()
    host = await r.first_write(3)
    await r.first_write(600)
    await r.write_back.flush()
    r.discard(3)
    await fails_in_place(r, 3)
    r.discard(600)
    monkeypatch.setattr("target.drivers.format.qcow2.flush._BATCH", 1)
    monkeypatch.setattr(r.map, "dirty", lambda: sorted(r.map.dirt, reverse=True))
    original = r.write_back._write_batch

    async def batch(slices: list[int]) -> None:
        assert r.l2(3) & spec.OFFSET_MASK == host
        assert await r.refcounts.get(host >> BITS) == 1
        await original(slices)
        await r.write_back.freed()

    monkeypatch.setattr(r.write_back, "_write_batch", batch)
    await r.write_back.flush()
    assert r.l2(3) & spec.OFFSET_MASK == 0
    assert await r.refcounts.get(host >> BITS) == 0
    await r.write_back.close()


@pytest.mark.parametrize("on_disk", [False, True])
async def test_what_came_in_an_attempt_that_failed_and_went_again_is_freed(on_disk: bool) -> None:
    """The entry was written, or was not, before the failure; nobody but the attempt knew of the cluster."""
    r = await rig()
    await r.first_write(3)
    await r.write_back.flush()
    host = await r.first_write(4)
    if on_disk:
        flushes = 0

        def second_fails() -> None:
            nonlocal flushes
            flushes += r.file.journal[-1].startswith("write") and r.l2(4) != 0
            if flushes == 1:
                raise OSError(errno.EIO, "injected")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(r.file, "_maybe_fail", second_fails)
            with pytest.raises(OSError, match="injected"):
                await r.write_back.flush()
    else:
        await fails_in_place(r, 4)
    assert (r.l2(4) & spec.OFFSET_MASK == host) == on_disk
    r.discard(4)
    await r.write_back.flush()
    await r.write_back.close()
    assert await r.refcounts.get(host >> BITS) == 0
    assert not r.grants.outstanding


async def test_close_gives_back_all_that_was_granted_and_reserved() -> None:
    r = await rig()
    host = await r.first_write(3)
    r.discard(3)  # never on disk
    await r.loader.load(1 << r.image.header.l2_bits - SLICE_BITS)
    await r.loader.reserve(1)
    await r.write_back.close()
    assert await r.refcounts.get(host >> BITS) == 0
    assert not r.grants.outstanding and not r.image.reserved
    used = [await r.refcounts.get(cluster) for cluster in range(r.image.allocator.fresh)]  # type: ignore[union-attr]
    metadata = 4 + 1  # header, refcount table, block, L1; the L2 table
    assert sum(used) == metadata


async def test_an_audit_finds_what_was_dropped_before_it_was_flushed() -> None:
    r = await rig()
    for _ in range(1000):
        await r.first_write(5)
        r.discard(5)
    await r.write_back.flush()
    await r.write_back.flush()
    await r.write_back.reclaim()
    assert len(r.grants.outstanding) <= r.map.granted + 64 + r.grants.want // 4
    await r.write_back.close()
    assert r.image.allocator is not None and r.image.allocator.hint < 10


async def test_an_audit_gives_up_on_a_claim_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    r = await rig()
    host = await r.first_write(3)
    monkeypatch.setattr("target.drivers.format.qcow2.grants._AUDIT_SECONDS", 0.01)
    r.map.claims = 1
    assert await r.grants.audit() == set()
    assert host >> BITS in r.grants.outstanding and r.map.granted


async def test_shared_table_is_copied_and_the_other_keeps_its_clusters() -> None:
    r = await rig()
    host = await r.first_write(3)
    await r.write_back.flush()
    old = r.image.table_offset(0)
    # As a snapshot leaves it: the table and its clusters have two users.
    r.image.l1[0] = old
    at = old + 24
    r.file.data[at : at + 8] = host.to_bytes(8, "big")
    await r.refcounts.set_run(old >> BITS, 1, 2)
    await r.refcounts.set_run(host >> BITS, 1, 2)
    r.map.slices.clear()
    before = bytes(r.file.data[old : old + CLUSTER])
    new = await r.first_write(3)
    other = await r.first_write(4)
    await r.write_back.reclaim()
    assert bytes(r.file.data[old : old + CLUSTER]) == before
    assert r.image.table_offset(0) != old and r.image.is_own(0)
    assert r.l2(3) == new | spec.OFLAG_COPIED and r.l2(4) == other | spec.OFLAG_COPIED
    assert await r.refcounts.get(host >> BITS) == 1
    assert await r.refcounts.get(old >> BITS) == 1


async def test_a_late_load_does_not_bring_back_what_a_write_back_has_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A load for a fault that was answered already reads the old table; the slice is written, and dropped."""
    r = await rig()
    host = await r.first_write(3)
    await r.write_back.flush()
    r.discard(3)
    read, asked, go_on = r.file.read, asyncio.Event(), asyncio.Event()

    async def slow(offset: int, length: int) -> bytes:
        data = await read(offset, length)
        asked.set()
        await go_on.wait()
        return data

    monkeypatch.setattr(r.file, "read", slow)
    late = asyncio.ensure_future(r.loader.load(0))
    await asked.wait()
    monkeypatch.setattr(r.file, "read", read)
    await r.write_back.flush()
    r.map.shrink(0)
    assert r.map.get(3) is None
    go_on.set()
    await late
    found = r.map.get(3)
    assert found is not None and int(found[0]) == ZERO_PLAIN, f"it points to {host:#x}, which is free"


async def test_loads_of_one_slice_share_one_read() -> None:
    r = await rig()
    await r.first_write(3)
    await r.write_back.flush()
    r.map.slices.clear()
    reads = r.file.reads
    await asyncio.gather(*(r.loader.load(0) for _ in range(50)))
    assert r.file.reads == reads + 1


async def test_the_map_stays_within_its_budget() -> None:
    r = await rig(Plan(size=1 << 30, cluster_size=CLUSTER))
    r.loader.budget = 64 << 10
    for slice in range(1000):
        await r.loader.load(slice)
    await asyncio.sleep(0.01)
    assert r.map.bytes <= 64 << 10
