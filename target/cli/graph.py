# SPDX-License-Identifier: Apache-2.0
"""``blocktarget graph``: draws what a running target serves."""

from __future__ import annotations

import math
import os
import sys
from typing import TYPE_CHECKING

from target.cli import options
from target.cli.errors import EXIT_ERROR, UsageError, report

if TYPE_CHECKING:
    from target.drawing.picture import Picture

USAGE = """\
Usage: blocktarget graph [options]
Draws the block nodes of a running target: who uses what, with sizes, permissions, traffic, exports and
their clients. qemu-storage-daemon's monitor is understood, too.

  -s, --socket <path>    the target's monitor; else $BLOCKTARGET_SOCKET, or the first that exists of
                         $XDG_RUNTIME_DIR/blocktarget/qmp.sock and /run/blocktarget/qmp.sock
  -f, --format <form>    text (a tree, which is what you get otherwise), svg, dot (Graphviz), mermaid
  -o, --output <file>    writes there; a name that ends with .svg, .dot or .mmd says the form, too
  -i, --interval <s>     seconds over which traffic is measured: 1; with 0 there are no figures
  -h, --help             shows this help
"""

KNOWN = {"socket": True, "format": True, "output": True, "interval": True, "help": False}
SHORT = {"s": "socket", "f": "format", "o": "output", "i": "interval", "h": "help"}
FORMATS = ("text", "svg", "dot", "mermaid")
ENDINGS = {".svg": "svg", ".dot": "dot", ".gv": "dot", ".mmd": "mermaid"}
ANSWER_SECONDS = 30.0
INTERVAL_MAX = 3600.0


def main(words: list[str]) -> int:
    split, others = options.split(words, KNOWN, SHORT)
    given = {option.name: option.argument for option in split}
    if "help" in given:
        print(USAGE, end="")
        return 0
    if others:
        raise UsageError(f"graph: {others[0]}: Unexpected argument")
    output = given.get("output", "")
    form = given.get("format") or ENDINGS.get(os.path.splitext(output)[1], "text")
    if form not in FORMATS:
        raise UsageError(f"graph: option --format: '{form}' is none of {', '.join(FORMATS)}")
    seconds = interval(given.get("interval", "1"))
    picture = look(given.get("socket", ""), seconds)
    return 1 if picture is None else write(drawn(picture, form, output), output)


def interval(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= INTERVAL_MAX:
        raise UsageError(
            f"graph: option --interval: '{text}' is no number of seconds up to {INTERVAL_MAX:.0f}"
        )
    return seconds


def look(path: str, seconds: float) -> Picture | None:
    from target.ctl.client import Client, ClientError, CommandFailed, default_socket
    from target.drawing.observe import observe

    try:
        with Client(path or default_socket(), ANSWER_SECONDS) as client:
            return observe(client, seconds)
    except TimeoutError:
        report("graph: the target does not answer")
    except (ClientError, CommandFailed) as error:
        report(f"graph: {error}")
    return None


def drawn(picture: Picture, form: str, output: str) -> str:
    from target.drawing import dot, mermaid, svg, text

    if form == "text":
        colour = not output and sys.stdout.isatty() and "NO_COLOR" not in os.environ
        return text.draw(picture, colour)
    return {"svg": svg.draw, "dot": dot.draw, "mermaid": mermaid.draw}[form](picture)


def write(drawing: str, output: str) -> int:
    try:
        if output:
            with open(output, "w", encoding="utf-8") as file:
                file.write(drawing)
        else:
            sys.stdout.buffer.write(drawing.encode())
            sys.stdout.buffer.flush()
    except OSError as error:
        report(f"graph: {output or 'standard output'}: {error.strerror}")
        return EXIT_ERROR
    return 0
