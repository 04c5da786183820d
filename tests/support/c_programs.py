# SPDX-License-Identifier: Apache-2.0
"""Builds C test programs with gcc, plain and with sanitizers, against the datapath without cffi and NBD."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
DATAPATH = _ROOT / "target" / "datapath"
PROGRAMS = _ROOT / "tests" / "unit" / "c"
SANITIZERS = {
    "plain": ["-O2"],
    "asan": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "tsan": ["-O1", "-fsanitize=thread", "-Wno-tsan"],  # it knows no fences; the rings of a guest need them
}
_FLAGS = ["-std=gnu11", "-g", "-Wall", "-Wextra", "-Werror", f"-I{DATAPATH}"]


def run_all(commands: Sequence[Sequence[str]], directory: Path) -> None:
    """Runs compilers, one on each processor."""

    def run(command: Sequence[str]) -> None:
        subprocess.run(command, check=True, cwd=directory)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, commands))


class CPrograms:
    """Programs of tests/unit/c, compiled below ``root``; the datapath is compiled once for each sanitizer."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def build(self, name: str, sanitizer: str, wrapped: tuple[str, ...] = ()) -> Path:
        """The compiled program. ``wrapped``: functions for which it defines __wrap_NAME."""
        directory = self.root / sanitizer
        program = directory / name
        if program.exists():
            return program
        if not directory.exists():
            self._compile_datapath(directory, SANITIZERS[sanitizer])
        objects = [str(o) for o in directory.glob("*.o")]
        wraps = [f"-Wl,--wrap={function}" for function in wrapped]
        command = ["gcc", *_FLAGS, *SANITIZERS[sanitizer], *wraps, str(PROGRAMS / f"{name}.c"), *objects]
        subprocess.run([*command, "-o", str(program), "-luring", "-lpthread"], check=True)
        return program

    def run(self, program: Path, *args: str, timeout: float = 120) -> list[str]:
        """Its output in lines. A failure, or a sanitizer's finding, is an assertion error that shows it."""
        done = subprocess.run([str(program), *args], capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.splitlines()

    @staticmethod
    def _compile_datapath(directory: Path, flags: list[str]) -> None:
        directory.mkdir()
        command = ["gcc", *_FLAGS, *flags, "-c"]
        run_all([[*command, str(c)] for c in DATAPATH.glob("*.c") if not c.name.startswith("_")], directory)
