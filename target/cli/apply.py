# SPDX-License-Identifier: Apache-2.0
"""``blocktarget apply``: brings a running target to what a configuration file says."""

from __future__ import annotations

import json

from target.cli import options
from target.cli.errors import EXIT_ERROR, UsageError, report
from target.cli.save import socket_of
from target.cli.serve import read
from target.config.options import OptionError
from target.ctl.client import Client, ClientError, CommandFailed

USAGE = """\
Usage: blocktarget apply [options] FILE.yaml
Compares the file with what runs, shows what has to be done, and does it while clients go on: all of it, or
nothing. Character devices and monitors stay as they are. Relative names are relative to the directory in
which the target runs.

  -s, --socket <path>    the target's monitor; found as by 'blocktarget ctl'
  -n, --dry-run          shows the plan, and does nothing
      --force            does what clients notice, too: ends exports that have clients, exchanges data
  -j, --json             shows the plan as the actions of a QMP transaction
  -h, --help             shows this help

The exit status is 1 when it is refused; then nothing has changed.
"""

KNOWN = {"socket": True, "dry-run": False, "force": False, "json": False, "help": False}
SHORT = {"s": "socket", "n": "dry-run", "j": "json", "h": "help"}


def main(words: list[str]) -> int:
    given, others = options.split(words, KNOWN, SHORT)
    flags = {option.name for option in given}
    if "help" in flags:
        print(USAGE, end="")
        return 0
    if len(others) != 1:
        raise UsageError("apply: exactly one configuration file is expected")
    from target.config.yaml_file import load

    try:
        config = load(read(others[0]))
    except OptionError as error:
        raise UsageError(f"{others[0]}: {error}") from None
    arguments = {"config": config, "dry-run": "dry-run" in flags, "force": "force" in flags}
    try:
        with Client(socket_of(given)) as client:
            answer = client.execute("x-config-apply", arguments)
    except (ClientError, CommandFailed) as error:
        report(f"{others[0]}: {error}")
        return EXIT_ERROR
    if "json" in flags:
        print(json.dumps(answer))
    else:
        show(answer["plan"])
    for reason in answer.get("refused", ()):
        report(f"refused: {reason}")
    return EXIT_ERROR if "refused" in answer else 0


def show(plan: list[dict[str, str]]) -> None:
    for step in plan:
        print(step["text"])
    if not plan:
        print("nothing to do")
