# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests with hostile vhost-user front ends: a target for each format, checked after each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.support.vhost_victim import Case, Victim


@pytest.fixture(scope="module", params=["raw", "qcow2"])
def victim_of_format(request: pytest.FixtureRequest) -> Iterator[Victim]:
    with TemporaryDirectory(prefix="bt-") as directory:
        victim = Victim(Path(directory), request.param)
        yield victim
        victim.close()


@pytest.fixture
def victim(victim_of_format: Victim) -> Iterator[Victim]:
    yield victim_of_format
    victim_of_format.check()


@pytest.fixture
def case(victim: Victim) -> Iterator[Case]:
    with victim.connect() as front_end:
        yield Case(front_end)
