# SPDX-License-Identifier: Apache-2.0
"""The C tests of the file device, plain and with sanitizers.

The device is tested on a filesystem with a disk below and on tmpfs, whose zeroes, holes and O_DIRECT are
different.
"""

import tempfile
from collections.abc import Iterator

import pytest

from tests.support.c_programs import CPrograms

WRAPPED = ("preadv", "pwritev", "preadv2", "pwritev2")


@pytest.fixture(params=["disk", "memory"])
def directory(request: pytest.FixtureRequest) -> Iterator[str]:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if request.param == "memory" else "/var/tmp") as name:
        yield name


@pytest.mark.parametrize(("sanitizer", "operations"), [("plain", 400), ("asan", 150), ("tsan", 150)])
def test_file_against_model(c_programs: CPrograms, sanitizer: str, operations: int, directory: str) -> None:
    lines = c_programs.run(c_programs.build("test_file", sanitizer, WRAPPED), directory, str(operations))
    assert lines[-1] == "ok"
    assert sum("requests" in line for line in lines) >= 2


@pytest.mark.parametrize("sanitizer", ["plain", "asan"])
def test_single_cases(c_programs: CPrograms, sanitizer: str, directory: str) -> None:
    assert c_programs.run(c_programs.build("test_file_cases", sanitizer, ("pwritev",)), directory)[-1] == "ok"


@pytest.mark.parametrize(("sanitizer", "rounds"), [("plain", 20000), ("asan", 5000), ("tsan", 5000)])
def test_ranges_exclude_each_other(c_programs: CPrograms, sanitizer: str, rounds: int) -> None:
    lines = c_programs.run(c_programs.build("test_ranges", sanitizer), str(rounds))
    assert lines[-1].startswith("ok: ")
