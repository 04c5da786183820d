# SPDX-License-Identifier: Apache-2.0
"""Runs fuzz targets for as long as asked: ``scripts/fuzz NAME... [--runs N | --seconds S]``.

Inputs that reach something new, and those that fail, are kept in the directory of --found; its runs.jsonl
says what was run when.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from tests.fuzz.targets import ROOT, TARGETS, build, command


class Outcome(NamedTuple):
    """Of one target. output: the end of what it printed."""

    executions: int
    failed: bool
    output: str


def run(
    name: str, built: Path, found: Path, runs: int | None = None, seconds: int | None = None, nice: int = 0
) -> Outcome:
    """Runs a target that is built until its bound, or until it fails; a new process for each round."""
    end = time.monotonic() + (seconds if seconds is not None else math.inf)
    total = 0
    while True:
        left = [n for n in (runs and runs - total, TARGETS[name].round) if n is not None]
        time_left = None if seconds is None else max(1, round(end - time.monotonic()))
        executions, failed, output = _round(name, built, found, min(left, default=None), time_left, nice)
        total += executions
        over = time.monotonic() >= end or (runs is not None and total >= runs)
        if failed or over or not executions:
            return Outcome(total, failed, output)


def _round(name: str, built: Path, found: Path, runs: int | None, seconds: int | None, nice: int) -> Outcome:
    words = command(name, built, found, runs, seconds)
    done = subprocess.run(
        ["nice", "-n", str(nice), *words], capture_output=True, text=True, errors="replace", cwd=ROOT
    )
    text = done.stdout + done.stderr
    count = re.search(r"stat::number_of_executed_units: +(\d+)", text)
    return Outcome(int(count[1]) if count else 0, done.returncode != 0, text[-8000:])


def record(journal: Path, name: str, outcome: Outcome) -> None:
    """Adds a line to the file that says what was run when, on which revision."""
    revision = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()
    line = {
        "target": name,
        "executions": outcome.executions,
        "failed": outcome.failed,
        "revision": revision,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with journal.open("a") as file:
        file.write(json.dumps(line) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description="Runs fuzz targets.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(TARGETS))
    parser.add_argument("--all", action="store_true", help="every target, one after another")
    parser.add_argument("--runs", type=int, help="executions of each target")
    parser.add_argument("--seconds", type=int, help="time for each target; 60 unless one is given")
    parser.add_argument("--nice", type=int, default=0, help="priority, 19 is the lowest")
    parser.add_argument("--found", type=Path, default=ROOT / "var" / "fuzz", help="where inputs are kept")
    options = parser.parse_args()
    names = list(TARGETS) if options.all else options.names
    if not names or set(names) - set(TARGETS):
        parser.error("name one of: " + ", ".join(TARGETS))
    built, found = options.found.resolve() / "built", options.found.resolve()
    build(names, built)
    seconds = 60 if options.runs is None and options.seconds is None else options.seconds
    failed = False
    for name in names:
        outcome = run(name, built, found, options.runs, seconds, options.nice)
        print(f"{name}: {outcome.executions} executions{', FAILED' if outcome.failed else ''}", flush=True)
        record(found / "runs.jsonl", name, outcome)
        if outcome.failed:
            print(outcome.output)
        failed |= outcome.failed
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
