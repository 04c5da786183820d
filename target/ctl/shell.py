# SPDX-License-Identifier: Apache-2.0
"""Commands line by line, from a terminal with completion, or from a script."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from target.ctl.words import candidates

if TYPE_CHECKING:
    from target.ctl.schema import Schema

PROMPT = "blocktarget> "
LOCAL = ("commands", "events", "exit", "help")

Run = Callable[[list[str]], bool]


def loop(run: Run, schema: Callable[[], Schema]) -> bool:
    """Runs lines to their end. From a script the first failure ends it; False then."""
    interactive = sys.stdin.isatty()
    lines = _terminal(schema) if interactive else iter(sys.stdin)
    for line in lines:
        try:
            words = shlex.split(line, comments=not interactive)
        except ValueError as error:
            print(f"blocktarget: {error}", file=sys.stderr)
            if interactive:
                continue
            return False
        if words == ["exit"]:
            break
        if words and not run(words) and not interactive:
            return False
    return True


def _terminal(schema: Callable[[], Schema]) -> Iterator[str]:
    """Lines that are typed; ^D ends them, ^C drops one."""
    _set_up_completion(schema)
    while True:
        try:
            yield input(PROMPT)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()


def _set_up_completion(schema: Callable[[], Schema]) -> None:
    import readline

    found: list[str] = []

    def complete(text: str, state: int) -> str | None:
        if state == 0:
            line = readline.get_line_buffer()[: readline.get_endidx()]
            found[:] = candidates(schema(), [*line[: len(line) - len(text)].split(), text], LOCAL)
        # A blank after what is complete; not after name= and name.
        choice = found[state] if state < len(found) else None
        return choice if choice is None or choice.endswith(("=", ".")) else f"{choice} "

    readline.set_completer(complete)
    readline.set_completer_delims(" \t\n")
    readline.parse_and_bind("tab: complete")
