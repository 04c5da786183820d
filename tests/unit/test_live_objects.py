# SPDX-License-Identifier: Apache-2.0
"""Objects of the datapath that change while they are used: children, drains that are given up, thresholds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import pytest
import pytest_asyncio

from target.datapath import Datapath, Fault, Object

MIB = 1 << 20


@pytest_asyncio.fixture
async def dp() -> AsyncIterator[Datapath]:
    made = Datapath()
    made.start(asyncio.get_running_loop())
    made.add_thread(poll_max_ns=0)
    made.add_thread(poll_max_ns=20000)
    yield made
    await made.close()


def filled(dp: Datapath, byte: int) -> Object:
    """An object that reads as one byte everywhere."""

    async def answer(fault: Fault) -> None:
        fault.put_data(0, bytes([byte]) * fault.length)
        fault.done()

    return dp.upcall(MIB, answer)


async def no_fault(fault: Fault) -> None:
    raise AssertionError(fault)


async def test_a_child_is_replaced_in_every_kind_of_object_that_has_one(dp: Datapath) -> None:
    old, new = filled(dp, 1), filled(dp, 2)
    window = dp.window(old, 4096, 8192)
    concat = dp.concat([filled(dp, 9), old])
    align = dp.align(old, 512)
    for parent, at in ((window, 0), (concat, MIB), (align, 0), (dp.gate(old, False), 0)):
        assert await parent.read(at, 3) == b"\1\1\1"
        parent.replace_child(old, new)
        assert await parent.read(at, 3) == b"\2\2\2"
    old.release()
    await dp.freed(old)


async def test_a_map_gets_and_loses_what_is_behind_it(dp: Datapath) -> None:

    made = dp.map(granule_bits=16, slice_bits=4, size=MIB, child=dp.null(MIB), backing=None, handler=no_fault)
    made.load(0, np.full(16, 1, np.uint64), True)
    assert await made.read(0, 2) == b"\0\0"
    backing = filled(dp, 7)
    made.set_child(1, backing)
    assert await made.read(70000, 2) == b"\7\7"
    made.set_child(1, None)
    backing.release()
    await dp.freed(backing)
    assert await made.read(70000, 2) == b"\0\0"


async def test_a_drain_that_is_given_up_lets_requests_go_on(
    dp: Datapath,
) -> None:
    waiting: list[Fault] = []
    gate = dp.gate(dp.upcall(MIB, lambda fault: waiting.append(fault)), False)
    inside = asyncio.ensure_future(gate.read(0, 1))
    while not waiting:
        await asyncio.sleep(0.001)
    for _ in range(3):
        with pytest.raises(TimeoutError):
            await gate.drain(0.01)
    held = asyncio.ensure_future(gate.read(1, 1))
    while len(waiting) < 2:  # it is not held any more
        await asyncio.sleep(0.001)
    drained = asyncio.ensure_future(gate.drain(5))
    for fault in waiting:
        assert not drained.done()
        fault.put_data(0, b"x")
        fault.done()
        await asyncio.sleep(0.01)
    await drained
    assert await inside == await held == b"x"
    late = asyncio.ensure_future(gate.read(2, 1))
    await asyncio.sleep(0.02)
    assert len(waiting) == 2
    gate.resume()
    while len(waiting) < 3:
        await asyncio.sleep(0.001)
    waiting[2].put_data(0, b"y")
    waiting[2].done()
    assert await late == b"y"


async def test_a_write_behind_the_threshold_is_told_once(dp: Datapath) -> None:
    node = dp.null(MIB)
    top = dp.window(node, 4096, MIB // 2)
    told: list[tuple[int, int]] = []
    node.on_threshold = lambda threshold, behind: told.append((threshold, behind))
    node.write_threshold = 8192
    assert node.write_threshold == 8192
    await top.read(0, 65536)
    await top.write(0, bytes(4096))
    await top.write(4096, bytes(512))
    await top.write(8192, bytes(512))
    await asyncio.sleep(0.01)
    assert told == [(8192, 512)]
    assert node.write_threshold is None
