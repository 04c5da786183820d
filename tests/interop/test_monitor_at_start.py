# SPDX-License-Identifier: Apache-2.0
"""A monitor's client that comes while the program starts sees all of what it serves, not half."""

from __future__ import annotations

import time
from pathlib import Path

from tests.support.daemon import Daemon, blockdev
from tests.support.qmp import Qmp, monitor_argv
from tests.support.tools import create_image

NODES = 20


def test_an_early_client_waits_for_the_whole_graph(scratch: Path) -> None:
    argv: list[str] = []
    for i in range(NODES):
        image = create_image(scratch / f"{i}.qcow2", "1M")
        argv += blockdev(driver="qcow2", node_name=f"n{i}", file={"driver": "file", "filename": str(image)})
    daemon = Daemon(*monitor_argv(scratch / "qmp"), *argv)
    try:
        end = time.monotonic() + 30
        while not (scratch / "qmp").exists():
            assert time.monotonic() < end
            time.sleep(0.001)
        with Qmp(scratch / "qmp") as client:
            found = client.execute("query-named-block-nodes", flat=True)
        assert {f"n{i}" for i in range(NODES)} <= {node["node-name"] for node in found}
        daemon.wait_ready()
        daemon.stop()
    finally:
        daemon.kill()
