# SPDX-License-Identifier: Apache-2.0
"""Parses the header cluster into a typed value, with every check of the specification and of our limits.

After ``parse`` the tables' places are inside the file, aligned, bounded and apart from one another. What may
be done with the image (dirty, corrupt, bitmaps) is for the node to decide. It writes nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import pairwise

from target.drivers.format.qcow2 import spec
from target.drivers.format.qcow2.errors import ImageError


@dataclass(frozen=True)
class Header:
    """The header's fields, checked. Offsets and sizes in bytes unless the name says otherwise."""

    version: int
    cluster_bits: int
    size: int
    l1_size: int  # entries
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    nb_snapshots: int
    snapshots_offset: int
    incompatible_features: int = 0
    compatible_features: int = 0
    autoclear_features: int = 0
    refcount_order: int = 4
    header_length: int = spec.HEADER_V2.size
    compression_type: int = spec.COMPRESSION_ZLIB
    backing_file: str | None = None
    backing_format: str | None = None
    has_bitmaps: bool = False
    feature_names: dict[tuple[int, int], str] = field(default_factory=dict)

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def l2_bits(self) -> int:
        """log2 of the entries in an L2 table, which is one cluster."""
        return self.cluster_bits - 3

    @property
    def refcount_bits(self) -> int:
        return 1 << self.refcount_order

    @property
    def refcount_block_bits(self) -> int:
        """log2 of the entries in a refcount block, which is one cluster."""
        return self.cluster_bits + 3 - self.refcount_order

    @property
    def dirty(self) -> bool:
        return bool(self.incompatible_features & spec.INCOMPAT_DIRTY)

    @property
    def corrupt(self) -> bool:
        return bool(self.incompatible_features & spec.INCOMPAT_CORRUPT)

    @property
    def lazy_refcounts(self) -> bool:
        return bool(self.compatible_features & spec.COMPAT_LAZY_REFCOUNTS)


def cluster_size(data: bytes) -> int:
    """How many bytes ``parse`` needs, from the first 24 or more. ImageError when this is no qcow2 image."""
    if len(data) < spec.HEADER_V2.size:
        raise ImageError(f"the file is too short for a qcow2 header ({len(data)} bytes)")
    fields = spec.HEADER_V2.unpack(data)
    if fields["magic"] != spec.MAGIC:
        raise ImageError("Image is not in qcow2 format")
    if fields["version"] not in (2, 3):
        raise ImageError(f"unsupported qcow2 version {fields['version']}")
    bits = fields["cluster_bits"]
    if not spec.MIN_CLUSTER_BITS <= bits <= spec.MAX_CLUSTER_BITS:
        raise ImageError(
            f"unsupported cluster size: cluster_bits is {bits}, not {spec.MIN_CLUSTER_BITS} to"
            f" {spec.MAX_CLUSTER_BITS}"
        )
    return 1 << int(bits)


def parse(data: bytes, file_size: int) -> Header:
    """The header, from the file's first cluster (the whole file when shorter). ImageError."""
    size = cluster_size(data)
    values = spec.HEADER_V2.unpack(data)
    if values["version"] == 3:
        values |= _parse_v3(data, size)
    extensions = _parse_extensions(data, size, values)
    _check_features(values, extensions.feature_names)
    _check_size(values)
    header = Header(
        **{name: values[name] for name in _COPIED if name in values},
        backing_file=_backing_name(data, size, values),
        backing_format=extensions.backing_format,
        has_bitmaps=extensions.has_bitmaps,
        feature_names=extensions.feature_names,
    )
    _check_tables(header, file_size)
    return header


_COPIED = (
    "version",
    "cluster_bits",
    "size",
    "l1_size",
    "l1_table_offset",
    "refcount_table_offset",
    "refcount_table_clusters",
    "nb_snapshots",
    "snapshots_offset",
    "incompatible_features",
    "compatible_features",
    "autoclear_features",
    "refcount_order",
    "header_length",
    "compression_type",
)


def _parse_v3(data: bytes, cluster_size: int) -> dict[str, int]:
    if len(data) < spec.V3_LENGTH:
        raise ImageError(f"the file is too short for a version 3 header ({len(data)} bytes)")
    values = spec.HEADER_V3.unpack(data, spec.HEADER_V2.size)
    length = values["header_length"]
    if length < spec.V3_LENGTH or length > cluster_size or length % 8:
        raise ImageError(f"header_length {length} is not a multiple of 8 from 104 to the cluster size")
    if length > len(data):
        raise ImageError(f"the file ends inside the header (header_length {length})")
    if values["refcount_order"] > spec.MAX_REFCOUNT_ORDER:
        raise ImageError(f"refcount_order {values['refcount_order']} is larger than 6")
    at = spec.COMPRESSION_TYPE_OFFSET
    values["compression_type"] = data[at] if length > at else spec.COMPRESSION_ZLIB
    return values


# ---- header extensions ----


@dataclass
class _Extensions:
    backing_format: str | None = None
    has_bitmaps: bool = False
    has_encryption: bool = False
    feature_names: dict[tuple[int, int], str] = field(default_factory=dict)


def _parse_extensions(data: bytes, cluster_size: int, values: dict[str, int]) -> _Extensions:
    at = values.get("header_length", spec.HEADER_V2.size)
    end = min(len(data), cluster_size)
    if values["backing_file_offset"]:
        end = min(end, values["backing_file_offset"])
    found = _Extensions()
    seen: set[int] = set()
    while at + spec.EXTENSION.size <= end:
        extension = spec.EXTENSION.unpack(data, at)
        kind, length = extension["type"], extension["length"]
        at += spec.EXTENSION.size
        if kind == spec.EXT_END:
            break
        if length > end - at:
            raise ImageError(f"header extension {kind:#010x} of {length} bytes does not fit into the header")
        if kind in seen and kind in _KNOWN:
            raise ImageError(f"header extension {kind:#010x} appears twice")
        seen.add(kind)
        _take_extension(found, kind, data[at : at + length])
        at += (length + 7) & ~7
    return found


_KNOWN = (spec.EXT_BACKING_FORMAT, spec.EXT_FEATURE_NAMES, spec.EXT_BITMAPS, spec.EXT_ENCRYPTION)


def _take_extension(found: _Extensions, kind: int, data: bytes) -> None:
    if kind == spec.EXT_BACKING_FORMAT:
        if len(data) > spec.MAX_BACKING_FORMAT:
            raise ImageError(f"the backing format's name is {len(data)} bytes long, more than 15")
        found.backing_format = _text(data, "backing format") or None
    elif kind == spec.EXT_BITMAPS:
        found.has_bitmaps = True
    elif kind == spec.EXT_ENCRYPTION:
        found.has_encryption = True
    elif kind == spec.EXT_FEATURE_NAMES:
        for at in range(0, len(data) - spec.FEATURE_NAME.size + 1, spec.FEATURE_NAME.size):
            raw = data[at + 2 : at + spec.FEATURE_NAME.size].split(b"\0")[0]
            found.feature_names[data[at], data[at + 1]] = printable(raw.decode("utf-8", "replace"))


def printable(text: str) -> str:
    """Text from an image as it may appear in a message: one line, no control characters."""
    return re.sub(r"[^\x20-\x7e\xa0-\uffff]", "?", text)


def _text(data: bytes, what: str) -> str:
    data = data.rstrip(b"\0")
    if b"\0" in data:
        raise ImageError(f"the {what} contains a zero byte")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ImageError(f"the {what} is not UTF-8") from None


def _backing_name(data: bytes, cluster_size: int, values: dict[str, int]) -> str | None:
    offset, length = values["backing_file_offset"], values["backing_file_size"]
    if not offset:
        return None
    if length > spec.MAX_BACKING_NAME:
        raise ImageError(f"the backing file name is {length} bytes long, more than {spec.MAX_BACKING_NAME}")
    header_end = values.get("header_length", spec.HEADER_V2.size)
    if offset < header_end or offset + length > min(cluster_size, len(data)):
        raise ImageError(
            f"the backing file name (offset {offset:#x}, {length} bytes) is not in the header cluster"
        )
    return _text(data[offset : offset + length], "backing file name") or None


# ---- features ----

_NOT_BUILT = spec.INCOMPAT_DATA_FILE | spec.INCOMPAT_EXTENDED_L2
_BUILT = spec.INCOMPAT_DIRTY | spec.INCOMPAT_CORRUPT | spec.INCOMPAT_COMPRESSION


def _check_features(values: dict[str, int], names: dict[tuple[int, int], str]) -> None:
    refused = values.get("incompatible_features", 0) & ~_BUILT
    if refused:
        raise ImageError(f"unsupported qcow2 feature(s): {_feature_names(refused, names)}")
    if values["crypt_method"]:
        method = {1: "AES", 2: "LUKS"}.get(values["crypt_method"], f"method {values['crypt_method']}")
        raise ImageError(f"unsupported qcow2 feature(s): encryption ({method})")
    kind = values.get("compression_type", 0)
    flagged = bool(values.get("incompatible_features", 0) & spec.INCOMPAT_COMPRESSION)
    if kind not in (spec.COMPRESSION_ZLIB, spec.COMPRESSION_ZSTD):
        raise ImageError(f"unknown compression_type {kind}")
    if flagged != (kind != spec.COMPRESSION_ZLIB):
        raise ImageError(f"compression_type {kind} contradicts the compression type feature bit")


def _feature_names(bits: int, names: dict[tuple[int, int], str]) -> str:
    known = {(f.kind, f.bit): f.name for f in spec.FEATURES}
    found = [bit for bit in range(64) if bits >> bit & 1]
    return ", ".join(known.get((0, bit)) or names.get((0, bit)) or f"incompatible bit {bit}" for bit in found)


# ---- places of the tables ----


def _check_size(values: dict[str, int]) -> None:
    if values["size"] > (1 << 63) - 1:
        raise ImageError(f"the virtual size {values['size']} is too large")
    values["size"] &= ~511  # as QEMU, which counts whole sectors
    bits = values["cluster_bits"]
    needed = -(-values["size"] >> (2 * bits - 3))
    if needed * 8 > spec.MAX_L1_BYTES:
        raise ImageError(f"the virtual size {values['size']} needs an L1 table of more than 32 MiB")
    if values["l1_size"] * 8 > spec.MAX_L1_BYTES:
        raise ImageError(f"the active L1 table is too large ({values['l1_size']} entries)")
    if values["l1_size"] < needed:
        raise ImageError(f"the L1 table is too small: {values['l1_size']} entries of {needed}")


def _check_tables(header: Header, file_size: int) -> None:
    size = header.cluster_size
    table = header.refcount_table_clusters << header.cluster_bits
    if not table:
        raise ImageError("the image has no refcount table")
    if table > spec.MAX_REFCOUNT_TABLE_BYTES:
        raise ImageError(f"the refcount table is too large ({header.refcount_table_clusters} clusters)")
    if header.nb_snapshots > spec.MAX_SNAPSHOTS:
        raise ImageError(f"too many snapshots ({header.nb_snapshots})")
    places = [
        ("header", 0, size),
        ("refcount table", header.refcount_table_offset, table),
    ]
    if header.l1_size:
        places.append(("L1 table", header.l1_table_offset, header.l1_size * 8))
    if header.nb_snapshots:
        places.append(("snapshot table", header.snapshots_offset, header.nb_snapshots * spec.SNAPSHOT.size))
    check_places(places, size, file_size)


def check_places(places: list[tuple[str, int, int]], cluster_size: int, file_size: int) -> None:
    """Each (name, offset, length) is aligned and inside the file, rounded up to a cluster; they are apart."""
    file_end = (file_size + cluster_size - 1) & ~(cluster_size - 1)
    for name, offset, length in places:
        if offset % cluster_size:
            raise ImageError(f"the {name}'s offset {offset:#x} is not aligned to a cluster")
        if offset + length > file_end:
            raise ImageError(f"the {name} (offset {offset:#x}, {length} bytes) lies past the end of the file")
    for (name, offset, length), (other, start, _) in pairwise(sorted(places, key=lambda place: place[1])):
        if offset + length > start:
            raise ImageError(f"the {other} (offset {start:#x}) overlaps the {name}")
