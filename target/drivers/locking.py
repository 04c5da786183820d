# SPDX-License-Identifier: Apache-2.0
"""Image locks: permissions shown to other processes as OFD locks on bytes of the file, in QEMU's way.

A shared lock on byte 100 + bit says that the permission is in use; on byte 200 + bit, that it is not shared.
Nobody holds a byte exclusively: each program takes its bytes, then asks whether another holds one that
conflicts. So several readers, and programs of other authors, find out about each other.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from target.graph.errors import BlockError
from target.graph.permissions import NAMES, Perm

PERM_BASE = 100
SHARED_BASE = 200
FLOCK = struct.Struct("@hhqqi4x")  # struct flock: type, whence, start, length, pid


class ImageLock:
    """The locks of one open file. ``prepare`` then ``commit`` follow the node's permissions."""

    def __init__(self, fd: int, filename: str) -> None:
        self.fd = fd
        self.filename = filename
        self.held: set[int] = set()

    def prepare(self, perm: Perm, shared: Perm) -> None:
        """Takes the bytes for a new state beside those held. BlockError when another user is in the way."""
        before = set(self.held)
        missing = _bytes(perm, shared) - before
        if not missing:
            return  # whoever comes later sees what is held: one who only tries is not in the way
        try:
            for byte in missing:
                self._lock(byte)
            self._check(perm, shared)
        except BaseException:
            for byte in self.held - before:
                self._unlock(byte)
            raise

    def commit(self, perm: Perm, shared: Perm) -> None:
        """Releases the bytes that the new state does not need."""
        for byte in self.held - _bytes(perm, shared):
            self._unlock(byte)

    def take_over(self, other: ImageLock) -> None:
        """Takes what another open file of the same program holds, before that lets go of it."""
        for byte in sorted(other.held):
            self._lock(byte)
        other.commit(Perm.NONE, Perm.ALL)

    def _lock(self, byte: int) -> None:
        try:
            _fcntl(self.fd, fcntl.F_OFD_SETLK, fcntl.F_RDLCK, byte)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise self._conflict(f"Failed to lock byte {byte}") from None
            raise BlockError.from_os(f"Failed to lock byte {byte} of '{self.filename}'", error) from None
        self.held.add(byte)

    def _unlock(self, byte: int) -> None:
        _fcntl(self.fd, fcntl.F_OFD_SETLK, fcntl.F_UNLCK, byte)
        self.held.discard(byte)

    def _check(self, perm: Perm, shared: Perm) -> None:
        for bit, name in NAMES.items():
            if bit in perm and self._is_held(SHARED_BASE, bit):
                raise self._conflict(f'Failed to get "{name}" lock')
            if bit not in shared and self._is_held(PERM_BASE, bit):
                raise self._conflict(f'Failed to get shared "{name}" lock')

    def _is_held(self, base: int, bit: Perm) -> bool:
        """Whether another open file holds the byte."""
        found = _fcntl(self.fd, fcntl.F_OFD_GETLK, fcntl.F_WRLCK, base + _index(bit))
        return bool(found != fcntl.F_UNLCK)

    def _conflict(self, what: str) -> BlockError:
        return BlockError(f"{what}: Is another process using the image [{self.filename}]?")


def supported(fd: int) -> bool:
    """Whether the kernel and the file system know OFD locks."""
    try:
        _fcntl(fd, fcntl.F_OFD_GETLK, fcntl.F_WRLCK, PERM_BASE)
    except OSError:
        return False
    return True


def open_locked_pidfile(path: str) -> int:
    """Opens or makes the file and locks it exclusively for the life of the descriptor, as QEMU does.

    Retries when another process removes the file between the opening and the lock.
    """
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise BlockError.from_os(f"cannot create PID file: Could not create '{path}'", error) from None
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            same = os.path.samestat(os.fstat(fd), os.stat(path))
        except FileNotFoundError:
            same = False
        except OSError as error:
            os.close(fd)
            raise BlockError.from_os(f"cannot create PID file: Failed to lock '{path}'", error) from None
        if same:
            return fd
        os.close(fd)


def _index(bit: Perm) -> int:
    return bit.value.bit_length() - 1


def _bytes(perm: Perm, shared: Perm) -> set[int]:
    used = {PERM_BASE + _index(bit) for bit in NAMES if bit in perm}
    return used | {SHARED_BASE + _index(bit) for bit in NAMES if bit not in shared}


def _fcntl(fd: int, command: int, kind: int, byte: int) -> int:
    """Runs a lock command on one byte; returns the lock type that the kernel wrote back."""
    request = FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)
    result: int = FLOCK.unpack(fcntl.fcntl(fd, command, request))[0]
    return result
