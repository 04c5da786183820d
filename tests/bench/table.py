# SPDX-License-Identifier: Apache-2.0
"""The results as Markdown, for a terminal and for docs/performance.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tests.bench.rows import LIMITS, MEMORY_ROWS, ROWS, TARGET, Bar, MemoryRow, Row
from tests.bench.summary import BUSY, Results, memory_passed

_TITLES = {"vhost": "vhost-user-blk", "nbd": "NBD"}
_COLUMNS = (
    "row",
    "server",
    "IOPS (min..max)",
    "MiB/s",
    "p50 us",
    "p99 us",
    "CPU us/request",
    "of the limit",
    "ours is",
    "others' CPUs",
)


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose columns are as wide as their longest cell."""
    rows = [list(head), *(list(line) for line in lines)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    rows.insert(1, ["-" * width for width in widths])
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


def number(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def markdown(results: Results) -> str:
    """The whole report."""
    parts = [_heading(results)]
    for transport, title in _TITLES.items():
        rows = [row for row in ROWS if row.transport == transport and row.name in results.cells]
        if rows:
            parts += [f"### {title}", bars_table(results, rows), figures_table(results, rows)]
    if results.memory:
        parts += ["### Memory", memory_table(results, MEMORY_ROWS)]
    if results.failures:
        parts += ["### Failures", "\n".join(f"- {failure}" for failure in results.failures)]
    return "\n\n".join(parts) + "\n"


def bars_table(results: Results, rows: Iterable[Row]) -> str:
    lines = []
    for row in rows:
        for verdict in (results.verdict(row, bar) for bar in row.bars):
            lines.append((row.name, _bar(verdict.bar), times(verdict.measured), verdict.word))
    return table(("row", "bar", "measured", ""), lines)


def _bar(bar: Bar) -> str:
    against = bar.against if "qd" not in bar.against else f"ours on {bar.against}"
    if bar.measure == "iops":
        return f"at least {bar.times:g}x the IOPS of {against}"
    return f"at most {bar.times:g}x the CPU per request of {against}"


def figures_table(results: Results, rows: Iterable[Row]) -> str:
    return table(_COLUMNS, [line for row in rows for line in _figures(results, row)])


def _figures(results: Results, row: Row) -> Iterable[tuple[str, ...]]:
    cells = results.cells[row.name]
    for backend in (name for name in row.backends() if name in cells):
        cell = cells[backend]
        iops = cell.of("iops")
        ours = "" if backend == TARGET or backend in LIMITS else times(results.ratio(row.name, backend))
        yield (
            row.name,
            f"limit: {backend}" if backend in LIMITS else backend,
            f"{number(cell.median('iops'))} ({number(min(iops))}..{number(max(iops))})",
            number(cell.median("mibps")),
            number(cell.median("p50"), 1),
            number(cell.median("p99"), 1),
            number(cell.median("cpu"), 2),
            percent(results.of_limit(row.name, backend)),
            ours,
            number(cell.median("others"), 2),
        )


def memory_table(results: Results, rows: Iterable[MemoryRow]) -> str:
    lines = []
    for row in rows:
        for backend, memory in results.memory.get(row.name, {}).items():
            own = backend == TARGET
            word = ("PASS" if memory_passed(row, memory) else "short") if own else ""
            bar = f"{row.bar:g}" if own else ""
            figures = (number(memory.idle, 1), number(memory.peak, 1), number(memory.after, 1))
            lines.append((row.name, backend, *figures, bar, word))
    return table(("row", "server", "RssAnon MiB, idle", "at most", "after", "bar", ""), lines)


def _heading(results: Results) -> str:
    machine, settings = results.machine, results.settings
    load = ", ".join(f"{value:.2f}" for value in machine["load_average_at_start"])
    versions = "; ".join(str(version) for version in machine["versions"].values())
    disturbed, samples = results.disturbed()
    lines = [
        f"{machine['date']}, {machine['cpus']} CPUs ({machine['cpu']}), {machine['memory_gib']} GiB, "
        f"Linux {machine['kernel']}, images on {machine['filesystem']}. {versions}.",
        f"Medians of {settings['repetitions']} alternations, {settings['seconds']:g} s for each cell, "
        f"images of {settings['size'] >> 20} MiB.",
        f"Load average at the start {load}. "
        f"In {disturbed} of {samples} cells others used more than {BUSY} CPUs.",
        *(f"{name}: {_state(state)}." for name, state in results.images.items()),
    ]
    return "\n".join(f"- {line}" for line in lines)


def _state(state: dict[str, object]) -> str:
    large, resident, pins = state["in_large_folios"], state["resident"], state["pins"]
    assert isinstance(resident, float) and isinstance(large, float | None)
    folios = "folio size unknown" if large is None else f"{large:.1%} of its pages in large folios"
    pinned = f"{resident:.1%} resident at the end, pinned {pins} time(s)"
    return f"image pinned in the page cache ({pinned}), {folios}"
