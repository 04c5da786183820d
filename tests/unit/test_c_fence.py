# SPDX-License-Identifier: Apache-2.0
"""The C test of fences and views: changes held back, saved and let go by two threads, under sanitizers."""

from pathlib import Path

import pytest

from tests.support.c_programs import CPrograms


@pytest.mark.parametrize("sanitizer", ["plain", "asan", "tsan"])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_view_is_of_what_was(c_programs: CPrograms, sanitizer: str, seed: int, scratch: Path) -> None:
    program = c_programs.build("test_fence", sanitizer)
    lines = c_programs.run(program, str(scratch / "disk"), str(scratch / "saved"), "150", str(seed))
    assert lines[-1] == "ok"
