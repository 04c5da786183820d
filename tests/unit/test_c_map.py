# SPDX-License-Identifier: Apache-2.0
"""The C test of maps: claims, grants, eviction, drain, synchronize on two I/O threads, under sanitizers."""

from pathlib import Path

import pytest

from tests.support.c_programs import CPrograms


@pytest.mark.parametrize("sanitizer", ["plain", "asan", "tsan"])
@pytest.mark.parametrize("seed", [1, 2])
def test_map_against_model(c_programs: CPrograms, sanitizer: str, seed: int, scratch: Path) -> None:
    lines = c_programs.run(c_programs.build("test_map", sanitizer), str(scratch / "file"), "1000", str(seed))
    assert lines[-1] == "ok"


@pytest.mark.parametrize("sanitizer", ["plain", "asan", "tsan"])
@pytest.mark.parametrize("seed", [1, 2])
def test_copy_on_read_against_model(c_programs: CPrograms, sanitizer: str, seed: int, scratch: Path) -> None:
    files = str(scratch / "file"), str(scratch / "backing")
    lines = c_programs.run(c_programs.build("test_map", sanitizer), files[0], "1000", str(seed), files[1])
    assert lines[-1] == "ok"
