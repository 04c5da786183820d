# SPDX-License-Identifier: Apache-2.0
"""The C test of saving: what two threads change for the first time is copied by the datapath, to a place
that fails and dawdles, while views are read, under sanitizers."""

import pytest

from tests.support.c_programs import CPrograms


@pytest.mark.parametrize("sanitizer", ["plain", "asan", "tsan"])
@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_what_is_changed_is_saved_before(c_programs: CPrograms, sanitizer: str, seed: int) -> None:
    program = c_programs.build("test_save", sanitizer)
    assert c_programs.run(program, "80", str(seed))[-1] == "ok"
