# SPDX-License-Identifier: Apache-2.0
"""``blocktarget pr-helper``: the life of a helper for persistent reservations."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING

from target.cli import options, systemd
from target.cli.background import daemonize
from target.cli.errors import EXIT_ERROR, UsageError, report

if TYPE_CHECKING:
    from target.pr_helper import PrHelper

FIRST_PASSED_FD = 3  # SD_LISTEN_FDS_START

USAGE = """\
Usage: blocktarget pr-helper --socket PATH [options]
Makes persistent reservations on disks that its clients have open, with the protocol of
qemu-pr-helper: for the object pr-manager-helper of QEMU and of this program. Needs the
privilege CAP_SYS_RAWIO, and gives up all others.

  --socket <path>        listens there; who may connect is decided by the umask and the directory
  --fd <number>          listens on this socket instead; one that systemd passes is found without
  --user <name>          becomes this user after the start
  --group <name>         becomes this group
  --pidfile <path>       writes the process number there once ready, and keeps it locked
  --daemonize            goes to the background once ready
  --verbose              tells of each command
  -h, --help             shows this help
"""

KNOWN = {
    "socket": True,
    "fd": True,
    "user": True,
    "group": True,
    "pidfile": True,
    "daemonize": False,
    "verbose": False,
    "help": False,
}
SHORT = {"h": "help", "k": "socket", "u": "user", "g": "group", "f": "pidfile", "d": "daemonize"}


def main(words: list[str]) -> int:
    given, others = options.split(words, KNOWN, SHORT)
    values = {option.name: option.argument for option in given}
    if "help" in values:
        print(USAGE, end="")
        return 0
    if others:
        raise UsageError(f"{others[0]}: Unexpected argument")
    passed = _activated()
    if passed is not None and "socket" not in values:
        values.setdefault("fd", passed)
    if ("socket" in values) == ("fd" in values):
        raise UsageError("pr-helper: one of --socket and --fd is needed")
    return serve(values)


def serve(values: dict[str, str]) -> int:
    background = daemonize() if "daemonize" in values else None
    from target.cli.run import PidFile
    from target.exports.address import listen_fd, listen_unix
    from target.graph.errors import BlockError
    from target.pr_helper import PrHelper
    from target.pr_helper.privileges import drop

    level = logging.INFO if "verbose" in values else logging.WARNING
    logging.basicConfig(stream=sys.stderr, format="blocktarget: %(message)s", level=level)
    listener = pidfile = None
    try:
        listener = listen_unix(values["socket"]) if "socket" in values else listen_fd(values["fd"])
        if "pidfile" in values:
            pidfile = PidFile(values["pidfile"])
        if not drop(values.get("user", ""), values.get("group", "")):
            report("pr-helper: CAP_SYS_RAWIO is missing: disks will refuse the commands")
        helper = PrHelper(listener.socket)
        _stop_on_signal(helper)
        systemd.notify("READY=1")
        if background is not None:
            background.ready()
        helper.serve()
        return 0
    except BlockError as error:
        report(str(error))
        return EXIT_ERROR
    finally:
        if pidfile is not None:
            pidfile.remove()
        # After a change of the user the socket may not be ours to remove; a stale one is replaced.
        if listener is not None:
            with contextlib.suppress(PermissionError):
                listener.close()


def _stop_on_signal(helper: PrHelper) -> None:
    """A thread waits for the signals: the main one may be in the middle of anything."""
    signals = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)

    def wait() -> None:
        signal.sigwait(signals)
        helper.stop()

    threading.Thread(target=wait, daemon=True).start()


def _activated() -> str | None:
    """The socket that systemd passes (sd_listen_fds(3)), if it is for us."""
    if os.environ.get("LISTEN_PID") == str(os.getpid()) and os.environ.get("LISTEN_FDS") == "1":
        return str(FIRST_PASSED_FD)
    return None
