# SPDX-License-Identifier: Apache-2.0
"""copy-on-read: the same reads here and in QEMU's daemon leave the same clusters in the overlay."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import Daemon, blockdev, nbd_export, nbd_server_unix, nbd_uri
from tests.support.tools import check_image, create_image, qemu_img, qemu_io, run

QEMU = "qemu-storage-daemon"
KIB, MIB = 1 << 10, 1 << 20
SIZE = 8 * MIB
Start = Callable[..., Daemon]


def chain(directory: Path, seed: int, overlay_options: str = "") -> tuple[Path, Path, Path]:
    """base <- mid <- top, each with some clusters of its own, zeros as data among them; base is short."""
    rng = random.Random(seed)
    images: list[Path] = []
    for name, options in (
        ("base", "cluster_size=4k"),
        ("mid", "cluster_size=128k"),
        ("top", overlay_options),
    ):
        size = SIZE - 3 * MIB if name == "base" else SIZE + 3 * 512
        path = directory / f"{name}.qcow2"
        create_image(path, str(size), options=options, backing=images[-1] if images else None)
        commands = []
        for i in range(10 if name != "top" else 4):
            at, length = rng.randrange(size // 4096 - 64) * 4096, rng.randrange(1, 64) * 4096
            commands.append(f"write -P {i if i % 4 else 0} {at} {length}")
        qemu_io(path, *commands, format="qcow2")
        images.append(path)
    base, mid, top = images
    return base, mid, top


def serve(start: Start, top: Path, socket: Path, **options: Any) -> Daemon:
    """The chain with named nodes, the filter on it, over NBD."""
    base, mid = top.with_name("base.qcow2"), top.with_name("mid.qcow2")

    def image(path: Path, name: str, **more: Any) -> list[str]:
        return blockdev(
            driver="qcow2", node_name=name, file={"driver": "file", "filename": str(path)}, **more
        )

    words = image(base, "base", read_only=True) + image(mid, "mid", read_only=True, backing="base")
    words += image(top, "top", backing="mid")
    words += blockdev(driver="copy-on-read", node_name="disk", file="top", **options)
    return start(*words, *nbd_server_unix(socket), *nbd_export())


def allocated(path: Path) -> list[tuple[int, int]]:
    """What is in this image and not in its backing: from where to where.

    Whether zeros are written as such depends on how much is copied at a time.
    """
    found = json.loads(qemu_img("map", "--output=json", "-f", "qcow2", path).stdout)
    runs: list[tuple[int, int]] = []
    for extent in found:
        start, end = extent["start"], extent["start"] + extent["length"]
        if extent["depth"] == 0 and extent["present"]:
            runs[-1:] = [(runs[-1][0], end)] if runs and runs[-1][1] == start else [*runs[-1:], (start, end)]
    return runs


READER = """
import nbd, sys, json
h = nbd.NBD()
h.set_request_structured_replies(False)  # or QEMU's server leaves holes out, and does not read them
h.connect_uri(sys.argv[1])
for length, at in json.loads(sys.argv[2]):
    h.pread(length, at)
h.shutdown()
"""


def read_some(uri: str, seed: int, count: int = 30) -> None:
    rng = random.Random(seed)
    size = SIZE + 3 * 512
    parts = [(512, size - 512)]
    for _ in range(count):
        length = rng.choice((512, 4096, 70000, 300000)) // 512 * 512
        parts.append((length, rng.randrange((size - length) // 512) * 512))
    run("/usr/bin/python3", "-c", READER, uri, json.dumps(parts))


@pytest.mark.parametrize("bottom", [None, "mid", "base"])
@pytest.mark.parametrize("overlay", ["", "cluster_size=4k", "cluster_size=256k", "compat=0.10"])
def test_the_same_clusters_are_copied_as_by_qemu(
    scratch: Path, start: Start, monkeypatch: pytest.MonkeyPatch, overlay: str, bottom: str | None
) -> None:
    found = []
    for name in ("", QEMU):
        directory = scratch / (name or "ours")
        directory.mkdir()
        _, _, top = chain(directory, 1, overlay)
        before = run("qemu-img", "convert", "-O", "raw", top, directory / "before")
        assert before.returncode == 0
        monkeypatch.setenv("BLOCKTARGET_TEST_DAEMON", name)
        daemon = serve(start, top, directory / "s", **({"bottom": bottom} if bottom else {}))
        read_some(nbd_uri(directory / "s"), 2)
        daemon.stop()
        qemu_img("compare", "-f", "raw", "-F", "qcow2", directory / "before", top)
        check_image(top)
        found.append(allocated(top))
    assert found[0] == found[1]
