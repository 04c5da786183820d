# SPDX-License-Identifier: Apache-2.0
"""Fixtures for every test: a scratch directory with a short name, and targets that are stopped at the end."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from tests.support.daemon import Daemon

FAILED = pytest.StashKey[bool]()


@pytest.fixture
def scratch() -> Iterator[Path]:
    """An empty directory; its name is short enough for unix sockets, which tmp_path's is not always."""
    path = Path(tempfile.mkdtemp(prefix="bt-"))
    yield path
    shutil.rmtree(path)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Lets fixtures know at their end whether the test failed."""
    report = yield
    if report.failed:
        item.stash[FAILED] = True
    return report


@pytest.fixture
def start(scratch: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Daemon]]:
    """start(*argv) starts a target, waits until it is ready, and stops it at the end of the test.

    A target that the test does not stop itself must still end with 0 on SIGTERM. When the test failed, what
    the target printed and its counters are shown.
    """
    running: list[Daemon] = []

    def begin(*argv: str) -> Daemon:
        daemon = Daemon(*argv)
        try:
            daemon.wait_ready()
        except AssertionError:
            daemon.kill()
            raise
        running.append(daemon)
        return daemon

    yield begin
    if request.node.stash.get(FAILED, False):
        for daemon in running:
            print(daemon.state())
    try:
        for daemon in running:
            daemon.stop()
    finally:
        for daemon in running:
            daemon.kill()
