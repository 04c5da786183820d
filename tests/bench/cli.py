# SPDX-License-Identifier: Apache-2.0
"""Measures this target, its peers and the limit (fio straight on the file) in turns on the same images."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.bench import machine, plot, summary, table
from tests.bench.backends import Backends
from tests.bench.docs import write_docs
from tests.bench.images import Images
from tests.bench.rows import MEMORY_ROWS, MIB, ROWS, MemoryRow, Row, chosen
from tests.bench.run import Bench
from tests.bench.summary import Results
from tests.support.daemon import blocktarget_argv

ROOT = Path(__file__).resolve().parents[2]
REPETITIONS = 5  # fewer are no result for the documentation


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    made.add_argument(
        "--rows", action="append", default=[], metavar="PATTERN", help="part of a row's name, with * and ?"
    )
    made.add_argument("--list", action="store_true", help="names the rows and ends")
    made.add_argument("--repetitions", type=int, default=REPETITIONS, metavar="N")
    made.add_argument("--seconds", type=float, default=2.0, metavar="S", help="for each cell")
    made.add_argument("--quick", action="store_true", help="one repetition of 0.3 s: is everything there?")
    made.add_argument(
        "--size", type=int, default=512, metavar="MIB", help="of the images; they are locked in memory"
    )
    made.add_argument(
        "--directory", type=Path, metavar="DIR", help="where images are made, and deleted afterwards"
    )
    made.add_argument(
        "--output", type=Path, metavar="DIR", help="for results.json, results.md and results.svg"
    )
    made.add_argument("--target", type=shlex.split, metavar="CMD", help="another 'blocktarget daemon'")
    made.add_argument(
        "--from", type=Path, dest="earlier", metavar="JSON", help="shows an earlier run, runs nothing"
    )
    made.add_argument("--write-docs", action="store_true", help="puts the results into docs/performance.md")
    return made


def main(argv: Sequence[str]) -> int:
    options = parser().parse_args(argv)
    rows = [row for row in ROWS if chosen(row.name, options.rows)]
    memory_rows = [row for row in MEMORY_ROWS if chosen(row.name, options.rows)]
    names = [row.name for row in rows] + [row.name for row in memory_rows]
    if options.list:
        print("\n".join(names))
        return 0
    if problem := _problem(options, names):
        print(f"scripts/bench: {problem}", file=sys.stderr)
        return 2
    if options.earlier:
        results = summary.from_json(json.loads(options.earlier.read_text()))
    else:
        results = _run(options, rows, memory_rows)
    print(table.markdown(results))
    _write(options, results)
    return 1 if results.failures else 0


def _problem(options: argparse.Namespace, names: Sequence[str]) -> str | None:
    if not names:
        return f"--rows {' '.join(options.rows)}: no such row"
    if options.repetitions < 1 or options.seconds <= 0 or options.size < 1:
        return "--repetitions, --seconds and --size have to be positive"
    partial = options.quick or options.rows or options.repetitions < REPETITIONS
    if options.write_docs and not options.earlier and partial:
        return f"--write-docs needs all rows and at least {REPETITIONS} repetitions"
    return None


def _state_directory() -> Path:
    return Path(os.environ.get("BLOCKTARGET_STATE", ROOT / "var"))


def _run(options: argparse.Namespace, rows: Sequence[Row], memory_rows: Sequence[MemoryRow]) -> Results:
    repetitions, seconds = (1, 0.3) if options.quick else (options.repetitions, options.seconds)
    parent = options.directory or _state_directory()
    parent.mkdir(parents=True, exist_ok=True)
    settings = {"repetitions": repetitions, "seconds": seconds, "size": options.size * MIB}
    described = machine.describe() | {"filesystem": machine.filesystem(parent)}
    results = Results(described, settings)
    scratch = tempfile.TemporaryDirectory
    with scratch(prefix="bench-", dir=parent) as directory, scratch(prefix="bench-") as sockets:
        images = Images(Path(directory), options.size * MIB)
        backends = Backends(Path(sockets), options.target or blocktarget_argv("daemon"))
        bench = Bench(Path(sockets), images, backends, results, seconds, _say)
        try:
            bench.run(rows, memory_rows, repetitions)
        finally:
            images.close()
    return results


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _write(options: argparse.Namespace, results: Results) -> None:
    if not options.earlier:
        output = options.output or _state_directory() / "bench"
        output.mkdir(parents=True, exist_ok=True)
        document = summary.to_json(results, ROWS, MEMORY_ROWS)
        (output / "results.json").write_text(json.dumps(document, indent=1) + "\n")
        (output / "results.md").write_text(table.markdown(results))
        (output / "results.svg").write_text(plot.svg(results))
        _say(f"results.json, results.md and results.svg are in {output}")
    if options.write_docs:
        write_docs(ROOT / "docs", table.markdown(results), plot.svg(results))
