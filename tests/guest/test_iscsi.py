# SPDX-License-Identifier: Apache-2.0
"""A guest installs a filesystem on qcow2 over an iSCSI LUN; the target goes away under it and comes back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from guest_vm import vhost_user_disk

from tests.guest.conftest import Guest
from tests.guest.jobs import compare_outside, filesystem_job
from tests.guest.test_reconnect import FILES, MANY_WRITERS, WRITERS
from tests.support.daemon import Daemon, blockdev, vhost_user_export
from tests.support.tgtd import Tgtd
from tests.support.tools import check_image, create_image, qemu_img, run

pytestmark = [pytest.mark.guest, pytest.mark.timeout(700)]

Start = Callable[..., Daemon]
Boot = Callable[..., Guest]
SECTORS_160M = str(160 * 2048)
LUN_SIZE = 256 << 20  # room for the image's metadata, and more


@pytest.fixture
def tgtd(scratch: Path) -> Iterator[Tgtd]:
    with Tgtd(scratch) as target:
        target.add_target()
        yield target


def lun(tgtd: Tgtd, scratch: Path, block_size: int = 512) -> Path:
    """A LUN that holds a qcow2 image."""
    path = create_image(scratch / "lun", "160M")
    with path.open("r+b") as handle:
        handle.truncate(LUN_SIZE)
    return tgtd.add_lun(path, block_size=block_size)


def qcow2(tgtd: Tgtd, **options: Any) -> list[str]:
    file = {**tgtd.options(**options), "discard": "unmap"}
    return blockdev(driver="qcow2", node_name="disk", discard="unmap", file=file)


@pytest.mark.parametrize("block_size", [512, 4096])
def test_a_filesystem_is_installed(
    tgtd: Tgtd, scratch: Path, start: Start, boot: Boot, block_size: int
) -> None:
    image = lun(tgtd, scratch, block_size)
    socket = scratch / "vhost.sock"
    daemon = start(*qcow2(tgtd), *vhost_user_export(socket))
    results = boot(filesystem_job("/dev/vda"), vhost_user_disk(socket)).finish()
    daemon.stop()
    assert results["sectors"] == SECTORS_160M
    tgtd.stop()
    compare_outside(results, image, "qcow2", scratch)


def test_the_target_restarts_under_many_writers(tgtd: Tgtd, scratch: Path, start: Start, boot: Boot) -> None:
    """The guest's job fails on any error, and on any I/O error that its kernel tells of."""
    image = lun(tgtd, scratch)
    socket = scratch / "vhost.sock"
    node = qcow2(tgtd, sessions=2)
    daemon = start(*node, *vhost_user_export(socket, queues=2))
    guest = boot(MANY_WRITERS, vhost_user_disk(socket, queues=2), cpus=2)
    guest.wait_for("GUEST-WRITES")
    ended = threading.Event()
    restarts = 0

    def disturb() -> None:
        nonlocal restarts
        while not ended.is_set() and restarts < 5:
            tgtd.restart(0.5)
            restarts += 1
            time.sleep(1)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        results = guest.finish()
    finally:
        ended.set()
        thread.join()
    assert results["files"] == str(WRITERS * FILES)
    assert restarts >= 1 and "connected to" in daemon.output()
    daemon.stop()
    tgtd.stop()
    check_image(image)
    qemu_img("convert", "-f", "qcow2", "-O", "raw", image, scratch / "flat")
    run("e2fsck", "-fn", scratch / "flat")
