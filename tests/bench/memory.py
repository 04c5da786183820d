# SPDX-License-Identifier: Apache-2.0
"""The memory rows: anonymous memory of a server while a client touches every table of a large image.

Neither image takes space: one is empty, the other has all its clusters allocated and none of them written.
"""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from tests.bench import clients
from tests.bench.backends import Backends, BenchError, Server
from tests.bench.images import create_qcow2
from tests.bench.rows import GIB, KIB, MIB, MemoryRow, Work

_LOOK_SECONDS, _PATIENCE = 0.02, 300.0
_STRIDE = 2 * MIB  # 32 clusters: less than what the smallest possible piece of a table maps


@dataclass(frozen=True)
class Memory:
    """RssAnon in MiB: when the server is ready, at most while tables are touched, and after."""

    idle: float
    peak: float
    after: float


def rss_anon(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    kib = next((int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), None)
    if kib is None:
        raise BenchError(f"process {pid} has no memory: it ended")
    return kib / KIB


def measure(directory: Path, backends: Backends, programs: Path, row: MemoryRow, backend: str) -> Memory:
    size, options = {
        "empty-1TiB": (1024 * GIB, ()),
        "full-20GiB": (20 * GIB, ("preallocation=metadata",)),
    }[row.image]
    path = directory / "memory.qcow2"
    create_qcow2(path, size, *options)
    try:
        with backends.running(backend, row.transport, "qcow2", path) as server:
            return _touch(programs, row, server, size // _STRIDE)
    finally:
        path.unlink()


def _touch(programs: Path, row: MemoryRow, server: Server, touches: int) -> Memory:
    idle = peak = rss_anon(server.pid)
    work = Work("seqread", 4 * KIB, 32, _STRIDE, touches)
    argv = clients.command(programs, row.transport, server, work, 0)
    end = time.monotonic() + _PATIENCE
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as client:
        while client.poll() is None:
            peak = max(peak, rss_anon(server.pid))
            if time.monotonic() > end:
                client.kill()
            time.sleep(_LOOK_SECONDS)
        assert client.stderr is not None
        if client.returncode:
            raise BenchError(f"{Path(argv[0]).name}: {client.stderr.read().strip() or client.returncode}")
    after = rss_anon(server.pid)
    return Memory(idle, max(peak, after), after)
