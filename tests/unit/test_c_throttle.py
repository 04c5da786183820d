# SPDX-License-Identifier: Apache-2.0
"""The C test of throttles: rate and shares, queues that change all the time, several on one way."""

import pytest

from tests.support.c_programs import CPrograms


@pytest.mark.timed
@pytest.mark.parametrize("sanitizer", ["plain", "asan", "tsan"])
@pytest.mark.parametrize("what", [("churn", "1"), ("churn", "2"), ("nested",)])
def test_throttle(c_programs: CPrograms, sanitizer: str, what: tuple[str, ...]) -> None:
    lines = c_programs.run(c_programs.build("test_throttle", sanitizer), *what, timeout=60)
    assert lines[-1] == "ok"


@pytest.mark.timed
def test_rate_and_shares(c_programs: CPrograms) -> None:
    assert c_programs.run(c_programs.build("test_throttle", "plain"), "rate", "1")[-1] == "ok"
