# SPDX-License-Identifier: Apache-2.0
"""Random requests with many in flight on qcow2 images of every kind, against a model in memory.

At the end the content must be the model's, in our eyes and in qemu-img's, and the image must be without an
error or a leaked cluster; images below it, and internal snapshots in it, must be as they were.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from target.drivers.format.qcow2 import Qcow2
from tests.support.qcow2 import Workload, content, qcow2_options, running_graph
from tests.support.tools import check_image, create_image, fill, qemu_img, qemu_io, sha256

MIB = 1 << 20
SIZE = 12 * MIB


@dataclass
class Case:
    """How an image is made, and the options it is opened with."""

    make: Callable[[Path], Path]
    options: dict[str, Any] = field(default_factory=dict)
    grants: int | None = None
    largest: int = 200_000


def plain(options: str) -> Callable[[Path], Path]:
    return lambda scratch: create_image(scratch / "disk.qcow2", str(SIZE), options=options)


def converted(*words: str) -> Callable[[Path], Path]:
    def make(scratch: Path) -> Path:
        source = fill(scratch / "source.raw", SIZE, seed=3, pieces=20)
        path = scratch / "disk.qcow2"
        qemu_img("convert", "-f", "raw", "-O", "qcow2", *words, source, path)
        source.unlink()
        return path

    return make


def chain(cluster_size: str, compat: str = "1.1") -> Callable[[Path], Path]:
    """Raw below qcow2 below qcow2, each of another size and cluster size."""

    def make(scratch: Path) -> Path:
        base = fill(scratch / "base.raw", 9 * MIB, seed=4, pieces=30)
        middle = scratch / "middle.qcow2"
        words = ("-o", "cluster_size=4k", "-b", base, "-F", "raw")
        qemu_img("create", "-q", "-f", "qcow2", *words, middle, str(7 * MIB + 512))
        qemu_io(middle, "write -P 5 1M 300k", "write -z 2M 1M", format="qcow2")
        options = f"cluster_size={cluster_size},compat={compat}"
        return create_image(scratch / "disk.qcow2", str(SIZE), options=options, backing=middle)

    return make


def snapshots(cluster_size: str, *words: str) -> Callable[[Path], Path]:
    """Two snapshots that share tables and clusters with the active state and one another."""

    def make(scratch: Path) -> Path:
        return with_snapshots(converted("-o", f"cluster_size={cluster_size}", *words)(scratch))

    return make


def chain_snapshots(cluster_size: str) -> Callable[[Path], Path]:
    """Two snapshots in an image over a chain: clusters are its own, shared, or below."""

    def make(scratch: Path) -> Path:
        path = chain(cluster_size)(scratch)
        qemu_io(path, "write -P 7 1536k 1M", "write -P 8 8M 700k", format="qcow2")
        return with_snapshots(path)

    return make


def with_snapshots(path: Path) -> Path:
    qemu_img("snapshot", "-c", "one", path)
    qemu_io(path, "write -P 6 2M 1M", "write -z 5M 333k", "discard 6M 1M", format="qcow2")
    qemu_img("snapshot", "-c", "two", path)
    return path


ONE_SLICE: dict[str, Any] = {"l2_cache_size": 512, "l2_cache_entry_size": 512}
CASES: dict[str, Case] = {
    "64k": Case(plain("cluster_size=64k")),
    "4k": Case(plain("cluster_size=4k")),
    "4k-one-slice": Case(plain("cluster_size=4k"), ONE_SLICE, grants=1),
    "512-refcount-1": Case(plain("cluster_size=512,refcount_bits=1"), largest=30_000),
    "512-refcount-64-one-slice": Case(
        plain("cluster_size=512,refcount_bits=64"), ONE_SLICE, grants=1, largest=9_000
    ),
    "2m": Case(plain("cluster_size=2M,refcount_bits=2")),
    "lazy": Case(plain("cluster_size=16k,lazy_refcounts=on"), {"lazy_refcounts": True}),
    "preallocated": Case(plain("cluster_size=16k,preallocation=metadata"), grants=1),
    "v2": Case(plain("cluster_size=4k,compat=0.10")),
    "full": Case(converted("-o", "cluster_size=4k")),
    "compressed": Case(converted("-c", "-o", "cluster_size=16k")),
    "compressed-one-slice": Case(converted("-c", "-o", "cluster_size=4k"), ONE_SLICE, grants=1),
    "compressed-v2": Case(converted("-c", "-o", "cluster_size=8k,compat=0.10")),
    "compressed-zstd": Case(converted("-c", "-o", "cluster_size=64k,compression_type=zstd")),
    "chain-64k": Case(chain("64k")),
    "chain-512": Case(chain("512"), largest=30_000),
    "chain-v2": Case(chain("8k", "0.10")),
    "chain-one-slice": Case(chain("4k"), ONE_SLICE, grants=1),
    "snapshots-64k": Case(snapshots("64k")),
    "snapshots-4k-one-slice": Case(snapshots("4k"), ONE_SLICE, grants=1),
    "snapshots-512": Case(snapshots("512"), largest=30_000),
    "snapshots-compressed": Case(snapshots("4k", "-c")),
    "chain-snapshots-512-one-slice": Case(chain_snapshots("512"), ONE_SLICE, grants=1, largest=9_000),
    "chain-snapshots-64k-one-slice": Case(chain_snapshots("64k"), ONE_SLICE, grants=1),
}


def below_digests(scratch: Path) -> dict[str, str]:
    """Of the images below."""
    found = (scratch / "base.raw", scratch / "middle.qcow2")
    return {path.name: sha256(path) for path in found if path.exists()}


def snapshot_digests(path: Path, scratch: Path) -> dict[str, str]:
    digests = {}
    for name in ("one", "two"):
        out = scratch / "snapshot.raw"
        done = qemu_img("convert", "-l", f"snapshot.name={name}", "-O", "raw", path, out, check=False)
        if done.returncode == 0:
            digests[name] = sha256(out)
    return digests


def flat(path: Path, scratch: Path) -> bytes:
    out = scratch / "flat.raw"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", path, out)
    return out.read_bytes()


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", CASES)
async def test_random_requests(scratch: Path, name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    monkeypatch.setattr(Qcow2, "grant_limit", case.grants)
    path = case.make(scratch)
    below = below_digests(scratch)
    before = snapshot_digests(path, scratch)
    model = bytearray(flat(path, scratch))
    for part in range(2):  # a second time on what the first one left
        async with running_graph(threads=2) as graph:
            node = await graph.add(qcow2_options(path, **case.options))
            work = Workload(node, model, seed * 100 + part, case.largest)
            await work.run(500, in_flight=16)
            assert await content(node) == model
        check_image(path)
        assert flat(path, scratch) == model
    assert snapshot_digests(path, scratch) == before
    assert ("snapshots" in name) == bool(before)
    assert ("chain" in name) == bool(below)
    assert below_digests(scratch) == below
