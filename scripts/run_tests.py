# SPDX-License-Identifier: Apache-2.0
"""Runs pytest for scripts/test: with its arguments; without any, all tests, two at a time.

Most tests wait, or use one processor. So two halves run at once, and then, with the machine to
themselves, the tests that are marked `timed`: those of speed and of short times.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence

PYTEST = [sys.executable, "-m", "pytest"]
FIRST = "tests/interop"  # about half of the time
END_SECONDS = 30


@contextlib.contextmanager
def beside(argv: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """Runs a process whose output is shown in one piece, at the end."""
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, text=True
        )
        try:
            yield process
        finally:
            if process.poll() is None:  # an interrupt: Ctrl-C has reached it, too
                end(process)
            said.seek(0)
            print(said.read(), end="", flush=True)


def end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def everything(options: Sequence[str] = ()) -> int:
    """The first exit status that is not 0, or 0. ``options``: for each pytest."""
    quiet = [*PYTEST, *options, "-m", "not timed"]
    # Each has its own note of what failed last.
    with beside([*quiet, "-o", "cache_dir=.pytest_cache/beside", f"--ignore={FIRST}"]) as others:
        first = subprocess.run([*quiet, FIRST]).returncode
        second = others.wait()
    print("the tests that are marked `timed`:", flush=True)
    timed = subprocess.run([*PYTEST, *options, "-m", "timed"]).returncode
    return first or second or timed


def main() -> int:
    argv = sys.argv[1:]
    if argv or len(os.sched_getaffinity(0)) < 2:
        return subprocess.run([*PYTEST, *argv]).returncode
    return everything()


if __name__ == "__main__":
    sys.exit(main())
