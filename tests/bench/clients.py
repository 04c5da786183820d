# SPDX-License-Identifier: Apache-2.0
"""Who sends the requests: the two clients in C beside this file, and fio, which does without a server."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.backends import BenchError, Server
from tests.bench.machine import Usage
from tests.bench.rows import LIMIT_RING, MIB, Transport, Work

_SOURCES = Path(__file__).resolve().parent
_PROGRAMS: dict[Transport, str] = {"vhost": "vhost_bench", "nbd": "nbd_bench"}
_PATIENCE = 120.0


@dataclass(frozen=True)
class Sample:
    """One cell of one repetition. Latencies and CPU times in microseconds; the latter for each request.

    cpu: the server's; of fio its own, with its start. others, stolen: CPUs used by anything else, and by the
    machine's host.
    """

    iops: float
    mibps: float
    mean: float
    p50: float
    p99: float
    cpu: float | None
    client_cpu: float | None
    ios: int
    seconds: float
    others: float
    stolen: float


def build(directory: Path) -> None:
    """Compiles the clients into ``directory``."""
    for program in _PROGRAMS.values():
        source = _SOURCES / f"{program}.c"
        flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra"]
        subprocess.run(["gcc", *flags, "-o", str(directory / program), str(source)], check=True)


def command(directory: Path, transport: Transport, server: Server, work: Work, seconds: float) -> list[str]:
    """The command line of a client that was built in ``directory``."""
    argv = [str(directory / _PROGRAMS[transport]), "--socket", str(server.socket), "--pid", str(server.pid)]
    argv += ["--op", work.op, "--bs", str(work.block), "--qd", str(work.depth), "--secs", str(seconds)]
    argv += ["--stride", str(work.stride)] if work.stride else []
    return argv + (["--ios", str(work.ios)] if work.ios else [])


def measure(directory: Path, transport: Transport, server: Server, work: Work, seconds: float) -> Sample:
    """One cell on a running server."""
    usage = Usage(server.pid).start()
    figures = _run(command(directory, transport, server, work, seconds))
    usage.stop()
    latency = figures["lat_us"]
    return Sample(
        iops=figures["iops"],
        mibps=figures["mibps"],
        mean=latency["mean"],
        p50=latency["p50"],
        p99=latency["p99"],
        cpu=figures["backend_cpu_us_per_io"],
        client_cpu=figures["client_cpu_us_per_io"],
        ios=figures["ios"],
        seconds=figures["seconds"],
        others=usage.others,
        stolen=usage.stolen,
    )


def measure_limit(engine: str, file: Path, size: int, work: Work, seconds: float, direct: bool) -> Sample:
    """The same work by fio straight on a file of ``size`` bytes."""
    usage = Usage(None).start()
    job = _run(fio_command(engine, file, size, work, seconds, direct))["jobs"][0]
    usage.stop()
    return fio_sample(job, work, usage)


def fio_command(engine: str, file: Path, size: int, work: Work, seconds: float, direct: bool) -> list[str]:
    """Without cache invalidation, which would start write-back at each wrap."""
    operation = {"randread": "randread", "randwrite": "randwrite", "seqread": "read", "seqwrite": "write"}
    ring = engine == LIMIT_RING
    argv = ["fio", "--name=limit", f"--filename={file}", f"--ioengine={'io_uring' if ring else 'psync'}"]
    argv += [f"--rw={operation[work.op]}", f"--bs={work.block}", f"--size={size}", f"--direct={int(direct)}"]
    argv += [f"--iodepth={work.depth if ring else 1}", "--invalidate=0", "--norandommap", "--fallocate=none"]
    argv += ["--allow_file_create=0", "--lat_percentiles=1", "--clat_percentiles=0", "--output-format=json"]
    if work.ios:
        return [*argv, f"--number_ios={work.ios}", f"--blockalign={work.stride}"]
    return [*argv, "--time_based", f"--runtime={round(seconds * 1000)}ms"]


def fio_sample(job: dict[str, Any], work: Work, usage: Usage) -> Sample:
    """From a job of fio's JSON."""
    side = job["write" if work.writes else "read"]
    latency = side["lat_ns"]
    percentiles = latency["percentile"]
    # fio's own count leaves out io_uring's workers; the whole process has a start, too long for few requests.
    cpu = None if work.ios else usage.client * 1e6 / max(1, side["total_ios"])
    return Sample(
        iops=side["iops"],
        mibps=side["iops"] * work.block / MIB,
        mean=latency["mean"] / 1000,
        p50=percentiles["50.000000"] / 1000,
        p99=percentiles["99.000000"] / 1000,
        cpu=cpu,
        client_cpu=None,
        ios=side["total_ios"],
        seconds=side["runtime"] / 1000,
        others=usage.others,
        stolen=usage.stolen,
    )


def _run(argv: list[str]) -> dict[str, Any]:
    name = Path(argv[0]).name
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        raise BenchError(f"{name} does not end in {_PATIENCE:.0f} s") from None
    if done.returncode:
        raise BenchError(f"{name}: {done.stderr.strip()[-300:]}")
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures
