# SPDX-License-Identifier: Apache-2.0
"""The device in front of one that takes only whole blocks, over memory that Python serves."""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from target.datapath import FAST_ZERO, FUA, HOLE, ZERO, Datapath, Extent, Fault, Object, Op

BLOCK = 512
SIZE = 64 * BLOCK


@pytest_asyncio.fixture
async def dp() -> AsyncIterator[Datapath]:
    made = Datapath()
    made.start(asyncio.get_running_loop())
    made.add_thread(poll_max_ns=0)
    yield made
    await made.close()


class Blocks:
    """Memory that takes whole blocks only, and answers late, in no particular order."""

    def __init__(self) -> None:
        self.data = bytearray(random.randbytes(SIZE))
        self.seen: list[tuple[Op, int, int, int]] = []
        self.fail: set[Op] = set()
        self.extents = [Extent(SIZE, 0)]

    async def __call__(self, fault: Fault) -> None:
        self.seen.append((fault.op, fault.offset, fault.length, fault.flags))
        assert fault.offset % BLOCK == 0 and fault.length % BLOCK == 0
        for _ in range(random.randrange(4)):
            await asyncio.sleep(0)
        if fault.op in self.fail:
            raise OSError(errno.ENOTSUP, "told to")
        part = slice(fault.offset, fault.offset + fault.length)
        if fault.op is Op.READ:
            fault.put_data(0, self.data[part])
        elif fault.op is Op.WRITE:
            self.data[part] = fault.get_data()
        elif fault.op in (Op.ZEROES, Op.DISCARD):
            self.data[part] = bytes(fault.length)
        elif fault.op is Op.STATUS:
            self.answer_status(fault)
        fault.done()

    def answer_status(self, fault: Fault) -> None:
        at, end = 0, fault.offset + fault.length
        for extent in self.extents:
            start, stop = max(at, fault.offset), min(at + extent.length, end)
            if start < stop and not fault.put_extent(stop - start, extent.flags):
                return
            at += extent.length


@pytest.fixture
def blocks() -> Blocks:
    return Blocks()


@pytest.fixture
def aligned(dp: Datapath, blocks: Blocks) -> Object:
    return dp.align(dp.upcall(SIZE, blocks, takes_fua=True), BLOCK)


@pytest.mark.parametrize("seed", range(5))
async def test_neighbours_in_one_block_do_not_lose_each_other(
    aligned: Object, blocks: Blocks, seed: int
) -> None:
    """Eight writers own interleaved ranges that share blocks, each checks its own bytes."""
    rng = random.Random(seed)
    cuts = sorted(rng.sample(range(1, SIZE), 39))
    ranges = list(zip([0, *cuts], [*cuts, SIZE], strict=True))
    model = bytearray(blocks.data)

    async def writer(own: list[tuple[int, int]]) -> None:
        for _ in range(60):
            start, end = rng.choice(own)
            at = rng.randrange(start, end)
            length = rng.randint(1, end - at)
            kind = rng.random()
            if kind < 0.5:
                data = rng.randbytes(length)
                await aligned.write(at, data, rng.choice([0, FUA]))
                model[at : at + length] = data
            elif kind < 0.7:
                await aligned.zeroes(at, length, rng.choice([0, FAST_ZERO]))
                model[at : at + length] = bytes(length)
            else:
                assert await aligned.read(at, length) == model[at : at + length]

    await asyncio.gather(*(writer(ranges[i::8]) for i in range(8)))
    assert await aligned.read(0, SIZE) == model == blocks.data


async def test_whole_blocks_pass_as_they_are(aligned: Object, blocks: Blocks) -> None:
    await aligned.write(BLOCK, bytes(2 * BLOCK), FUA)
    assert blocks.seen == [(Op.WRITE, BLOCK, 2 * BLOCK, FUA)]
    assert aligned.counters()["bounced"] == 0


async def test_fua_comes_with_every_change(aligned: Object, blocks: Blocks) -> None:
    await aligned.zeroes(1, 2 * BLOCK - 1, FUA)
    changes = sorted(entry for entry in blocks.seen if entry[0] is not Op.READ)
    assert changes == [(Op.WRITE, 0, BLOCK, FUA), (Op.ZEROES, BLOCK, BLOCK, FUA)]


async def test_a_flush_follows_where_fua_is_not_served(dp: Datapath, blocks: Blocks) -> None:
    aligned = dp.align(dp.upcall(SIZE, blocks), BLOCK)
    await aligned.zeroes(0, BLOCK, FUA)
    assert blocks.seen == [(Op.ZEROES, 0, BLOCK, 0), (Op.FLUSH, 0, 0, 0)]


async def test_only_the_edges_are_read_and_written_again(aligned: Object, blocks: Blocks) -> None:
    await aligned.write(BLOCK - 1, bytes(2 * BLOCK + 2), 0)
    assert sorted(entry[:3] for entry in blocks.seen) == [
        (Op.READ, 0, BLOCK),
        (Op.READ, 3 * BLOCK, BLOCK),
        (Op.WRITE, 0, BLOCK),
        (Op.WRITE, BLOCK, 2 * BLOCK),
        (Op.WRITE, 3 * BLOCK, BLOCK),
    ]
    assert aligned.counters()["bounced"] == 1


async def test_discard_touches_whole_blocks_only(aligned: Object, blocks: Blocks) -> None:
    before = bytes(blocks.data)
    await aligned.discard(1, BLOCK - 2)
    assert blocks.seen == []
    await aligned.discard(BLOCK - 1, 2 * BLOCK)
    assert [entry[:3] for entry in blocks.seen] == [(Op.DISCARD, BLOCK, BLOCK)]
    assert blocks.data[:BLOCK] == before[:BLOCK] and blocks.data[2 * BLOCK :] == before[2 * BLOCK :]


async def test_zeroes_that_are_not_fast_change_nothing(aligned: Object, blocks: Blocks) -> None:
    before = bytes(blocks.data)
    blocks.fail = {Op.ZEROES}
    with pytest.raises(OSError) as raised:
        await aligned.zeroes(1, 3 * BLOCK, FAST_ZERO)
    assert raised.value.errno == errno.ENOTSUP
    assert blocks.data == before


@pytest.mark.parametrize("failing", [Op.READ, Op.WRITE])
async def test_a_failure_of_any_part_is_the_answer(aligned: Object, blocks: Blocks, failing: Op) -> None:
    blocks.fail = {failing}
    with pytest.raises(OSError) as raised:
        await aligned.write(1, bytes(3 * BLOCK))
    assert raised.value.errno == errno.ENOTSUP
    blocks.fail = set()
    await aligned.write(1, bytes(3 * BLOCK))
    assert blocks.data[1 : 3 * BLOCK + 1] == bytes(3 * BLOCK)


async def test_status_is_asked_of_whole_blocks(aligned: Object, blocks: Blocks) -> None:
    blocks.extents = [Extent(2 * BLOCK, HOLE | ZERO), Extent(BLOCK, 0)]
    assert await aligned.status(1, 3 * BLOCK - 2) == [
        Extent(2 * BLOCK - 1, HOLE | ZERO),
        Extent(BLOCK - 1, 0),
    ]
    blocks.extents = [Extent(10, ZERO), Extent(SIZE, 0)]
    assert await aligned.status(20, 100) == [Extent(100, 0)]


async def test_blocks_of_another_size_are_refused(dp: Datapath, blocks: Blocks) -> None:
    for size, block in ((SIZE, 3), (SIZE, 1 << 17), (SIZE + 1, BLOCK)):
        child = dp.upcall(size, blocks)
        with pytest.raises(OSError, match="Invalid argument"):
            dp.align(child, block)
