# SPDX-License-Identifier: Apache-2.0
"""The target goes away and comes back while a guest writes: the guest sees no error and loses nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from guest_vm import vhost_user_disk

from tests.guest.conftest import Guest
from tests.support.daemon import Daemon, image_node, vhost_user_export
from tests.support.tools import check_image, create_image, qemu_img, run

pytestmark = [pytest.mark.guest, pytest.mark.timeout(700)]

WRITERS, FILES = 4, 25
MANY_WRITERS = f"""
set -e
mkfs.ext4 -q -F /dev/vda
mount -t ext4 /dev/vda /mnt
writer() {{
    for i in $(seq 1 {FILES}); do
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

# One request at a time: with more, a kill may come between completions out of order, after which QEMU, which
# only knows how many there were, does not know which.
BLOCKS = 400
ONE_WRITER = f"""
set -e
dd if=/dev/urandom of=/tmp/data bs=16k count={BLOCKS} 2>/dev/null
(sleep 0.5; echo GUEST-WRITES) &
for i in $(seq 0 {BLOCKS - 1}); do
    dd if=/tmp/data of=/dev/vda bs=16k count=1 skip=$i seek=$i oflag=direct 2>/dev/null
done
wait
dd if=/dev/vda of=/tmp/back bs=16k count={BLOCKS} iflag=direct 2>/dev/null
cmp /tmp/data /tmp/back
if dmesg | grep -i 'i/o error'; then exit 1; fi
echo "RESULT blocks {BLOCKS}"
"""


def test_restart_under_many_writers(
    scratch: Path, start: Callable[..., Daemon], boot: Callable[..., Guest]
) -> None:
    image = create_image(scratch / "disk.qcow2", "160M")
    socket = scratch / "vhost.sock"
    argv = [*image_node(image, "qcow2"), *vhost_user_export(socket, queues=2)]
    first = start(*argv)
    guest = boot(MANY_WRITERS, vhost_user_disk(socket, queues=2, reconnect=1), cpus=2)
    guest.wait_for("GUEST-WRITES")
    first.stop()
    check_image(image)
    time.sleep(1)
    second = start(*argv)
    assert guest.finish()["files"] == str(WRITERS * FILES)
    second.stop()
    check_image(image)
    qemu_img("convert", "-f", "qcow2", "-O", "raw", image, scratch / "flat")
    run("e2fsck", "-fn", scratch / "flat")


def test_kill_under_one_writer(
    scratch: Path, start: Callable[..., Daemon], boot: Callable[..., Guest]
) -> None:
    image = scratch / "disk.raw"
    with image.open("wb") as handle:
        handle.truncate(16 << 20)
    socket = scratch / "vhost.sock"
    argv = [*image_node(image, "raw"), *vhost_user_export(socket)]
    first = start(*argv)
    guest = boot(ONE_WRITER, vhost_user_disk(socket, reconnect=1))
    guest.wait_for("GUEST-WRITES")
    first.kill()
    time.sleep(1)
    start(*argv)
    assert guest.finish()["blocks"] == str(BLOCKS)
