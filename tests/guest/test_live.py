# SPDX-License-Identifier: Apache-2.0
"""A guest writes and verifies all the time, while all that is beneath its disk changes, over and over."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from guest_vm import vhost_user_disk

from tests.guest.conftest import Guest
from tests.support.daemon import Daemon, vhost_user_export
from tests.support.qmp import Qmp, monitor_argv
from tests.support.tools import check_image, create_image

pytestmark = [pytest.mark.guest, pytest.mark.timeout(700)]

MIB = 1 << 20
SIZE = 64 * MIB  # that the guest writes to; the disk is larger, to have room for shrinking
LAST = 100 * MIB  # the size that tells the guest to come to an end
WRITERS, SLOTS, ROUNDS = 2, 24, 40

# Each writer has its own part of the disk, in slots of 256 KiB. It writes one, reads it back past the cache,
# and reads one that it has written before.
JOB = f"""
set -e
last() {{ [ "$(cat /sys/block/vda/size)" = {LAST // 512} ]; }}
verify() {{
    dd if=/dev/vda of=/tmp/read.$1 bs=64k skip=$(( $1 * 256 + $2 * 4 )) count=4 iflag=direct 2>/dev/null
    cmp /tmp/kept.$1.$2 /tmp/read.$1
}}
writer() {{
    i=0
    while ! last; do
        slot=$(( i * 7 % {SLOTS} ))
        dd if=/dev/urandom of=/tmp/kept.$1.$slot bs=64k count=4 2>/dev/null || exit 1
        dd if=/tmp/kept.$1.$slot of=/dev/vda bs=64k seek=$(( $1 * 256 + slot * 4 )) count=4 oflag=direct \\
            conv=notrunc 2>/dev/null || exit 1
        verify $1 $slot || exit 1
        old=$(( i * 5 % {SLOTS} ))
        [ ! -e /tmp/kept.$1.$old ] || verify $1 $old || exit 1
        i=$(( i + 1 ))
        if [ $i = 3 ]; then echo "WRITING $1"; fi
        if [ $i = {ROUNDS} ]; then echo "ENOUGH $1"; fi
    done
    for slot in $(seq 0 {SLOTS - 1}); do
        [ ! -e /tmp/kept.$1.$slot ] || verify $1 $slot || exit 1
    done
    echo $i > /tmp/done.$1
}}
pids=
for w in $(seq 0 {WRITERS - 1}); do writer $w & pids="$pids $!"; done
for pid in $pids; do wait $pid; done
if dmesg | grep -i 'i/o error'; then exit 1; fi
for w in $(seq 0 {WRITERS - 1}); do echo "RESULT rounds$w $(cat /tmp/done.$w)"; done
"""


class Disturbance:
    """All that is done to the disk, one thing after the other. ``format``: of the disk's image."""

    def __init__(self, qmp: Qmp, scratch: Path, format: str) -> None:
        self.qmp = qmp
        self.scratch = scratch
        self.format = format
        self.random = random.Random(11)
        self.top = "disk"
        self.numbers = itertools.count(1)
        self.snapshots: list[str] = []

    def act(self, *actions: tuple[str, dict[str, Any]]) -> None:
        self.qmp.execute("transaction", actions=[{"type": type, "data": data} for type, data in actions])

    def above(self, driver: str, **options: Any) -> None:
        """A filter comes above the disk, and goes."""
        name = f"above{next(self.numbers)}"
        child = {"children": [self.top], "vote-threshold": 1} if driver == "quorum" else {"file": self.top}
        self.act(
            ("blockdev-add", {"driver": driver, "node-name": name, **child, **options}),
            ("x-blockdev-replace", {"export": "vhost", "new-child": name}),
        )
        self.pause()
        self.act(
            ("x-blockdev-replace", {"export": "vhost", "new-child": self.top}),
            ("blockdev-del", {"node-name": name}),
        )

    def below(self, driver: str, **options: Any) -> None:
        """A filter comes between the disk and its file, and goes."""
        name = f"below{next(self.numbers)}"
        child = {"children": ["file"], "vote-threshold": 1} if driver == "quorum" else {"file": "file"}
        self.act(("blockdev-add", {"driver": driver, "node-name": name, **child, **options}))
        self.qmp.execute("blockdev-reopen", options=[self.disk(file=name)])
        self.pause()
        self.qmp.execute("blockdev-reopen", options=[self.disk()])
        self.qmp.execute("blockdev-del", **{"node-name": name})

    def disk(self, **options: Any) -> dict[str, Any]:
        read_only = {"read-only": True} if self.snapshots else {}
        return {"driver": self.format, "node-name": "disk", "file": "file", **read_only, **options}

    def snapshot(self) -> None:
        if len(self.snapshots) >= 4:
            return
        name = f"snapshot{next(self.numbers)}"
        path = str(self.scratch / f"{name}.qcow2")
        self.qmp.execute(
            "blockdev-snapshot-sync",
            **{"node-name": self.top, "snapshot-file": path, "snapshot-node-name": name},
        )
        self.snapshots.append(name)
        self.top = name

    def reopen_backing(self) -> None:
        """What is behind the disk becomes writable, and read-only again."""
        if self.snapshots:
            self.qmp.execute("blockdev-reopen", options=[{**self.disk(), "read-only": False}])
            self.pause()
            self.qmp.execute("blockdev-reopen", options=[self.disk()])

    def resize(self) -> None:
        self.qmp.execute(
            "block_resize", **{"node-name": self.top, "size": self.random.randrange(70, 90) * MIB}
        )

    def thread(self) -> None:
        thread = self.random.choice(["io0", "io1", None])
        self.qmp.execute("x-export-set-iothread", id="vhost", iothread=thread)

    def other_export(self) -> None:
        self.qmp.execute(
            "block-export-add", type="nbd", id="other", **{"node-name": self.top, "name": "other"}
        )
        self.pause()
        self.qmp.execute("block-export-del", id="other", mode="soft")

    def limits(self) -> None:
        value = {"iops-total": self.random.randrange(100, 100_000)}
        self.qmp.execute("qom-set", path="/objects/group", property="limits", value=value)

    def pause(self) -> None:
        self.qmp.execute("query-block-exports")

    def round(self) -> None:
        steps: list[Callable[[], None]] = [
            lambda: self.above("throttle", **{"throttle-group": "group"}),
            lambda: self.above("copy-on-read"),
            lambda: self.above("quorum"),
            lambda: self.below("throttle", **{"throttle-group": "group"}),
            lambda: self.below("quorum"),
            self.snapshot,
            self.reopen_backing,
            self.resize,
            self.thread,
            self.other_export,
            self.limits,
        ]
        self.random.shuffle(steps)
        for step in steps:
            step()


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_a_guest_sees_nothing_of_what_changes_beneath(
    scratch: Path, start: Callable[..., Daemon], boot: Callable[..., Guest], format: str
) -> None:
    image = create_image(scratch / "disk.img", "80M", format=format)
    socket, monitor = scratch / "vhost.sock", scratch / "qmp.sock"
    daemon = start(
        *monitor_argv(monitor),
        *("--object", "iothread,id=io0", "--object", "iothread,id=io1"),
        *("--object", "throttle-group,id=group,limits.iops-total=100000"),
        *("--blockdev", f"file,node-name=file,filename={image}"),
        *("--blockdev", f"{format},node-name=disk,file=file"),
        *("--nbd-server", f"addr.type=unix,addr.path={scratch / 'nbd.sock'}"),
        *vhost_user_export(socket, queues=2),
    )
    guest = boot(JOB, vhost_user_disk(socket, queues=2), cpus=2)
    for writer in range(WRITERS):
        guest.wait_for(f"WRITING {writer}")
    with Qmp(monitor) as qmp:
        disturbance = Disturbance(qmp, scratch, format)
        rounds = 0
        while rounds < 12 or any(f"ENOUGH {writer}" not in guest.console() for writer in range(WRITERS)):
            disturbance.round()
            rounds += 1
        qmp.execute("block_resize", **{"node-name": disturbance.top, "size": LAST})
        results = guest.finish()
        assert all(int(results[f"rounds{writer}"]) >= ROUNDS for writer in range(WRITERS)), results
    daemon.stop()
    for name in disturbance.snapshots:
        check_image(scratch / f"{name}.qcow2")
    if format == "qcow2":
        check_image(image)
    print(f"{rounds} rounds of changes")
