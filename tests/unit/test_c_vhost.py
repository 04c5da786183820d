# SPDX-License-Identifier: Apache-2.0
"""The C test of vhost-user-blk sessions, plain and with sanitizers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.c_programs import CPrograms


@pytest.mark.parametrize(("sanitizer", "operations"), [("plain", 20000), ("asan", 3000), ("tsan", 3000)])
def test_queues_under_changes(c_programs: CPrograms, sanitizer: str, operations: int, scratch: Path) -> None:
    program = c_programs.build("test_vhost", sanitizer)
    assert c_programs.run(program, str(scratch / "disk"), str(operations)) == ["ok"]
