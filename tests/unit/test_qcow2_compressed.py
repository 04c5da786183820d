# SPDX-License-Identifier: Apache-2.0
"""Compressed clusters: what is damaged gives EIO, and nothing grows without bound."""

from __future__ import annotations

import importlib
import os
import zlib
from dataclasses import replace

import pytest

from target.drivers.format.qcow2 import spec
from target.drivers.format.qcow2.compressed import CompressedClusters, decompressor, inflate
from target.drivers.format.qcow2.create import Plan, pieces
from target.drivers.format.qcow2.errors import CorruptError, ImageError
from target.drivers.format.qcow2.header import Header, parse
from target.drivers.format.qcow2.store import Store
from tests.support.fakes import FakeFile


def header(cluster_size: int) -> Header:
    data = pieces(Plan(size=1 << 20, cluster_size=cluster_size))[0][1]
    return parse(data.ljust(cluster_size, b"\0"), 10 * cluster_size)


def deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -12)
    return packer.compress(data) + packer.flush()


def entry(offset: int, length: int, cluster_bits: int) -> int:
    sectors = (offset % 512 + length - 1) // 512
    return spec.OFLAG_COMPRESSED | sectors << 62 - (cluster_bits - 8) | offset


@pytest.mark.parametrize("cluster_bits", [9, 12, 16, 21])
async def test_read(cluster_bits: int) -> None:
    content = (os.urandom(100) + bytes(412)) * (1 << cluster_bits - 9)
    packed = deflate(content)
    file = FakeFile(bytes(777) + packed)
    clusters = CompressedClusters(Store(file, True), header(1 << cluster_bits))
    raw = entry(777, len(packed), cluster_bits)
    assert await clusters.read(raw) == content
    reads = file.reads
    assert await clusters.read(raw) == content and file.reads == reads  # the cache of one


@pytest.mark.parametrize(
    "packed",
    [b"", b"\xff" * 600, deflate(bytes(100)), deflate(bytes(4096))[:3]],
    ids=["empty", "junk", "short", "cut"],
)
async def test_damaged(packed: bytes) -> None:
    clusters = CompressedClusters(
        Store(FakeFile(bytes(512) + packed.ljust(600, b"\xff")), True), header(4096)
    )
    with pytest.raises(CorruptError):
        await clusters.read(entry(512, max(1, len(packed)), 12))


async def test_past_the_end() -> None:
    clusters = CompressedClusters(Store(FakeFile(bytes(512)), True), header(4096))
    with pytest.raises(CorruptError, match="past the end"):
        await clusters.read(entry(4096, 100, 12))


def test_a_bomb_gives_one_cluster() -> None:
    assert len(inflate(deflate(bytes(64 << 20)), 65536)) == 65536


def test_zstd() -> None:
    module = importlib.import_module("backports.zstd")
    decompress = decompressor(spec.COMPRESSION_ZSTD)
    assert decompress(module.compress(b"abc" * 1000) + b"\xee" * 99, 3000) == b"abc" * 1000
    assert len(decompress(module.compress(bytes(64 << 20)), 65536)) == 65536
    with pytest.raises(CorruptError):
        decompress(b"\x28\xb5\x2f\xfd" + b"\xff" * 200, 4096)
    with pytest.raises(CorruptError):
        decompress(b"junk" * 50, 4096)


def test_zstd_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(ImageError, match=r"zstd.*backports\.zstd"):
        CompressedClusters(Store(FakeFile(), True), replace(header(4096), compression_type=1))
