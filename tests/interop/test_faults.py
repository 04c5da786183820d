# SPDX-License-Identifier: Apache-2.0
"""Python's share: once the tables are loaded, ordinary reads and overwrites never enter it.

The target counts its faults and shows them on SIGUSR1; a client that is not ours makes the load.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import Daemon, image_node, nbd_export, nbd_server_unix, nbd_uri
from tests.support.tools import create_image, qemu_io, run

SIZE = "64M"
SECONDS = 5


def counters(daemon: Daemon) -> dict[str, Any]:
    """The line that SIGUSR1 makes the target print."""
    before = daemon.output().count("\n")
    daemon.process.send_signal(signal.SIGUSR1)
    end = time.monotonic() + SECONDS
    while daemon.output().count("\n") == before:
        assert time.monotonic() < end, "no line after SIGUSR1"
        time.sleep(0.01)
    found: dict[str, Any] = json.loads(daemon.output().splitlines()[-1])
    return found


def load(uri: str, kind: str) -> None:
    run(
        "fio",
        "--name=load",
        "--ioengine=nbd",
        f"--uri={uri}",
        f"--rw={kind}",
        "--bs=4k",
        "--iodepth=32",
        f"--size={SIZE}",
        "--number_ios=10000",
        "--norandommap",
    )


@pytest.mark.parametrize("kind", ["randread", "randwrite"])
def test_a_mapped_image_takes_no_fault(scratch: Path, start: Callable[..., Daemon], kind: str) -> None:
    image = create_image(scratch / "disk.qcow2", SIZE)
    qemu_io(image, f"write -P 7 0 {SIZE}", format="qcow2")
    socket = scratch / "nbd"
    daemon = start(*image_node(image, "qcow2"), *nbd_server_unix(socket), *nbd_export())
    run("nbdcopy", nbd_uri(socket), "null:")
    warm = counters(daemon)["nodes"]["disk"]
    assert warm["faults"]["load"] > 0, "the first touch of a table is a fault"
    load(nbd_uri(socket), kind)
    after = counters(daemon)["nodes"]["disk"]
    operation = "read" if kind == "randread" else "write"
    assert after["requests"][operation] - warm["requests"][operation] >= 10000
    # fio ends with a flush at most, and a flush of clean tables does not leave C.
    assert after["faults"] == warm["faults"]
    assert after["misses"] == warm["misses"]
