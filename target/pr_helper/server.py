# SPDX-License-Identifier: Apache-2.0
"""The server's side of the protocol (QEMU's docs/interop/pr-helper.rst).

Each connection has a thread, since SG_IO blocks. Clients are hostile: what breaks the protocol ends the
connection; a request takes bounded time and memory; only the two commands for reservations pass, and only
PERSISTENT RESERVE IN on a descriptor that is not open for writing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

from target.reservations.commands import (
    ALLOCATION_MAX,
    PERSISTENT_RESERVE_IN,
    PERSISTENT_RESERVE_OUT,
    transfer_length,
)
from target.reservations.sense import (
    CHECK_CONDITION,
    GOOD,
    RESERVATION_CONFLICT,
    TASK_SET_FULL,
    Sense,
    fixed_sense,
)
from target.reservations.transports import FEATURES, HELPER_CDB_SIZE, RESPONSE, Answer, sg_io

log = logging.getLogger("blocktarget.pr-helper")

CONNECTIONS_MAX = 128
REQUEST_SECONDS = 10.0  # for a request that has begun; between requests a client may be silent
DEVICE_SECONDS = 30.0
CONTROL_SIZE = socket.CMSG_SPACE(2 * struct.calcsize("i"))

INVALID_OPCODE = Sense(0x05, 0x20, 0x00)
IO_TERMINATED = Sense(0x0B, 0x00, 0x06)

# Runs a command on a descriptor: (fd, cdb, data to the device, length of data from it).
Run = Callable[[int, bytes, bytes, int], Answer]


class Violation(Exception):
    """A client broke the protocol."""


class Left(Exception):
    """A client ended the connection between two requests."""


def sg_io_run(fd: int, cdb: bytes, data_out: bytes, data_in_length: int) -> Answer:
    return sg_io(fd, cdb, data_out, data_in_length, DEVICE_SECONDS)


class PrHelper:
    """Serves a listening socket until ``stop``."""

    def __init__(self, listener: socket.socket, run: Run = sg_io_run) -> None:
        self._listener = listener
        self._run = run
        self._lock = threading.Lock()
        self._clients: set[socket.socket] = set()
        self._stopped = threading.Event()

    def serve(self) -> None:
        """Accepts clients; returns after ``stop``, which another thread or a signal handler calls."""
        self._listener.setblocking(True)
        while not self._stopped.is_set():
            try:
                accepted, _ = self._listener.accept()
            except OSError as error:
                if self._stopped.is_set():
                    break
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                    time.sleep(0.1)
                elif error.errno != errno.ECONNABORTED:
                    raise
                continue
            self._begin(accepted)

    def stop(self) -> None:
        """No further clients; those that are connected are cut off."""
        self._stopped.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        with self._lock:
            clients = list(self._clients)
        for client in clients:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)

    def _begin(self, accepted: socket.socket) -> None:
        with self._lock:
            full = len(self._clients) >= CONNECTIONS_MAX or self._stopped.is_set()
            if not full:
                self._clients.add(accepted)
        if full:
            log.warning("pr-helper: a client is turned away: %d are connected", CONNECTIONS_MAX)
            accepted.close()
            return
        threading.Thread(target=self._serve_client, args=(accepted,), daemon=True).start()

    def _serve_client(self, client: socket.socket) -> None:
        try:
            client.settimeout(REQUEST_SECONDS)
            client.sendall(FEATURES)
            if any(_exactly(client, len(FEATURES))):
                raise Violation("it wants features that there are not")
            while True:
                self._serve_request(client)
        except Left:
            pass
        except Violation as violation:
            log.warning("pr-helper: the connection of process %d is closed: %s", _peer(client), violation)
        except OSError as error:
            log.info("pr-helper: a connection is closed: %s", error)
        finally:
            with self._lock:
                self._clients.discard(client)
            client.close()

    def _serve_request(self, client: socket.socket) -> None:
        cdb, fd = _receive_command(client)
        try:
            size = _checked_size(cdb)
            data = _exactly(client, size) if cdb[0] == PERSISTENT_RESERVE_OUT else b""
            answer = self._answer(fd, cdb, data, 0 if data else size)
        finally:
            os.close(fd)
        log.info("pr-helper: process %d: command %s: status %#x", _peer(client), cdb[:2].hex(), answer.status)
        returned = answer.data if answer.status == GOOD else b""
        client.sendall(RESPONSE.pack(answer.status, len(returned), answer.sense) + returned)

    def _answer(self, fd: int, cdb: bytes, data: bytes, data_in_length: int) -> Answer:
        """Runs the command; what cannot be run is told as sense data, since the protocol knows no errors."""
        writes = cdb[0] == PERSISTENT_RESERVE_OUT
        if writes and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            return _refusal(INVALID_OPCODE)
        if writes and not data:
            return _refusal(Sense(0x05, 0x1A, 0x00))  # parameter list length error
        if is_multipath(fd):
            log.warning("pr-helper: reservations on all paths of a multipath device are not supported")
            return _refusal(INVALID_OPCODE)
        try:
            return self._run(fd, cdb, data, data_in_length)
        except OSError as error:
            return _from_errno(error.errno or errno.EIO)


def _from_errno(number: int) -> Answer:
    """What SG_IO failed with, as an initiator understands it."""
    match number:
        case errno.EBADE:
            return Answer(RESERVATION_CONFLICT, b"", b"")
        case errno.EDOM:
            return Answer(TASK_SET_FULL, b"", b"")
        case errno.ENOTTY | errno.EINVAL | errno.ENOSYS | errno.EOPNOTSUPP:
            return _refusal(INVALID_OPCODE)  # not a SCSI device
        case errno.EPERM | errno.EACCES:
            log.warning("pr-helper: the kernel refuses the command: CAP_SYS_RAWIO is missing")
    return _refusal(IO_TERMINATED)


def _refusal(sense: Sense) -> Answer:
    return Answer(CHECK_CONDITION, fixed_sense(sense), b"")


def _checked_size(cdb: bytes) -> int:
    if cdb[0] not in (PERSISTENT_RESERVE_IN, PERSISTENT_RESERVE_OUT):
        raise Violation(f"command {cdb[0]:#04x} is not for reservations")
    size = transfer_length(cdb)
    if size > ALLOCATION_MAX:
        raise Violation(f"a transfer of {size} bytes")
    return size


def _receive_command(client: socket.socket) -> tuple[bytes, int]:
    """The next CDB and the descriptor that came with it. Waits for its first byte for as long as it takes."""
    data = b""
    fds: list[int] = []
    client.settimeout(None)
    try:
        while len(data) < HELPER_CDB_SIZE:
            part, control, flags, _ = client.recvmsg(HELPER_CDB_SIZE - len(data), CONTROL_SIZE)
            client.settimeout(REQUEST_SECONDS)
            fds += _descriptors(control)
            if not part and not data:
                raise Left
            if not part or flags & socket.MSG_CTRUNC:
                raise Violation("half a command" if not part else "too many descriptors")
            data += part
        if len(fds) != 1:
            raise Violation(f"{len(fds)} descriptors with a command, not one")
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return data, fds[0]


def _descriptors(control: list[tuple[int, int, bytes]]) -> list[int]:
    size = struct.calcsize("i")
    found: list[int] = []
    for level, kind, data in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            count = len(data) // size
            found += struct.unpack(f"{count}i", data[: count * size])
    for fd in found:
        os.set_inheritable(fd, False)
    return found


def _exactly(client: socket.socket, size: int) -> bytes:
    """So many bytes within the time for a request. Descriptors that come along are dropped by the kernel."""
    data = b""
    end = time.monotonic() + REQUEST_SECONDS
    while len(data) < size:
        left = end - time.monotonic()
        if left <= 0:
            raise Violation("a request takes too long")
        client.settimeout(left)
        part = client.recv(size - len(data))
        if not part:
            raise Violation("half a request")
        data += part
    return data


def _peer(client: socket.socket) -> int:
    """The process at the other end; 0 when it is not known."""
    try:
        raw = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    except OSError:
        return 0
    pid: int = struct.unpack("3i", raw)[0]
    return pid


def is_multipath(fd: int) -> bool:
    """Whether it is a device of dm-multipath, whose SG_IO would reach one path of several."""
    found = os.fstat(fd)
    if not stat.S_ISBLK(found.st_mode):
        return False
    number = f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"
    try:
        return Path(f"/sys/dev/block/{number}/dm/uuid").read_text().startswith("mpath-")
    except OSError:
        return False
