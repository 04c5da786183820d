# SPDX-License-Identifier: Apache-2.0
"""Images to crash: small qcow2 chains of every kind, whose content a history can tell apart."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.crash.history import SECTOR, numbered
from tests.support.tools import qemu_img, qemu_io

KIB = 1 << 10
SIZE = 1024 * KIB
SECTORS = SIZE // SECTOR


@dataclass(frozen=True)
class Kind:
    """How an image is made and opened. ``backing``: a chain of raw below qcow2; else it stands alone."""

    options: str
    backing: bool = False
    snapshot: bool = False
    compressed: bool = False
    open: dict[str, Any] = field(default_factory=dict)
    grants: int | None = None
    largest: int = 48 * KIB


ONE_SLICE: dict[str, Any] = {"l2-cache-size": 512, "l2-cache-entry-size": 512}
KINDS: dict[str, Kind] = {
    "64k-chain": Kind("cluster_size=64k", backing=True, largest=160 * KIB, grants=1),
    "4k-one-slice": Kind("cluster_size=4k", open=ONE_SLICE, grants=1),
    "512-chain-one-slice": Kind(
        "cluster_size=512,refcount_bits=64", backing=True, open=ONE_SLICE, grants=2, largest=40 * KIB
    ),
    "4k-snapshot": Kind("cluster_size=4k", snapshot=True, open=ONE_SLICE, grants=1),
    "2k-chain-snapshot": Kind(
        "cluster_size=2k,refcount_bits=64", backing=True, snapshot=True, grants=3, largest=24 * KIB
    ),
    "4k-compressed": Kind("cluster_size=4k", compressed=True, open=ONE_SLICE, grants=1),
    "lazy": Kind("cluster_size=8k,lazy_refcounts=on", backing=True, open={"lazy-refcounts": True}, grants=1),
    "v2-chain": Kind("cluster_size=4k,compat=0.10", backing=True, open=ONE_SLICE, grants=1),
}


def make(kind: Kind, root: Path) -> Path:
    """The image disk.qcow2 and what is below it."""
    raw = root / "base.raw"
    raw.write_bytes(numbered(1, SECTORS * 3 // 4) + bytes(SIZE // 4))
    disk = root / "disk.qcow2"
    if kind.compressed:
        qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", kind.options, raw, disk)
        return disk
    words: list[str | Path] = []
    if kind.backing:
        middle = root / "middle.qcow2"
        qemu_img(
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            "cluster_size=4k",
            "-b",
            raw,
            "-F",
            "raw",
            middle,
            f"{SIZE - 4608}",
        )
        qemu_io(middle, "write -z 128k 100k", format="qcow2")
        patch(middle, root, 300 * KIB, 100 * KIB, 1 << 20)
        words = ["-b", middle, "-F", "qcow2"]
    qemu_img("create", "-q", "-f", "qcow2", "-o", kind.options, *words, disk, str(SIZE))
    if kind.snapshot:
        patch(disk, root, 0, 200 * KIB, 1 << 21)
        qemu_img("snapshot", "-c", "one", disk)
        patch(disk, root, 100 * KIB, 60 * KIB, 1 << 22)
    return disk


def patch(image: Path, root: Path, offset: int, length: int, number: int) -> None:
    """Writes numbered sectors through qemu-io."""
    data = root / "patch"
    data.write_bytes(numbered(number, length // SECTOR))
    qemu_io(image, f"write -s {data} {offset} {length}", format="qcow2")
    data.unlink()


def content(image: Path, snapshot: str = "") -> bytes:
    """What a guest would read, or would have read when the snapshot was taken, by qemu-img."""
    out = image.with_suffix(".flat")
    words = ["-l", f"snapshot.name={snapshot}"] if snapshot else []
    qemu_img("convert", "-f", "qcow2", "-O", "raw", *words, image, out)
    data = out.read_bytes()
    out.unlink()
    return data


def flat(kind: Kind | None, image: Path) -> bytes:
    """The content; without a kind the image is raw."""
    return image.read_bytes() if kind is None else content(image)


def untouchable(kind: Kind, image: Path) -> dict[str, bytes]:
    """What no request may change: the images below, and the snapshot."""
    found = {
        path.name: path.read_bytes() for path in image.parent.glob("*") if path.stem in ("base", "middle")
    }
    return found | ({"snapshot": content(image, "one")} if kind.snapshot else {})


def check(image: Path) -> bool:
    """Asserts that qemu-img finds no error but leaks; whether it found leaks."""
    done = qemu_img("check", "-f", "qcow2", image, check=False)
    assert done.returncode in (0, 3), f"qemu-img check: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.returncode == 3


def qcow2(kind: Kind, file: dict[str, Any] | str) -> dict[str, Any]:
    """Options of the node `disk` on a file node."""
    return {"driver": "qcow2", "node-name": "disk", "discard": "unmap", "file": file} | kind.open


def node(kind: Kind | None, file: dict[str, Any] | str) -> dict[str, Any]:
    """The same; without a kind the image is raw."""
    if kind is None:
        return {"driver": "raw", "node-name": "disk", "discard": "unmap", "file": file}
    return qcow2(kind, file)


def file(path: Path) -> dict[str, Any]:
    return {"driver": "file", "filename": str(path), "discard": "unmap"}


def slow_file(path: Path, **milliseconds: float) -> dict[str, Any]:
    """A file whose requests of some types take their time, so that much comes between: ``read=2``."""
    rules = [
        {"event": "none", "iotype": kind, "errno": 0, "x-delay-ns": int(time * 1e6)}
        for kind, time in milliseconds.items()
    ]
    return {"driver": "blkdebug", "image": file(path), "inject-error": rules}
