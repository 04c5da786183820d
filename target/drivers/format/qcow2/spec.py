# SPDX-License-Identifier: Apache-2.0
"""Layout of qcow2's on-disk structures, declared once as data, and the limits that this driver keeps.

Names and sections are those of the specification (QEMU, docs/interop/qcow2.rst). It reads no file and makes
no decision: see header.py, snapshots.py and table.py. All numbers on disk are big-endian.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np

MAGIC = 0x514649FB  # "QFI\xfb"

# ---- limits: QEMU's, which every image in the field keeps ----

MIN_CLUSTER_BITS = 9
MAX_CLUSTER_BITS = 21
MAX_L1_BYTES = 32 << 20
MAX_REFCOUNT_TABLE_BYTES = 8 << 20
MAX_BACKING_NAME = 1023
MAX_BACKING_FORMAT = 15
MAX_SNAPSHOTS = 65536
MAX_SNAPSHOT_TABLE_BYTES = 64 << 20
MAX_SNAPSHOT_EXTRA = 1024
MAX_REFCOUNT_ORDER = 6


class Layout:
    """A fixed big-endian structure: named fields in order, each with a struct format character."""

    def __init__(self, *fields: tuple[str, str]) -> None:
        self._struct = struct.Struct(">" + "".join(code for _, code in fields))
        self.names = tuple(name for name, _ in fields)
        self.size = self._struct.size
        self.offsets: dict[str, int] = {}
        at = 0
        for name, code in fields:
            self.offsets[name] = at
            at += struct.calcsize(">" + code)

    def unpack(self, data: bytes, at: int = 0) -> dict[str, int]:
        return dict(zip(self.names, self._struct.unpack_from(data, at), strict=True))

    def pack(self, **values: int | bytes) -> bytes:
        return self._struct.pack(*(values.get(name, 0) for name in self.names))


# ---- section "Header" ----

HEADER_V2 = Layout(
    ("magic", "I"),
    ("version", "I"),
    ("backing_file_offset", "Q"),
    ("backing_file_size", "I"),
    ("cluster_bits", "I"),
    ("size", "Q"),
    ("crypt_method", "I"),
    ("l1_size", "I"),
    ("l1_table_offset", "Q"),
    ("refcount_table_offset", "Q"),
    ("refcount_table_clusters", "I"),
    ("nb_snapshots", "I"),
    ("snapshots_offset", "Q"),
)
HEADER_V3 = Layout(
    ("incompatible_features", "Q"),
    ("compatible_features", "Q"),
    ("autoclear_features", "Q"),
    ("refcount_order", "I"),
    ("header_length", "I"),
)
V3_LENGTH = HEADER_V2.size + HEADER_V3.size  # 104
COMPRESSION_TYPE_OFFSET = 104

INCOMPAT_DIRTY = 1 << 0
INCOMPAT_CORRUPT = 1 << 1
INCOMPAT_DATA_FILE = 1 << 2
INCOMPAT_COMPRESSION = 1 << 3
INCOMPAT_EXTENDED_L2 = 1 << 4
COMPAT_LAZY_REFCOUNTS = 1 << 0
AUTOCLEAR_BITMAPS = 1 << 0

COMPRESSION_ZLIB = 0
COMPRESSION_ZSTD = 1


class Feature(NamedTuple):
    """A feature's bitmap (0 incompatible, 1 compatible, 2 autoclear), bit, and name as QEMU writes it."""

    kind: int
    bit: int
    name: str


FEATURES = (
    Feature(0, 0, "dirty bit"),
    Feature(0, 1, "corrupt bit"),
    Feature(0, 2, "external data file"),
    Feature(0, 3, "compression type"),
    Feature(0, 4, "extended L2 entries"),
    Feature(1, 0, "lazy refcounts"),
    Feature(2, 0, "bitmaps"),
    Feature(2, 1, "raw external data"),
)

# ---- section "Header extensions" ----

EXTENSION = Layout(("type", "I"), ("length", "I"))
EXT_END = 0
EXT_BACKING_FORMAT = 0xE2792ACA
EXT_FEATURE_NAMES = 0x6803F857
EXT_BITMAPS = 0x23852875
EXT_ENCRYPTION = 0x0537BE77
EXT_DATA_FILE = 0x44415441
FEATURE_NAME = Layout(("kind", "B"), ("bit", "B"), ("name", "46s"))

# ---- section "Snapshots" ----

SNAPSHOT = Layout(
    ("l1_table_offset", "Q"),
    ("l1_size", "I"),
    ("id_size", "H"),
    ("name_size", "H"),
    ("date_sec", "I"),
    ("date_nsec", "I"),
    ("vm_clock_nsec", "Q"),
    ("vm_state_size", "I"),
    ("extra_data_size", "I"),
)

# ---- sections "Host cluster management" and "Cluster mapping" ----

BE64 = np.dtype(">u8")
OFLAG_COPIED = 1 << 63
OFLAG_COMPRESSED = 1 << 62
OFLAG_ZERO = 1
OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00  # bits 9-55 of L1 and standard L2 entries
REFCOUNT_TABLE_MASK = 0xFFFF_FFFF_FFFF_FE00
L1_RESERVED = ~(OFFSET_MASK | OFLAG_COPIED) & (1 << 64) - 1
L2_RESERVED = ~(OFFSET_MASK | OFLAG_COPIED | OFLAG_COMPRESSED | OFLAG_ZERO) & (1 << 64) - 1
