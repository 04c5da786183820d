# SPDX-License-Identifier: Apache-2.0
"""A backup of a disk in use: filter and snapshot come and go by QMP while a client writes and verifies.

The same commands go to this target and to QEMU's daemon.
"""

from __future__ import annotations

import random
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.daemon import Daemon, blockdev, nbd_export, nbd_server_unix, nbd_uri
from tests.support.qmp import Qmp, QmpError, monitor_argv
from tests.support.tools import create_image, qemu_img, qemu_io, run, sha256

QEMU = "qemu-storage-daemon"
KIB, MIB = 1 << 10, 1 << 20
SIZE = 16 * MIB
Start = Callable[..., Daemon]

CLIENT = """
import nbd, random, sys
h = nbd.NBD()
h.connect_uri(sys.argv[1])
source, blocks, rounds = random.Random(int(sys.argv[2])), {}, 0
print("ready", flush=True)
import threading
stop = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
while not stop.is_set():
    block = source.randrange(h.get_size() // 4096)
    data = source.randbytes(16) * 256
    h.pwrite(data, block * 4096)
    blocks[block] = data
    seen = source.choice(list(blocks))
    assert h.pread(4096, seen * 4096) == blocks[seen], seen
    rounds += 1
for block, data in blocks.items():
    assert h.pread(4096, block * 4096) == data, block
h.shutdown()
print(rounds)
"""


class Guest:
    """Writes and verifies, in the system's Python, which has libnbd, until it is stopped."""

    def __init__(self, uri: str) -> None:
        argv = ["/usr/bin/python3", "-c", CLIENT, uri, "1"]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def stop(self) -> int:
        """How many rounds it did, without an error."""
        out, _ = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, out
        return int(out)


def disk(start: Start, scratch: Path) -> Qmp:
    (scratch / "disk").write_bytes(random.Random(1).randbytes(SIZE))
    below = {"driver": "file", "filename": str(scratch / "disk")}
    start(
        *blockdev(node_name="below", **below),
        *blockdev(driver="raw", node_name="disk", file="below"),
        *nbd_server_unix(scratch / "nbd"),
        *nbd_export(),
        *monitor_argv(scratch / "qmp"),
    )
    return Qmp(scratch / "qmp")


def begin(qmp: Qmp, scratch: Path, number: int, **options: object) -> None:
    """Puts the filter below the disk's raw node, and exports the snapshot."""
    create_image(scratch / f"old{number}", str(SIZE))
    file = {"driver": "file", "filename": str(scratch / f"old{number}")}
    qmp.execute("blockdev-add", driver="qcow2", node_name="old", file=file)
    qmp.execute(
        "blockdev-add", driver="copy-before-write", node_name="cbw", file="below", target="old", **options
    )
    qmp.execute("blockdev-reopen", options=[{"driver": "raw", "node-name": "disk", "file": "cbw"}])
    qmp.execute("blockdev-add", driver="snapshot-access", node_name="snap", file="cbw")
    qmp.execute("block-export-add", type="nbd", id="snap", node_name="snap", name="snap")


def end(qmp: Qmp) -> None:
    qmp.execute("block-export-del", id="snap")
    qmp.wait_event("BLOCK_EXPORT_DELETED")
    qmp.execute("blockdev-del", node_name="snap")
    with pytest.raises(QmpError, match="is in use"):
        qmp.execute("blockdev-del", node_name="cbw")
    qmp.execute("blockdev-reopen", options=[{"driver": "raw", "node-name": "disk", "file": "below"}])
    qmp.execute("blockdev-del", node_name="cbw")
    qmp.execute("blockdev-del", node_name="old")


@pytest.mark.parametrize("daemon", ["", QEMU])
def test_backups_of_a_disk_in_use(
    scratch: Path, start: Start, monkeypatch: pytest.MonkeyPatch, daemon: str
) -> None:
    """Two readers of one snapshot, at different times, find the same."""
    monkeypatch.setenv("BLOCKTARGET_TEST_DAEMON", daemon)
    snap = nbd_uri(scratch / "nbd", "snap")
    with disk(start, scratch) as qmp:
        guest = Guest(nbd_uri(scratch / "nbd"))
        for number in range(3):
            begin(qmp, scratch, number)
            for name in ("first", "second"):
                run("nbdcopy", snap, scratch / name)
            assert sha256(scratch / "first") == sha256(scratch / "second")
            end(qmp)
        assert guest.stop() > 100


def test_a_backup_is_of_one_moment(scratch: Path, start: Start) -> None:
    """What the disk was when the filter came in: nothing of what came later, all that came before."""
    snap, uri = nbd_uri(scratch / "nbd", "snap"), nbd_uri(scratch / "nbd")
    with disk(start, scratch) as qmp:
        qemu_io(uri, "write -P 1 0 1M")
        begin(qmp, scratch, 0)
        qemu_io(uri, "write -P 2 512k 1M", "write -z 4M 1M")
        qemu_io(snap, "read -P 1 0 1M", read_only=True)
        qemu_img("convert", "-f", "raw", "-O", "raw", snap, scratch / "copy")
        expected = bytearray(random.Random(1).randbytes(SIZE))
        expected[:MIB] = b"\1" * MIB
        assert (scratch / "copy").read_bytes() == expected
        end(qmp)
        qemu_io(uri, "read -P 1 0 512k", "read -P 2 512k 1M", "read -P 0 4M 1M")


@pytest.mark.parametrize("policy", ["break-guest-write", "break-snapshot"])
def test_a_target_that_is_full(scratch: Path, start: Start, policy: str) -> None:
    place = scratch / "small"
    place.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=2M", "none", place)
    try:
        with disk(start, scratch) as qmp:
            uri, snap = nbd_uri(scratch / "nbd"), nbd_uri(scratch / "nbd", "snap")
            qemu_img("create", "-q", "-f", "raw", place / "old", str(SIZE))
            file = {"driver": "file", "filename": str(place / "old")}
            qmp.execute("blockdev-add", node_name="old", **file)
            names = {"file": "below", "target": "old", "on_cbw_error": policy}
            qmp.execute("blockdev-add", driver="copy-before-write", node_name="cbw", **names)
            qmp.execute("blockdev-reopen", options=[{"driver": "raw", "node-name": "disk", "file": "cbw"}])
            qmp.execute("blockdev-add", driver="snapshot-access", node_name="snap", file="cbw")
            qmp.execute("block-export-add", type="nbd", id="snap", node_name="snap", name="snap")
            qemu_io(uri, "write -P 1 0 1M")
            before = qemu_io(snap, "read 0 1M", check=False, read_only=True)
            assert "failed" not in before.stdout + before.stderr
            done = qemu_io(uri, "write -P 2 4M 4M", check=False)
            failed = "write failed: No space left on device" in done.stdout + done.stderr
            assert failed == (policy == "break-guest-write")
            if failed:
                qemu_img("convert", "-f", "raw", "-O", "raw", snap, scratch / "copy")
                assert (scratch / "copy").read_bytes() == random.Random(1).randbytes(SIZE)
            else:
                qemu_io(uri, "read -P 1 0 1M", "read -P 2 4M 4M")
                lost = qemu_io(snap, "read 0 4k", check=False, read_only=True)
                assert "read failed" in lost.stdout + lost.stderr
            end(qmp)
    finally:
        run("umount", "--lazy", place)


def test_many_writers_and_readers(scratch: Path, start: Start) -> None:
    """Several clients of disk and snapshot at a time, with writes that meet in the same clusters."""
    uri, snap = nbd_uri(scratch / "nbd"), nbd_uri(scratch / "nbd", "snap")
    with disk(start, scratch) as qmp:
        before = sha256(scratch / "disk")
        begin(qmp, scratch, 0)
        writers = []
        for lane in range(4):
            source = random.Random(lane)
            places = [source.randrange(SIZE // (4 * KIB)) * 4 * KIB + lane * KIB for _ in range(150)]
            commands = [f"write -P {lane + 1} {place} 1k" for place in places]
            writers.append(threading.Thread(target=qemu_io, args=(uri, *commands)))
        for writer in writers:
            writer.start()
        digests = []
        for _ in range(3):
            run("nbdcopy", snap, scratch / "copy")
            digests.append(sha256(scratch / "copy"))
        for writer in writers:
            writer.join()
        assert digests == [before] * 3
        end(qmp)
