# SPDX-License-Identifier: Apache-2.0
"""Translates L2 entries to the datapath's generic entries and back, whole slices at a time.

Pure functions on arrays of uint64 in host byte order: no I/O, no state. A compressed or invalid cluster
becomes FAULT, so its on-disk entry is kept by whoever writes the slice back (see ``encode``).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from target.datapath import (
    ENTRY_ALLOC,
    ENTRY_DATA,
    ENTRY_FAULT,
    ENTRY_HOST,
    ENTRY_UNALLOCATED,
    ENTRY_WRITABLE,
    ENTRY_ZERO,
)
from target.drivers.format.qcow2 import spec
from target.drivers.format.qcow2.store import Entries

_KIND = 7
_HOST_SHIFT = 8
_SECTOR_BITS = 9

_U = np.uint64
_OFFSET = _U(spec.OFFSET_MASK)
_COPIED = _U(spec.OFLAG_COPIED)
_COMPRESSED = _U(spec.OFLAG_COMPRESSED)
_RESERVED = _U(spec.L2_RESERVED)
_ONE = _U(1)
_ZERO = _U(0)

DATA_OWN = ENTRY_DATA | ENTRY_WRITABLE | ENTRY_ALLOC
DATA_SHARED = ENTRY_DATA | ENTRY_ALLOC
ZERO_OWN = ENTRY_ZERO | ENTRY_HOST | ENTRY_WRITABLE | ENTRY_ALLOC
ZERO_PLAIN = ENTRY_ZERO | ENTRY_ALLOC
UNALLOCATED = ENTRY_UNALLOCATED | ENTRY_ALLOC


def from_disk(data: bytes) -> Entries:
    """Big-endian words of an L1, L2 or refcount table as a writable array in host order."""
    return np.frombuffer(data, dtype=spec.BE64).astype(np.uint64)


def to_disk(entries: Entries) -> bytes:
    return entries.astype(spec.BE64).tobytes()


def entry(host: int, bits: int) -> int:
    """A generic entry for the cluster at host offset ``host``."""
    return host >> _SECTOR_BITS << _HOST_SHIFT | bits


def host_of(generic: int) -> int:
    return generic >> _HOST_SHIFT << _SECTOR_BITS


def hosts_of(generic: Entries) -> Entries:
    """Host offsets of entries that have one."""
    return generic >> _U(_HOST_SHIFT) << _U(_SECTOR_BITS)


def hosted(generic: Entries) -> NDArray[np.bool_]:
    """Which entries have a host offset."""
    found: NDArray[np.bool_] = ((generic & _U(_KIND)) == ENTRY_DATA) | ((generic & _U(ENTRY_HOST)) != 0)
    return found


class Classes(NamedTuple):
    """Boolean arrays over a slice; every entry is in exactly one of them."""

    unallocated: np.ndarray[tuple[int], np.dtype[np.bool_]]
    zero: np.ndarray[tuple[int], np.dtype[np.bool_]]
    data: np.ndarray[tuple[int], np.dtype[np.bool_]]
    compressed: np.ndarray[tuple[int], np.dtype[np.bool_]]
    invalid: np.ndarray[tuple[int], np.dtype[np.bool_]]


def classify(raw: Entries, version: int, cluster_size: int) -> Classes:
    """What each L2 entry is, by the section "L2 table entry"; misaligned or reserved bits make it invalid."""
    compressed = (raw & _COMPRESSED) != 0
    offset = raw & _OFFSET
    zero_bit = (raw & _ONE) != 0
    invalid = ~compressed & (((offset & _U(cluster_size - 1)) != 0) | ((raw & _RESERVED) != 0))
    if version < 3:
        invalid |= ~compressed & zero_bit
    standard = ~compressed & ~invalid
    zero = standard & zero_bit
    data = standard & ~zero_bit & (offset != 0)
    unallocated = standard & ~zero_bit & (offset == 0)
    return Classes(unallocated, zero, data, compressed, invalid)


def decode(raw: Entries, version: int, cluster_size: int, *, shared: bool) -> Entries:
    """Generic entries. ``shared``: the table itself has more than one user, so no cluster may be written.

    WRITABLE only with OFLAG_COPIED: a shared cluster is replaced through ALLOC and never changed. A zero
    cluster with a shared host cluster shows no host: replacing it keeps the other user's.
    """
    classes = classify(raw, version, cluster_size)
    own = ((raw & _COPIED) != 0) & (not shared)
    host = (raw & _OFFSET) >> _U(_SECTOR_BITS) << _U(_HOST_SHIFT)
    out = np.full(raw.shape, ENTRY_FAULT, dtype=np.uint64)
    out[classes.unallocated] = UNALLOCATED
    out[classes.zero] = ZERO_PLAIN
    hosted = classes.zero & own & (host != 0)
    out[hosted] = host[hosted] | _U(ZERO_OWN)
    out[classes.data & own] = host[classes.data & own] | _U(DATA_OWN)
    rest = classes.data & ~own
    out[rest] = host[rest] | _U(DATA_SHARED)
    return out


def encode(generic: Entries) -> Entries:
    """L2 entries for generic entries other than FAULT (whose place in the result is 0)."""
    kind = generic & _U(_KIND)
    host = hosts_of(generic)
    own = np.where((generic & _U(ENTRY_WRITABLE)) != 0, _COPIED, _ZERO)
    hosted_zero = (kind == ENTRY_ZERO) & ((generic & _U(ENTRY_HOST)) != 0)
    out = np.zeros(generic.shape, dtype=np.uint64)
    data = kind == ENTRY_DATA
    out[data] = host[data] | own[data]
    out[kind == ENTRY_ZERO] = _ONE
    out[hosted_zero] = host[hosted_zero] | own[hosted_zero] | _ONE
    return out


class Merge(NamedTuple):
    """A slice as it is to be on disk, against what is there."""

    raw: Entries  # to be written
    changed: Entries  # indices that differ
    came: Entries  # host offsets that came into use
    dropped: Entries  # host offsets of clusters no longer used
    zeroed: Entries  # those of dropped that were zeroed or discarded, not replaced
    compressed: Entries  # old entries of compressed clusters no longer used


def merge(old: Entries, generic: Entries, version: int, cluster_size: int, *, shared: bool) -> Merge:
    """What the changes in ``generic`` make of the on-disk slice ``old``.

    An entry that still is what ``decode`` made of the old one is unchanged and keeps its bits; so is FAULT,
    which the datapath never makes.
    """
    differs = generic != decode(old, version, cluster_size, shared=shared)
    changed = np.flatnonzero(differs & ((generic & _U(_KIND)) != ENTRY_FAULT))
    raw = old.copy()
    raw[changed] = encode(generic[changed])
    before, after = old[changed], raw[changed]
    was_compressed = (before & _COMPRESSED) != 0
    old_host = np.where(was_compressed, _ZERO, before & _OFFSET)
    new_host = after & _OFFSET
    moved = old_host != new_host
    dropped = moved & (old_host != 0)
    return Merge(
        raw,
        changed.astype(np.uint64),
        new_host[moved & (new_host != 0)],
        old_host[dropped],
        old_host[dropped & (new_host == 0)],
        before[was_compressed],
    )


def combined(attempts: list[Merge]) -> Merge:
    """What several attempts to write one slice amount to, of which each may have reached the disk or not.

    A later attempt compares with what it finds there, and so may not see what an earlier one replaced, or
    placed. The last one is what is on disk now.
    """
    last = attempts[-1]
    if len(attempts) == 1:
        return last
    in_use = last.raw[(last.raw & _COMPRESSED) == 0] & _OFFSET
    came = np.unique(joined([attempt.came for attempt in attempts]))
    dropped = np.setdiff1d(joined([came, *(attempt.dropped for attempt in attempts)]), in_use)
    zeroed = np.intersect1d(joined([attempt.zeroed for attempt in attempts]), dropped)
    compressed = np.setdiff1d(joined([attempt.compressed for attempt in attempts]), last.raw)
    return Merge(last.raw, last.changed, came, dropped, zeroed, compressed)


class CompressedExtent(NamedTuple):
    """Where a compressed cluster's data may lie, in bytes; decompression stops when a cluster is full."""

    offset: int
    length: int


def compressed_extent(raw: int, cluster_bits: int) -> CompressedExtent:
    """Section "Compressed Clusters Descriptor"."""
    x = 62 - (cluster_bits - 8)
    offset = raw & (1 << x) - 1
    sectors = (raw & (1 << 62) - 1) >> x
    return CompressedExtent(offset, (sectors + 1) * 512 - offset % 512)


def spans(compressed: Entries, cluster_bits: int) -> Entries:
    """The clusters that compressed clusters lie in, one element for each reference."""
    out: list[int] = []
    for raw in compressed.tolist():
        where = compressed_extent(raw, cluster_bits)
        out.extend(range(where.offset >> cluster_bits, (where.offset + where.length - 1 >> cluster_bits) + 1))
    return np.array(out, dtype=np.uint64)


def joined(parts: list[Entries]) -> Entries:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint64)
