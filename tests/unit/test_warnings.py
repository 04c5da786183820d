# SPDX-License-Identifier: Apache-2.0
"""Warnings about clients: their number is bounded, each is counted, and no client writes the log."""

from __future__ import annotations

import asyncio
import logging
import re
import time

import pytest

from target.exports.warnings import BURST, INTERVAL, LONGEST, Warnings, printable

log = logging.getLogger("test")


async def test_a_flood_is_a_few_lines_that_count_it(caplog: pytest.LogCaptureFixture) -> None:
    warnings = Warnings(log, "export 'x'")
    begun = time.monotonic()
    said = 0
    while time.monotonic() < begun + 4 * INTERVAL:
        for _ in range(100):
            warnings.say(f"warning {said}")
            said += 1
        await asyncio.sleep(0.001)
    warnings.close()
    lines = caplog.messages
    assert BURST + 3 <= len(lines) <= BURST + 7
    assert all(line.startswith("export 'x': warning ") for line in lines)
    assert f"warning {said - 1}" in lines[-1]
    assert len(lines) + sum(int(n) for n in re.findall(r"and (\d+) more", caplog.text)) == said


async def test_the_last_of_a_burst_is_not_held_for_long(caplog: pytest.LogCaptureFixture) -> None:
    warnings = Warnings(log, "NBD server")
    for i in range(BURST + 10):
        warnings.say(str(i))
    await asyncio.sleep(2 * INTERVAL)
    assert caplog.messages[-1].startswith(f"NBD server: {BURST + 9} (and ")
    warnings.say("one")
    await asyncio.sleep(2 * INTERVAL)
    assert caplog.messages[-1] == "NBD server: one"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nblocktarget: ready\r\x1b[2J\0", "a\\nblocktarget: ready\\r\\x1b[2J\\x00"),
        ("Größe '磁盘'", "Größe '磁盘'"),
        ("\udcff\u2028\u202e", "\\udcff\\u2028\\u202e"),
        ("x" * LONGEST, "x" * LONGEST),
        ("x" * 5000, "x" * LONGEST + "..."),
        ("\0" * 5000, ("\\x00" * LONGEST)[:LONGEST] + "..."),
    ],
)
def test_what_a_client_sends_is_escaped_and_cut(text: str, shown: str) -> None:
    assert printable(text) == shown
