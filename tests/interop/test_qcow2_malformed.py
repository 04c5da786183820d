# SPDX-License-Identifier: Apache-2.0
"""Malformed qcow2 images: a clear error or the readable part, in bounded time and memory; others go on.

Each image is one that qemu-img made (alone, of version 2, with a backing file, with snapshots), with one
thing in it overwritten. It is opened for reading and for writing, read whole and written to. Requests may
fail where it is damaged; elsewhere what is read is what was there; the process and another image go on.
"""

from __future__ import annotations

import asyncio
import random
import struct
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from target.drivers.format.qcow2 import spec
from target.graph.errors import BlockError
from target.graph.graph import Graph
from target.graph.node import Node
from tests.support.qcow2 import qcow2_options, running_graph
from tests.support.tools import create_image, fill, qemu_img, qemu_io

MIB = 1 << 20
SIZE = 8 * MIB
SECONDS = 5
MEMORY = 256 * MIB
CLUSTER = 4096
ENTRIES = CLUSTER // 8
READ = 16 * CLUSTER
PAST_END = 1 << 40

FORMS = {16: ">H", 32: ">I", 64: ">Q"}

Mutation = Callable[[bytearray], None]
Place = Callable[[bytearray], int]


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
PLACES: dict[str, Place] = {
    "l1[0]": l1_offset,
    "l1[1]": lambda image: l1_offset(image) + 8,
    "l2[0]": l2_offset,
    "l2[5]": lambda image: l2_offset(image) + 40,
    "reftable[0]": refcount_table,
    "reftable[1]": lambda image: refcount_table(image) + 8,
}
COPIED = spec.OFLAG_COPIED
COMPRESSED = spec.OFLAG_COMPRESSED
VALUES: dict[str, Place] = {
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


def fixed(offset: int) -> Place:
    return lambda image: offset


def header_mutations(*layouts: tuple[spec.Layout, int]) -> Iterator[tuple[str, Mutation]]:
    for layout, base in layouts:
        for name in layout.offsets:
            yield from field_mutations(layout, name, fixed(base))


def field_mutations(layout: spec.Layout, name: str, base: Place) -> Iterator[tuple[str, Mutation]]:
    """Values of a field that are small, large and none, as far as they fit."""
    bits = 8 * _width(layout, name)
    for value in (0, 1, 511, 4096, 0x7FFFFFFF, 0xFFFFFFFF, PAST_END, 1 << 63, (1 << 64) - 1):
        if value < 1 << bits:
            yield f"{name}={value:#x}", put_at(base, layout.offsets[name], FORMS[bits], value)


def put_at(base: Place, offset: int, form: str, value: int) -> Mutation:
    return lambda image: struct.pack_into(form, image, base(image) + offset, value)


def _width(layout: spec.Layout, name: str) -> int:
    offsets = [*layout.offsets.values(), layout.size]
    at = offsets.index(layout.offsets[name])
    return offsets[at + 1] - offsets[at]


def table_mutations(noises: int) -> dict[str, Mutation]:
    """For every kind of image."""
    found = {f"{place}={value}": at_place(place, value) for place in PLACES for value in VALUES}
    lengths = (0, 1, 72, 104, 512, 4096, 8192, 12288, 16384, 20480, 65536)
    found |= {f"truncated-{n}": truncated(n) for n in lengths}
    found |= {f"noise-{seed}": noise(seed) for seed in range(noises)}
    return found


def plain_mutations() -> dict[str, Mutation]:
    found = dict(header_mutations((spec.HEADER_V2, 0), (spec.HEADER_V3, spec.HEADER_V2.size)))
    found |= table_mutations(60)
    return found | {
        "counts-zero": block_values(b"\0"),
        "counts-ones": block_values(b"\xff"),
        "counts-two": block_values(b"\0\2"),
        "dirty-counts-zero": both(block_values(b"\0"), put(72, ">Q", 1)),
        # Found by fuzzing: gigabytes of memory went into counting where no snapshot is.
        "dirty-snapshots-nowhere": both(put(64, ">Q", 0x7FFFFFFF64003B00), put(72, ">Q", 1)),
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


def backing_mutations() -> dict[str, Mutation]:
    """What is wrong with the name of the backing file; its tables have entries that fall through."""
    found = table_mutations(20)
    for name in ("backing_file_offset", "backing_file_size"):
        found |= dict(field_mutations(spec.HEADER_V2, name, fixed(0)))
    names = {
        "itself": b"disk.qcow2",
        "absent": b"absent.qcow2",
        "not-text": b"\xff\xfe\xfd",
        "zero-byte": b"a\0b",
        "protocol": b"nbd://host/x",
        "json": b"json:{",
        "json-deep": b"json:" + b"[" * 900,
        "directory": b"/",
        "device": b"/dev/zero",
    }
    return found | {f"backing-{name}": backing_name(value) for name, value in names.items()}


def backing_name(name: bytes) -> Mutation:
    return both(put(8, ">Q", 2048), put(16, ">I", len(name)), text(2048, name))


def snapshot_table(image: bytearray) -> int:
    return word(image, spec.HEADER_V2.offsets["snapshots_offset"])


def snapshot_l1(value: str) -> Mutation:
    def apply(image: bytearray) -> None:
        struct.pack_into(">Q", image, snapshot_table(image), VALUES[value](image) & spec.OFFSET_MASK)

    return apply


def snapshot_mutations() -> dict[str, Mutation]:
    found = table_mutations(20)
    for name in spec.SNAPSHOT.offsets:
        for key, mutation in field_mutations(spec.SNAPSHOT, name, snapshot_table):
            found[f"snapshot.{key}"] = mutation
    for value in VALUES:
        found[f"snapshot.l1={value}"] = snapshot_l1(value)
    for name in ("nb_snapshots", "snapshots_offset"):
        found |= dict(field_mutations(spec.HEADER_V2, name, fixed(0)))
    found["snapshot-table-cut"] = lambda image: truncated(snapshot_table(image) + 50)(image)
    return found


MUTATIONS = {
    "plain": plain_mutations(),
    "v2": table_mutations(20) | dict(header_mutations((spec.HEADER_V2, 0))),
    "backing": backing_mutations(),
    "snapshots": snapshot_mutations(),
}
EACH = [(kind, name) for kind, found in MUTATIONS.items() for name in found]


def test_enough_of_them() -> None:
    assert len(MUTATIONS["plain"]) >= 300
    assert len(EACH) >= 800


# ---- sound images, and what of a damaged one is still as it was ----


class Sound(NamedTuple):
    """An image that nothing is wrong with, and what a guest reads from it."""

    kind: str
    image: bytes
    content: bytes


def make_sound(directory: Path, kind: str) -> Path:
    """An image with data, compressed, zero and unallocated clusters in several L2 tables."""
    source = fill(directory / "source.raw", SIZE, seed=8, pieces=12)
    path = directory / "sound.qcow2"
    options = "cluster_size=4k,compat=0.10" if kind == "v2" else "cluster_size=4k"
    if kind == "backing":
        base = directory / "base.qcow2"
        qemu_img("convert", "-f", "raw", "-O", "qcow2", source, base)
        create_image(path, str(SIZE), options=options, backing=base)
        qemu_io(path, "write -c -P 9 3M 4k", format="qcow2")
    else:
        qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, source, path)
    commands = ("write -P 1 0 16k", "write -P 2 20k 4k", "write -P 3 5M 100k", "write -z 6M 64k")
    qemu_io(path, *commands, format="qcow2")
    if kind == "snapshots":
        for name in ("one", "two"):
            qemu_img("snapshot", "-c", name, path)
            qemu_io(path, "write -P 4 0 8k", "write -P 5 6M 4k", format="qcow2")
    return path


@pytest.fixture(scope="module")
def sound_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Sound]:
    @cache
    def make(kind: str) -> Sound:
        directory = tmp_path_factory.mktemp("sound")
        path = make_sound(directory, kind)
        qemu_img("convert", "-f", "qcow2", "-O", "raw", path, directory / "content")
        return Sound(kind, path.read_bytes(), (directory / "content").read_bytes())

    return make


# Fields of the header that reading does not depend on: the reference counts, snapshots, and feature bits
# but the incompatible ones.
UNREAD = [(48, 72), (80, 100)]
STATE_BITS = spec.INCOMPAT_DIRTY | spec.INCOMPAT_CORRUPT


def _read_by(image: bytes | bytearray, kind: str) -> bytes:
    """The part of the header that decides what is read. The names of a backing file are behind it."""
    header = bytearray(image[: CLUSTER if kind == "backing" else 72 if kind == "v2" else 112].ljust(112))
    if kind != "v2":
        struct.pack_into(">Q", header, 72, word(header, 72) & ~STATE_BITS)
    for begin, end in UNREAD if kind != "v2" else UNREAD[:1]:
        header[begin:end] = bytes(end - begin)
    return bytes(header)


def intact(sound: Sound, damaged: bytes | bytearray) -> list[bool]:
    """For each cluster of the guest: whether its L1 entry, its L2 entry and its data are as they were."""
    clusters = SIZE // CLUSTER
    if _read_by(sound.image, sound.kind) != _read_by(damaged, sound.kind):
        return [False] * clusters

    def same(offset: int, length: int) -> bool:
        return sound.image[offset : offset + length] == damaged[offset : offset + length]

    image = bytearray(sound.image)
    result = []
    for guest in range(clusters):
        at = l1_offset(image) + guest // ENTRIES * 8
        whole = same(at, 8)
        table = word(image, at) & spec.OFFSET_MASK
        if whole and table:
            at = table + guest % ENTRIES * 8
            whole = same(at, 8) and same(*_data(word(image, at)))
        result.append(whole)
    return result


def _data(entry: int) -> tuple[int, int]:
    """Where an L2 entry's data is, and its length."""
    if not entry & spec.OFLAG_COMPRESSED:
        return entry & spec.OFFSET_MASK, CLUSTER if entry & spec.OFFSET_MASK else 0
    bits = 62 - (CLUSTER.bit_length() - 1 - 8)
    offset = entry & (1 << bits) - 1
    return offset, ((entry >> bits & (1 << 62 - bits) - 1) + 1) * 512


# ---- the tests ----


class Outcome(NamedTuple):
    """What became of an image: whether it was opened; requests that were made, and that failed."""

    served: bool
    requests: int = 0
    failed: int = 0


async def read_all(node: Node, sound: Sound, whole: list[bool], strict: bool) -> Outcome:
    """What is read where nothing is damaged is what it was; ``strict``: and that can be read."""
    requests = failed = at = 0
    while at < min(node.size, SIZE):
        flag = whole[at // CLUSTER]
        end = at + CLUSTER
        while end < min(node.size, SIZE, at + READ) and whole[end // CLUSTER] == flag:
            end += CLUSTER
        end = min(end, node.size)
        requests += 1
        try:
            data = await node.read(at, end - at)
        except OSError as error:
            failed += 1
            assert not (flag and strict), (at, end, error)
        else:
            assert not flag or data == sound.content[at:end], (at, end)
        at = end
    return Outcome(True, requests, failed)


async def change_all(node: Node) -> Outcome:
    requests = failed = 0
    for at in range(0, min(node.size, SIZE), MIB // 2):
        requests += 1
        try:
            await node.read(at, min(MIB // 2, node.size - at))
            await node.write(at, b"\x5a" * min(70_000 // 512 * 512, node.size - at))
            await node.discard(at, min(8192, node.size - at))
            await node.flush()
        except OSError:
            failed += 1
    return Outcome(True, requests, failed)


async def exercise(graph: Graph, path: Path, sound: Sound, whole: list[bool], read_only: bool) -> Outcome:
    """Opens, reads and writes all over the image. Only the errors that a user may see are permitted."""
    try:
        node = await graph.add(qcow2_options(path, read_only=read_only))
    except BlockError as error:
        assert str(error).startswith("node 'disk'"), error
        assert "\n" not in str(error)
        return Outcome(False)
    # With wrong tables, what a writable image has there is held for metadata, and not given out.
    outcome = await read_all(node, sound, whole, strict=read_only)
    if not read_only:
        changed = await change_all(node)
        outcome = Outcome(True, outcome.requests + changed.requests, outcome.failed + changed.failed)
    try:
        await graph.remove("disk")
    except OSError:
        outcome = outcome._replace(failed=outcome.failed + 1)
    return outcome


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


# Damage that is no reason to refuse the image for reading.
SERVED = (*PLACES, "counts-", "dirty-")
# Pointers in L1 and L2 that can point to nothing: what is read there fails.
NOWHERE = (
    "=ones",
    "past-end",
    "past-end-plain",
    "=end",
    "=unaligned",
    "=reserved",
    "=reserved-high",
    "=highest",
)
OUTCOMES: dict[tuple[str, str], tuple[Outcome, Outcome]] = {}


@pytest.mark.parametrize(("kind", "name"), EACH)
@pytest.mark.usefixtures("bounded_memory")
async def test_malformed(
    sound_of: Callable[[str], Sound],
    scratch: Path,
    kind: str,
    name: str,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    sound = sound_of(kind)
    image = bytearray(sound.image)
    MUTATIONS[kind][name](image)
    whole = intact(sound, image)
    other = create_image(scratch / "other.qcow2", "1M")
    outcomes = []
    async with running_graph() as graph:
        healthy = await graph.add(qcow2_options(other) | {"node-name": "other"})
        await healthy.write(0, b"\x77" * 4096)
        for read_only in (True, False):
            path = scratch / "disk.qcow2"
            path.write_bytes(image)
            # The clock is for what blocks the loop, which no timeout on the loop would notice.
            begun = time.monotonic()
            async with asyncio.timeout(SECONDS):
                outcomes.append(await exercise(graph, path, sound, whole, read_only))
            assert time.monotonic() - begun < SECONDS
            assert await healthy.read(0, 4096) == b"\x77" * 4096
    assert "Traceback" not in capsys.readouterr().err + caplog.text
    OUTCOMES[kind, name] = outcomes[0], outcomes[1]
    reading = outcomes[0]
    if name.startswith(SERVED):
        assert reading.served
    if name.startswith(("l1[", "l2[")):
        assert reading.failed <= reading.requests // 2
        assert reading.failed > 0 or not name.endswith(NOWHERE)


def of(kind: str, prefix: str) -> list[tuple[Outcome, Outcome]]:
    return [pair for (of_kind, name), pair in OUTCOMES.items() if of_kind == kind and name.startswith(prefix)]


def test_outcomes() -> None:
    """Enough of them are served, and enough are not."""
    if len(OUTCOMES) < len(EACH):
        pytest.skip("only some of the images were tried")
    for kind in MUTATIONS:
        counts = of(kind, "reftable[")
        assert sum(not writing.served for _, writing in counts) >= 30
        noises = of(kind, "noise-")
        assert sum(reading.served for reading, _ in noises) >= 0.9 * len(noises)
    readings, writings = zip(*OUTCOMES.values(), strict=True)
    for outcomes, served in ((readings, 700), (writings, 450)):
        assert sum(outcome.served for outcome in outcomes) >= served
        assert sum(not outcome.served for outcome in outcomes) >= 200
        for text, number in (
            ("refused", sum(not outcome.served for outcome in outcomes)),
            ("served whole", sum(outcome.served and not outcome.failed for outcome in outcomes)),
            ("served in part", sum(outcome.failed > 0 for outcome in outcomes)),
        ):
            print(f"{'reading' if outcomes is readings else 'writing'}: {text} {number}")


@pytest.mark.parametrize("kind", MUTATIONS)
async def test_sound_image_is_served(sound_of: Callable[[str], Sound], scratch: Path, kind: str) -> None:
    sound = sound_of(kind)
    path = scratch / "disk.qcow2"
    whole = intact(sound, sound.image)
    assert all(whole)
    for read_only in (True, False):
        path.write_bytes(sound.image)
        async with running_graph() as graph:
            outcome = await exercise(graph, path, sound, whole, read_only)
        assert outcome.served and outcome.failed == 0
    qemu_img("check", path)
