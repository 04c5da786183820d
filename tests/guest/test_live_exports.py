# SPDX-License-Identifier: Apache-2.0
"""Exports change under a guest that writes all the time: its disk moves between I/O threads and grows, others
come and go. The guest sees no error and no wrong byte."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from guest_vm import vhost_user_disk

from target.peers.vhost_user_front_end import FrontEnd
from tests.guest.conftest import Guest
from tests.support.daemon import Daemon, blockdev, image_node, nbd_server_unix, vhost_user_export
from tests.support.qmp import Qmp, monitor_argv
from tests.support.tools import check_image, create_image, qemu_img, qemu_io, run

pytestmark = [pytest.mark.guest, pytest.mark.timeout(700)]

MIB = 1 << 20
SECONDS = 10
WRITERS = 3
# Writers go on until the file with the sign is there, which the new size of the disk is.
JOB = f"""
set -e
mkfs.ext4 -q -F /dev/vda 160M
mount -t ext4 /dev/vda /mnt
writer() {{
    round=0
    while [ ! -e /tmp/stop ]; do
        for i in 1 2 3 4 5 6 7 8; do
            dd if=/dev/urandom of=/tmp/new.$1 bs=16k count=$((1 + i * 3)) 2>/dev/null
            dd if=/tmp/new.$1 of=/mnt/$1.$i bs=16k conv=fsync 2>/dev/null || exit 1
            dd if=/mnt/$1.$i of=/tmp/back.$1 bs=16k iflag=direct 2>/dev/null || exit 1
            cmp /tmp/new.$1 /tmp/back.$1 || exit 1
            sha256sum /mnt/$1.$i > /tmp/sum.$1.$i
        done
        round=$((round + 1))
    done
    echo $round > /tmp/rounds.$1
}}
pids=
for w in $(seq 1 {WRITERS}); do writer $w & pids="$pids $!"; done
echo GUEST-WRITES
while [ "$(cat /sys/block/vda/size)" != "$((240 * 2048))" ]; do sleep 0.1; done
touch /tmp/stop
for pid in $pids; do wait $pid; done
umount /mnt
echo 3 > /proc/sys/vm/drop_caches
mount -t ext4 -o ro /dev/vda /mnt
cat /tmp/sum.* > /tmp/sums
sha256sum -c /tmp/sums > /tmp/checked || {{ cat /tmp/checked; exit 1; }}
umount /mnt
e2fsck -fn /dev/vda
dd if=/dev/urandom of=/dev/vda bs=1M count=1 seek=239 oflag=direct 2>/dev/null
if dmesg | grep -i 'i/o error'; then exit 1; fi
echo "RESULT files $(wc -l < /tmp/sums)"
echo "RESULT rounds $(cat /tmp/rounds.1)"
"""


def come_and_go(qmp: Qmp, scratch: Path, turn: int) -> None:
    """One export of a node beside, with a client, removed in one of the ways."""
    mode = ("safe", "hard", "soft", "hide")[turn % 4]
    common = {"id": "other", "node-name": "beside", "writable": True, "iothread": ["io0", "io1"]}
    if turn % 2:
        qmp.execute("block-export-add", type="nbd", name="other", **common)
        uri = f"nbd+unix:///other?socket={scratch}/nbd"
        qemu_io(uri, f"write -P {turn % 251} 0 64k", f"read -P {turn % 251} 0 64k")
        qmp.execute("block-export-del", id="other", mode=mode)
    else:
        address = {"type": "unix", "path": str(scratch / "other")}
        qmp.execute("block-export-add", type="vhost-user-blk", addr=address, **common)
        with FrontEnd.connect(str(scratch / "other")) as front:
            front.write(turn, bytes([turn % 251]) * 4096)
            if mode != "safe":
                qmp.execute("block-export-del", id="other", mode=mode)
        if mode == "safe":
            wait_until(lambda: not export(qmp, "other")["x-clients"])
            qmp.execute("block-export-del", id="other")
    wait_until(lambda: export(qmp, "other") is None)


def export(qmp: Qmp, id: str) -> Any:
    return next((item for item in qmp.execute("query-block-exports") if item["id"] == id), None)


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_a_guest_notices_nothing_but_its_size(
    scratch: Path, start: Callable[..., Daemon], boot: Callable[..., Guest], format: str
) -> None:
    image = create_image(scratch / "disk", "160M", format=format)
    socket = scratch / "vhost.sock"
    threads = ["--object", "iothread,id=io0", "--object", "iothread,id=io1"]
    other = create_image(scratch / "beside", "16M", format="raw")
    daemon = start(
        *threads,
        *image_node(image, format),
        *blockdev(driver="file", node_name="beside", filename=str(other)),
        *nbd_server_unix(scratch / "nbd"),
        *vhost_user_export(socket, queues=2),
        *monitor_argv(scratch / "qmp"),
    )
    guest = boot(JOB, vhost_user_disk(socket, queues=2), cpus=2)
    guest.wait_for("GUEST-WRITES")
    places = itertools.cycle(["io0", "io1", ["io0", "io1"], None, ["io1", "io0"]])
    sizes = iter([176, 192, 208, 224])
    turns, began = 0, time.monotonic()
    with Qmp(scratch / "qmp") as qmp:
        while time.monotonic() < began + SECONDS:
            qmp.execute(
                "transaction",
                actions=[
                    {"type": "x-export-set-iothread", "data": {"id": "vhost", "iothread": next(places)}}
                ],
            )
            come_and_go(qmp, scratch, turns)
            if turns % 20 == 10 and (size := next(sizes, None)):
                qmp.execute("block_resize", **{"node-name": "disk", "size": size * MIB})
            turns += 1
            time.sleep(0.1)
        qmp.execute("block_resize", **{"node-name": "disk", "size": 240 * MIB})
        results = guest.finish()
        clients = export(qmp, "vhost")
        assert clients["x-stats"]["failed_wr_operations"] == clients["x-stats"]["failed_rd_operations"] == 0
    daemon.stop()
    assert turns > 20 and results["files"] == str(8 * WRITERS) and int(results["rounds"]) > 1
    if format == "qcow2":
        check_image(image)
    qemu_img("convert", "-f", format, "-O", "raw", image, scratch / "flat")
    run("e2fsck", "-fn", scratch / "flat")
