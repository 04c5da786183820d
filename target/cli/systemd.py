# SPDX-License-Identifier: Apache-2.0
"""The service manager: told that the target is ready or stopping (sd_notify), and the sockets that it passes.

Without one nothing happens.
"""

from __future__ import annotations

import contextlib
import os
import socket

FIRST_FD = 3  # SD_LISTEN_FDS_START
FDS_MAX = 64


def notify(state: str) -> None:
    """Sends one message, such as "READY=1". Errors are ignored, as sd_notify(3) advises."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return
    address = "\0" + path[1:] if path[0] == "@" else path
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock,
    ):
        sock.sendto(state.encode(), address)


def passed_fds() -> dict[str, int]:
    """The descriptors of sd_listen_fds(3) by name; those without one are listen0, listen1, ..."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return {}
    count = os.environ.get("LISTEN_FDS", "")
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    found: dict[str, int] = {}
    for i in range(min(int(count), FDS_MAX) if count.isdecimal() else 0):
        name = names[i] if i < len(names) else ""
        unusable = not name or name[0].isdigit() or name == "unknown" or name in found
        with contextlib.suppress(OSError):  # one that is not open
            os.set_inheritable(FIRST_FD + i, False)
            found[f"listen{i}" if unusable else name] = FIRST_FD + i
    return found
