# SPDX-License-Identifier: Apache-2.0
"""4k random reads of one LUN at depth 32, over NBD: as qemu-storage-daemon does it, and what tgtd can give.

tgtd is the limit sooner or later: all of its network is one thread. iscsi-perf, which does nothing with what
it reads, shows where. Runs alternate, so that what else the machine does hits all of them.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.bench.clients import build
from tests.support.daemon import Daemon, nbd_export, nbd_server_unix
from tests.support.tgtd import Tgtd
from tests.support.tools import fill, run

pytestmark = pytest.mark.timed

MIB = 1 << 20
SIZE = 128 * MIB
ROUNDS = 7
SECONDS = "1"
TIMES_QEMU, OF_THE_LIMIT = 1.5, 0.8


@contextmanager
def qemu(*argv: str, sock: Path) -> Iterator[None]:
    with subprocess.Popen(["qemu-storage-daemon", *argv]) as process:
        end = time.monotonic() + 20
        while not sock.exists():
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.02)
        try:
            yield
        finally:
            process.terminate()


def nbd_rate(directory: Path, sock: Path) -> float:
    words = ["--export", "disk", "--op", "randread", "--bs", "4096", "--qd", "32", "--secs", SECONDS]
    rate: float = json.loads(run(directory / "nbd_bench", "--socket", sock, *words).stdout)["iops"]
    return rate


def tgtd_rate(url: str) -> float:
    text = run("iscsi-perf", "-m", "32", "-b", "8", "-t", SECONDS, "-r", url).stdout
    return float(re.findall(r"iops average (\d+)", text)[-1])


@pytest.mark.slow
def test_4k_random_reads_at_depth_32(scratch: Path) -> None:
    build(scratch)
    ours, qemus = scratch / "ours.sock", scratch / "qemu.sock"
    rates: dict[str, list[float]] = {"ours": [], "QEMU's": [], "iscsi-perf": []}
    with Tgtd(scratch) as tgtd:
        tgtd.add_target()
        tgtd.add_lun(fill(scratch / "lun", SIZE, seed=5, pieces=2000))
        daemon = Daemon(*tgtd.node(), *nbd_server_unix(ours), *nbd_export()).wait_ready()
        try:
            with qemu(*tgtd.node(), *nbd_server_unix(qemus), *nbd_export(), sock=qemus):
                for _ in range(ROUNDS):
                    rates["QEMU's"].append(nbd_rate(scratch, qemus))
                    rates["ours"].append(nbd_rate(scratch, ours))
                    rates["iscsi-perf"].append(tgtd_rate(tgtd.url()))
            daemon.stop()
        finally:
            if daemon.log.exists():
                daemon.kill()
    median = {name: statistics.median(found) for name, found in rates.items()}
    print({name: round(rate) for name, rate in median.items()})
    assert (
        median["ours"] >= TIMES_QEMU * median["QEMU's"]
        or median["ours"] >= OF_THE_LIMIT * median["iscsi-perf"]
    ), rates
