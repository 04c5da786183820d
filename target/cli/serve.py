# SPDX-License-Identifier: Apache-2.0
"""``blocktarget serve FILE.yaml``: serves what a configuration file describes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from target.cli import options
from target.cli.daemon import Action, act, parse
from target.cli.errors import UsageError
from target.cli.run import RunOptions, StartError, execute
from target.config.options import OptionError
from target.graph.errors import BlockError

if TYPE_CHECKING:
    from target.service import Service

USAGE = """\
Usage: blocktarget serve [options] FILE.yaml
Serves what the file describes, and prints for each export how a client attaches to it.

  --nbd-server ..., --export ..., --chardev ..., --monitor ...
                         adds to what the file describes; as options of the daemon command
  --pidfile <path>       writes the process number there once ready, and keeps it locked
  --daemonize            goes to the background once ready
  --run <command>        runs a shell command with $uri, $unixsocket, $port, $exportname; ends with it
  -h, --help             shows this help
"""

ADDITIONS = ("nbd-server", "export", "chardev", "monitor")
OTHERS = {"pidfile": True, "daemonize": False, "run": True, "help": False}
KNOWN = dict.fromkeys(ADDITIONS, True) | OTHERS


def main(words: list[str]) -> int:
    given, others = options.split(words, KNOWN, {"h": "help"})
    run = RunOptions(describe=True)
    additions: list[Action] = []
    for option in given:
        if option.name == "help":
            print(USAGE, end="")
            return 0
        if option.name == "pidfile":
            run.pidfile = option.argument
        elif option.name == "run":
            run.command = option.argument
        elif option.name in ADDITIONS:
            additions.append(Action(option.name, parse(option)))
        else:
            run.background = True
    if len(others) != 1:
        raise UsageError("serve: exactly one configuration file is expected")
    path = others[0]
    text = read(path)

    async def start(service: Service) -> None:
        from target.config.yaml_file import parse_config

        try:
            for entry in parse_config(text):
                await entry.run(service)
        except (BlockError, OptionError) as error:
            raise StartError(f"{path}: {error}") from None
        for action in additions:
            await act(service, action)

    return execute(start, run)


def read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: Could not open: {error.strerror}") from None
    except ValueError:
        raise UsageError(f"{path}: it is not UTF-8 text") from None
