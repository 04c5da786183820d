# SPDX-License-Identifier: Apache-2.0
"""The machine that measures: what it is, how busy it was before, and who else used its CPUs meanwhile."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")


def process_cpu(pid: int) -> float:
    """CPU seconds of all threads that a process has or had. OSError when there is no such process."""
    # Python has clock_getcpuclockid(3) for threads only: the process, CPUCLOCK_SCHED.
    return time.clock_gettime((~pid << 3) | 2)


def _cpu_ticks() -> tuple[float, float]:
    """Seconds that all CPUs were busy, and stolen by the host, since boot."""
    fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq) / _TICK, steal / _TICK


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@dataclass
class Usage:
    """What was used between start() and stop(); the client must be reaped in between.

    others, stolen: CPUs on average, by neither client nor server, and by the host; the kernel's own threads
    (write-back) count as others. client: seconds of CPU time, with its start.
    """

    server: int | None
    others: float = 0.0
    stolen: float = 0.0
    client: float = 0.0
    _start: tuple[float, ...] = field(default=(), repr=False)

    def _now(self) -> tuple[float, ...]:
        server = time.process_time() + (process_cpu(self.server) if self.server else 0.0)
        return (time.monotonic(), *_cpu_ticks(), server, _children_cpu())

    def start(self) -> Usage:
        self._start = self._now()
        return self

    def stop(self) -> None:
        now = zip(self._start, self._now(), strict=True)
        seconds, busy, stolen, server, self.client = (b - a for a, b in now)
        self.others = max(0.0, (busy - server - self.client) / seconds)
        self.stolen = stolen / seconds


def _first_line(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True)
    return (done.stdout.splitlines() or ["?"])[0]


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "?")


def filesystem(path: Path) -> str:
    return _first_line("findmnt", "-no", "FSTYPE", "-T", str(path))


def describe() -> dict[str, object]:
    """To be taken before the run: the load average is its state at the start."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "memory_gib": round(memory / (1 << 30), 1),
        "kernel": platform.release(),
        "load_average_at_start": list(os.getloadavg()),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "versions": {
            "qemu": _first_line("qemu-storage-daemon", "--version"),
            "nbdkit": _first_line("nbdkit", "--version"),
            "fio": _first_line("fio", "--version"),
        },
    }
