# SPDX-License-Identifier: Apache-2.0
"""The ``blocktarget`` command: finds the sub-command and runs it.

Nothing heavy is imported here: a daemon forks before any thread, ring or loop exists.
"""

from __future__ import annotations

import sys

from target import __version__
from target.cli import (
    apply,
    ctl,
    daemon,
    dump_plugin,
    graph,
    pr_helper,
    replay_log,
    reservations,
    save,
    serve,
)
from target.cli.errors import EXIT_ERROR, UsageError, report

USAGE = """\
Usage: blocktarget COMMAND [options]
A userspace storage target: block graphs served over NBD and vhost-user-blk.

  serve FILE.yaml        serve what a configuration file describes
  daemon [options]       the same with the command line of qemu-storage-daemon
  ctl [COMMAND ...]      tells a running target what to do
  save [FILE.yaml]       writes what a running target serves as a configuration file
  apply FILE.yaml        brings a running target to what a file says, while clients go on
  graph [options]        draws what a running target serves, with its traffic
  dump-plugin SCRIPT     what a script for nbdkit's Python interface says about itself
  reservations ACTION    persistent reservations of the device of a node
  pr-helper [options]    make them for programs without the privilege, as qemu-pr-helper does
  replay-log LOG IMAGE   rebuild an image from a log of writes, as after a power cut

  -h, --help             show this help, or that of a command
  -V, --version          show the version
"""

COMMANDS = {
    "apply": apply.main,
    "ctl": ctl.main,
    "daemon": daemon.main,
    "dump-plugin": dump_plugin.main,
    "graph": graph.main,
    "pr-helper": pr_helper.main,
    "replay-log": replay_log.main,
    "reservations": reservations.main,
    "save": save.main,
    "serve": serve.main,
}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 after one line on standard error."""
    words = sys.argv[1:] if argv is None else argv
    try:
        if not words:
            raise UsageError("a command is missing; try 'blocktarget --help'")
        command, *rest = words
        if command in ("-h", "--help", "help"):
            print(USAGE, end="")
            return 0
        if command in ("-V", "--version"):
            print(f"blocktarget version {__version__}")
            return 0
        if command not in COMMANDS:
            raise UsageError(f"unknown command '{command}'; try 'blocktarget --help'")
        return COMMANDS[command](rest)
    except UsageError as error:
        report(str(error))
        return EXIT_ERROR
