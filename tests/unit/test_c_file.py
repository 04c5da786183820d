# SPDX-License-Identifier: Apache-2.0
"""Builds the C tests of the file device with gcc, plain and with sanitizers, and runs them.

The programs link the datapath without cffi and without the exports. The device is tested on a filesystem with
a disk below and on tmpfs, whose zeroes, holes and O_DIRECT are different.
"""

import pathlib
import subprocess
import tempfile
from collections.abc import Callable, Iterator

import pytest

DATAPATH = pathlib.Path(__file__).parents[2] / "target" / "datapath"
PROGRAMS = pathlib.Path(__file__).parent / "c"
WRAPPED = ["preadv", "pwritev", "preadv2", "pwritev2"]
SANITIZERS = {
    "plain": ["-O2"],
    "asan": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "tsan": ["-O1", "-fsanitize=thread"],
}

FLAGS = ["-std=gnu11", "-g", "-Wall", "-Wextra", "-Werror", f"-I{DATAPATH}"]

Build = Callable[[str, str], pathlib.Path]


def _compile_datapath(directory: pathlib.Path, flags: list[str]) -> None:
    """The datapath without its exports, as objects in the directory."""
    directory.mkdir()
    sources = [str(c) for c in DATAPATH.glob("*.c") if not c.name.startswith(("nbd_", "vhost_", "_"))]
    subprocess.run(["gcc", *FLAGS, *flags, "-c", *sources], check=True, cwd=directory)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """build(name, sanitizer) gives the compiled program; the datapath is compiled once for each sanitizer."""
    root = tmp_path_factory.mktemp("c_file")

    def compile_program(name: str, sanitizer: str) -> pathlib.Path:
        directory = root / sanitizer
        if not directory.exists():
            _compile_datapath(directory, SANITIZERS[sanitizer])
        program = directory / name
        if not program.exists():
            wraps = [f"-Wl,--wrap={call}" for call in WRAPPED] if name == "test_file" else []
            objects = [str(o) for o in directory.glob("*.o")]
            flags = [*FLAGS, *SANITIZERS[sanitizer], *wraps]
            command = ["gcc", *flags, str(PROGRAMS / f"{name}.c"), *objects, "-o", str(program)]
            subprocess.run([*command, "-luring", "-lpthread"], check=True)
        return program

    return compile_program


@pytest.fixture(params=["disk", "memory"])
def directory(request: pytest.FixtureRequest) -> Iterator[str]:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if request.param == "memory" else "/var/tmp") as name:
        yield name


def _run(program: pathlib.Path, *args: str) -> list[str]:
    done = subprocess.run([str(program), *args], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(("sanitizer", "operations"), [("plain", 400), ("asan", 150), ("tsan", 150)])
def test_file_against_model(build: Build, sanitizer: str, operations: int, directory: str) -> None:
    lines = _run(build("test_file", sanitizer), directory, str(operations))
    assert lines[-1] == "ok"
    assert sum("requests" in line for line in lines) >= 2


@pytest.mark.parametrize("sanitizer", ["plain", "asan"])
def test_single_cases(build: Build, sanitizer: str, directory: str) -> None:
    assert _run(build("test_file_cases", sanitizer), directory)[-1] == "ok"


@pytest.mark.parametrize(("sanitizer", "rounds"), [("plain", 20000), ("asan", 5000), ("tsan", 5000)])
def test_ranges_exclude_each_other(build: Build, sanitizer: str, rounds: int) -> None:
    assert _run(build("test_file_ranges", sanitizer), str(rounds))[-1].startswith("ok: ")
