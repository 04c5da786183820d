# SPDX-License-Identifier: Apache-2.0
"""Runs the fuzz target vhost_ring.c for a bounded time, from seeds that reach every request type.

For a long run, with the program and the seeds kept:
    python -m tests.fuzz.test_vhost_ring DIRECTORY [RUNS]
"""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from target.peers.vhost_user_front_end import (
    BLK_HEADER,
    DESC,
    DISCARD,
    FLUSH,
    GET_ID,
    IN,
    INDIRECT,
    NEXT,
    OUT,
    SEGMENT,
    UNMAP,
    WRITE,
    WRITE_ZEROES,
)

ROOT = Path(__file__).resolve().parents[2]
RUNS = 20_000
RING, TABLE, AREA = 16, 0x40, 0x200
HEADER, SEGMENTS, STATUS, INNER = 0x200, 0x240, 0x300, 0x400
WRITABLE, LARGE_BLOCKS, INDIRECT_FEATURE, EVENT_IDX, RANGES = 1, 2, 4, 8, 16


def memory(heads: list[int], descriptors: list[bytes], parts: dict[int, bytes]) -> bytes:
    """Guest memory from address 0 on."""
    content = bytearray(0x600)
    content[: 4 + 2 * len(heads)] = struct.pack(f"<HH{len(heads)}H", 0, len(heads), *heads)
    table = b"".join(descriptors)
    content[TABLE : TABLE + len(table)] = table
    for address, data in parts.items():
        content[address : address + len(data)] = data
    return bytes(content)


def set_up(flags: int) -> bytes:
    return bytes([4, flags, 3, 1, 0, 1, 0, 0])


def plain(kind: int, out: bytes = b"", into: int = 0, sector: int = 0) -> bytes:
    """One request in direct descriptors."""
    descriptors = [DESC.pack(HEADER, 16, NEXT, 1)]
    if out:
        descriptors.append(DESC.pack(SEGMENTS, len(out), NEXT, len(descriptors) + 1))
    if into:
        descriptors.append(DESC.pack(0x100000000, into, NEXT | WRITE, len(descriptors) + 1))
    descriptors.append(DESC.pack(STATUS, 1, WRITE, 0))
    parts = {HEADER: BLK_HEADER.pack(kind, 0, sector), SEGMENTS: out}
    return memory([0], descriptors, parts)


def seeds() -> list[bytes]:
    every = WRITABLE | INDIRECT_FEATURE | EVENT_IDX | RANGES
    ranges = SEGMENT.pack(0, 8, 0) + SEGMENT.pack(16, 1, UNMAP)
    table = (
        DESC.pack(HEADER, 16, NEXT, 1)
        + DESC.pack(0x7F00, 512, NEXT | WRITE, 2)
        + DESC.pack(STATUS, 1, WRITE, 0)
    )
    inner = memory(
        [0], [DESC.pack(INNER, len(table), INDIRECT, 0)], {HEADER: BLK_HEADER.pack(IN, 0, 1), INNER: table}
    )
    loop = memory([0], [DESC.pack(HEADER, 16, NEXT, 1), DESC.pack(HEADER, 16, NEXT, 0)], {})
    pieces = [DESC.pack(HEADER + i, 1, NEXT, i + 1) for i in range(15)] + [DESC.pack(STATUS, 1, WRITE, 0)]
    many = memory([0] * RING, [DESC.pack(HEADER, 16, NEXT, 1), DESC.pack(STATUS, 1, WRITE, 0)], {})
    cases = [plain(IN, into=4096), plain(IN, into=512, sector=2047), plain(OUT, b"x" * 128), plain(FLUSH),
             plain(GET_ID, into=20), plain(DISCARD, ranges[:16]), plain(WRITE_ZEROES, ranges), inner, loop,
             memory([0], pieces, {}), many]  # fmt: skip
    return [
        set_up(flags) + case for case in cases for flags in (every, every ^ EVENT_IDX, every | LARGE_BLOCKS)
    ]


def compiler() -> str:
    """clang, which Debian also installs under its version alone."""
    names = ["clang", *(f"clang-{version}" for version in range(25, 12, -1))]
    return next((name for name in names if shutil.which(name)), "clang")


def build(directory: Path) -> tuple[Path, Path]:
    """The program, and the directory of its corpus, filled with the seeds."""
    program, corpus = directory / "vhost_ring", directory / "corpus"
    datapath = ROOT / "target" / "datapath"
    sources = [ROOT / "tests/fuzz/vhost_ring.c", *sorted(datapath.glob("vhost_*.c")), datapath / "iov.c"]
    flags = ["-std=gnu11", "-g", "-O1", "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all"]
    subprocess.run([compiler(), *flags, f"-I{datapath}", *map(str, sources), "-o", str(program)], check=True)
    corpus.mkdir(exist_ok=True)
    for number, seed in enumerate(seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)
    return program, corpus


def fuzz(directory: Path, runs: int) -> subprocess.CompletedProcess[str]:
    program, corpus = build(directory)
    options = [
        f"-runs={runs}",
        "-max_len=4096",
        "-len_control=0",
        "-timeout=10",
        f"-artifact_prefix={directory}/",
    ]
    return subprocess.run([str(program), *options, str(corpus)], capture_output=True, text=True)


@pytest.mark.timeout(240)
def test_rings(tmp_path: Path) -> None:
    done = fuzz(tmp_path, RUNS)
    assert done.returncode == 0, done.stderr[-4000:]


if __name__ == "__main__":
    result = fuzz(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1_000_000)
    print(result.stderr[-4000:])
    sys.exit(result.returncode)
