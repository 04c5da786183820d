# SPDX-License-Identifier: Apache-2.0
"""The datapath's objects as Python sees them: a map over memory that Python serves, against a model.

Everything here goes through the real C code; only the store beneath is Python.
"""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import AsyncIterator

import numpy as np
import pytest
import pytest_asyncio

from target import datapath as dpm
from target.datapath import Datapath, Extent, Fault, Map, Object, Op, Reason

GRANULE = 65536
MIB = 1 << 20
LANES = 16


@pytest_asyncio.fixture
async def dp() -> AsyncIterator[Datapath]:
    made = Datapath()
    made.start(asyncio.get_running_loop())
    made.add_thread(poll_max_ns=0)
    made.add_thread(poll_max_ns=20000)
    yield made
    await made.close()


class Memory:
    """An upcall handler: bytes in memory, now and then slow, failing when told to."""

    def __init__(self, content: bytes) -> None:
        self.data = bytearray(content)
        self.fail: Op | None = None
        self.flushes = 0

    async def __call__(self, fault: Fault) -> None:
        if random.random() < 0.1:
            await asyncio.sleep(0)
        if fault.op is self.fail:
            raise OSError(errno.ENOSPC, "told to")
        part = slice(fault.offset, fault.offset + fault.length)
        if fault.op is Op.READ:
            fault.put_data(0, bytes(self.data[part]).ljust(fault.length, b"\0"))
        elif fault.op is Op.WRITE:
            self.data[part] = fault.get_data()
        elif fault.op is Op.ZEROES:
            self.data[part] = bytes(fault.length)
        elif fault.op is Op.STATUS:
            fault.put_extent(fault.length, 0)
        elif fault.op is Op.FLUSH:
            self.flushes += 1
        fault.done()


class Image:
    """A tiny image format in memory: a map whose tables are kept in a dictionary when they are cleaned."""

    SLICE_BITS = 3

    def __init__(self, dp: Datapath, size: int, backing: bytes | None, run: int = 3) -> None:
        self.store = Memory(b"")
        self.child = dp.upcall(1 << 30, self.store)
        self.backing = dp.upcall(len(backing), Memory(backing)) if backing is not None else None
        self.tables: dict[int, np.ndarray] = {}
        self.next = 0
        self.run = run
        self.grant_error = 0
        self.map: Map = dp.map(
            granule_bits=16,
            slice_bits=self.SLICE_BITS,
            size=size,
            child=self.child,
            backing=self.backing,
            handler=self.fault,
        )

    async def fault(self, fault: Fault) -> None:
        if fault.reason is Reason.LOAD:
            index = fault.offset >> 16 >> self.SLICE_BITS
            empty = np.full(8, dpm.ENTRY_UNALLOCATED | dpm.ENTRY_ALLOC, np.uint64)
            await asyncio.sleep(0)
            self.map.load(index, self.tables.get(index, empty), True)
            fault.retry()
        elif fault.reason is Reason.GRANT:
            if self.grant_error:
                fault.done(-self.grant_error)
                return
            zeroed = random.random() < 0.5
            self.store.data += (bytes if zeroed else random.randbytes)(self.run * GRANULE)
            self.map.grant(self.next, self.run, zeroed)
            self.next += self.run * GRANULE
            fault.retry()
        elif fault.reason is Reason.FLUSH:
            for index in self.map.dirty():
                self.tables[index] = self.map.clean(index)
            self.map.shrink(200)
            await self.child.flush()
            fault.done()
        else:
            raise AssertionError(fault)


async def worker(image: Image, model: bytearray, lane: int, rng: random.Random) -> None:
    """Reads and changes the blocks of 4 KiB that are its own: each 16th, so that granules are shared."""
    blocks = range(lane, len(model) // 4096, LANES)
    for _ in range(60):
        at = rng.choice(blocks) * 4096
        kind = rng.random()
        if kind < 0.45:
            data = rng.randbytes(4096)
            await image.map.write(at, data, rng.choice([0, 0, dpm.FUA]))
            model[at : at + 4096] = data
        elif kind < 0.6:
            await image.map.zeroes(at, 4096, rng.choice([0, dpm.UNMAP]))
            model[at : at + 4096] = bytes(4096)
        elif kind < 0.65:
            await image.map.flush()
        elif kind < 0.7:
            await image.map.synchronize()
        else:
            assert await image.map.read(at, 4096) == model[at : at + 4096]


@pytest.mark.parametrize("seed", range(4))
async def test_many_in_flight_on_shared_granules_agree_with_a_model(dp: Datapath, seed: int) -> None:
    rng = random.Random(seed)
    size = 4 * MIB - 4096 * seed
    backing = rng.randbytes(3 * MIB) if seed % 2 else None
    image = Image(dp, size, backing, run=seed + 1)
    model = bytearray((backing or b"").ljust(size, b"\0")[:size])
    await asyncio.gather(*[worker(image, model, lane, random.Random(rng.random())) for lane in range(LANES)])
    assert await image.map.read(0, size) == model
    await image.map.flush()
    assert image.map.dirty() == []
    assert image.map.counters()["grants"] > 0


async def test_synchronize_waits_for_what_python_was_asked_to_read(dp: Datapath) -> None:
    """The cluster of a granule that is dropped meanwhile must not be given to another."""
    image = Image(dp, MIB, None)
    await image.map.write(0, b"x" * GRANULE)
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def slow(fault: Fault) -> None:
        asked.set()
        await go_on.wait()
        await image.store(fault)

    image.child.handler = slow
    reading = asyncio.ensure_future(image.map.read(0, GRANULE))
    await asked.wait()
    image.child.handler = image.store
    await image.map.zeroes(0, GRANULE, dpm.UNMAP)
    synchronizing = asyncio.ensure_future(image.map.synchronize())
    assert await image.map.read(0, GRANULE) == bytes(GRANULE)
    done, _ = await asyncio.wait([synchronizing], timeout=0.05)
    assert not done, "the cluster would be free while it is read"
    go_on.set()
    await synchronizing
    assert await reading == b"x" * GRANULE


async def test_zeroes_of_whole_granules_change_the_table_only(dp: Datapath) -> None:
    image = Image(dp, MIB, b"\xaa" * MIB)
    await image.map.zeroes(0, MIB)
    assert image.store.data == b""
    assert await image.map.read(0, MIB) == bytes(MIB)
    assert await image.map.status(0, MIB) == [Extent(MIB, dpm.HOLE | dpm.ZERO)]


async def test_zeroes_without_unmap_keep_the_cluster_and_with_unmap_drop_it(dp: Datapath) -> None:
    image = Image(dp, MIB, None, run=1)
    await image.map.write(0, b"x" * GRANULE)
    await image.map.zeroes(0, GRANULE)
    kept = image.map.get(0)
    assert kept is not None and int(kept[0]) & dpm.ENTRY_HOST
    await image.map.write(512, b"y" * 512)
    assert await image.map.read(0, 2048) == bytes(512) + b"y" * 512 + bytes(1024)
    assert image.next == GRANULE, "filling in place needs no grant"
    await image.map.zeroes(0, GRANULE, dpm.UNMAP)
    dropped = image.map.get(0)
    assert dropped is not None and int(dropped[0]) == dpm.ENTRY_ZERO | dpm.ENTRY_ALLOC


async def test_fast_zero_of_a_part_that_needs_data_is_refused(dp: Datapath) -> None:
    image = Image(dp, MIB, b"\xaa" * MIB)
    with pytest.raises(OSError) as error:
        await image.map.zeroes(512, 512, dpm.FAST_ZERO)
    assert error.value.errno == errno.ENOTSUP


async def test_a_failed_data_write_leaves_the_old_entry_and_returns_the_grant(dp: Datapath) -> None:
    image = Image(dp, MIB, b"\xaa" * MIB, run=2)
    image.store.fail = Op.WRITE
    with pytest.raises(OSError) as error:
        await image.map.write(4096, b"new" * 100)
    assert error.value.errno == errno.ENOSPC
    assert await image.map.read(0, MIB) == b"\xaa" * MIB
    assert image.map.dirty() == []
    assert sum(grant.granules for grant in image.map.revoke()) == 2
    image.store.fail = None
    await image.map.write(4096, b"new")
    assert await image.map.read(4094, 8) == b"\xaa\xaanew\xaa\xaa\xaa"


async def test_a_refill_that_fails_fails_all_who_wait_with_its_errno(dp: Datapath) -> None:
    image = Image(dp, MIB, None)
    image.grant_error = errno.ENOSPC
    writes = [image.map.write(i * GRANULE, b"x") for i in range(16)]
    results = await asyncio.gather(*writes, return_exceptions=True)
    assert [getattr(result, "errno", None) for result in results] == [errno.ENOSPC] * 16


async def test_what_was_parked_is_counted_once(dp: Datapath) -> None:
    image = Image(dp, MIB, None, run=1)
    await image.map.write(0, bytes(range(256)) * (MIB // 256))
    await image.map.flush()
    counters = image.map.counters()
    assert counters["faults"]["grant"] > 0
    assert counters["bytes"]["write"] == MIB
    assert counters["requests"]["write"] == MIB // GRANULE
    assert counters["requests"]["flush"] == 1


async def test_a_gate_holds_requests_while_drained(dp: Datapath) -> None:
    disk = dp.null(MIB, read_zeroes=True)
    gate = dp.gate(disk, writable=True)
    await gate.drain()
    held = asyncio.ensure_future(gate.read(0, 512))
    await disk.read(0, 512)
    await asyncio.sleep(0.05)
    assert not held.done()
    other = dp.upcall(MIB, Memory(b"\x55" * MIB))
    gate.resume(other)
    assert await held == b"\x55" * 512
    for _ in range(50):
        await gate.drain()
        gate.resume()


async def test_a_gate_that_is_not_writable_refuses_changes(dp: Datapath) -> None:
    gate = dp.gate(dp.null(MIB), writable=False)
    with pytest.raises(PermissionError):
        await gate.write(0, b"x" * 512)


async def test_windows_and_concatenations_translate(dp: Datapath) -> None:
    memory = Memory(random.randbytes(MIB))
    whole = dp.upcall(MIB, memory)
    parts = [dp.window(whole, i * 1000, 1000) for i in (5, 2, 9)]
    joined = dp.concat(parts)
    assert joined.size == 3000
    expected = memory.data[5000:6000] + memory.data[2000:3000] + memory.data[9000:10000]
    assert await joined.read(0, 3000) == expected
    await joined.write(990, b"A" * 20)
    assert memory.data[5990:6000] + memory.data[2000:2010] == b"A" * 20
    assert [part.counters()["bytes"]["write"] for part in parts] == [10, 10, 0]


async def test_discard_passes_only_where_the_node_unmaps(dp: Datapath) -> None:
    image = Image(dp, MIB, None)
    await image.map.write(0, b"x" * GRANULE)
    image.map.set_policy(discard_unmap=False, detect_zeroes="off")
    await image.map.discard(0, GRANULE)
    assert await image.map.read(0, 1) == b"x"
    image.map.set_policy(discard_unmap=True, detect_zeroes="off")
    await image.map.discard(0, GRANULE)
    assert await image.map.read(0, 1) == b"\0"


async def test_detect_zeroes_writes_no_data(dp: Datapath) -> None:
    image = Image(dp, MIB, b"\xaa" * MIB)
    image.map.set_policy(discard_unmap=True, detect_zeroes="on")
    await image.map.write(0, bytes(MIB))
    assert image.next == 0
    assert await image.map.read(0, MIB) == bytes(MIB)


async def test_copy_moves_data_and_zeros(dp: Datapath) -> None:
    source = Image(dp, 8 * MIB, None)
    for _ in range(20):
        at = random.randrange(8 * MIB - 70000)
        await source.map.write(at, random.randbytes(70000))
    target = Image(dp, 16 * MIB, None)
    await dp.copy(source.map, target.map, 512, MIB, 8 * MIB - 512)
    assert await target.map.read(MIB, 8 * MIB - 512) == await source.map.read(512, 8 * MIB - 512)
    with pytest.raises(OSError):
        await dp.copy(source.map, target.map, MIB, 0, 8 * MIB)


async def test_a_handler_that_raises_fails_its_requests_and_nothing_else(dp: Datapath) -> None:
    async def broken(fault: Fault) -> None:
        raise OSError(errno.ENODEV, "gone")

    async def silent(fault: Fault) -> None:
        return

    for handler, number in ((broken, errno.ENODEV), (silent, errno.EIO)):
        with pytest.raises(OSError) as error:
            await dp.upcall(MIB, handler).read(0, 512)
        assert error.value.errno == number


async def test_status_stops_when_the_answer_is_full(dp: Datapath) -> None:
    image = Image(dp, MIB, None, run=1)
    for granule in range(0, 16, 2):
        await image.map.write(granule * GRANULE, b"x" * GRANULE)
    assert len(await image.map.status(0, MIB)) == 16
    assert await image.map.status(0, MIB, max=3) == [
        Extent(GRANULE, 0),
        Extent(GRANULE, dpm.HOLE | dpm.ZERO),
        Extent(GRANULE, 0),
    ]


async def test_objects_go_with_their_last_reference(dp: Datapath) -> None:
    disk: Object = dp.null(MIB)
    window = dp.window(disk, 0, 512)
    disk.release()
    await window.read(0, 512)
    with pytest.raises(OSError):
        await disk.read(0, 512)


async def test_a_released_object_is_refused_and_not_given_to_c(dp: Datapath) -> None:
    """What it was may be gone: questions about its size or traffic read memory that was free."""
    disk = dp.null(MIB)
    gate = dp.gate(disk, writable=True)
    for each in (gate, disk):
        each.release()
        each.release()
        with pytest.raises(OSError, match="the object is released"):
            each.counters()
        with pytest.raises(OSError, match="the object is released"):
            assert each.size
    for work in (disk.read(0, 512), disk.status(0, 512), disk.synchronize(), gate.drain()):
        with pytest.raises(OSError, match="the object is released"):
            await work
