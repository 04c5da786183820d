# SPDX-License-Identifier: Apache-2.0
"""A signal to end that comes when the process has ended already, but is not gone: the status stays."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import atexit, os, signal, sys
from target.cli.main import main

atexit.register(os.kill, os.getpid(), signal.Signals[sys.argv.pop(1)])
sys.exit(main())
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_after_the_end_does_not_become_the_status(name: str) -> None:
    argv = [sys.executable, "-c", PROGRAM, name, "daemon", "--run", "exit 3"]
    assert subprocess.run(argv, timeout=30, stdin=subprocess.DEVNULL).returncode == 3
