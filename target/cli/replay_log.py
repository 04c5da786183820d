# SPDX-License-Identifier: Apache-2.0
"""``blocktarget replay-log``: rebuilds an image from a log of writes, as a power cut may have left it."""

from __future__ import annotations

from target.cli import options
from target.cli.errors import UsageError
from target.replay import Discarded, LogError, PowerCut, WriteLog, rebuild

USAGE = """\
Usage: blocktarget replay-log LOG IMAGE [options]
       blocktarget replay-log LOG --list
Replays a log that blklogwrites or dm-log-writes made onto IMAGE, a copy of the image as
it was when the log began.

  --until <n>            only what comes before entry n
  --flush <k>            only what comes before the k-th flush (from 1), and it
  --mark <name>          only what comes before the mark
  --lose                 a power cut at that place: what was not flushed is dropped
  --seed <n>             a power cut at that place: of what was not flushed a random part is dropped, and some
                         writes are torn between sectors; the same number makes the same image
  --keep <p>             with --seed: how much of it stays, from 0 to 1 (default 0.5)
  --discard <what>       what discarded ranges read as: keep, zero (default), poison
  --list                 prints the entries
  -h, --help             shows this help
"""

KNOWN = {
    "until": True,
    "flush": True,
    "mark": True,
    "lose": False,
    "seed": True,
    "keep": True,
    "discard": True,
    "list": False,
    "help": False,
}


def main(words: list[str]) -> int:
    given, others = options.split(words, KNOWN, {"h": "help"})
    values = {option.name: option.argument for option in given}
    if "help" in values:
        print(USAGE, end="")
        return 0
    listing = "list" in values
    if len(others) != (1 if listing else 2):
        raise UsageError("replay-log: a log and an image are expected, or a log with --list")
    try:
        with WriteLog(others[0]) as log:
            if listing:
                print("".join(f"{entry}\n" for entry in log.entries), end="")
            else:
                _replay(log, others[1], values)
    except LogError as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        raise UsageError(f"{others[1]}: {error.strerror}") from None
    return 0


def _replay(log: WriteLog, image: str, values: dict[str, str]) -> None:
    until = _place(log, values)
    try:
        discarded = Discarded(values.get("discard", "zero"))
    except ValueError:
        raise UsageError("option --discard: expects keep, zero or poison") from None
    if "lose" in values and "seed" in values:
        raise UsageError("options --lose and --seed exclude each other")
    if "keep" in values and "seed" not in values:
        raise UsageError("option --keep needs --seed")
    if "lose" in values or "seed" in values:
        keep = _fraction(values.get("keep", "0.5")) if "seed" in values else 0.0
        PowerCut(until, keep, _number(values.get("seed", "0"), "seed"), discarded).make(log, image)
    else:
        rebuild(log, image, until, discarded)


def _place(log: WriteLog, values: dict[str, str]) -> int:
    """The number of the entry to stop at."""
    chosen = [name for name in ("until", "flush", "mark") if name in values]
    if len(chosen) > 1:
        raise UsageError(f"options --{chosen[0]} and --{chosen[1]} exclude each other")
    if "mark" in values:
        return log.mark(values["mark"])
    if "flush" in values:
        flushes = log.flushes()
        number = _number(values["flush"], "flush")
        if not 1 <= number <= len(flushes):
            raise UsageError(f"option --flush: the log has {len(flushes)} flushes, not {number}")
        return flushes[number - 1] + 1
    until = _number(values.get("until", str(len(log.entries))), "until")
    if until > len(log.entries):
        raise UsageError(f"option --until: the log has {len(log.entries)} entries, not {until}")
    return until


def _number(text: str, option: str) -> int:
    if not text.isascii() or not text.isdecimal():
        raise UsageError(f"option --{option}: expects a number, not '{text}'")
    return int(text)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise UsageError(f"option --keep: expects a number from 0 to 1, not '{text}'")
    return value
