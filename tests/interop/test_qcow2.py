# SPDX-License-Identifier: Apache-2.0
"""qcow2 images made by qemu-img and by us: what one writes the other reads; features, options, backing."""

from __future__ import annotations

import asyncio
import json
import os
import random
import struct
from pathlib import Path
from typing import Any

import pytest

from target.datapath import UNMAP
from target.drivers.format.qcow2 import Qcow2, spec
from target.drivers.format.qcow2.allocate import Allocator
from target.drivers.format.qcow2.create import Plan, create
from target.drivers.format.qcow2.flush import WriteBack
from target.graph.errors import BlockError
from tests.support.qcow2 import content, qcow2_options, running_graph
from tests.support.tools import check_image, create_image, fill, qemu_img, qemu_io, sha256

MIB = 1 << 20
GIB = 1 << 30


def patch(path: Path, offset: int, form: str, value: int) -> None:
    with path.open("r+b") as handle:
        handle.seek(offset)
        handle.write(struct.pack(form, value))


def peek(path: Path, offset: int, form: str = ">Q") -> int:
    with path.open("rb") as handle:
        handle.seek(offset)
        value: int = struct.unpack(form, handle.read(struct.calcsize(form)))[0]
        return value


def info(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(qemu_img("info", "--output=json", path).stdout)
    return found


INCOMPATIBLE = spec.HEADER_V2.size
COMPATIBLE = INCOMPATIBLE + 8
AUTOCLEAR = INCOMPATIBLE + 16


async def write_and_close(path: Path, at: int = 0, data: bytes = b"\x11" * 4096, **options: Any) -> None:
    async with running_graph() as graph:
        node = await graph.add(qcow2_options(path, **options))
        await node.write(at, data)


async def refused(path: Path, *words: str, **options: Any) -> str:
    async with running_graph() as graph:
        with pytest.raises(BlockError) as caught:
            await graph.add(qcow2_options(path, **options))
        assert not graph.nodes
    message = str(caught.value)
    for word in ("'disk'", *words):
        assert word in message, message
    assert "\n" not in message
    return message


# ---- images that we make ----

PLANS = {
    "default": Plan(size=GIB),
    "v2": Plan(size=GIB, version=2),
    "small": Plan(size=8 * MIB, cluster_size=512),
    "large": Plan(size=1 << 42, cluster_size=2 * MIB, refcount_bits=1),
    "wide": Plan(size=64 * MIB, cluster_size=512, refcount_bits=64),
    "odd": Plan(size=5 * MIB + 512, cluster_size=4096, refcount_bits=8, lazy_refcounts=True),
    "tib": Plan(size=1 << 40),
    "empty": Plan(size=0),
}


@pytest.mark.parametrize("name", PLANS)
async def test_create(scratch: Path, name: str) -> None:
    plan = PLANS[name]
    path = scratch / "disk.qcow2"
    create(str(path), plan)
    check_image(path)
    found = info(path)
    data = found["format-specific"]["data"]
    assert found["virtual-size"] == plan.size
    assert found["cluster-size"] == plan.cluster_size
    assert data["compat"] == ("1.1" if plan.version == 3 else "0.10")
    if plan.version == 3:
        assert data["lazy-refcounts"] == plan.lazy_refcounts
    assert data["refcount-bits"] == plan.refcount_bits
    if not plan.size:
        return
    last = plan.size - 512
    qemu_io(path, "write -P 1 0 512", f"write -P 2 {last} 512", format="qcow2")
    await write_and_close(path, 1 * MIB, b"\x03" * 1024)
    expected = (
        "read -P 1 0 512",
        f"read -P 2 {last} 512",
        f"read -P 3 {MIB} 1k",
        f"read -P 0 {MIB + 1024} 1k",
    )
    qemu_io(path, *expected, format="qcow2")
    check_image(path)


async def test_create_with_backing(scratch: Path) -> None:
    base = fill(scratch / "base.raw", 4 * MIB, seed=5)
    path = scratch / "disk.qcow2"
    create(str(path), Plan(size=6 * MIB, backing_file="base.raw", backing_format="raw"))
    assert info(path)["backing-filename"] == "base.raw" and info(path)["backing-filename-format"] == "raw"
    async with running_graph() as graph:
        node = await graph.add(qcow2_options(path))
        assert await content(node) == base.read_bytes() + bytes(2 * MIB)
    check_image(path)


async def test_empty_disk_is_opened(scratch: Path) -> None:
    path = create_image(scratch / "disk.qcow2", "0")
    async with running_graph() as graph:
        assert (await graph.add(qcow2_options(path))).size == 0


# ---- header features ----


async def test_unknown_autoclear_bits_go_with_the_first_writer(scratch: Path) -> None:
    path = create_image(scratch / "disk.qcow2", "1M")
    patch(path, AUTOCLEAR, ">Q", 1 << 40)
    patch(path, COMPATIBLE, ">Q", 1 << 41)
    async with running_graph() as graph:
        await graph.add(qcow2_options(path, read_only=True))
    assert peek(path, AUTOCLEAR) == 1 << 40
    await write_and_close(path)
    assert peek(path, AUTOCLEAR) == 0 and peek(path, COMPATIBLE) == 1 << 41


async def test_unknown_incompatible_bit_is_named_by_the_image(scratch: Path) -> None:
    path = create_image(scratch / "disk.qcow2", "1M")
    table = bytearray(path.read_bytes())
    entry = table.index(b"\0\0dirty bit")
    table[entry : entry + 48] = struct.pack(">BB46s", 0, 13, b"time travel\x1b[2J")
    path.write_bytes(table)
    patch(path, INCOMPATIBLE, ">Q", 1 << 13 | 1 << 14)
    message = await refused(path, "time travel?[2J", "incompatible bit 14")
    assert "\x1b" not in message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("extended_l2=on,cluster_size=128k", ["extended L2"]),
        ("data_file=other.raw", ["external data file"]),
        ("encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10", ["encryption", "LUKS"]),
    ],
)
async def test_features_not_built_are_refused(scratch: Path, options: str, words: list[str]) -> None:
    path = scratch / "disk.qcow2"
    secret = ("--object", "secret,id=s,data=x") if "encrypt" in options else ()
    options = options.replace("other", str(scratch / "o"))
    for _ in range(20):
        done = qemu_img("create", "-q", *secret, "-f", "qcow2", "-o", options, path, "1M", check=False)
        if "Unable to get accurate CPU usage" not in done.stderr:  # it times itself for LUKS
            break
    assert done.returncode == 0, done.stderr
    await refused(path, *words)


async def test_corrupt_image_opens_for_reading_only(scratch: Path) -> None:
    path = create_image(scratch / "disk.qcow2", "1M")
    qemu_io(path, "write -P 9 0 64k", format="qcow2")
    patch(path, INCOMPATIBLE, ">Q", spec.INCOMPAT_CORRUPT)
    digest = sha256(path)
    await refused(path, "corrupt")
    async with running_graph() as graph:
        node = await graph.add(qcow2_options(path, auto_read_only=True))
        assert node.read_only
        assert await node.read(0, 512) == b"\x09" * 512
    assert sha256(path) == digest


@pytest.mark.parametrize("consistent", [True, False])
async def test_image_with_bitmaps_is_not_written(scratch: Path, consistent: bool) -> None:
    path = create_image(scratch / "disk.qcow2", "1M")
    qemu_img("bitmap", "--add", path, "b0")
    if not consistent:
        patch(path, AUTOCLEAR, ">Q", 0)
    digest = sha256(path)
    await refused(path, "bitmaps")
    async with running_graph() as graph:
        node = await graph.add(qcow2_options(path, read_only=True))
        assert await node.read(0, 512) == bytes(512)
    assert sha256(path) == digest


# ---- lazy reference counts ----


def make_dirty(path: Path, options: str = "") -> None:
    """An image whose writer was killed, with all of its counts lost but the first block's."""
    create_image(path, "64M", options="lazy_refcounts=on" + options)
    qemu_io(path, "write -P 4 0 3M", "write -P 5 20M 1M", "write -z 40M 1M", format="qcow2")
    table = peek(path, spec.HEADER_V2.offsets["refcount_table_offset"])
    bits = peek(path, spec.HEADER_V2.offsets["cluster_bits"], ">I")
    block = peek(path, table)
    with path.open("r+b") as handle:
        handle.seek(block)
        handle.write(bytes(1 << bits))
        handle.seek(table + 8)  # the other blocks are forgotten
        handle.write(bytes((1 << bits) - 8))
    patch(path, INCOMPATIBLE, ">Q", spec.INCOMPAT_DIRTY)
    assert qemu_img("check", path, check=False).returncode != 0


@pytest.mark.parametrize(
    "options", ["", ",cluster_size=4k", ",cluster_size=512,refcount_bits=64", ",refcount_bits=1"]
)
async def test_dirty_image_is_repaired_before_the_first_write(scratch: Path, options: str) -> None:
    path = scratch / "disk.qcow2"
    make_dirty(path, options)
    digest = sha256(path)
    async with running_graph() as graph:
        node = await graph.add(qcow2_options(path, read_only=True))
        assert await node.read(20 * MIB, 512) == b"\x05" * 512
    assert sha256(path) == digest
    await write_and_close(path, 50 * MIB)
    assert peek(path, INCOMPATIBLE) == 0
    check_image(path)
    qemu_io(
        path, "read -P 4 0 3M", "read -P 5 20M 1M", "read -P 0 40M 1M", "read -P 17 50M 4k", format="qcow2"
    )


async def test_dirty_image_with_snapshots(scratch: Path) -> None:
    path = create_image(scratch / "disk.qcow2", "8M", options="lazy_refcounts=on,cluster_size=4k")
    qemu_io(path, "write -P 4 0 3M", format="qcow2")
    qemu_img("snapshot", "-c", "one", path)
    qemu_io(path, "write -P 5 1M 1M", format="qcow2")
    block = peek(path, peek(path, spec.HEADER_V2.offsets["refcount_table_offset"]))
    with path.open("r+b") as handle:
        handle.seek(block + 100)
        handle.write(bytes(2000))
    patch(path, INCOMPATIBLE, ">Q", spec.INCOMPAT_DIRTY)
    await write_and_close(path, 2 * MIB)
    check_image(path)
    out = scratch / "one.raw"
    qemu_img("convert", "-l", "one", "-O", "raw", path, out)
    assert out.read_bytes() == b"\x04" * (3 * MIB) + bytes(5 * MIB)


# ---- backing ----


async def read_start(path: Path, **options: Any) -> bytes:
    async with running_graph() as graph:
        node = await graph.add(qcow2_options(path, **options))
        return await node.read(0, 512)


def rebase(path: Path, name: str, format: str | None = "raw") -> None:
    """Puts any text into the header as the name of the backing file."""
    data = name.encode()
    with path.open("r+b") as handle:
        extension = b"" if format is None else struct.pack(">II", spec.EXT_BACKING_FORMAT, len(format))
        if format is not None:
            extension += format.encode().ljust((len(format) + 7) & ~7, b"\0")
        handle.seek(112)
        handle.write(extension + bytes(8))
        handle.seek(4096)
        handle.write(data)
    patch(path, spec.HEADER_V2.offsets["backing_file_offset"], ">Q", 4096)
    patch(path, spec.HEADER_V2.offsets["backing_file_size"], ">I", len(data))


@pytest.mark.parametrize(
    "name",
    [
        "sub/base.raw",
        "./sub/base.raw",
        "file:sub/base.raw",
        "{scratch}/sub/base.raw",
        'json:{{"driver":"raw","file":{{"driver":"file","filename":"{scratch}/sub/base.raw"}}}}',
        'json:{{"driver":"raw","file.driver":"file","file.filename":"{scratch}/sub/base.raw"}}',
    ],
)
async def test_backing_names(scratch: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (scratch / "sub").mkdir()
    (scratch / "sub" / "base.raw").write_bytes(b"\x42" * MIB)
    path = create_image(scratch / "disk.qcow2", "1M")
    rebase(path, name.format(scratch=scratch))
    monkeypatch.chdir("/")
    assert await read_start(path) == b"\x42" * 512


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nbd://127.0.0.1/x", ["protocol 'nbd'"]),
        ("json:{", ["JSON"]),
        ("json:[]", ["JSON"]),
        ('json:{"driver":"raw"}', ["file"]),
        ('json:{"driver":"nonesuch"}', ["nonesuch"]),
        ("absent.raw", ["absent.raw", "No such file"]),
        (".", ["backing"]),
    ],
)
async def test_bad_backing_names(scratch: Path, name: str, words: list[str]) -> None:
    path = create_image(scratch / "disk.qcow2", "1M")
    rebase(path, name)
    await refused(path, *words)


async def test_backing_option_overrides_the_header(scratch: Path) -> None:
    base = scratch / "base.raw"
    base.write_bytes(b"\x43" * MIB)
    path = create_image(scratch / "disk.qcow2", "1M")
    rebase(path, "absent.raw")
    assert await read_start(path, backing=None) == bytes(512)
    inline = {"driver": "raw", "file": {"driver": "file", "filename": str(base)}}
    assert await read_start(path, backing=inline) == b"\x43" * 512
    async with running_graph() as graph:
        await graph.add({**inline, "node-name": "base", "read-only": True})
        node = await graph.add(qcow2_options(path, backing="base"))
        assert await node.read(0, 512) == b"\x43" * 512


async def test_backing_format_is_probed_and_never_written(scratch: Path) -> None:
    base = create_image(scratch / "base.qcow2", "1M")
    qemu_io(base, "write -P 7 0 64k", format="qcow2")
    path = create_image(scratch / "disk.qcow2", "1M")
    rebase(path, "base.qcow2", None)
    digest = sha256(base)
    assert await read_start(path) == b"\x07" * 512
    await write_and_close(path, 512)
    assert sha256(base) == digest
    # Named as raw it is raw, whatever a guest has written into it.
    path = create_image(scratch / "other.qcow2", "1M")
    rebase(path, "base.qcow2", "raw")
    assert (await read_start(path))[:4] == b"QFI\xfb"


@pytest.mark.parametrize(("magic", "driver"), [(b"KDMV", "vmdk"), (b"QED\0", "qed"), (b"vhdxfile", "vhdx")])
async def test_probed_formats_that_are_not_built_are_named(scratch: Path, magic: bytes, driver: str) -> None:
    (scratch / "base").write_bytes(magic.ljust(65536, b"\0"))
    path = create_image(scratch / "disk.qcow2", "1M")
    rebase(path, "base", None)
    await refused(path, driver)


async def test_fifo_as_backing_does_not_hang(scratch: Path) -> None:
    os.mkfifo(scratch / "base")
    path = create_image(scratch / "disk.qcow2", "1M")
    rebase(path, "base", None)
    await refused(path, "base")


def make_chain(scratch: Path, depth: int) -> Path:
    previous = scratch / "0.raw"
    previous.write_bytes(b"\x21" * 65536)
    for level in range(1, depth + 1):
        path = scratch / f"{level}.qcow2"
        kind = "raw" if level == 1 else "qcow2"
        create(str(path), Plan(size=65536, backing_file=previous.name, backing_format=kind))
        previous = path
    return previous


async def test_deep_chain(scratch: Path) -> None:
    top = make_chain(scratch, 190)
    async with running_graph() as graph:
        node = await graph.add(qcow2_options(top))
        assert await node.read(0, 512) == b"\x21" * 512
        await node.write(512, b"\x22" * 512)
        assert await node.read(0, 1024) == b"\x21" * 512 + b"\x22" * 512


async def test_chain_that_is_too_deep(scratch: Path) -> None:
    await refused(make_chain(scratch, 230), "200")


# ---- options ----


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"l2_cache_entry_size": 1000}, ["l2-cache-entry-size", "1000"]),
        ({"l2_cache_entry_size": 131072}, ["l2-cache-entry-size", "131072"]),
        ({"cache_size": 1, "l2_cache_size": 2}, ["l2-cache-size"]),
        ({"cache_size": 9, "l2_cache_size": 2, "refcount_cache_size": 2}, ["cache-size"]),
        ({"discard_no_unref": True}, ["discard-no-unref"]),
        ({"cache_clean_interval": 600}, ["cache-clean-interval"]),
        ({"overlap_check": "all"}, ["overlap-check"]),
        ({"encrypt": {"format": "luks"}}, ["encrypt"]),
        ({"data_file": "x"}, ["data-file"]),
    ],
)
async def test_options_that_are_refused(scratch: Path, options: dict[str, Any], words: list[str]) -> None:
    await refused(create_image(scratch / "disk.qcow2", "1M"), *words, **options)


async def test_lazy_refcounts_need_version_3(scratch: Path) -> None:
    path = create_image(scratch / "disk.qcow2", "1M", options="compat=0.10")
    await refused(path, "lazy-refcounts", lazy_refcounts=True)


def blocks(path: Path) -> int:
    return path.stat().st_blocks * 512


@pytest.mark.parametrize("passed", [True, False])
async def test_discard_reaches_the_file(scratch: Path, passed: bool) -> None:
    path = create_image(scratch / "disk.qcow2", "32M")
    qemu_io(path, "write -P 1 0 16M", format="qcow2")
    before = blocks(path)
    async with running_graph() as graph:
        node = await graph.add(qcow2_options(path, pass_discard_request=passed))
        await node.discard(0, 8 * MIB)
        await node.flush()
    check_image(path)
    assert (blocks(path) < before - 7 * MIB) == passed
    qemu_io(path, "read -P 0 0 8M", "read -P 1 8M 8M", format="qcow2")


async def test_freed_clusters_are_used_again(scratch: Path) -> None:
    path = create_image(scratch / "disk.qcow2", "1G")
    async with running_graph() as graph:
        node = await graph.add(qcow2_options(path))
        for round in range(64):
            await node.write(round * 8 * MIB, b"\x77" * (4 * MIB))
            await node.flush()
            await node.discard(round * 8 * MIB, 4 * MIB)
            await node.flush()
    assert path.stat().st_size < 128 * MIB
    check_image(path)


async def test_clusters_dropped_before_they_were_ever_flushed_are_not_lost(scratch: Path) -> None:
    path = create_image(scratch / "disk.qcow2", "64M", options="cluster_size=4k")
    async with running_graph() as graph:
        node = await graph.add(qcow2_options(path))
        assert isinstance(node, Qcow2)
        for _ in range(40):
            await node.write(0, b"\x78" * (2 * MIB))
            await node.write_zeroes(0, 2 * MIB, UNMAP)
            await node.flush()
        space = node.serving.space
        assert space is not None and len(space.grants.outstanding) < 20 * 512
    assert path.stat().st_size < 36 * MIB
    check_image(path)


# ---- files that end ----


async def test_no_space_reaches_the_caller(scratch: Path) -> None:
    """A window of a fixed size is as full as a block device; what was written stays."""
    path = create_image(scratch / "disk.qcow2", "64M")
    os.truncate(path, 4 * MIB)
    file = {"driver": "raw", "size": 4 * MIB, "file": {"driver": "file", "filename": str(path)}}
    async with running_graph() as graph:
        node = await graph.add(qcow2_options(path) | {"file": file})
        await node.write(0, b"\x31" * MIB)
        with pytest.raises(OSError) as caught:
            for at in range(1, 64):
                await node.write(at * MIB, b"\x32" * MIB)
        assert caught.value.strerror == "No space left on device"
        assert await node.read(0, 512) == b"\x31" * 512
        await node.discard(0, MIB)
        await node.flush()
        await node.write(MIB // 2, b"\x33" * 65536)
    assert path.stat().st_size == 4 * MIB
    check_image(path)
    qemu_io(path, f"read -P 0x33 {MIB // 2} 64k", "read -P 0 0 512k", format="qcow2")


@pytest.mark.parametrize("cluster", [512, 4096, 65536])
async def test_every_cluster_of_a_file_that_ends_can_be_used(scratch: Path, cluster: int) -> None:
    """Clusters waiting in the grant pool are not missing when only they are left, for data or for tables."""
    path = create_image(
        scratch / "disk.qcow2", "8M", options=f"cluster_size={cluster},preallocation=metadata"
    )
    full = path.stat().st_size  # what an image needs of which every cluster is written
    create_image(path, "8M", options=f"cluster_size={cluster}")
    os.truncate(path, full)
    file = {"driver": "raw", "size": full, "file": {"driver": "file", "filename": str(path)}}
    async with running_graph() as graph:
        node = await graph.add(qcow2_options(path) | {"file": file})
        for step in (64 * 1024, 24 * 1024):
            offsets = list(range(0, 8 * MIB - step + 1, step))
            random.Random(step).shuffle(offsets)
            for at in range(0, len(offsets), 32):
                await asyncio.gather(
                    *(node.write(offset, b"\x66" * step) for offset in offsets[at : at + 32])
                )
            await node.discard(0, 8 * MIB)
        await asyncio.gather(*(node.write(at * MIB, b"\x67" * MIB) for at in range(8)))
        assert await content(node) == b"\x67" * (8 * MIB)
    check_image(path)


@pytest.mark.parametrize("seed", range(4))
async def test_slow_metadata_does_not_make_the_last_clusters_missing(
    scratch: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step of taking and freeing takes a random while, so that all requests come between them."""
    clock = random.Random(seed)

    def delay(kind: type, name: str) -> None:
        method = getattr(kind, name)

        async def delayed(self: Any, *args: Any) -> Any:
            await asyncio.sleep(clock.random() * 0.003 if clock.random() < 0.3 else 0)
            result = await method(self, *args)
            await asyncio.sleep(clock.random() * 0.003 if clock.random() < 0.3 else 0)
            return result

        monkeypatch.setattr(kind, name, delayed)

    delay(Allocator, "take")
    delay(Allocator, "lower")
    delay(WriteBack, "reclaim")
    await test_every_cluster_of_a_file_that_ends_can_be_used(scratch, 512)


async def test_growing_frees_what_it_needs_in_a_file_that_ends(scratch: Path) -> None:
    """The larger L1 table needs clusters in a row; all that are free wait for a write-back."""
    path = create_image(scratch / "disk.qcow2", "2M", options="cluster_size=512")
    os.truncate(path, MIB)
    file = {"driver": "raw", "size": MIB, "file": {"driver": "file", "filename": str(path)}}
    async with running_graph() as graph:
        node = await graph.add(qcow2_options(path) | {"file": file})
        with pytest.raises(OSError):
            await node.write(0, b"\x35" * (2 * MIB))
        await node.write_zeroes(512 * 1024, 64 * 1024, UNMAP)
        async with graph.change() as change:
            await change.resize(node, 4 * MIB)
        await node.write(4 * MIB - 4096, b"\x36" * 4096)
        assert await node.read(4 * MIB - 4096, 4096) == b"\x36" * 4096
    check_image(path)
    qemu_io(path, f"read -P 0x36 {4 * MIB - 4096} 4k", f"read -P 0 {2 * MIB} 1M", format="qcow2")


# ---- memory ----


def memory(name: str) -> int:
    """Bytes of this process: RssAnon, VmRSS, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


@pytest.mark.parametrize("kind", ["empty-1t", "full-20g"])
async def test_memory(scratch: Path, kind: str) -> None:
    """Every table is touched; what the driver holds stays within the cache size."""
    path = scratch / "disk.qcow2"
    if kind == "empty-1t":
        create(str(path), Plan(size=1 << 40))
    else:
        create_image(path, "20G", options="preallocation=metadata")
    async with running_graph() as graph:
        node = await graph.add(qcow2_options(path))
        Path("/proc/self/clear_refs").write_text("5")  # the peak is from here on, not that of other tests
        before, all_before = memory("RssAnon"), memory("VmRSS")
        for at in range(0, node.size, 4096 * 65536):
            assert await node.read(at, 512) == bytes(512)
            await node.write(at + 65536, b"\x01" * 512) if kind != "empty-1t" else None
        await node.flush()
        assert memory("RssAnon") - before < 80 * MIB
        assert memory("VmHWM") - all_before < 200 * MIB


async def test_first_writes_all_over_a_large_image(scratch: Path) -> None:
    """More dirty tables than the cache holds are written back on the way."""
    path = create_image(scratch / "disk.qcow2", "256G")
    async with running_graph() as graph:
        node = await graph.add(qcow2_options(path, l2_cache_size=MIB))
        assert isinstance(node, Qcow2)
        for at in range(0, node.size, 256 * MIB):
            await node.write(at, b"\x61" * 512)
        assert node.serving.map.bytes < 8 * MIB
    check_image(path)
    qemu_io(path, "read -P 0x61 0 512", f"read -P 0x61 {255 * GIB} 512", format="qcow2")
