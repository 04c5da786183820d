# SPDX-License-Identifier: Apache-2.0
"""Descriptors that clients have passed over a socket: under names (getfd), and in sets (add-fd).

A set opens as ``/dev/fdset/N``: the descriptor of it whose access mode fits is duplicated, so that the same
disk is at hand for reading and for writing. What nothing uses goes when removed, or with the last client.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field

from target.graph.errors import BlockError

FDS_MAX = 512
PREFIX = "/dev/fdset/"
# Names that the running command's monitor has; None: it is not a monitor's.
_own: ContextVar[dict[str, int] | None] = ContextVar("names of a monitor", default=None)
_NUMBER = re.compile(r"[0-9]{1,10}\Z")


class NoFitting(BlockError):
    """A set has no descriptor of the access mode that is wanted."""


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
    users: set[int] = field(default_factory=set)


class Descriptors:
    """All that were passed and are not given on yet. They are closed with it."""

    def __init__(self) -> None:
        self.named: dict[str, int] = {}  # from the start, for all
        self._names = [self.named]
        self.sets: dict[int, FdSet] = {}
        self.monitors = 0

    # ---- names ----

    def add_monitor(self) -> dict[str, int]:
        """Names of its own for a monitor, for ``use_names``."""
        names: dict[str, int] = {}
        self._names.append(names)
        return names

    def remove_monitor(self, names: dict[str, int]) -> None:
        """Closes what has no other owner by now."""
        self._names = [each for each in self._names if each is not names]
        _close_all(names)

    @staticmethod
    def use_names(names: dict[str, int]) -> None:
        """From here on in this task, and in those that it starts."""
        _own.set(names)

    def _where(self, name: str) -> dict[str, int] | None:
        """The names among which it is found: the monitor's own come first."""
        own = _own.get()
        if own is not None and name in own:
            return own
        return self.named if name in self.named else None

    def name(self, name: str, fd: int) -> None:
        """Takes the descriptor over under a name; one that had the name is closed."""
        if name[:1].isdigit() or not name:
            raise BlockError("Parameter 'fdname' expects a name not starting with a digit")
        own = _own.get()
        names = self.named if own is None else own
        old = names.pop(name, None)
        if old is not None:
            os.close(old)
        self._check_room()
        names[name] = fd

    def close_named(self, name: str) -> None:
        names = self._where(name)
        if names is None:
            raise BlockError(f"File descriptor named '{name}' not found")
        os.close(names.pop(name))

    @contextlib.contextmanager
    def taken(self, text: str) -> Iterator[int]:
        """The descriptor of that name, or number, which is the caller's from now on. BlockError.

        One with a name is closed when what the caller does with it fails; it has left the names then, too.
        """
        if _NUMBER.match(text):
            for names in self._names:
                for name in [name for name, fd in names.items() if fd == int(text)]:
                    del names[name]
            yield int(text)
            return
        found = self._where(text)
        if found is None:
            raise BlockError(f"File descriptor named '{text}' has not been found")
        fd = found.pop(text)
        try:
            yield fd
        except BaseException:
            os.close(fd)
            raise

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
        """Opens ``/dev/fdset/N`` with flags of os.open, of which O_DIRECT counts; for ``close_user``."""
        found = self._set_of(path)
        fitting = [
            passed.fd
            for passed in reversed(found.fds)
            if fcntl.fcntl(passed.fd, fcntl.F_GETFL) & os.O_ACCMODE == flags & os.O_ACCMODE
        ]
        if not fitting:
            shown = flags & (os.O_ACCMODE | os.O_DIRECT)
            raise NoFitting(f"Failed to find file descriptor with matching flags={shown:#x}")
        fd = fcntl.fcntl(fitting[0], fcntl.F_DUPFD_CLOEXEC, 0)
        try:
            # The mode is shared with whoever passed the descriptor. Requests need the one that was asked for.
            others = fcntl.fcntl(fd, fcntl.F_GETFL) & ~(os.O_DIRECT | os.O_APPEND | os.O_NONBLOCK)
            fcntl.fcntl(fd, fcntl.F_SETFL, others | (flags & os.O_DIRECT))
        except OSError:
            os.close(fd)
            raise
        found.users.add(fd)
        return fd

    def close_user(self, fd: int) -> None:
        """Closes a descriptor that ``open`` gave, or any other."""
        os.close(fd)
        for found in list(self.sets.values()):
            if fd in found.users:
                found.users.remove(fd)
                self._collect(found)

    def _set_of(self, path: str) -> FdSet:
        number = path.removeprefix(PREFIX)
        if not _NUMBER.match(number):
            raise BlockError(f"Could not parse fdset {path}")
        if int(number) not in self.sets:
            raise BlockError(f"Failed to find fdset {path}")
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
        for names in self._names:
            _close_all(names)
        fds = [passed.fd for found in self.sets.values() for passed in found.fds]
        self.sets.clear()
        for fd in fds:
            os.close(fd)

    def _check_room(self) -> None:
        in_sets = sum(len(found.fds) for found in self.sets.values())
        if sum(map(len, self._names)) + in_sets >= FDS_MAX:
            raise BlockError(f"At most {FDS_MAX} file descriptors can be kept")

    def _collect(self, found: FdSet) -> None:
        unused = not found.users and self.monitors == 0
        for passed in list(found.fds):
            if passed.removed or unused:
                os.close(passed.fd)
                found.fds.remove(passed)
        if not found.fds and not found.users:
            self.sets.pop(found.id, None)


def _close_all(names: dict[str, int]) -> None:
    while names:
        os.close(names.popitem()[1])
