# SPDX-License-Identifier: Apache-2.0
"""From samples to figures: medians, ratios and verdicts, and their JSON. Runs nothing and prints nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from tests.bench.clients import Sample
from tests.bench.memory import Memory
from tests.bench.rows import LIMITS, TARGET, Bar, MemoryRow, Row

BUSY = 0.25  # CPUs used by others from which a cell is counted as disturbed


@dataclass
class Cell:
    """The samples of one backend on one row, one for each repetition that succeeded."""

    samples: list[Sample] = field(default_factory=list)

    def of(self, name: str) -> list[float]:
        values = [getattr(sample, name) for sample in self.samples]
        return [float(value) for value in values if value is not None]

    def median(self, name: str) -> float | None:
        values = self.of(name)
        return median(values) if values else None


@dataclass(frozen=True)
class Verdict:
    """``measured`` is None when one of the two was not measured."""

    bar: Bar
    measured: float | None

    @property
    def passed(self) -> bool | None:
        if self.measured is None:
            return None
        # As precise as the table shows it, so that no row is 'short' with the figure that it was to reach.
        shown = round(self.measured, 2)
        return shown >= self.bar.times if self.bar.measure == "iops" else shown <= self.bar.times

    @property
    def word(self) -> str:
        return {True: "PASS", False: "short", None: "not measured"}[self.passed]


@dataclass
class Results:
    """Everything that a run found. ``cells``: by the row's name, then by the backend's."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    cells: dict[str, dict[str, Cell]] = field(default_factory=dict)
    memory: dict[str, dict[str, Memory]] = field(default_factory=dict)
    images: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def add(self, row: str, backend: str, sample: Sample) -> None:
        self.cells.setdefault(row, {}).setdefault(backend, Cell()).samples.append(sample)

    def value(self, row: str, backend: str, name: str) -> float | None:
        cell = self.cells.get(row, {}).get(backend)
        return cell.median(name) if cell else None

    def ratio(self, row: str, backend: str) -> float | None:
        """How many times the IOPS of ``backend`` ours are."""
        return _divide(self.value(row, TARGET, "iops"), self.value(row, backend, "iops"))

    def limit(self, row: str) -> float | None:
        """The best that fio reached."""
        values = [self.value(row, backend, "iops") for backend in LIMITS]
        return max((value for value in values if value is not None), default=None)

    def of_limit(self, row: str, backend: str) -> float | None:
        return _divide(self.value(row, backend, "iops"), self.limit(row))

    def verdict(self, row: Row, bar: Bar) -> Verdict:
        other_row = bar.against not in row.backends()
        name, backend = (bar.against, TARGET) if other_row else (row.name, bar.against)
        ours, theirs = self.value(row.name, TARGET, bar.measure), self.value(name, backend, bar.measure)
        return Verdict(bar, _divide(ours, theirs))

    def disturbed(self) -> tuple[int, int]:
        """How many samples were taken while others used more than BUSY CPUs, and how many there are."""
        cells = [cell for row in self.cells.values() for cell in row.values()]
        others = [value for cell in cells for value in cell.of("others")]
        return sum(value > BUSY for value in others), len(others)


def _divide(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def memory_passed(row: MemoryRow, memory: Memory) -> bool:
    return memory.peak <= row.bar


def to_json(results: Results, rows: Iterable[Row], memory_rows: Iterable[MemoryRow]) -> dict[str, Any]:
    """For other programs: medians, verdicts, and every sample."""
    return {
        "format": 1,
        "machine": results.machine,
        "settings": results.settings,
        "images": results.images,
        "failures": results.failures,
        "rows": [_row_json(results, row) for row in rows if row.name in results.cells],
        "memory": [_memory_json(results, row) for row in memory_rows if row.name in results.memory],
    }


def _row_json(results: Results, row: Row) -> dict[str, Any]:
    cells = {}
    shown: dict[str, float | None]
    for backend, cell in results.cells[row.name].items():
        shown = {name: cell.median(name) for name in ("iops", "mibps", "mean", "p50", "p99", "cpu", "others")}
        shown |= {"of_limit": results.of_limit(row.name, backend), "ours": results.ratio(row.name, backend)}
        cells[backend] = {"median": shown, "samples": [asdict(sample) for sample in cell.samples]}
    verdicts = [results.verdict(row, bar) for bar in row.bars]
    bars = [{**asdict(v.bar), "measured": v.measured, "verdict": v.word} for v in verdicts]
    return {"name": row.name, "backends": cells, "bars": bars}


def _memory_json(results: Results, row: MemoryRow) -> dict[str, Any]:
    found = results.memory[row.name]
    passed = {name: memory_passed(row, memory) for name, memory in found.items() if name == TARGET}
    return {
        "name": row.name,
        "bar_mib": row.bar,
        "rss_anon_mib": {name: asdict(memory) for name, memory in found.items()},
        "verdict": {True: "PASS", False: "short", None: "not measured"}[passed.get(TARGET)],
    }


def from_json(document: dict[str, Any]) -> Results:
    """The results of an earlier run. ValueError for another format."""
    if document.get("format") != 1:
        raise ValueError(f"results of format {document.get('format')!r}, not 1")
    results = Results(document["machine"], document["settings"], images=document["images"])
    results.failures = list(document["failures"])
    for row in document["rows"]:
        for backend, cell in row["backends"].items():
            for sample in cell["samples"]:
                results.add(row["name"], backend, Sample(**sample))
    for row in document["memory"]:
        found = row["rss_anon_mib"].items()
        results.memory[row["name"]] = {name: Memory(**memory) for name, memory in found}
    return results
