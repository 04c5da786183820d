# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the crash laboratory. BLOCKTARGET_CRASH=N makes each test N times as long."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.crash.targets import Nursery


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


@pytest.fixture(scope="session")
def scale() -> int:
    """How many times as long as in CI."""
    return int(os.environ.get("BLOCKTARGET_CRASH", "1"))


@pytest.fixture(scope="session")
def seed() -> str:
    """What random choices start from; BLOCKTARGET_CRASH_SEED chooses others."""
    return os.environ.get("BLOCKTARGET_CRASH_SEED", "1")
