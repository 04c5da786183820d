# SPDX-License-Identifier: Apache-2.0
"""scripts/bench does measure, and its clients see wrong data: short cells, figures of no meaning."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bench import clients
from tests.bench.cli import main
from tests.bench.rows import LIMIT_CALLS, LIMIT_RING, NBDKIT, QEMU_NBD, QSD, TARGET
from tests.support.daemon import Daemon, blockdev, nbd_export, nbd_server_unix, vhost_user_export
from tests.support.tools import create_image, qemu_img

pytestmark = pytest.mark.timed

SHORT = ["--size", "4", "--seconds", "0.1", "--repetitions", "1"]


def test_two_rows_with_every_peer(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ["--rows", "vhost-qcow2-randwrite-4k-qd1", "--rows", "nbd-raw-randread"]
    assert main([*SHORT, *rows, "--directory", str(scratch), "--output", str(scratch)]) == 0
    document = json.loads((scratch / "results.json").read_text())
    vhost, nbd = (
        {name: cell["median"] for name, cell in row["backends"].items()} for row in document["rows"]
    )
    assert set(vhost) == {TARGET, QSD, LIMIT_RING, LIMIT_CALLS}
    assert set(nbd) == {TARGET, QSD, QEMU_NBD, NBDKIT, LIMIT_RING, LIMIT_CALLS}
    for figures in (*vhost.values(), *nbd.values()):
        assert figures["iops"] > 100 and 0 < figures["p50"] <= figures["p99"] and figures["cpu"] > 0
    assert document["images"]["raw"]["resident"] == document["images"]["qcow2"]["resident"] == 1
    assert (scratch / "results.svg").read_text().startswith("<svg")
    assert "vhost-qcow2-randwrite-4k-qd1" in capsys.readouterr().out
    assert sorted(path.suffix for path in scratch.iterdir()) == [".json", ".md", ".svg"]


def test_memory_row(scratch: Path) -> None:
    assert (
        main(["--rows", "memory-nbd-full-20GiB", "--directory", str(scratch), "--output", str(scratch)]) == 0
    )
    [row] = json.loads((scratch / "results.json").read_text())["memory"]
    assert 5 < row["rss_anon_mib"][TARGET]["peak"] < row["bar_mib"] and row["verdict"] == "PASS"


def test_server_that_does_not_start_is_reported_and_the_others_are_measured(
    scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--directory", str(scratch), "--output", str(scratch)]
    assert main([*SHORT, *where, "--rows", "null*qd1", "--target", "false"]) == 1
    document = json.loads((scratch / "results.json").read_text())
    assert document["failures"] == ["vhost-null-randread-4k-qd1, blocktarget: blocktarget does not start: "]
    assert QSD in document["rows"][0]["backends"] and "Failures" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["--rows", "no-such-row"], "no-such-row"),
        (["--seconds", "0"], "--seconds"),
        (["--quick", "--write-docs"], "all rows"),
    ],
)
def test_options_that_make_no_sense(argv: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert why in capsys.readouterr().err


def _client(scratch: Path, transport: str) -> tuple[list[str], list[str]]:
    """An export of the node `disk`, and the client for it."""
    clients.build(scratch)
    socket = scratch / "socket"
    if transport == "vhost":
        return vhost_user_export(socket), [str(scratch / "vhost_bench"), "--socket", str(socket)]
    more = ["--export", "disk", "--structured", "--connections", "2"]
    return [*nbd_server_unix(socket), *nbd_export()], [
        str(scratch / "nbd_bench"),
        "--socket",
        str(socket),
        *more,
    ]


@pytest.mark.parametrize("transport", ["vhost", "nbd"])
def test_clients_touch_each_place_once_and_read_what_they_wrote(
    scratch: Path, start: Callable[..., Daemon], transport: str
) -> None:
    image = create_image(scratch / "disk.qcow2", "8M", options="cluster_size=4096")
    export, client = _client(scratch, transport)
    node = blockdev(driver="qcow2", node_name="disk", file={"driver": "file", "filename": str(image)})
    daemon = start(*node, *export)
    client += ["--pid", str(daemon.process.pid), "--verify", "--secs", "0.1", "--qd", "16"]
    assert _figures([*client, "--op", "randwrite", "--stride", "64k", "--ios", "128"])["ios"] == 128
    daemon.stop()
    qemu_img("convert", "-O", "raw", image, scratch / "raw")
    data = (scratch / "raw").read_bytes()
    for offset in range(0, len(data), 4 << 10):
        touched = offset % (64 << 10) == 0
        word = offset * 0x9E3779B97F4A7C15 % 2**64 if touched else 0
        assert int.from_bytes(data[offset : offset + 8], "little") == word
    client[client.index("--pid") + 1] = str(start(*node, *export).process.pid)
    figures = _figures([*client, "--op", "randread"])
    assert figures["ios"] > 100 and figures["backend_cpu_us_per_io"] > 0


@pytest.mark.parametrize("transport", ["vhost", "nbd"])
def test_clients_see_wrong_data(scratch: Path, start: Callable[..., Daemon], transport: str) -> None:
    export, client = _client(scratch, transport)
    start(*blockdev(driver="null-co", node_name="disk", size=1 << 20, read_zeroes=True), *export)
    done = subprocess.run([*client, "--verify", "--secs", "0.1"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 1 and "wrong data at" in done.stderr


def _figures(argv: list[str]) -> dict[str, float]:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    figures: dict[str, float] = json.loads(done.stdout)
    return figures
