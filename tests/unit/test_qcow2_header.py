# SPDX-License-Identifier: Apache-2.0
"""The header's layout against the specification's offsets, and every check of it."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from target.drivers.format.qcow2 import spec
from target.drivers.format.qcow2.create import Plan, pieces
from target.drivers.format.qcow2.errors import ImageError
from target.drivers.format.qcow2.header import Header, cluster_size, parse, printable

CLUSTER = 65536


def image(plan: Plan | None = None) -> bytearray:
    data = bytearray()
    for offset, part in pieces(plan or Plan(size=1 << 30)):
        data.extend(bytes(offset - len(data)))
        data.extend(part)
    return data


def parsed(data: bytes | bytearray, file_size: int | None = None) -> Header:
    return parse(bytes(data[:CLUSTER]), len(data) if file_size is None else file_size)


def test_offsets_are_those_of_the_specification() -> None:
    v2, v3 = spec.HEADER_V2.offsets, spec.HEADER_V3.offsets
    assert (v2["backing_file_offset"], v2["cluster_bits"], v2["size"]) == (8, 20, 24)
    assert (v2["l1_table_offset"], v2["refcount_table_offset"]) == (40, 48)
    assert (v2["nb_snapshots"], v2["snapshots_offset"], spec.HEADER_V2.size) == (60, 64, 72)
    assert 72 + v3["refcount_order"] == 96 and 72 + v3["header_length"] == 100
    assert spec.SNAPSHOT.size == 40 and spec.FEATURE_NAME.size == 48
    assert spec.SNAPSHOT.offsets["extra_data_size"] == 36


def test_new_image() -> None:
    header = parsed(image(Plan(size=1 << 30, backing_file="b", backing_format="raw", lazy_refcounts=True)))
    assert (header.version, header.cluster_size, header.size) == (3, CLUSTER, 1 << 30)
    assert (header.backing_file, header.backing_format) == ("b", "raw")
    assert header.lazy_refcounts and not header.dirty and not header.corrupt
    assert header.refcount_bits == 16 and header.refcount_block_bits == 15 and header.l2_bits == 13
    assert header.feature_names[0, 0] == "dirty bit"


def test_version_2_has_no_more_fields() -> None:
    data = image(Plan(size=1 << 30, version=2))
    header = parsed(data)
    assert (header.version, header.refcount_order, header.header_length) == (2, 4, 72)


def test_size_counts_whole_sectors() -> None:
    data = image()
    struct.pack_into(">Q", data, 24, 1000)
    assert parsed(data).size == 512


def with_extensions(*extensions: tuple[int, bytes]) -> bytearray:
    data = image()
    at = 112
    for kind, content in extensions:
        padded = content + bytes(-len(content) % 8)
        data[at : at + 8 + len(padded)] = struct.pack(">II", kind, len(content)) + padded
        at += 8 + len(padded)
    data[at : at + 8] = bytes(8)
    return data


def test_extensions() -> None:
    header = parsed(with_extensions((0x1234, b"xyz"), (spec.EXT_BITMAPS, bytes(24)), (0x1234, b"")))
    assert header.has_bitmaps and header.feature_names == {}


def test_extension_twice() -> None:
    with pytest.raises(ImageError, match="twice"):
        parsed(with_extensions((spec.EXT_BACKING_FORMAT, b"raw"), (spec.EXT_BACKING_FORMAT, b"raw")))


Change = Callable[[bytearray], None]


def field(offset: int, form: str, value: int) -> Change:
    return lambda data: struct.pack_into(form, data, offset, value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (field(0, ">I", 0x51464900), "not in qcow2 format"),
        (field(4, ">I", 1), "version 1"),
        (field(4, ">I", 4), "version 4"),
        (field(20, ">I", 8), "cluster_bits is 8"),
        (field(20, ">I", 22), "cluster_bits is 22"),
        (field(8, ">Q", 50), "backing file name"),
        (field(8, ">Q", CLUSTER - 1), "backing file name"),
        (field(16, ">I", 1024), "1024"),
        (field(24, ">Q", 1 << 63), "virtual size"),
        (field(24, ">Q", 1 << 62), "L1 table"),
        (field(32, ">I", 1), "AES"),
        (field(32, ">I", 2), "LUKS"),
        (field(36, ">I", 1), "L1 table is too small"),
        (field(36, ">I", 1 << 23), "too large"),
        (field(40, ">Q", 512), "not aligned"),
        (field(40, ">Q", 0), "overlaps"),
        (field(40, ">Q", 1 << 40), "past the end"),
        (field(40, ">Q", 0xFFFFFFFFFFFF0000), "past the end"),
        (field(48, ">Q", 0), "overlaps"),
        (field(48, ">Q", 3 * CLUSTER), "overlaps"),
        (field(56, ">I", 0), "no refcount table"),
        (field(56, ">I", 129), "too large"),
        (field(60, ">I", 65537), "too many snapshots"),
        (field(60, ">I", 1), "overlaps"),
        (field(72, ">Q", 4), "external data file"),
        (field(72, ">Q", 16), "extended L2"),
        (field(72, ">Q", 8), "compression"),
        (field(72, ">Q", 1 << 63), "incompatible bit 63"),
        (field(96, ">I", 7), "refcount_order"),
        (field(100, ">I", 96), "header_length 96"),
        (field(100, ">I", 108), "header_length 108"),
        (field(100, ">I", 1 << 17), "header_length 131072"),
        (field(104, ">B", 1), "compression_type"),
        (field(104, ">B", 2), "compression_type 2"),
    ],
)
def test_refused(change: Change, words: str) -> None:
    data = image(Plan(size=1 << 30, backing_file="base"))
    change(data)
    with pytest.raises(ImageError, match=words) as caught:
        parsed(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [0, 4, 71, 72, 103, 104])
def test_truncated(length: int) -> None:
    with pytest.raises(ImageError):
        parsed(image()[:length])


def test_tables_end_with_the_file() -> None:
    data = image()
    assert parsed(data, len(data) - 4096).l1_size == 2
    with pytest.raises(ImageError, match="past the end"):
        parsed(data, 3 * CLUSTER)


def test_cluster_size_needs_only_the_start() -> None:
    assert cluster_size(bytes(image(Plan(size=1 << 20, cluster_size=4096))[:72])) == 4096


def test_text_from_an_image_is_one_line() -> None:
    assert printable("a\nb\x1b[2Jc\x00d\x9b") == "a?b?[2Jc?d?"
