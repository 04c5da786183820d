# SPDX-License-Identifier: Apache-2.0
"""Throttling as clients see it: rates, shares, bursts and words as in QEMU's daemon."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from target.peers.nbd_client import NbdClient
from target.peers.vhost_user_front_end import BLK_HEADER, Buffer, FrontEnd
from tests.support.daemon import Daemon, blockdev, blocktarget_argv, vhost_user_export
from tests.support.throttle_load import CASES, Load, daemon_argv, measure
from tests.support.tools import run

Start = Callable[..., Daemon]
QEMU = "qemu-storage-daemon"
# A second object of a type that is unknown ends the program, if nothing did before.
END = ["--object", "no-such-type,id=end"]


@pytest.mark.timed
@pytest.mark.parametrize("name", CASES)
def test_rates_and_shares(scratch: Path, start: Start, name: str) -> None:
    case = CASES[name]
    disks = 1 + max(load.disk for load in case.loads)
    start(*daemon_argv(scratch / "s", case.limits, disks))
    got = asyncio.run(measure(scratch / "s", case.loads, 5, 0.4))
    total, wanted = sum(each.rate(skip=1) for each in got), sum(case.rates)
    assert abs(total / wanted - 1) < 0.05, [each.counts for each in got]
    for each, rate in zip(got, case.rates, strict=True):
        assert abs(each.rate(skip=1) / rate - 1) < 0.2, [each.counts for each in got]


@pytest.mark.timed
@pytest.mark.parametrize("length", [1, 2])
def test_bursts_are_those_of_qemu(
    scratch: Path, start: Start, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    """A burst for its length, then the average; for a length of 1 all of the burst at once."""
    limits = {"iops-total": 100, "iops-total-max": 500, "iops-total-max-length": length}
    found = []
    for name in ("", QEMU):
        monkeypatch.setenv("BLOCKTARGET_TEST_DAEMON", name)
        socket = scratch / (name or "ours")
        daemon = start(*daemon_argv(socket, limits, 1))
        found.append(asyncio.run(measure(socket, [Load()], 6, 0.5))[0].counts)
        daemon.stop()
    ours, theirs = found
    assert abs(sum(ours) - sum(theirs)) < 0.05 * sum(theirs), found
    for i in range(len(ours)):
        assert abs(sum(ours[: i + 1]) - sum(theirs[: i + 1])) < 0.1 * sum(theirs[: i + 1]) + 20, found


REFUSED = [
    "limits.iops-total=100,limits.iops-read=5",
    "limits.bps-total=100,limits.bps-write=5",
    "limits.iops-total=-1",
    "limits.iops-total=2000000000000000",
    "limits.iops-size=5",
    "limits.iops-total-max=5",
    "limits.iops-total=10,limits.iops-total-max=5",
    "limits.iops-total=10,limits.iops-total-max-length=5",
    "limits.iops-total=10,limits.iops-total-max-length=0",
    "limits.iops-total=10,limits.iops-total-max=100,limits.iops-total-max-length=5000000000",
    "limits.iops-total=10,limits.iops-total-max=1000000000000,limits.iops-total-max-length=1000000",
    "limits.bps-total=1M",
    "limits.foo=1",
    "x-iops-total=-1",
    "x-iops-total=10,limits.iops-read=10",
    "x-bps-total=1M",
    "x-iops-total-max=10",
]


def refusal(*argv: str) -> str:
    """What the program said when it ended: the last line, without its own name and the option's text."""
    done = run(*argv, *END, check=False, timeout=20)
    assert done.returncode != 0
    return done.stderr.strip().splitlines()[-1].rpartition(": ")[2]


@pytest.mark.parametrize("limits", REFUSED)
def test_what_is_refused_in_the_words_of_qemu(limits: str) -> None:
    words = ["--object", f"throttle-group,id=g,{limits}"]
    theirs, ours = refusal(QEMU, *words), refusal(*blocktarget_argv("daemon", *words))
    assert ours == theirs and "no-such-type" not in ours


NULL = {"driver": "null-co", "size": 1 << 20}


@pytest.mark.parametrize(
    "options",
    [
        {"file": NULL},
        {"throttle-group": "g"},
        {"file": NULL, "throttle-group": "h"},
        {"file": NULL, "throttle-group": "thread"},
        {"file": NULL, "throttle-group": "g", "limits": 5},
    ],
)
def test_nodes_are_refused_in_the_words_of_qemu(options: dict[str, object]) -> None:
    words = ["--object", "throttle-group,id=g", "--object", "iothread,id=thread"]
    words += ["--blockdev", json.dumps({"driver": "throttle", "node-name": "t", **options})]
    theirs, ours = refusal(QEMU, *words), refusal(*blocktarget_argv("daemon", *words))
    assert ours == theirs and "no-such-type" not in ours


def test_copy_on_read_is_refused_in_the_words_of_qemu() -> None:
    for options in ({"read-only": True}, {"file": NULL | {"read-only": True}}, {"bottom": "none"}):
        words = blockdev(driver="copy-on-read", node_name="t", **{"file": NULL, **options})
        theirs, ours = refusal(QEMU, *words), refusal(*blocktarget_argv("daemon", *words))
        assert ours == theirs and "no-such-type" not in ours


def begin_reads(front_end: FrontEnd, count: int) -> None:
    """Requests of one sector, whose answers nobody waits for."""
    memory, ring = front_end.memory, front_end.rings[0]
    for _ in range(count):
        header = memory.put(BLK_HEADER.pack(0, 0, 0))
        sink, status = memory.allocate(512), memory.put(b"x")
        ring.add([Buffer(header, BLK_HEADER.size), Buffer(sink, 512, True), Buffer(status, 1, True)])
    ring.notify()


def test_a_queue_stops_whose_requests_wait(scratch: Path, start: Start) -> None:
    words = daemon_argv(scratch / "nbd", {"iops-total": 1}, 1)
    daemon = start(*words, *vhost_user_export(scratch / "vhost", node="disk0"))
    with FrontEnd.connect(str(scratch / "vhost")) as front_end:
        begin_reads(front_end, 30)
        time.sleep(0.2)
        began = time.monotonic()
        assert front_end.stop_queue(0) == 30
        front_end.start_queue(0, base=30)
        begin_reads(front_end, 30)
        daemon.stop()
        assert time.monotonic() - began < 4


def test_the_target_ends_while_requests_wait(scratch: Path, start: Start) -> None:
    daemon = start(*daemon_argv(scratch / "nbd", {"iops-total": 1}, 1))

    async def stop() -> float:
        client = await NbdClient.connect(str(scratch / "nbd"), "disk0", structured=False)
        reads = [asyncio.ensure_future(client.read(0, 512)) for _ in range(40)]
        await asyncio.sleep(0.2)
        began = time.monotonic()
        await asyncio.to_thread(daemon.stop)
        await asyncio.wait(reads)
        await client.abort()
        return time.monotonic() - began

    assert asyncio.run(stop()) < 4
