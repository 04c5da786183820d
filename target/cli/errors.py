# SPDX-License-Identifier: Apache-2.0
"""How commands report what a user did wrong: one line, exit status 1."""

from __future__ import annotations

import sys

EXIT_ERROR = 1


class UsageError(Exception):
    """The command line itself is wrong."""


def report(message: str) -> None:
    """Prints one line on standard error, whatever the message holds."""
    line = " ".join(message.split())
    print(f"blocktarget: {line}", file=sys.stderr, flush=True)
