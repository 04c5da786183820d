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
def running(scratch: Path) -> Iterator[list[Daemon]]:
    """The targets that `start` has started. One that the test does not stop must end with 0 on SIGTERM."""
    daemons: list[Daemon] = []
    yield daemons
    try:
        for daemon in daemons:
            daemon.stop()
    finally:
        for daemon in daemons:
            daemon.kill()


@pytest.fixture
def show_when_failed(running: list[Daemon], request: pytest.FixtureRequest) -> Iterator[None]:
    """Prints what the targets say when the test has failed, with their counters at that moment."""
    yield
    if request.node.stash.get(FAILED, False):
        for daemon in running:
            print(daemon.state())


@pytest.fixture
def start(running: list[Daemon], show_when_failed: None) -> Callable[..., Daemon]:
    """start(*argv) starts a target, waits until it is ready, and has it stopped at the end of the test."""

    def begin(*argv: str) -> Daemon:
        daemon = Daemon(*argv)
        try:
            daemon.wait_ready()
        except AssertionError:
            daemon.kill()
            raise
        running.append(daemon)
        return daemon

    return begin
