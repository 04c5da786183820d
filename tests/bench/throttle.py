# SPDX-License-Identifier: Apache-2.0
"""How exact throttling is, here and in QEMU's daemon: ``python -m tests.bench.throttle [SECONDS]``."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from pathlib import Path

from tests.support.daemon import Daemon
from tests.support.throttle_load import CASES, Case, Got, daemon_argv, measure

PROGRAMS = {"blocktarget": "", "qemu-storage-daemon": "qemu-storage-daemon"}


def run(case: Case, program: str, seconds: float) -> list[Got]:
    os.environ["BLOCKTARGET_TEST_DAEMON"] = program
    with tempfile.TemporaryDirectory(prefix="bt-") as directory:
        socket = Path(directory) / "s"
        daemon = Daemon(*daemon_argv(socket, case.limits, 1 + max(load.disk for load in case.loads)))
        try:
            daemon.wait_ready()
            return asyncio.run(measure(socket, case.loads, 1, seconds))
        finally:
            daemon.kill()


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 10
    print(f"requests a second over {seconds:g} s from the start, the first tenth of a second's worth at once")
    for name, case in CASES.items():
        for program, command in PROGRAMS.items():
            rates = [each.rate() for each in run(case, command, seconds)]
            wanted, total = sum(case.rates), sum(rates)
            shares = " ".join(f"{rate:.0f}" for rate in rates)
            print(f"{name:10} {program:20} {total:8.1f} of {wanted:g} ({total / wanted:.3f}): {shares}")


if __name__ == "__main__":
    main()
