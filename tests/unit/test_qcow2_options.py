# SPDX-License-Identifier: Apache-2.0
"""Cache sizes by QEMU's rules, and the set of clusters."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from target.drivers.format.qcow2.clusterset import ClusterSet, Metadata
from target.drivers.format.qcow2.create import Plan, pieces
from target.drivers.format.qcow2.errors import ImageError
from target.drivers.format.qcow2.header import Header, parse
from target.drivers.format.qcow2.options import Qcow2Options, caches
from target.graph.options import BlockdevRef

MIB = 1 << 20


def header(size: int, cluster_size: int = 65536) -> Header:
    data = pieces(Plan(size=MIB, cluster_size=cluster_size))[0][1]
    return replace(parse(data.ljust(cluster_size, b"\0"), 100 * cluster_size), size=size)


def options(**values: Any) -> Qcow2Options:
    return Qcow2Options(file=BlockdevRef("file"), **values)


def test_defaults() -> None:
    found = caches(options(), header(1 << 40))
    assert (found.l2, found.refcount, found.slice_bits) == (32 * MIB, MIB, 12)


def test_never_more_than_the_image_needs() -> None:
    assert caches(options(), header(1 << 30)).l2 < 200_000
    assert caches(options(l2_cache_size=0), header(1 << 30)).l2 >= 8 << 12


def test_small_clusters_have_small_slices() -> None:
    assert caches(options(), header(64 * MIB, 512)).slice_bits == 6
    assert caches(options(l2_cache_entry_size=4096), header(1 << 40)).slice_bits == 9


def test_directory_is_bounded() -> None:
    """16 PiB of 2 MiB clusters have 8 Gi entries."""
    assert 1 << 54 - 21 - caches(options(), header(1 << 54, 2 * MIB)).slice_bits <= 4 << 20


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"cache_size": 8 * MIB}, (7 * MIB, MIB)),
        ({"cache_size": 2 * MIB}, (MIB * 3 // 2, MIB // 2)),
        ({"cache_size": 8 * MIB, "l2_cache_size": 3 * MIB}, (3 * MIB, 5 * MIB)),
        ({"cache_size": 8 * MIB, "refcount_cache_size": 3 * MIB}, (5 * MIB, 3 * MIB)),
        ({"l2_cache_size": 3 * MIB, "refcount_cache_size": 5}, (3 * MIB, 5)),
    ],
)
def test_split(values: dict[str, int], expected: tuple[int, int]) -> None:
    found = caches(options(**values), header(1 << 40))
    assert (found.l2, found.refcount) == expected


@pytest.mark.parametrize(
    "values",
    [
        {"cache_size": 1, "l2_cache_size": 1, "refcount_cache_size": 1},
        {"cache_size": 1, "l2_cache_size": 2},
        {"cache_size": 1, "refcount_cache_size": 2},
        {"l2_cache_entry_size": 256},
        {"l2_cache_entry_size": 768},
        {"l2_cache_entry_size": 131072},
    ],
)
def test_refused(values: dict[str, int]) -> None:
    with pytest.raises(ImageError):
        caches(options(**values), header(1 << 40))


def test_cluster_set_against_a_set() -> None:
    source = random.Random(5)
    found, model = ClusterSet(), set[int]()
    for _ in range(200):
        first, count = source.choice([0, 32760, 1 << 40]) + source.randrange(100), source.randrange(1, 50)
        if source.random() < 0.7:
            found.add(first, count)
            model |= set(range(first, first + count))
        else:
            found.discard(np.arange(first, first + count, dtype=np.uint64))
            model -= set(range(first, first + count))
        assert found.overlaps(first, 200) == bool(model & set(range(first, first + 200)))
    numbers = [*range(200), *range(32700, 32900), *range((1 << 40) - 5, (1 << 40) + 200)]
    source.shuffle(numbers)
    asked = np.array(numbers, dtype=np.uint64)
    assert found.contains(asked).tolist() == [number in model for number in numbers]


def test_metadata_forgets_what_was_freed() -> None:
    metadata = Metadata()
    metadata.fixed.add(7)
    metadata.l2_tables.update(np.array([9, 1 << 30], dtype=np.uint64))
    metadata.forget(np.array([7, 9], dtype=np.uint64))
    assert not metadata.overlaps(0, 100) and metadata.overlaps(1 << 30, 1)
