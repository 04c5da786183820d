# SPDX-License-Identifier: Apache-2.0
"""Malformed qcow2 images: a clear error or the readable part, in bounded time and memory; others go on.

Each image is one that qemu-img made, with one thing in it overwritten. It is opened for reading and for
writing, read whole and written to; a request may fail, the process and another image in it may not.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from target.drivers.format.qcow2 import spec
from target.graph.errors import BlockError
from target.graph.graph import Graph
from tests.support.qcow2 import qcow2_options, running_graph
from tests.support.tools import create_image, fill, qemu_img, qemu_io

MIB = 1 << 20
SIZE = 8 * MIB
SECONDS = 5
MEMORY = 256 * MIB
CLUSTER = 4096
PAST_END = 1 << 40

Mutation = Callable[[bytearray], None]


def put(offset: int, form: str, value: int) -> Mutation:
    def apply(image: bytearray) -> None:
        struct.pack_into(form, image, offset, value)

    return apply


def both(*mutations: Mutation) -> Mutation:
    def apply(image: bytearray) -> None:
        for mutation in mutations:
            mutation(image)

    return apply


def text(offset: int, data: bytes) -> Mutation:
    def apply(image: bytearray) -> None:
        image[offset : offset + len(data)] = data

    return apply


def word(image: bytearray, offset: int) -> int:
    value: int = struct.unpack_from(">Q", image, offset)[0]
    return value


def l1_offset(image: bytearray) -> int:
    return word(image, spec.HEADER_V2.offsets["l1_table_offset"])


def refcount_table(image: bytearray) -> int:
    return word(image, spec.HEADER_V2.offsets["refcount_table_offset"])


def l2_offset(image: bytearray, index: int = 0) -> int:
    return word(image, l1_offset(image) + index * 8) & spec.OFFSET_MASK


# Named places of an image, as offsets of 8-byte words, and named values to put there.
PLACES: dict[str, Callable[[bytearray], int]] = {
    "l1[0]": l1_offset,
    "l1[1]": lambda image: l1_offset(image) + 8,
    "l2[0]": l2_offset,
    "l2[5]": lambda image: l2_offset(image) + 40,
    "reftable[0]": refcount_table,
    "reftable[1]": lambda image: refcount_table(image) + 8,
}
COPIED = spec.OFLAG_COPIED
COMPRESSED = spec.OFLAG_COMPRESSED
VALUES: dict[str, Callable[[bytearray], int]] = {
    "zero": lambda image: 0,
    "ones": lambda image: (1 << 64) - 1,
    "past-end": lambda image: PAST_END | COPIED,
    "past-end-plain": lambda image: PAST_END,
    "end": lambda image: len(image) // CLUSTER * CLUSTER + 64 * CLUSTER | COPIED,
    "unaligned": lambda image: l2_offset(image) + 512 | COPIED,
    "header": lambda image: COPIED,
    "l1": lambda image: l1_offset(image) | COPIED,
    "l2": lambda image: l2_offset(image) | COPIED,
    "l2-plain": l2_offset,
    "reftable": lambda image: refcount_table(image) | COPIED,
    "refblock": lambda image: word(image, refcount_table(image)) | COPIED,
    "reserved": lambda image: l2_offset(image) | COPIED | 0x1F0,
    "reserved-high": lambda image: l2_offset(image) | COPIED | 1 << 58,
    "highest": lambda image: spec.OFFSET_MASK,
    "compressed-past-end": lambda image: COMPRESSED | PAST_END,
    "compressed-header": lambda image: COMPRESSED | 3,
    "compressed-long": lambda image: COMPRESSED | l2_offset(image) | 0x3FF << 52,
    "compressed-copied": lambda image: COMPRESSED | COPIED | 4096,
}


def at_place(place: str, value: str) -> Mutation:
    def apply(image: bytearray) -> None:
        struct.pack_into(">Q", image, PLACES[place](image), VALUES[value](image))

    return apply


def block_values(value: bytes) -> Mutation:
    """Every count in the first refcount block."""

    def apply(image: bytearray) -> None:
        block = word(image, refcount_table(image))
        image[block : block + CLUSTER] = value * (CLUSTER // len(value))

    return apply


def truncated(length: int) -> Mutation:
    def apply(image: bytearray) -> None:
        del image[length:]

    return apply


def noise(seed: int) -> Mutation:
    """Random bytes at random places in the metadata."""

    def apply(image: bytearray) -> None:
        source = random.Random(seed)
        block = word(image, refcount_table(image))
        bases = [0, l1_offset(image), l2_offset(image), refcount_table(image), block]
        for base in source.sample(bases, 2):
            at = base + source.randrange(8, CLUSTER - 64)
            length = source.randrange(1, 64)
            image[at : at + length] = source.randbytes(length)

    return apply


def extension(kind: int, length: int, data: bytes = b"") -> Mutation:
    """A header extension directly after the header."""

    def apply(image: bytearray) -> None:
        at = struct.unpack_from(">I", image, 100)[0]
        image[at : at + 8] = struct.pack(">II", kind, length)
        image[at + 8 : at + 8 + len(data)] = data

    return apply


def header_mutations() -> Iterator[tuple[str, Mutation]]:
    ones = (1 << 64) - 1
    layouts = ((spec.HEADER_V2, 0), (spec.HEADER_V3, spec.HEADER_V2.size))
    for layout, base in layouts:
        for name, offset in layout.offsets.items():
            bits = 8 * _width(layout, name)
            form = ">Q" if bits == 64 else ">I"
            for value in (0, 1, 511, 4096, 0x7FFFFFFF, 0xFFFFFFFF, PAST_END, 1 << 63, ones):
                if value < 1 << bits:
                    yield f"{name}={value:#x}", put(base + offset, form, value)


def _width(layout: spec.Layout, name: str) -> int:
    offsets = [*layout.offsets.values(), layout.size]
    at = offsets.index(layout.offsets[name])
    return offsets[at + 1] - offsets[at]


def all_mutations() -> dict[str, Mutation]:
    found = dict(header_mutations())
    found |= {f"{place}={value}": at_place(place, value) for place in PLACES for value in VALUES}
    lengths = (0, 1, 72, 104, 512, 4096, 8192, 12288, 16384, 20480, 65536)
    found |= {f"truncated-{n}": truncated(n) for n in lengths}
    found |= {f"noise-{seed}": noise(seed) for seed in range(60)}
    found |= {
        "counts-zero": block_values(b"\0"),
        "counts-ones": block_values(b"\xff"),
        "counts-two": block_values(b"\0\2"),
        "dirty-counts-zero": both(block_values(b"\0"), put(72, ">Q", 1)),
        "dirty-l1-past-end": both(at_place("l1[0]", "past-end"), put(72, ">Q", 1)),
        "dirty-l2-header": both(at_place("l2[0]", "l1"), put(72, ">Q", 1)),
        "dirty-l2-twice": both(at_place("l2[5]", "l2"), put(72, ">Q", 1)),
        "dirty-reftable-past-end": both(at_place("reftable[0]", "past-end"), put(72, ">Q", 1)),
        "snapshots-past-end": both(put(60, ">I", 5), put(64, ">Q", PAST_END)),
        "snapshots-in-header": both(put(60, ">I", 5), put(64, ">Q", 0)),
        "snapshots-in-data": both(put(60, ">I", 65536), put(64, ">Q", 0x8000)),
        "snapshots-in-l1": lambda image: both(put(60, ">I", 1), put(64, ">Q", l1_offset(image)))(image),
        "extension-long": extension(0x1234, 0xFFFFFFFF),
        "extension-4k": extension(0x1234, 4096),
        "extension-names-odd": extension(spec.EXT_FEATURE_NAMES, 47, b"\0\5" + b"x" * 45),
        "extension-format-long": extension(spec.EXT_BACKING_FORMAT, 64, b"q" * 64),
        "extension-format-binary": extension(spec.EXT_BACKING_FORMAT, 5, b"\xff\xfe\0ab"),
        "extension-bitmaps": extension(spec.EXT_BITMAPS, 24, bytes(24)),
        "backing-in-header": both(put(8, ">Q", 16), put(16, ">I", 8)),
        "backing-json": both(put(8, ">Q", 2048), put(16, ">I", 6), text(2048, b"json:{")),
        "backing-protocol": both(put(8, ">Q", 2048), put(16, ">I", 12), text(2048, b"nbd://host/x")),
        "backing-zero-byte": both(put(8, ">Q", 2048), put(16, ">I", 9)),
    }
    return found


MUTATIONS = all_mutations()


def test_enough_of_them() -> None:
    assert len(MUTATIONS) >= 300


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with data, compressed, zero and unallocated clusters in several L2 tables."""
    directory = tmp_path_factory.mktemp("sound")
    source = fill(directory / "source.raw", SIZE, seed=8, pieces=12)
    path = directory / "sound.qcow2"
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k", source, path)
    commands = ("write -P 1 0 16k", "write -P 2 20k 4k", "write -P 3 5M 100k", "write -z 6M 64k")
    qemu_io(path, *commands, format="qcow2")
    return path


async def exercise(graph: Graph, path: Path, read_only: bool) -> str:
    """Opens, reads and writes all over the image. Only the errors that a user may see are permitted."""
    try:
        node = await graph.add(qcow2_options(path, read_only=read_only))
    except BlockError as error:
        assert str(error).startswith("node 'disk'"), error
        assert "\n" not in str(error)
        return "refused"
    failed = 0
    for at in range(0, min(node.size, SIZE), MIB // 2):
        try:
            await node.read(at, min(MIB // 2, node.size - at))
            if not read_only:
                await node.write(at, b"\x5a" * min(70_000 // 512 * 512, node.size - at))
                await node.discard(at, min(8192, node.size - at))
                await node.flush()
        except OSError:
            failed += 1
    try:
        await graph.remove("disk")
    except OSError:
        failed += 1
    return f"served, {failed} failed"


@pytest.fixture
def bounded_memory() -> Iterator[None]:
    """The process's peak grows by less than the bound."""

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name + ":"))

    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    yield
    assert status("VmHWM") - before < MEMORY


@pytest.mark.parametrize("name", MUTATIONS)
@pytest.mark.usefixtures("bounded_memory")
async def test_malformed(
    sound: Path, scratch: Path, name: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    image = bytearray(sound.read_bytes())
    MUTATIONS[name](image)
    other = create_image(scratch / "other.qcow2", "1M")
    async with running_graph() as graph:
        healthy = await graph.add(qcow2_options(other) | {"node-name": "other"})
        await healthy.write(0, b"\x77" * 4096)
        for read_only in (True, False):
            path = scratch / "disk.qcow2"
            path.write_bytes(image)
            await asyncio.wait_for(exercise(graph, path, read_only), SECONDS)
            assert await healthy.read(0, 4096) == b"\x77" * 4096
    assert "Traceback" not in capfd.readouterr().err + caplog.text


async def test_sound_image_is_served(sound: Path, scratch: Path) -> None:
    for read_only in (True, False):
        path = Path(shutil.copy(sound, scratch / "disk.qcow2"))
        async with running_graph() as graph:
            assert await exercise(graph, path, read_only) == "served, 0 failed"
    qemu_img("check", scratch / "disk.qcow2")
