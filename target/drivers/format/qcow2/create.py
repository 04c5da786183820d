# SPDX-License-Identifier: Apache-2.0
"""Makes new, empty images. No preallocation, no encryption, no external data file."""

from __future__ import annotations

import os
from dataclasses import dataclass

from target.drivers.format.qcow2 import spec
from target.drivers.format.qcow2.errors import ImageError
from target.drivers.format.qcow2.refcount import pack, unpack

_HEADER_LENGTH = 112  # with compression_type, and padding


@dataclass(frozen=True)
class Plan:
    """A new image. ``size`` and ``cluster_size`` in bytes, ``refcount_bits`` a power of two from 1 to 64."""

    size: int
    cluster_size: int = 65536
    version: int = 3
    refcount_bits: int = 16
    lazy_refcounts: bool = False
    backing_file: str | None = None
    backing_format: str | None = None

    @property
    def cluster_bits(self) -> int:
        return self.cluster_size.bit_length() - 1

    @property
    def refcount_order(self) -> int:
        return self.refcount_bits.bit_length() - 1

    @property
    def l1_size(self) -> int:
        return -(-self.size >> 2 * self.cluster_bits - 3)

    def check(self) -> None:
        """ImageError says which value cannot be."""
        bits = self.cluster_bits
        if self.cluster_size != 1 << bits or not spec.MIN_CLUSTER_BITS <= bits <= spec.MAX_CLUSTER_BITS:
            raise ImageError(f"cluster-size {self.cluster_size} is not a power of two from 512 to 2097152")
        if self.size % 512 or not 0 <= self.size < 1 << 63:
            raise ImageError(f"size {self.size} is not a multiple of 512")
        if self.l1_size * 8 > spec.MAX_L1_BYTES:
            raise ImageError(f"size {self.size} is too large for cluster-size {self.cluster_size}")
        if self.refcount_bits not in (1, 2, 4, 8, 16, 32, 64):
            raise ImageError(f"refcount-bits {self.refcount_bits} is not a power of two from 1 to 64")
        if self.version == 2 and self.refcount_bits != 16:
            raise ImageError("refcount-bits other than 16 needs version v3")
        if self.version == 2 and self.lazy_refcounts:
            raise ImageError("lazy-refcounts needs version v3")
        if self.backing_format is not None and self.backing_file is None:
            raise ImageError("backing-fmt needs backing-file")
        if len((self.backing_file or "").encode()) > spec.MAX_BACKING_NAME:
            raise ImageError(f"backing-file is longer than {spec.MAX_BACKING_NAME} bytes")


@dataclass(frozen=True)
class _Places:
    """Clusters: header, refcount table, refcount blocks, L1; one after another."""

    table: int
    blocks: int
    l1: int

    @property
    def total(self) -> int:
        return 1 + self.table + self.blocks + self.l1


def _places(plan: Plan) -> _Places:
    """Sizes in clusters; the refcount structures count themselves."""
    per_block = plan.cluster_size * 8 // plan.refcount_bits
    l1 = -(-plan.l1_size * 8 // plan.cluster_size)
    places = _Places(1, 1, l1)
    while True:
        blocks = -(-places.total // per_block)
        table = -(-blocks * 8 // plan.cluster_size)
        if (table, blocks) == (places.table, places.blocks):
            return places
        places = _Places(table, blocks, l1)


def pieces(plan: Plan) -> list[tuple[int, bytes]]:
    """What to write, (offset, data); everything else up to the last piece's end is zeros. ImageError."""
    plan.check()
    places, size = _places(plan), plan.cluster_size
    first_block = 1 + places.table
    table = b"".join((first_block + i << plan.cluster_bits).to_bytes(8, "big") for i in range(places.blocks))
    counts = unpack(bytes(places.blocks * size), plan.refcount_order)
    counts[: places.total] = 1
    return [
        (0, _header(plan, places)),
        (size, table),
        (first_block * size, pack(counts, plan.refcount_order)),
        ((first_block + places.blocks) * size, bytes(places.l1 * size)),
    ]


def _header(plan: Plan, places: _Places) -> bytes:
    length = _HEADER_LENGTH if plan.version == 3 else spec.HEADER_V2.size
    extensions = _extensions(plan)
    name = (plan.backing_file or "").encode()
    head = spec.HEADER_V2.pack(
        magic=spec.MAGIC,
        version=plan.version,
        backing_file_offset=length + len(extensions) if name else 0,
        backing_file_size=len(name),
        cluster_bits=plan.cluster_bits,
        size=plan.size,
        l1_size=plan.l1_size,
        l1_table_offset=(1 + places.table + places.blocks) << plan.cluster_bits if places.l1 else 0,
        refcount_table_offset=plan.cluster_size,
        refcount_table_clusters=places.table,
    )
    if plan.version == 3:
        head += spec.HEADER_V3.pack(
            compatible_features=spec.COMPAT_LAZY_REFCOUNTS if plan.lazy_refcounts else 0,
            refcount_order=plan.refcount_order,
            header_length=length,
        )
    data = head.ljust(length, b"\0") + extensions + name
    if len(data) > plan.cluster_size:
        raise ImageError(f"cluster-size {plan.cluster_size} is too small for a header with this backing-file")
    return data


def _extensions(plan: Plan) -> bytes:
    out = b""
    if plan.backing_format is not None:
        out += _extension(spec.EXT_BACKING_FORMAT, plan.backing_format.encode())
    if plan.version == 3 and plan.cluster_size >= 4096:
        names = (spec.FEATURE_NAME.pack(kind=f.kind, bit=f.bit, name=f.name.encode()) for f in spec.FEATURES)
        out += _extension(spec.EXT_FEATURE_NAMES, b"".join(names))
    return out + _extension(spec.EXT_END, b"")


def _extension(kind: int, data: bytes) -> bytes:
    padded = data.ljust(len(data) + 7 & ~7, b"\0")
    return spec.EXTENSION.pack(type=kind, length=len(data)) + padded


def create(filename: str, plan: Plan) -> None:
    """Writes a new image, durably; the file must not exist. ImageError, OSError."""
    parts = pieces(plan)
    with open(filename, "xb") as file:
        for offset, data in parts:
            file.seek(offset)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
