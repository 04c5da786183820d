# SPDX-License-Identifier: Apache-2.0
"""NBD clients that come, get half-way and leave at random, while one verifies its data.

The whole run, a thousand clients for two minutes, is the same test with
    BLOCKTARGET_CHURN=1000,120 scripts/test tests/interop/test_churn.py -s
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from target.peers.nbd_churn import Churn
from tests.support.daemon import Daemon, blockdev, nbd_export
from tests.support.nbd import MIB, anonymous_memory, descriptors, settles
from tests.support.tools import check_image, create_image

CLIENTS, SECONDS = (int(n) for n in os.environ.get("BLOCKTARGET_CHURN", "200,8").split(","))


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
    base = descriptors(pid), anonymous_memory(pid)
    result = await Churn(socket, "disk").run(CLIENTS, SECONDS)
    print(result)
    assert len(result.visits) == 8 and sum(result.visits.values()) > 5 * SECONDS
    assert result.rounds > SECONDS / 2  # it shares its process with the others, which keep that busy
    await settles(pid, *base)
    daemon.stop()
    if format == "qcow2":
        check_image(image)
