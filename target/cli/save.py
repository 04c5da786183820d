# SPDX-License-Identifier: Apache-2.0
"""``blocktarget save``: writes what a running target serves as a configuration file."""

from __future__ import annotations

import os
import sys

import yaml

from target.cli import options
from target.cli.errors import EXIT_ERROR, UsageError, report
from target.ctl.client import Client, ClientError, CommandFailed, default_socket

USAGE = """\
Usage: blocktarget save [options] [FILE.yaml]
Writes what a running target serves as the file from which 'blocktarget serve' makes the same again; to
standard output without FILE. It holds secrets as they were given, so only its owner may read it.

  -s, --socket <path>    the target's monitor; found as by 'blocktarget ctl'
  -h, --help             shows this help
"""

KNOWN = {"socket": True, "help": False}


def main(words: list[str]) -> int:
    given, others = options.split(words, KNOWN, {"s": "socket", "h": "help"})
    if any(option.name == "help" for option in given):
        print(USAGE, end="")
        return 0
    if len(others) > 1:
        raise UsageError(f"{others[1]}: Unexpected argument")
    try:
        with Client(socket_of(given)) as client:
            config = client.execute("x-config-save")["config"]
    except (ClientError, CommandFailed) as error:
        report(str(error))
        return EXIT_ERROR
    text = yaml.safe_dump(config, sort_keys=False, width=110)
    if others:
        _write(others[0], text)
    else:
        sys.stdout.write(text)
    return 0


def socket_of(given: list[options.Option]) -> str:
    """The monitor's path: the last that is given, or where one is usually."""
    paths = [option.argument for option in given if option.name == "socket"]
    return paths[-1] if paths else default_socket()


def _write(path: str, text: str) -> None:
    """All of it or nothing, so that a file that is there is not lost."""
    part = f"{path}.{os.getpid()}.part"
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise UsageError(f"{path}: Could not write: {error.strerror}") from None
