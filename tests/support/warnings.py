# SPDX-License-Identifier: Apache-2.0
"""What a target says about its clients, from one look to the next."""

from __future__ import annotations

import asyncio
import re
import time

from tests.support.daemon import Daemon

SECONDS = 5


class Log:
    """Reads on in a target's output. ``who`` is how a line begins, ``text`` a part of it, verbatim."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._seen = 0

    def skip(self) -> None:
        """What has been said so far is not looked at."""
        self._seen = len(self._daemon.output())

    def new(self) -> list[str]:
        """Whole lines since the last look; they stay new."""
        return re.findall(r"(.*)\n", self._daemon.output()[self._seen :])

    def _find(self, who: str, text: str) -> bool:
        line = re.compile(rf"^blocktarget: {re.escape(who)}: .*{re.escape(text)}.*\n", re.MULTILINE)
        found = line.search(self._daemon.output(), self._seen)
        if found:
            self._seen = found.end()
        return found is not None

    def _missing(self, who: str, text: str) -> str:
        return f"no line of {who!r} with {text!r}, but {self.new()}"

    def says(self, who: str, text: str) -> None:
        """Asserts that such a line comes."""
        end = time.monotonic() + SECONDS
        while not self._find(who, text):
            assert time.monotonic() < end, self._missing(who, text)
            time.sleep(0.005)

    async def will_say(self, who: str, text: str) -> None:
        """As says, while the loop goes on."""
        end = time.monotonic() + SECONDS
        while not self._find(who, text):
            assert time.monotonic() < end, self._missing(who, text)
            await asyncio.sleep(0.005)
