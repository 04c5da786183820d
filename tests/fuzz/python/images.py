# SPDX-License-Identifier: Apache-2.0
"""Small qcow2 images in memory that have one of everything, for fuzz targets and their seeds."""

from __future__ import annotations

import struct
import zlib

from target.drivers.format.qcow2 import spec
from target.drivers.format.qcow2.create import Plan, pieces

CLUSTER = 512
TABLES = 2  # L2 tables, of 64 entries each
L2 = 5
SNAPSHOT_TABLE, SNAPSHOT_L1 = 20, 21
CLUSTERS = 24


def image(version: int = 3, refcount_bits: int = 16, dirty: bool = False, backing: bool = False) -> bytearray:
    """Header, refcounts, L1, two L2 tables with clusters of every kind, and a snapshot that shares some."""
    plan = Plan(
        size=TABLES * 64 * CLUSTER,
        cluster_size=CLUSTER,
        version=version,
        refcount_bits=refcount_bits,
        lazy_refcounts=dirty,
        backing_file="base.raw" if backing else None,
        backing_format="raw" if backing else None,
    )
    disk = bytearray(CLUSTERS * CLUSTER)
    for offset, data in pieces(plan):
        disk[offset : offset + len(data)] = data
    l1 = spec.HEADER_V2.unpack(bytes(disk[:CLUSTER]))["l1_table_offset"]
    tables = [L2 * CLUSTER, (L2 + 1) * CLUSTER]
    struct.pack_into(">QQ", disk, l1, tables[0] | spec.OFLAG_COPIED, tables[1])
    struct.pack_into(">QQ", disk, SNAPSHOT_L1 * CLUSTER, 0, tables[1])
    _fill_tables(disk, version)
    _add_snapshot(disk)
    _set_counts(disk, refcount_bits)
    if dirty:
        disk[spec.HEADER_V2.size + 7] |= spec.INCOMPAT_DIRTY
    return disk


def _fill_tables(disk: bytearray, version: int) -> None:
    packed = zlib.compress(b"abc" * 170 + b"de", wbits=-12)
    disk[15 * CLUSTER : 15 * CLUSTER + len(packed)] = packed
    compressed = spec.OFLAG_COMPRESSED | 15 * CLUSTER
    zero = spec.OFLAG_ZERO if version == 3 else 0
    first = [
        8 * CLUSTER | spec.OFLAG_COPIED,
        9 * CLUSTER | spec.OFLAG_COPIED,
        0,
        compressed,
        zero,
        12 * CLUSTER,
    ]
    first.append(10 * CLUSTER | spec.OFLAG_COPIED | zero)
    struct.pack_into(f">{len(first)}Q", disk, L2 * CLUSTER, *first)
    struct.pack_into(">3Q", disk, (L2 + 1) * CLUSTER, 13 * CLUSTER, 0, 14 * CLUSTER)
    for cluster in range(8, 15):
        disk[cluster * CLUSTER : (cluster + 1) * CLUSTER] = bytes([cluster]) * CLUSTER


def _add_snapshot(disk: bytearray) -> None:
    entry = spec.SNAPSHOT.pack(
        l1_table_offset=SNAPSHOT_L1 * CLUSTER, l1_size=TABLES, id_size=1, name_size=4, extra_data_size=16
    )
    entry += struct.pack(">QQ", 0, TABLES * 64 * CLUSTER) + b"1snap"
    disk[SNAPSHOT_TABLE * CLUSTER : SNAPSHOT_TABLE * CLUSTER + len(entry)] = entry
    struct.pack_into(">I", disk, spec.HEADER_V2.offsets["nb_snapshots"], 1)
    struct.pack_into(">Q", disk, spec.HEADER_V2.offsets["snapshots_offset"], SNAPSHOT_TABLE * CLUSTER)


def _set_counts(disk: bytearray, refcount_bits: int) -> None:
    """Of 16 bits; others stay as they were made, which is wrong and to be borne with."""
    if refcount_bits != 16:
        return
    block = struct.unpack_from(">Q", disk, CLUSTER)[0]
    for cluster in range(CLUSTERS):
        shared = cluster in (L2 + 1, 12, 13, 14)
        struct.pack_into(">H", disk, block + 2 * cluster, 2 if shared else 1 if cluster != 22 else 0)


BASES = [image(), image(version=2), image(dirty=True), image(refcount_bits=1), image(refcount_bits=64)]
BASES += [image(backing=True), image(dirty=True, refcount_bits=8)]
