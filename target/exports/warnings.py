# SPDX-License-Identifier: Apache-2.0
"""Warnings about what clients do: they name the export or the server; a flood is a few lines a second."""

from __future__ import annotations

import asyncio
import logging
import time

BURST = 50  # lines at once; then one every INTERVAL seconds
INTERVAL = 0.25
LONGEST = 300  # characters of one text


class Warnings:
    """``say`` writes a line; of many the last, and their number. ``close`` writes what is left."""

    def __init__(self, log: logging.Logger, name: str) -> None:
        self._log = log
        self._name = name
        self._paid = 0.0  # each line costs INTERVAL; this is the time at which all of them will be paid for
        self._held = 0
        self._last = ""
        self._timer: asyncio.TimerHandle | None = None

    def say(self, text: str) -> None:
        """text may hold what a client has sent. On the loop only."""
        if self._timer is None and self._paid <= time.monotonic() + BURST * INTERVAL:
            self._write(printable(text))
            return
        self._held += 1
        self._last = text
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(INTERVAL, self._write_held)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._write_held()

    def _write_held(self) -> None:
        held, self._held, self._timer = self._held, 0, None
        more = f" (and {held - 1} more warnings since the last)" if held > 1 else ""
        self._write(printable(self._last) + more)

    def _write(self, text: str) -> None:
        self._paid = max(self._paid, time.monotonic()) + INTERVAL
        self._log.warning("%s: %s", self._name, text)


def printable(text: str) -> str:
    """On one line, without control characters, and cut."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: LONGEST + 1])
    return shown if len(shown) <= LONGEST else shown[:LONGEST] + "..."
