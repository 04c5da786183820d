# SPDX-License-Identifier: Apache-2.0
"""Starts targets fast: a process that has imported everything, and forks one for each request on its input.

A line is a JSON list: ["start", LOG, SETTINGS, ARGV...] answers the new process's number; ["wait", PID]
answers its exit status (negative: the signal that ended it). Run as ``python -m tests.crash.nursery``.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import uvloop

import target.config.parse
import target.service
from target.cli.main import main
from target.drivers.format.qcow2 import Qcow2

_IMPORTED = (uvloop, target.config.parse, target.service)


def start(log: str, settings: dict[str, Any], argv: list[str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, place in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(descriptor, place)
    Qcow2.grant_limit = settings.get("grants")
    status = 70
    try:
        status = main(argv)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve() -> None:
    for line in sys.stdin:
        verb, *rest = json.loads(line)
        if verb == "start":
            answer = start(rest[0], rest[1], rest[2:])
        else:
            answer = os.waitstatus_to_exitcode(os.waitpid(rest[0], 0)[1])
        print(answer, flush=True)


if __name__ == "__main__":
    serve()
