# SPDX-License-Identifier: Apache-2.0
"""A real kernel makes a filesystem on each kind of export; what it wrote is compared from outside."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from guest_vm import vhost_user_disk

from tests.guest.conftest import Guest
from tests.guest.jobs import compare_outside, filesystem_job
from tests.support.daemon import (
    Daemon,
    free_port,
    image_node,
    nbd_export,
    nbd_server_tcp,
    nbd_server_unix,
    vhost_user_export,
)
from tests.support.tools import create_image, qemu_io, sha256

pytestmark = [pytest.mark.guest, pytest.mark.timeout(700)]

Start = Callable[..., Daemon]
Boot = Callable[..., Guest]
SECTORS_160M = str(160 * 2048)


def qemu_nbd_disk(socket: Path) -> list[str]:
    """A virtio disk of the guest's QEMU, which reaches the export with QEMU's own NBD client."""
    node = f"driver=nbd,node-name=n0,server.type=unix,server.path={socket},export=disk,discard=unmap"
    return ["-blockdev", node, "-device", "virtio-blk-pci,drive=n0,discard=on"]


def guest_network() -> list[str]:
    return ["-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="]


@pytest.mark.parametrize("queues", [1, 2])
def test_vhost_user_disk(scratch: Path, start: Start, boot: Boot, queues: int) -> None:
    image = create_image(scratch / "disk.qcow2", "160M")
    socket = scratch / "vhost.sock"
    daemon = start(*image_node(image, "qcow2"), *vhost_user_export(socket, queues=queues))
    results = boot(filesystem_job("/dev/vda"), vhost_user_disk(socket, queues=queues), cpus=queues).finish()
    daemon.stop()
    assert not socket.exists()
    assert results["sectors"] == SECTORS_160M
    assert results["queues"] == str(queues)
    compare_outside(results, image, "qcow2", scratch)


def test_nbd_disk(scratch: Path, start: Start, boot: Boot) -> None:
    image = create_image(scratch / "disk.qcow2", "160M")
    socket = scratch / "nbd.sock"
    daemon = start(*image_node(image, "qcow2"), *nbd_server_unix(socket), *nbd_export())
    results = boot(filesystem_job("/dev/vda"), qemu_nbd_disk(socket)).finish()
    daemon.stop()
    assert results["sectors"] == SECTORS_160M
    compare_outside(results, image, "qcow2", scratch)


@pytest.mark.parametrize("connections", [1, 2])
def test_kernel_nbd_client(scratch: Path, start: Start, boot: Boot, connections: int) -> None:
    image = create_image(scratch / "disk.qcow2", "160M")
    port = free_port()
    daemon = start(*image_node(image, "qcow2"), *nbd_server_tcp(port), *nbd_export())
    connect = (
        "ip link set eth0 up; ip addr add 10.0.2.15/24 dev eth0\n"
        f"nbd-client 10.0.2.2 {port} /dev/nbd0 -N disk -b 4096 -C {connections} || exit 1\n"
    )
    leave = "nbd-client -d /dev/nbd0\n"
    job = connect + filesystem_job("/dev/nbd0") + leave
    results = boot(job, guest_network(), cpus=connections).finish()
    daemon.stop()
    assert results["sectors"] == SECTORS_160M
    assert results["queues"] == str(connections)
    compare_outside(results, image, "qcow2", scratch)


def test_overlay_leaves_its_backing_image_alone(scratch: Path, start: Start, boot: Boot) -> None:
    base = create_image(scratch / "base.qcow2", "96M")
    qemu_io(base, "write -P 0x42 0 96M", format="qcow2")
    before = sha256(base)
    overlay = create_image(scratch / "disk.qcow2", "160M", backing=base)
    socket = scratch / "vhost.sock"
    daemon = start(*image_node(overlay, "qcow2"), *vhost_user_export(socket))
    results = boot(filesystem_job("/dev/vda"), vhost_user_disk(socket)).finish()
    daemon.stop()
    assert sha256(base) == before
    compare_outside(results, overlay, "qcow2", scratch)


def test_raw_disk(scratch: Path, start: Start, boot: Boot) -> None:
    image = scratch / "disk.raw"
    with image.open("wb") as handle:
        handle.truncate(160 << 20)
    socket = scratch / "vhost.sock"
    daemon = start(*image_node(image, "raw"), *vhost_user_export(socket))
    results = boot(filesystem_job("/dev/vda"), vhost_user_disk(socket)).finish()
    daemon.stop()
    compare_outside(results, image, "raw", scratch)


def test_read_only_disk(scratch: Path, start: Start, boot: Boot) -> None:
    image = create_image(scratch / "disk.qcow2", "8M")
    qemu_io(image, "write -P 0x5a 1M 1M", format="qcow2")
    socket = scratch / "vhost.sock"
    start(*image_node(image, "qcow2", read_only=True), *vhost_user_export(socket, writable=False))
    job = (
        "set -e\n"
        "echo RESULT read-only $(cat /sys/block/vda/ro)\n"
        "dd if=/dev/vda bs=1M skip=1 count=1 2>/dev/null | sha256sum | sed 's/^/RESULT sum /'\n"
        "if dd if=/dev/zero of=/dev/vda bs=4k count=1 2>/dev/null; then exit 1; fi\n"
    )
    results = boot(job, vhost_user_disk(socket)).finish()
    assert results["read-only"] == "1"
    assert results["sum"].split()[0] == hashlib.sha256(b"\x5a" * (1 << 20)).hexdigest()
