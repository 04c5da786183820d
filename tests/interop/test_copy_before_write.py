# SPDX-License-Identifier: Apache-2.0
"""A disk behind copy-before-write and its snapshot, as two NBD exports: the same script here and in QEMU's.

What clients see is written down and compared: data, errors, and the allocation that a backup asks for.
QEMU 7.2 has two errors that the scripts stay clear of: the snapshot's allocation is that of the disk, so that
what was zeroed or discarded there reads as zeros here; and a discard of the snapshot that covers no whole
cluster ends the program.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import Daemon, blockdev, blocktarget_argv, nbd_export, nbd_server_unix, nbd_uri
from tests.support.tools import create_image, fill, qemu_img, qemu_io, run, sha256

QEMU = "qemu-storage-daemon"
KIB, MIB = 1 << 10, 1 << 20
SIZE = 16 * MIB
# Both programs end here when they have taken all options before it.
END = ["--object", "no-such-type,id=end"]
Start = Callable[..., Daemon]
Both = Callable[[Callable[[Path, str], Any]], None]


@pytest.fixture
def both(scratch: Path, start: Start, monkeypatch: pytest.MonkeyPatch) -> Both:
    """Runs a script on each daemon, in a directory of its own, and compares what it returns."""

    def compare(script: Callable[[Path, str], Any]) -> None:
        found = []
        for name in ("", QEMU):
            monkeypatch.setenv("BLOCKTARGET_TEST_DAEMON", name)
            directory = scratch / (name or "ours")
            directory.mkdir()
            found.append(script(directory, name))
        assert found[0] == found[1]

    return compare


def disk_and_snapshot(
    start: Start, directory: Path, target: dict[str, Any], writable_snapshot: bool = False, **cbw: object
) -> tuple[str, str]:
    """URIs of a disk and of its snapshot."""
    fill(directory / "disk.raw", SIZE, seed=1)
    disk = {"driver": "file", "filename": str(directory / "disk.raw"), "discard": "unmap"}
    start(
        *blockdev(
            driver="copy-before-write", node_name="disk", discard="unmap", file=disk, target=target, **cbw
        ),
        *blockdev(driver="snapshot-access", node_name="snap", discard="unmap", file="disk"),
        *nbd_server_unix(directory / "nbd"),
        *nbd_export(),
        *nbd_export(node="snap", name="snap", writable=writable_snapshot),
    )
    return nbd_uri(directory / "nbd"), nbd_uri(directory / "nbd", "snap")


def raw(path: Path, size: int = SIZE) -> dict[str, Any]:
    with path.open("wb") as out:
        out.truncate(size)
    return {"driver": "file", "filename": str(path), "discard": "unmap"}


def qcow2(path: Path) -> dict[str, Any]:
    create_image(path, str(SIZE))
    return {"driver": "qcow2", "discard": "unmap", "file": {"driver": "file", "filename": str(path)}}


def allocation(uri: str) -> list[tuple[int, int, int]]:
    """Offset, length and flags of the runs."""
    extents = json.loads(run("nbdinfo", "--map", "--json", uri).stdout)
    return [(extent["offset"], extent["length"], extent["type"]) for extent in extents]


def digest(uri: str, path: Path) -> str:
    qemu_img("convert", "-f", "raw", "-O", "raw", uri, path)
    return sha256(path)


def random_commands(seed: int, count: int, kinds: int = 4) -> list[str]:
    """Writes (2 kinds), zeroes and discards, some of them across clusters."""
    source = random.Random(seed)
    commands = []
    for i in range(count):
        offset = source.randrange(SIZE // 4096) * 4096
        length = min(source.randrange(1, 64) * 4096, SIZE - offset)
        match source.randrange(kinds):
            case 0 | 1:
                commands.append(f"write -P {i % 255 + 1} {offset} {length}")
            case 2:
                commands.append(f"write -z {source.choice(('-u', ''))} {offset} {length}")
            case 3:
                commands.append(f"discard {offset} {length}")
    return commands


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_data_and_allocation(start: Start, both: Both, format: str) -> None:
    def script(directory: Path, name: str) -> Any:
        target = raw(directory / "target") if format == "raw" else qcow2(directory / "target")
        disk, snap = disk_and_snapshot(start, directory, target)
        before = sha256(directory / "disk.raw")
        first = allocation(snap)
        assert first == allocation(disk)
        qemu_io(disk, *random_commands(1, 40, kinds=2))
        assert digest(snap, directory / "copy.raw") == before
        seen = [first, allocation(disk), digest(disk, directory / "copy.raw")]
        qemu_io(disk, *random_commands(2, 40))
        assert name or digest(snap, directory / "copy.raw") == before
        return [*seen, allocation(disk), digest(disk, directory / "copy.raw")]

    both(script)


def test_a_full_target(start: Start, both: Both) -> None:
    """Either the guest's write fails or the snapshot does; what the other sees is right."""

    def script(directory: Path, name: str) -> Any:
        seen: list[Any] = []
        for policy in ("break-guest-write", "break-snapshot"):
            below = directory / policy
            below.mkdir()
            rule = {"event": "none", "iotype": "write", "errno": 28, "sector": 2048}
            target = {"driver": "blkdebug", "image": raw(below / "target"), "inject-error": [rule]}
            disk, snap = disk_and_snapshot(start, below, target, on_cbw_error=policy)
            qemu_io(disk, "write -P 1 0 4k")
            done = qemu_io(disk, "write -P 2 1M 4k", "read -P 2 1M 4k", "write -P 3 4M 4k", check=False)
            seen.append([line for line in done.stdout.splitlines() if "ops" not in line and line])
            read = qemu_io(snap, "read 0 4k", "read 8M 4k", check=False, read_only=True)
            seen.append((read.stdout + read.stderr).count("failed"))
        return seen

    both(script)


def test_what_a_backup_has_fetched_is_discarded(start: Start, both: Both) -> None:
    def script(directory: Path, name: str) -> Any:
        disk, snap = disk_and_snapshot(start, directory, raw(directory / "target"), writable_snapshot=True)
        qemu_io(disk, "write -P 1 0 128k")
        qemu_io(snap, "discard 0 1M", "read 1088k 64k")
        qemu_io(disk, "write -P 2 512k 64k", "write -P 3 2M 64k")
        target = json.loads(qemu_img("map", "-U", "-f", "raw", "--output=json", directory / "target").stdout)
        read = qemu_io(snap, "read 0 64k", "read 1008k 32k", "read 1M 1M", "write 4M 4k", check=False)
        outcomes = [
            line.partition(":")[0] for line in (read.stdout + read.stderr).splitlines() if "failed" in line
        ]
        return [(e["start"], e["length"], e["data"]) for e in target], outcomes

    both(script)


@pytest.mark.parametrize(
    "options",
    [
        "driver=copy-before-write,node-name=x,file=disk",
        "driver=copy-before-write,node-name=x,file=disk,target=disk2,on-cbw-error=ignore",
        "driver=copy-before-write,node-name=x,file=disk,target=disk2,cbw-timeout=1",
        "driver=copy-before-write,node-name=x,file=disk,target=none",
        "driver=copy-before-write,node-name=x,file=disk,target.driver=null-co,target.read-only=on",
        "driver=snapshot-access,node-name=x",
        "driver=snapshot-access,node-name=x,file=none",
    ],
)
def test_options(scratch: Path, options: str) -> None:
    """Both take the command line, or both refuse it, in the same words."""
    raw(scratch / "disk")
    raw(scratch / "disk2")
    nodes = [
        word
        for name in ("disk", "disk2")
        for word in ("--blockdev", f"driver=file,node-name={name},filename={scratch / name}")
    ]
    found = []
    for argv in (blocktarget_argv("daemon"), [QEMU]):
        done = run(*argv, *nodes, "--blockdev", options, *END, check=False, timeout=20)
        found.append(done.stderr.strip().splitlines()[-1])
    assert found[1].rpartition(": ")[2] in found[0], found
    assert ("no-such-type" in found[0]) == ("no-such-type" in found[1]), found
