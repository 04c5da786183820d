# SPDX-License-Identifier: Apache-2.0
"""Other NBD clients (nbdinfo, nbdcopy, qemu-img, qemu-io, fio) agree with the same tool on the image file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import (
    Daemon,
    blockdev,
    free_port,
    image_node,
    nbd_export,
    nbd_server_tcp,
    nbd_server_unix,
    nbd_uri,
)
from tests.support.tools import (
    Argument,
    check_image,
    create_image,
    fill,
    image_map,
    qemu_img,
    qemu_io,
    run,
    sha256,
)

Start = Callable[..., Daemon]
MIB = 1 << 20


@dataclass
class Image:
    """An image to serve, and what it holds as a flat file."""

    path: Path
    format: str
    flat: Path

    @property
    def size(self) -> int:
        return self.flat.stat().st_size


def converted(source: Path, *words: str) -> Path:
    output = source.with_name("disk.qcow2")
    qemu_img("convert", "-f", "raw", "-O", "qcow2", *words, source, output)
    return output


def overlay(source: Path) -> Path:
    """Two overlays of different sizes above the content, each with data, zeros and holes of its own."""
    base = converted(source).rename(source.with_name("base.qcow2"))
    middle = create_image(source.with_name("middle.qcow2"), "30M", options="cluster_size=4k", backing=base)
    qemu_io(middle, "write -P 7 3M 1M", "write -z 9M 333k", "discard 1M 100k", format="qcow2")
    top = create_image(source.with_name("disk.qcow2"), "56M", backing=middle)
    qemu_io(top, "write -P 9 55M 64k", "write -z 5M 1M", "write -P 8 29M 2M", format="qcow2")
    return top


def with_snapshot(source: Path) -> Path:
    path = converted(source)
    qemu_img("snapshot", "-c", "before", path)
    qemu_io(path, "write -P 6 2M 3M", "write -P 5 20M 4k", format="qcow2")
    return path


def with_zero_clusters(source: Path) -> Path:
    path = converted(source)
    qemu_io(path, "write -z 1M 5M", "write -z -u 8M 2M", "write -z 12345k 100k", format="qcow2")
    return path


KINDS: dict[str, Callable[[Path], Path]] = {
    "raw": lambda source: source,
    "qcow2": converted,
    "qcow2-v2": lambda source: converted(source, "-o", "compat=0.10"),
    "qcow2-small-clusters": lambda source: converted(source, "-o", "cluster_size=512"),
    "qcow2-large-clusters": lambda source: converted(source, "-o", "cluster_size=2M,refcount_bits=1"),
    "qcow2-compressed": lambda source: converted(source, "-c"),
    "qcow2-zero-clusters": with_zero_clusters,
    "qcow2-snapshot": with_snapshot,
    "qcow2-overlay": overlay,
}


@pytest.fixture(params=KINDS)
def image(request: pytest.FixtureRequest, scratch: Path) -> Image:
    path = KINDS[request.param](fill(scratch / "disk.raw", 48 * MIB, seed=1))
    format = "raw" if request.param == "raw" else "qcow2"
    flat = scratch / "flat.raw"
    qemu_img("convert", "-f", format, "-O", "raw", path, flat)
    return Image(path, format, flat)


def serve(start: Start, image: Image, socket: Path, **options: object) -> Daemon:
    return start(*image_node(image.path, image.format, **options), *nbd_server_unix(socket), *nbd_export())


def extents(rows: list[dict[str, Any]]) -> list[tuple[int, int, bool, bool]]:
    """(start, end, reads as zeros, is data) of a map, adjacent equal rows merged."""
    merged: list[tuple[int, int, bool, bool]] = []
    for row in rows:
        start, zero, data = row["start"], row["zero"], row["data"]
        if merged and merged[-1][1:] == (start, zero, data):
            start = merged.pop()[0]
        merged.append((start, row["start"] + row["length"], zero, data))
    return merged


def test_nbdinfo(image: Image, scratch: Path, start: Start) -> None:
    socket = scratch / "nbd.sock"
    serve(start, image, socket)
    (export,) = json.loads(run("nbdinfo", "--json", nbd_uri(socket)).stdout)["exports"]
    assert export["export-size"] == image.size
    assert export["is_read_only"] is False
    for flag in ("can_flush", "can_fua", "can_trim", "can_zero", "can_df", "can_cache", "can_multi_conn"):
        assert export[flag] is True, flag
    assert export["contexts"] == ["base:allocation"]
    assert export["block_size_maximum"] == 32 * MIB
    assert 1 <= export["block_size_minimum"] <= export["block_size_preferred"]


def test_whole_content_is_read(image: Image, scratch: Path, start: Start) -> None:
    socket = scratch / "nbd.sock"
    serve(start, image, socket)
    copied = scratch / "copied.raw"
    run("nbdcopy", nbd_uri(socket), copied)
    assert sha256(copied) == sha256(image.flat)
    copied.unlink()
    qemu_img("convert", "-f", "raw", "-O", "raw", nbd_uri(socket), copied)
    assert sha256(copied) == sha256(image.flat)
    qemu_img("compare", "-U", "-f", "raw", "-F", image.format, nbd_uri(socket), image.path)


def test_map_agrees(image: Image, scratch: Path, start: Start) -> None:
    local = extents(image_map(image.path, image.format))
    socket = scratch / "nbd.sock"
    serve(start, image, socket)
    assert extents(image_map(nbd_uri(socket), "raw")) == local
    rows = json.loads(run("nbdinfo", "--map", "--json", nbd_uri(socket)).stdout)
    assert sum(row["length"] for row in rows) == image.size
    holes = [(row["offset"], row["offset"] + row["length"]) for row in rows if row["type"] & 1]
    for begin, end in holes:
        assert not any(data and start < end and begin < stop for start, stop, _, data in local)


def test_written_content_is_the_same(image: Image, scratch: Path, start: Start) -> None:
    """The same qemu-io commands through the export and on a flat copy leave the same content."""
    commands = [
        "write -P 0x5a 1M 256k",
        "write -P 0x11 777k 3000",
        "write -z 2M 1M",
        "write -z -u 4M 1M",
        "write -z 6000k 5k",
        "write -f -P 3 8000k 9k",
        "write -P 0x77 40M 8M",
        "flush",
        "read -P 0x5a 1M 256k",
        "read -P 0x11 777k 3000",
        "read -P 0 2M 1M",
        "read -P 0 4M 1M",
        "read -P 0 6000k 5k",
        "read -P 3 8000k 9k",
        "read -P 0x77 40M 8M",
    ]
    socket = scratch / "nbd.sock"
    daemon = serve(start, image, socket)
    qemu_io(nbd_uri(socket), *commands)
    qemu_io(image.flat, *commands)
    daemon.stop()
    qemu_img("compare", "-f", image.format, "-F", "raw", image.path, image.flat)
    if image.format == "qcow2":
        check_image(image.path)


def test_discard_leaves_the_rest_alone(image: Image, scratch: Path, start: Start) -> None:
    socket = scratch / "nbd.sock"
    daemon = serve(start, image, socket)
    qemu_io(nbd_uri(socket), "discard 16M 4M", "read -P 0 16M 4M", "discard 20481k 3k", "flush")
    daemon.stop()
    after = scratch / "after.raw"
    qemu_img("convert", "-f", image.format, "-O", "raw", image.path, after)
    with after.open("rb") as ours, image.flat.open("rb") as before:
        assert ours.read(16 * MIB) == before.read(16 * MIB)
        ours.seek(21 * MIB)
        before.seek(21 * MIB)
        assert ours.read() == before.read()
    if image.format == "qcow2":
        check_image(image.path)


def test_nbdcopy_writes_an_image(image: Image, scratch: Path, start: Start) -> None:
    source = fill(scratch / "source.raw", image.size, seed=2, pieces=90)
    socket = scratch / "nbd.sock"
    daemon = serve(start, image, socket)
    run("nbdcopy", "--flush", source, nbd_uri(socket))
    daemon.stop()
    qemu_img("compare", "-f", image.format, "-F", "raw", image.path, source)
    if image.format == "qcow2":
        check_image(image.path)


def test_fio_verifies(image: Image, scratch: Path, start: Start) -> None:
    socket = scratch / "nbd.sock"
    daemon = serve(start, image, socket)
    common = ["--ioengine=nbd", f"--uri={nbd_uri(socket)}", "--size=16m", "--offset=24m", "--verify=crc32c"]
    common += ["--do_verify=1", "--verify_fatal=1", "--verify_state_save=0"]
    for name, options in {
        "random": ["--rw=randwrite", "--bs=4k", "--iodepth=32"],
        "uneven": ["--rw=randwrite", "--bsrange=512-64k", "--bs_unaligned=0", "--iodepth=8"],
        "sequential": ["--rw=write", "--bs=128k", "--iodepth=4", "--fsync=16"],
    }.items():
        run("fio", f"--name={name}", *common, *options)
    daemon.stop()
    if image.format == "qcow2":
        check_image(image.path)


def test_snapshot_is_not_changed_by_writes(scratch: Path, start: Start) -> None:
    path = with_snapshot(fill(scratch / "disk.raw", 48 * MIB, seed=1))
    before, after = scratch / "before.raw", scratch / "after.raw"
    words: list[Argument] = ["convert", "-f", "qcow2", "-O", "raw", "-l", "snapshot.name=before", path]
    qemu_img(*words, before)
    socket = scratch / "nbd.sock"
    daemon = serve(start, Image(path, "qcow2", before), socket)
    qemu_io(nbd_uri(socket), "write -P 1 0 30M", "discard 30M 2M", "write -z 33M 2M", "write -P 2 36M 1k")
    daemon.stop()
    qemu_img(*words, after)
    assert sha256(after) == sha256(before)
    check_image(path)


def test_read_only_export(scratch: Path, start: Start) -> None:
    path = converted(fill(scratch / "disk.raw", 8 * MIB, seed=3))
    before = sha256(path)
    socket = scratch / "nbd.sock"
    daemon = start(
        *image_node(path, "qcow2", read_only=True), *nbd_server_unix(socket), *nbd_export(writable=False)
    )
    (export,) = json.loads(run("nbdinfo", "--json", nbd_uri(socket)).stdout)["exports"]
    assert export["is_read_only"] is True
    refused = qemu_io(nbd_uri(socket), "write 0 4k", check=False)
    assert refused.returncode != 0
    daemon.stop()
    assert sha256(path) == before


def test_several_exports_over_tcp(scratch: Path, start: Start) -> None:
    files = {name: fill(scratch / f"{name}.raw", 4 * MIB, seed=seed) for seed, name in enumerate(("a", "b"))}
    port = free_port()
    argv = nbd_server_tcp(port)
    for name, path in files.items():
        argv += blockdev(driver="raw", node_name=name, file={"driver": "file", "filename": str(path)})
        argv += nbd_export(node=name, name=name)
    start(*argv)
    server = f"nbd://127.0.0.1:{port}"
    listed = json.loads(run("nbdinfo", "--list", "--json", server).stdout)["exports"]
    assert {export["export-name"] for export in listed} == {"a", "b"}
    for name, path in files.items():
        run("nbdcopy", f"{server}/{name}", scratch / "copy")
        assert sha256(scratch / "copy") == sha256(path)
        (scratch / "copy").unlink()
    missing = run("nbdinfo", f"{server}/nothing", check=False)
    assert missing.returncode != 0


def test_image_written_by_us_is_the_same_for_qemu(scratch: Path, start: Start) -> None:
    """An empty image filled through the export equals one that qemu-img made from the same content."""
    source = fill(scratch / "source.raw", 32 * MIB, seed=4)
    ours = create_image(scratch / "ours.qcow2", "32M")
    socket = scratch / "nbd.sock"
    daemon = serve(start, Image(ours, "qcow2", source), socket)
    qemu_img("convert", "-n", "-f", "raw", "-O", "raw", source, nbd_uri(socket))
    daemon.stop()
    theirs = scratch / "theirs.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", source, theirs)
    qemu_img("compare", "-f", "qcow2", "-F", "qcow2", ours, theirs)
    check_image(ours)
    shutil.copy(ours, scratch / "again.qcow2")
    qemu_img("check", "-r", "all", scratch / "again.qcow2")
