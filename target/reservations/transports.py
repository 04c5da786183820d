# SPDX-License-Identifier: Apache-2.0
"""The ways by which a SCSI command reaches a device: any object with ``scsi_command`` (an iscsi node is one),
SG_IO on a block device of the host, or a helper program that is privileged to do that.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import fcntl
import os
import socket
import struct
import time
from typing import NamedTuple, Protocol

from target.reservations.commands import ALLOCATION_MAX, transfer_length
from target.reservations.sense import CHECK_CONDITION, GOOD, RESERVATION_CONFLICT

SG_IO = 0x2285  # scsi/sg.h
SG_DXFER_NONE, SG_DXFER_TO_DEV, SG_DXFER_FROM_DEV = -1, -2, -3
SENSE_SIZE = 96
COMMAND_SECONDS = 30
DID_TIME_OUT = 0x03
# struct sg_io_hdr
_SG_HEADER = struct.Struct("@iiBBHIPPPIIiPBBBBHHiII0P")


class Answer(NamedTuple):
    """How a command ended: SCSI status, sense data, data from the device."""

    status: int
    sense: bytes
    data: bytes


class Transport(Protocol):
    """OSError when the command did not reach the device, or no answer came."""

    async def scsi_command(
        self, cdb: bytes, data_out: bytes, data_in_length: int
    ) -> tuple[int, bytes, bytes]: ...


def sg_io(
    fd: int, cdb: bytes, data_out: bytes, data_in_length: int, seconds: float = COMMAND_SECONDS
) -> Answer:
    """Passes a command through on a block device's descriptor, and waits. A command moves data one way.

    ENOTTY, EINVAL: the descriptor takes no SCSI commands. EPERM: no privilege (CAP_SYS_RAWIO).
    """
    if data_out and data_in_length:
        raise ValueError("data in both directions")
    length = len(data_out) or data_in_length
    buffer = ctypes.create_string_buffer(data_out, max(length, 1))
    command = ctypes.create_string_buffer(cdb, len(cdb))
    sense = ctypes.create_string_buffer(SENSE_SIZE)
    direction = SG_DXFER_TO_DEV if data_out else SG_DXFER_FROM_DEV if length else SG_DXFER_NONE
    addresses = [ctypes.addressof(part) for part in (buffer, command, sense)]
    header = bytearray(
        _SG_HEADER.pack(
            *(ord("S"), direction, len(cdb), SENSE_SIZE, 0, length),
            *addresses,
            *(int(seconds * 1000), 0, 0, 0),
            *(0, 0, 0, 0, 0, 0, 0, 0, 0),
        )
    )
    fcntl.ioctl(fd, SG_IO, header)
    *_, status, _masked, _message, sense_length, host, _driver, left, _duration, _info = _SG_HEADER.unpack(
        header
    )
    if host and status != RESERVATION_CONFLICT:
        number = errno.ETIMEDOUT if host == DID_TIME_OUT else errno.EIO
        raise OSError(number, f"{os.strerror(number)} (host status {host:#x})")
    came = max(0, min(length, length - left)) if data_in_length and status == GOOD else 0
    return Answer(status, sense.raw[: min(sense_length, SENSE_SIZE)], buffer.raw[:came])


# ---- a helper ----

RESPONSE = struct.Struct(f">iI{SENSE_SIZE}s")
FEATURES = bytes(4)
HELPER_CDB_SIZE = 16
CONNECT_SECONDS = 2.0
ATTEMPTS, ATTEMPT_SECONDS = 5, 1.0
"""A helper that is being started again is waited for."""


class Helper:
    """A program that speaks the protocol of qemu-pr-helper on a unix socket, and the device for its commands.

    Each command has a connection of its own, so that a helper may come and go.
    """

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self.fd = fd

    async def scsi_command(
        self, cdb: bytes, data_out: bytes, data_in_length: int
    ) -> tuple[int, bytes, bytes]:
        return await asyncio.to_thread(self.run, cdb, data_out, data_in_length)

    def run(self, cdb: bytes, data_out: bytes, data_in_length: int) -> Answer:
        """Blocks. ValueError for a command that a helper does not take."""
        length = transfer_length(cdb)
        if length > ALLOCATION_MAX or length != (len(data_out) or data_in_length):
            raise ValueError(f"a transfer of {length} bytes")
        with self._connect_patiently() as connection:
            connection.settimeout(COMMAND_SECONDS + CONNECT_SECONDS)
            socket.send_fds(connection, [cdb.ljust(HELPER_CDB_SIZE, b"\0")], [self.fd])
            if data_out:
                connection.sendall(data_out)
            status, size, sense = RESPONSE.unpack(exactly(connection, RESPONSE.size))
            if size > data_in_length or (size and status != GOOD):
                raise OSError(errno.EPROTO, f"the helper sends {size} bytes with status {status:#x}")
            data = exactly(connection, size)
        return Answer(status, sense if status == CHECK_CONDITION else b"", data)

    def _connect_patiently(self) -> socket.socket:
        for _ in range(ATTEMPTS - 1):
            try:
                return connect_helper(self.path)
            except (ConnectionError, FileNotFoundError):
                time.sleep(ATTEMPT_SECONDS)
        return connect_helper(self.path)


def connect_helper(path: str) -> socket.socket:
    """A connection with its features agreed on. OSError, also for a peer that is no helper."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(CONNECT_SECONDS)
        connection.connect(path)
        exactly(connection, len(FEATURES))
        connection.sendall(FEATURES)
    except BaseException:
        connection.close()
        raise
    return connection


def exactly(connection: socket.socket, size: int) -> bytes:
    """So many bytes, or ConnectionResetError."""
    data = bytearray()
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise ConnectionResetError(errno.ECONNRESET, "the helper closed the connection")
        data += part
    return bytes(data)
