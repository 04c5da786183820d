# SPDX-License-Identifier: Apache-2.0
"""The C test of an I/O thread that polls."""

import pytest

from tests.support.c_programs import CPrograms


@pytest.mark.parametrize("sanitizer", ["plain", "asan", "tsan"])
def test_descriptors_do_not_starve_while_a_poller_finds_work(c_programs: CPrograms, sanitizer: str) -> None:
    """New clients of a thread that served a busy guest waited up to a second."""
    c_programs.run(c_programs.build("test_thread", sanitizer), timeout=30)
