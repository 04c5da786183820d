# SPDX-License-Identifier: Apache-2.0
"""--daemonize: fork first, and let the parent end only when the child is ready or has failed.

The child keeps the terminal as its standard error until it is ready, so its one line of error is seen.
"""

from __future__ import annotations

import contextlib
import os
import sys

from target.cli.errors import EXIT_ERROR, report

READY = b"\0"


class Background:
    """The child's side: ``ready`` lets the parent go and leaves the terminal."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    def ready(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.close(null)
        with contextlib.suppress(BrokenPipeError):  # the parent was ended meanwhile
            os.write(self._pipe, READY)
        os.close(self._pipe)


def daemonize() -> Background:
    """Returns in a grandchild of its own session; the parent waits for it and ends here."""
    reader, writer = os.pipe()
    if os.fork():
        os.close(writer)
        _wait(reader)
    os.close(reader)
    os.setsid()
    if os.fork():
        os._exit(0)
    return Background(writer)


def _wait(reader: int) -> None:
    """Ends the parent with 0 when the child says it is ready, else with 1: the child has told why."""
    answer = os.read(reader, 1)
    if not answer:
        os._exit(EXIT_ERROR)
    if answer != READY:
        report("daemonize: the child sent nonsense")
        os._exit(EXIT_ERROR)
    os._exit(0)
