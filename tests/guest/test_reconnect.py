# SPDX-License-Identifier: Apache-2.0
"""The target dies and comes back while a guest writes: the guest sees no error and loses nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from guest_vm import vhost_user_disk

from tests.guest.conftest import Guest
from tests.support.daemon import Daemon, image_node, vhost_user_export
from tests.support.tools import run

pytestmark = [pytest.mark.guest, pytest.mark.timeout(400)]

WRITERS = 4
JOB = f"""
set -e
mkfs.ext4 -q -F /dev/vda
mount -t ext4 /dev/vda /mnt
writer() {{
    for i in $(seq 1 25); do
        dd if=/dev/urandom of=/mnt/$1.$i bs=64k count=4 conv=fsync 2>/dev/null || exit 1
        sha256sum /mnt/$1.$i >> /tmp/sums.$1
    done
}}
pids=
for w in $(seq 1 {WRITERS}); do writer $w & pids="$pids $!"; done
sleep 1
echo GUEST-WRITES
for pid in $pids; do wait $pid; done
umount /mnt
echo 3 > /proc/sys/vm/drop_caches
mount -t ext4 -o ro /dev/vda /mnt
cat /tmp/sums.* > /tmp/sums
sha256sum -c /tmp/sums > /tmp/checked || {{ cat /tmp/checked; exit 1; }}
umount /mnt
e2fsck -fn /dev/vda
if dmesg | grep -i 'i/o error'; then exit 1; fi
echo "RESULT files $(wc -l < /tmp/sums)"
"""


def test_guest_survives_a_killed_target(
    scratch: Path, start: Callable[..., Daemon], boot: Callable[..., Guest]
) -> None:
    image = scratch / "disk.raw"
    with image.open("wb") as handle:
        handle.truncate(160 << 20)
    socket = scratch / "vhost.sock"
    argv = [*image_node(image, "raw"), *vhost_user_export(socket, queues=2)]
    first = start(*argv)
    guest = boot(JOB, vhost_user_disk(socket, queues=2, reconnect=1), cpus=2)
    guest.wait_for("GUEST-WRITES")
    first.kill()
    time.sleep(1)
    second = start(*argv)
    assert guest.finish()["files"] == str(WRITERS * 25)
    second.stop()
    run("e2fsck", "-fn", image)
