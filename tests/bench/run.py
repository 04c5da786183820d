# SPDX-License-Identifier: Apache-2.0
"""The run: repetitions outside, rows and backends inside, so that a change of the machine meets all alike."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.bench import clients, memory
from tests.bench.backends import Backends, BenchError
from tests.bench.clients import Sample
from tests.bench.images import Images
from tests.bench.rows import EMPTY_SIZE, LIMITS, OVER, QSD, TARGET, Image, MemoryRow, Row, Work
from tests.bench.summary import Results

Say = Callable[[str], None]


@dataclass
class Bench:
    """``programs``: where the clients are compiled to. All directories are the caller's to delete."""

    programs: Path
    images: Images
    backends: Backends
    results: Results
    seconds: float
    say: Say

    def run(self, rows: Sequence[Row], memory_rows: Sequence[MemoryRow], repetitions: int) -> None:
        clients.build(self.programs)
        for repetition in range(repetitions):
            self.say(f"repetition {repetition + 1} of {repetitions}")
            # Rows with the same work share the limit's samples of a repetition.
            limits: dict[tuple[Work, bool, str], Sample] = {}
            for row in rows:
                for backend in rotated(row.backends(), repetition):
                    self._attempt(f"{row.name}, {backend}", partial(self._cell, row, backend, limits))
        for memory_row in memory_rows:
            for backend in (TARGET, QSD):
                self._attempt(f"{memory_row.name}, {backend}", partial(self._memory, memory_row, backend))
        self.results.images = self.images.state()

    def _attempt(self, what: str, do: Callable[[], None]) -> None:
        """A cell that fails is reported; it does not take the others with it."""
        try:
            do()
        except (BenchError, OSError, subprocess.CalledProcessError) as error:
            self.results.failures.append(f"{what}: {error}")
            self.say(f"{what}: FAILED: {error}")

    def _cell(self, row: Row, backend: str, limits: dict[tuple[Work, bool, str], Sample]) -> None:
        if backend in LIMITS:
            key = (row.work, row.image == "direct", backend)
            if key not in limits:
                limits[key] = self._limit(row, backend)
            sample = limits[key]
        else:
            sample = self._served(row, backend)
        self.results.add(row.name, backend, sample)
        self.say(f"  {row.name:34} {backend:20} {sample.iops:12,.0f} IOPS  others {sample.others:.2f} CPUs")

    def _served(self, row: Row, backend: str) -> Sample:
        image = OVER.get(row.image, row.image)
        with (
            self.images.ready(image, row.work) as path,
            self.backends.running(backend, row.transport, row.image, path) as server,
        ):
            return clients.measure(self.programs, row.transport, server, row.work, self.seconds)

    def _limit(self, row: Row, engine: str) -> Sample:
        """On a raw file for qcow2 too: it is the limit of what any format could reach."""
        replaced: dict[Image, Image] = {"qcow2": "raw", "empty": "sparse"}
        image = replaced.get(row.image, row.image)
        size = EMPTY_SIZE if image == "sparse" else self.images.size
        with self.images.ready(image, row.work) as path:
            assert path is not None  # the null device has no limit
            return clients.measure_limit(engine, path, size, row.work, self.seconds, image == "direct")

    def _memory(self, row: MemoryRow, backend: str) -> None:
        found = memory.measure(self.images.directory, self.backends, self.programs, row, backend)
        self.results.memory.setdefault(row.name, {})[backend] = found
        self.say(f"  {row.name:34} {backend:20} {found.peak:12.1f} MiB at most")


def rotated(backends: Sequence[str], repetition: int) -> list[str]:
    """Each repetition begins with another backend, so that none has always the same one before it."""
    first = repetition % len(backends)
    return [*backends[first:], *backends[:first]]
