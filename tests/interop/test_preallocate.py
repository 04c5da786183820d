# SPDX-License-Identifier: Apache-2.0
"""A qcow2 image over preallocate: its file while it is used and afterwards, here and with QEMU's daemon."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.daemon import (
    Daemon,
    blockdev,
    blocktarget_argv,
    nbd_export,
    nbd_server_unix,
    nbd_uri,
)
from tests.support.tools import check_image, create_image, qemu_io, run

QEMU = "qemu-storage-daemon"
MIB = 1 << 20


@pytest.mark.parametrize("daemon", ["", QEMU])
def test_an_image_grows_ahead(
    scratch: Path, start: Callable[..., Daemon], monkeypatch: pytest.MonkeyPatch, daemon: str
) -> None:
    monkeypatch.setenv("BLOCKTARGET_TEST_DAEMON", daemon)
    image = create_image(scratch / "disk", "1G")
    file = {"driver": "file", "filename": str(image)}
    below = {"driver": "preallocate", "file": file, "prealloc-size": 32 * MIB, "prealloc-align": 4 * MIB}
    running = start(
        *blockdev(driver="qcow2", node_name="disk", file=below),
        *nbd_server_unix(scratch / "nbd"),
        *nbd_export(),
    )
    qemu_io(nbd_uri(scratch / "nbd"), "write -P 1 0 3M", "flush")
    status = image.stat()
    assert status.st_size % (4 * MIB) == 0 and 36 * MIB <= status.st_size <= 48 * MIB
    assert status.st_blocks * 512 >= status.st_size - MIB
    qemu_io(nbd_uri(scratch / "nbd"), "write -P 2 100M 40M", "flush", "read -P 1 0 3M", "read -P 2 100M 40M")
    running.stop()
    assert 43 * MIB < image.stat().st_size <= 46 * MIB
    check_image(image)
    qemu_io(image, "read -P 1 0 3M", "read -P 2 100M 40M", "read -P 0 140M 1M", format="qcow2")


@pytest.mark.parametrize("align", [1000, 4096])
def test_options(scratch: Path, align: int) -> None:
    (scratch / "disk").touch()
    node = {"driver": "preallocate", "node-name": "x", "prealloc-align": align}
    node["file"] = {"driver": "file", "filename": str(scratch / "disk")}
    end = ["--object", "no-such-type,id=end"]
    found = []
    for argv in (blocktarget_argv("daemon"), [QEMU]):
        done = run(*argv, "--blockdev", json.dumps(node), *end, check=False, timeout=20)
        found.append(done.stderr.strip().splitlines()[-1].rpartition(": ")[2])
    assert found[0] == found[1]
    assert ("is not aligned to 512" in found[0]) == (align == 1000)
