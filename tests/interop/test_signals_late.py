# SPDX-License-Identifier: Apache-2.0
"""A signal that comes when the process has ended already, but is not gone: the status stays."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

# As the very last thing, when Python has put the actions of signals back, the C library calls raise(status).
PROGRAM = """
import ctypes, sys
from target.cli.main import main

libc = ctypes.CDLL(None)
libc.on_exit(getattr(libc, "raise"), None)
sys.exit(main())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_after_the_end_does_not_become_the_status(number: signal.Signals) -> None:
    argv = [sys.executable, "-c", PROGRAM, "daemon", "--run", f"exit {number.value}"]
    assert subprocess.run(argv, timeout=30, stdin=subprocess.DEVNULL).returncode == number.value
