# SPDX-License-Identifier: Apache-2.0
"""The C test of a whole target, under sanitizers: NBD sessions and a guest on one map and two I/O threads."""

from pathlib import Path

import pytest

from tests.support.c_programs import CPrograms


@pytest.mark.parametrize("sanitizer", ["plain", "asan", "tsan"])
@pytest.mark.parametrize("seed", [1, 2])
def test_traffic(c_programs: CPrograms, sanitizer: str, seed: int, scratch: Path) -> None:
    program = c_programs.build("test_traffic", sanitizer)
    assert c_programs.run(program, str(scratch / "file"), "200", str(seed))[-1] == "ok"
