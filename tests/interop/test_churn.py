# SPDX-License-Identifier: Apache-2.0
"""NBD clients that come, get half-way and leave at random, while one verifies its data.

The whole run, a thousand clients for two minutes, is the same test with
    BLOCKTARGET_CHURN=1000,120 scripts/test tests/interop/test_churn.py -s
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pytest

from target.exports.nbd.server import SESSION_MEMORY
from target.peers.nbd_churn import Churn
from tests.support.daemon import Daemon, blockdev, nbd_export
from tests.support.nbd import MIB, Usage, anonymous_memory, descriptors, settles
from tests.support.tools import check_image, create_image

CONNECTION = MIB  # what each may have besides its part of the buffers of all (bytes)
GROWTH = 16 * MIB
LOOK_SECONDS, MOST_LOOKS = 0.5, 20
# A session that begins has its socket twice for a moment: from the control plane, for the datapath.
HANDOVER = 1
CLIENTS, SECONDS = (int(n) for n in os.environ.get("BLOCKTARGET_CHURN", "200,8").split(","))


def peaks(usage: Usage, base_descriptors: int, base_memory: int) -> str:
    half = len(usage.memory) // 2
    halves = [int(median(part)) - base_memory >> 10 for part in (usage.memory[:half], usage.memory[half:])]
    return (
        f"at most {max(usage.descriptors) - base_descriptors} descriptors "
        f"and {max(usage.memory) - base_memory >> 10} KiB more than at rest, "
        f"in the median {halves[0]} in the first half, {halves[1]} in the second ({len(usage.memory)} looks)"
    )


def check_flat(usage: Usage, base_descriptors: int, base_memory: int) -> None:
    """All the time: bounded by the connections there may be, and not growing."""
    assert len(usage.memory) > 2 * SECONDS
    assert max(usage.descriptors) <= base_descriptors + CLIENTS // 2 + HANDOVER
    assert max(usage.memory) <= base_memory + SESSION_MEMORY + CLIENTS // 2 * CONNECTION
    half = len(usage.memory) // 2
    first, second = median(usage.memory[:half]), median(usage.memory[half:])
    assert second <= first + 0.25 * max(0, first - base_memory) + GROWTH


async def at_rest(pid: int) -> tuple[int, int]:
    """Descriptors and memory once they fall no more: what clients had goes some time after them."""
    now = descriptors(pid), anonymous_memory(pid)
    for _ in range(MOST_LOOKS):
        before = now
        await asyncio.sleep(LOOK_SECONDS)
        now = descriptors(pid), anonymous_memory(pid)
        if now[0] >= before[0] and now[1] >= before[1]:
            break
    return now


@pytest.mark.timeout(SECONDS * 2 + 120)
@pytest.mark.parametrize("format", ["raw", "qcow2"])
async def test_clients_come_and_go(scratch: Path, start: Callable[..., Daemon], format: str) -> None:
    image = create_image(scratch / "disk", str(64 * MIB), format=format)
    socket = str(scratch / "nbd")
    file = {"driver": "file", "filename": str(image)}
    daemon = start(
        *["--object", "iothread,id=t0", *blockdev(driver=format, node_name="disk", file=file)],
        *["--nbd-server", f"addr.type=unix,addr.path={socket},max-connections={CLIENTS // 2}"],
        *nbd_export()[:-1],
        nbd_export()[-1] + ",iothread=t0",
    )
    pid = daemon.process.pid
    await Churn(socket, "disk", seed=0).run(CLIENTS // 2, 2)  # what is made on first use belongs to the base
    base = await at_rest(pid)
    with Usage(pid) as usage:
        result = await Churn(socket, "disk").run(CLIENTS, SECONDS)
    print(f"{result}; {peaks(usage, *base)}")
    check_flat(usage, *base)
    assert len(result.visits) == 8 and sum(result.visits.values()) > 5 * SECONDS
    assert result.rounds > SECONDS / 2  # it shares its process with the others, which keep that busy
    await settles(pid, *base)
    daemon.stop()
    if format == "qcow2":
        check_image(image)
