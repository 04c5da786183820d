# SPDX-License-Identifier: Apache-2.0
"""What scripts/test runs: each test once, in whichever part; a failure in any part is one of the whole."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import run_tests

SETTINGS = '[pytest]\naddopts = --strict-markers\nmarkers =\n    timed: "alone"\n'
TESTS = {"tests/interop/test_a.py": "a", "tests/unit/test_b.py": "b", "tests/test_c.py": "c"}
TEXT = """
import os, pytest

def test_{name}():
    assert "{name}" != os.environ["FAILING"]

@pytest.mark.timed
def test_{name}_timed():
    assert "{name}-timed" != os.environ["FAILING"]
"""
RUN = """
import os, runpy, sys
processors = set(range(int(sys.argv[1])))
os.sched_getaffinity = lambda _: processors
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def project(scratch: Path) -> Path:
    (scratch / "pytest.ini").write_text(SETTINGS)
    for path, name in TESTS.items():
        (scratch / path).parent.mkdir(parents=True, exist_ok=True)
        (scratch / path).write_text(TEXT.format(name=name))
    return scratch


def run(
    directory: Path, *argv: str, failing: str = "none", processors: int = 2
) -> subprocess.CompletedProcess[str]:
    """The program itself, told that there are so many processors."""
    command = [sys.executable, "-c", RUN, str(processors), run_tests.__file__, *argv]
    environment = {**os.environ, "FAILING": failing}
    return subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=100
    )


@pytest.mark.parametrize("failing", ["none", "a", "b", "c", "a-timed", "c-timed"])
def test_everything_runs_once(scratch: Path, failing: str) -> None:
    done = run(project(scratch), failing=failing)
    assert done.returncode == (failing != "none"), done.stdout
    counts = {"passed": 0, "failed": 0}
    for number, what in re.findall(r"(\d+) (passed|failed)", done.stdout):
        counts[what] += int(number)
    failed = int(failing != "none")
    assert counts == {"passed": 2 * len(TESTS) - failed, "failed": failed}, done.stdout


def test_arguments_go_to_pytest(scratch: Path) -> None:
    done = run(project(scratch), "tests/unit", "-q")
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout
    assert run(scratch, "tests/unit", "-q", failing="b-timed").returncode == 1
    assert run(scratch, "-m", "no_such_marker", "-q").returncode != 0


def test_one_processor_runs_all_in_one(scratch: Path) -> None:
    done = run(project(scratch), processors=1)
    assert done.returncode == 0, done.stdout
    assert re.findall(r"(\d+) passed", done.stdout) == [str(2 * len(TESTS))], done.stdout
    assert run(scratch, failing="c-timed", processors=1).returncode == 1
