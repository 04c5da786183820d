# SPDX-License-Identifier: Apache-2.0
"""The C test of quorums: racing reads, damage, failures, repair, children that come and go; sanitizers."""

import pytest

from tests.support.c_programs import CPrograms


@pytest.mark.parametrize("sanitizer", ["plain", "asan", "tsan"])
@pytest.mark.parametrize("options", ["r", "rcw", "rfw", "rl", "rlf"])
def test_quorum(c_programs: CPrograms, sanitizer: str, options: str) -> None:
    assert c_programs.run(c_programs.build("test_quorum", sanitizer), options, "80", "1")[-1] == "ok"


@pytest.mark.parametrize("sanitizer", ["plain", "asan", "tsan"])
def test_large_reads_take_rounds_and_wait_for_memory(c_programs: CPrograms, sanitizer: str) -> None:
    assert c_programs.run(c_programs.build("test_quorum", sanitizer), "rbcw", "10", "1")[-1] == "ok"
