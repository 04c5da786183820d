# SPDX-License-Identifier: Apache-2.0
"""Fuzz target: the header cluster of a qcow2 image. Only ImageError may come out, and what is accepted
is in bounds.

Input: the length of the file in units of 512 bytes (2 bytes), then the file's beginning.
"""

from __future__ import annotations

import atheris

from tests.fuzz.python.common import Input, main

with atheris.instrument_imports(include=["target.drivers.format.qcow2"]):
    from target.drivers.format.qcow2 import spec
    from target.drivers.format.qcow2.errors import ImageError
    from target.drivers.format.qcow2.header import Header, cluster_size, parse


def check(header: Header, file_size: int) -> None:
    size = header.cluster_size
    end = (file_size + size - 1) // size * size
    tables = [
        (0, size),
        (header.refcount_table_offset, header.refcount_table_clusters * size),
        (header.l1_table_offset, header.l1_size * 8),
    ]
    for offset, length in tables:
        assert offset % size == 0 or not length
        assert offset + length <= end or not length
    tables = sorted(table for table in tables if table[1])
    for i in range(len(tables) - 1):
        assert sum(tables[i]) <= tables[i + 1][0]
    assert header.l1_size << header.cluster_bits + header.l2_bits >= header.size
    assert header.l1_size * 8 <= spec.MAX_L1_BYTES
    assert "\0" not in (header.backing_file or "") + (header.backing_format or "")
    assert header.size % 512 == 0 and header.size < 1 << 63
    for name in header.feature_names.values():
        assert "\n" not in name


def test_one_input(data: bytes) -> None:
    input = Input(data)
    sectors = input.number(2)
    start = input.rest()
    file_size = len(start) + 512 * sectors
    try:
        size = cluster_size(start)
        assert 512 <= size <= 2 << 20
        header = parse(start[:size].ljust(min(size, file_size), b"\0"), file_size)
    except ImageError as error:
        assert "\n" not in str(error)
        return
    check(header, file_size)


if __name__ == "__main__":
    main(test_one_input)
