# SPDX-License-Identifier: Apache-2.0
"""L2 entries to generic entries and back, against the specification's bits."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from target.datapath import ENTRY_ALLOC, ENTRY_DATA, ENTRY_FAULT, ENTRY_HOST, ENTRY_WRITABLE, ENTRY_ZERO
from target.drivers.format.qcow2 import spec
from target.drivers.format.qcow2.store import Entries
from target.drivers.format.qcow2.table import (
    DATA_OWN,
    DATA_SHARED,
    UNALLOCATED,
    ZERO_OWN,
    ZERO_PLAIN,
    compressed_extent,
    decode,
    encode,
    entry,
    from_disk,
    host_of,
    merge,
    spans,
    to_disk,
)

CLUSTER = 65536
COPIED, COMPRESSED = spec.OFLAG_COPIED, spec.OFLAG_COMPRESSED


def words(*values: int) -> Entries:
    return np.array(values, dtype=np.uint64)


def decoded(raw: int, *, version: int = 3, shared: bool = False) -> int:
    return int(decode(words(raw), version, CLUSTER, shared=shared)[0])


def test_every_kind() -> None:
    assert decoded(0) == UNALLOCATED
    assert decoded(COPIED) == UNALLOCATED
    assert decoded(0x50000 | COPIED) == entry(0x50000, ENTRY_DATA | ENTRY_WRITABLE | ENTRY_ALLOC)
    assert decoded(0x50000) == entry(0x50000, ENTRY_DATA | ENTRY_ALLOC)
    assert decoded(1) == ENTRY_ZERO | ENTRY_ALLOC
    assert decoded(0x50001 | COPIED) == entry(0x50000, ENTRY_ZERO | ENTRY_HOST | ENTRY_WRITABLE | ENTRY_ALLOC)
    assert decoded(0x50001) == ZERO_PLAIN
    assert decoded(COMPRESSED | 0x12345) == ENTRY_FAULT


def test_in_a_shared_table_nothing_is_writable() -> None:
    assert decoded(0x50000 | COPIED, shared=True) == entry(0x50000, DATA_SHARED)
    assert decoded(0x50001 | COPIED, shared=True) == ZERO_PLAIN


def test_invalid_entries_fault() -> None:
    for raw in (0x50200, 0x50002 | COPIED, 0x50000 | 1 << 57, 1 << 61):
        assert decoded(raw) == ENTRY_FAULT, hex(raw)
    assert decoded(1, version=2) == ENTRY_FAULT


def test_highest_host_offset() -> None:
    host = spec.OFFSET_MASK & ~(CLUSTER - 1)
    assert host_of(decoded(host | COPIED)) == host


clusters = st.integers(1, (1 << 40) - 1).map(lambda number: number * CLUSTER)
raw_entries = st.one_of(
    st.just(0),
    st.just(1),
    clusters,
    clusters.map(lambda host: host | COPIED),
    clusters.map(lambda host: host | COPIED | 1),
    clusters.map(lambda host: host | 1),
    st.integers(0, (1 << 62) - 1).map(lambda x: x | COMPRESSED),
)


@given(st.lists(raw_entries, min_size=1, max_size=50), st.booleans())
def test_what_is_unchanged_is_kept_bit_for_bit(raw: list[int], shared: bool) -> None:
    old = words(*raw)
    merged = merge(old, decode(old, 3, CLUSTER, shared=shared), 3, CLUSTER, shared=shared)
    assert not merged.changed.size
    assert np.array_equal(merged.raw, old)
    assert not any(part.size for part in (merged.came, merged.dropped, merged.zeroed, merged.compressed))


new_entries = st.one_of(
    st.just(ZERO_PLAIN),
    clusters.map(lambda host: entry(host, DATA_OWN)),
    clusters.map(lambda host: entry(host, ZERO_OWN)),
)


@given(st.lists(st.tuples(raw_entries, new_entries), min_size=1, max_size=50))
def test_changes_are_accounted_for(pairs: list[tuple[int, int]]) -> None:
    old, new = words(*(raw for raw, _ in pairs)), words(*(value for _, value in pairs))
    merged = merge(old, new, 3, CLUSTER, shared=False)
    # A zero cluster whose host belongs to somebody else too stays as it was.
    kept = decode(old, 3, CLUSTER, shared=False) == new
    assert np.array_equal(decode(merged.raw, 3, CLUSTER, shared=False), new)
    assert np.array_equal(merged.raw[kept], old[kept])

    def hosts(raw: Entries) -> set[int]:
        return {int(value) & spec.OFFSET_MASK for value in raw if not int(value) & COMPRESSED} - {0}

    moved = [(int(a), int(b)) for a, b in zip(old[~kept], merged.raw[~kept], strict=True)]
    gone = [a & spec.OFFSET_MASK for a, b in moved if not a & COMPRESSED and (a ^ b) & spec.OFFSET_MASK]
    assert sorted(int(host) for host in merged.dropped) == sorted(host for host in gone if host)
    assert sorted(merged.compressed.tolist()) == sorted(a for a, _ in moved if a & COMPRESSED)
    assert {int(host) for host in merged.came} <= hosts(merged.raw)
    assert set(merged.zeroed.tolist()) <= set(merged.dropped.tolist())


def test_a_fault_entry_never_changes_the_disk() -> None:
    """A pointer that was not followed when the slice was loaded keeps what it points to."""
    old = words(0x50000 | COPIED, COMPRESSED | 99)
    merged = merge(old, words(ENTRY_FAULT, ENTRY_FAULT), 3, CLUSTER, shared=False)
    assert np.array_equal(merged.raw, old) and not merged.dropped.size and not merged.compressed.size


def test_encode() -> None:
    generic = words(
        UNALLOCATED,
        ZERO_PLAIN,
        entry(0x70000, ZERO_OWN),
        entry(0x80000, DATA_OWN),
        entry(0x90000, DATA_SHARED),
    )
    assert encode(generic).tolist() == [0, 1, 0x70001 | COPIED, 0x80000 | COPIED, 0x90000]


def test_byte_order() -> None:
    assert from_disk(bytes.fromhex("8000000000050000")).tolist() == [0x50000 | COPIED]
    assert to_disk(words(0x50000 | COPIED)) == bytes.fromhex("8000000000050000")


def test_compressed_descriptor() -> None:
    """With 64 KiB clusters x is 54: 8 bits count sectors."""
    raw = COMPRESSED | 2 << 54 | 0x12345
    assert compressed_extent(raw, 16) == (0x12345, 3 * 512 - 0x145)
    # 512-byte clusters: x is 61.
    assert compressed_extent(COMPRESSED | 1 << 61 | 0x3FF, 9) == (0x3FF, 2 * 512 - 0x1FF)


def test_compressed_clusters_refer_to_every_cluster_they_touch() -> None:
    inside = COMPRESSED | 0 << 54 | 0x10000
    across = COMPRESSED | 1 << 54 | 0x1FE00 + 5
    assert spans(words(inside, across), 16).tolist() == [1, 1, 2]
