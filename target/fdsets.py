# SPDX-License-Identifier: Apache-2.0
"""Descriptors that clients have passed over a socket: under names (getfd), and in sets (add-fd).

A set opens as ``/dev/fdset/N``: the descriptor of it whose access mode fits is duplicated, so that the same
disk is at hand for reading and for writing. What nothing uses goes when removed, or with the last client.
"""

from __future__ import annotations

import fcntl
import os
import re
from dataclasses import dataclass, field

from target.graph.errors import BlockError

FDS_MAX = 512
PREFIX = "/dev/fdset/"
_NUMBER = re.compile(r"[0-9]{1,10}\Z")
# What F_SETFL changes; the rest of open's flags are the file's for ever.
_SETTABLE = os.O_APPEND | os.O_DIRECT | os.O_NOATIME | os.O_NONBLOCK


@dataclass
class Passed:
    """A descriptor in a set. ``removed``: it goes when the set has no users."""

    fd: int
    opaque: str | None
    removed: bool = False


@dataclass
class FdSet:
    """``users``: descriptors that were duplicated from the set and are open."""

    id: int
    fds: list[Passed] = field(default_factory=list)
    users: int = 0


class Descriptors:
    """All that were passed and are not given on yet. They are closed with it."""

    def __init__(self) -> None:
        self.named: dict[str, int] = {}
        self.sets: dict[int, FdSet] = {}
        self.monitors = 0

    # ---- names ----

    def name(self, name: str, fd: int) -> None:
        """Takes the descriptor over under a name; one that had the name is closed."""
        if name[:1].isdigit() or not name:
            raise BlockError("Parameter 'fdname' expects a name not starting with a digit")
        old = self.named.pop(name, None)
        if old is not None:
            os.close(old)
        self._check_room()
        self.named[name] = fd

    def close_named(self, name: str) -> None:
        fd = self.named.pop(name, None)
        if fd is None:
            raise BlockError(f"File descriptor named '{name}' not found")
        os.close(fd)

    def take(self, text: str) -> int:
        """The descriptor of that name, or number, which is the caller's from now on. BlockError."""
        if _NUMBER.match(text):
            return int(text)
        if text not in self.named:
            raise BlockError(f"File descriptor named '{text}' has not been found")
        return self.named.pop(text)

    # ---- sets ----

    def add(self, fd: int, id: int | None = None, opaque: str | None = None) -> FdSet:
        """Takes the descriptor over into a set, by default a new one with the smallest free number."""
        if id is not None and id < 0:
            raise BlockError("Parameter 'fdset-id' expects a non-negative value")
        self._check_room()
        if id is None:
            id = next(i for i in range(len(self.sets) + 1) if i not in self.sets)
        found = self.sets.setdefault(id, FdSet(id))
        found.fds.append(Passed(fd, opaque))
        return found

    def remove(self, id: int, fd: int | None = None) -> None:
        """Marks one descriptor of a set, or all, for removal; those without users are closed at once."""
        found = self.sets.get(id)
        chosen = [passed for passed in found.fds if fd in (None, passed.fd)] if found else []
        if found is None or (fd is not None and not chosen):
            what = f"fdset-id:{id}" if fd is None else f"fdset-id:{id}, fd:{fd}"
            raise BlockError(f"File descriptor named '{what}' not found")
        for passed in chosen:
            passed.removed = True
        self._collect(found)

    def open(self, path: str, flags: int) -> int:
        """Opens ``/dev/fdset/N`` with the flags of os.open. OSError as os.open; release() undoes it."""
        found = self._set_of(path)
        for passed in found.fds:
            if fcntl.fcntl(passed.fd, fcntl.F_GETFL) & os.O_ACCMODE == flags & os.O_ACCMODE:
                break
        else:
            raise BlockError(f"Failed to find file descriptor with matching flags={flags:#x}")
        fd = fcntl.fcntl(passed.fd, fcntl.F_DUPFD_CLOEXEC, 0)
        try:
            # Shared with whoever passed it, and with other users of the set: only what is asked for is added.
            status = fcntl.fcntl(fd, fcntl.F_GETFL)
            fcntl.fcntl(fd, fcntl.F_SETFL, status | (flags & _SETTABLE))
        except OSError:
            os.close(fd)
            raise
        found.users += 1
        return fd

    def release(self, path: str) -> None:
        """A descriptor that ``open`` gave is closed."""
        found = self._set_of(path)
        found.users -= 1
        self._collect(found)

    def _set_of(self, path: str) -> FdSet:
        number = path.removeprefix(PREFIX)
        if not _NUMBER.match(number):
            raise BlockError(f"Failed to parse fdset {path}")
        if int(number) not in self.sets:
            raise BlockError(f"fdset {int(number)} is not found")
        return self.sets[int(number)]

    # ---- their life ----

    def monitor_opened(self) -> None:
        self.monitors += 1

    def monitor_closed(self) -> None:
        """With the last client go the sets that nothing uses."""
        self.monitors -= 1
        if self.monitors == 0:
            for found in list(self.sets.values()):
                self._collect(found)

    def close(self) -> None:
        fds = [*self.named.values(), *(passed.fd for found in self.sets.values() for passed in found.fds)]
        self.named.clear()
        self.sets.clear()
        for fd in fds:
            os.close(fd)

    def _check_room(self) -> None:
        if len(self.named) + sum(len(found.fds) for found in self.sets.values()) >= FDS_MAX:
            raise BlockError(f"At most {FDS_MAX} file descriptors can be kept")

    def _collect(self, found: FdSet) -> None:
        unused = found.users == 0 and self.monitors == 0
        for passed in list(found.fds):
            if passed.removed or unused:
                os.close(passed.fd)
                found.fds.remove(passed)
        if not found.fds and found.users == 0:
            self.sets.pop(found.id, None)
