# SPDX-License-Identifier: Apache-2.0
"""The messages of the vhost-user protocol: their layout, declared once, with checks of size and descriptors.

Source: QEMU's docs/interop/vhost-user.rst; names are the specification's without their prefix. Only what a
block back end offers is here. No I/O, and no judgement on the values beyond their form.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Any, NamedTuple

HEADER = struct.Struct("=III")  # request, flags, size of the payload
U64 = struct.Struct("=Q")
MEMORY_HEADER = struct.Struct("=II")  # number of regions, padding
CONFIG_HEADER = struct.Struct("=III")  # offset, size, flags

VERSION = 1
VERSION_MASK = 3
REPLY = 1 << 2
NEED_REPLY = 1 << 3
MAX_PAYLOAD = 1024  # the longest known one has 280 bytes
MAX_FDS = 8
MAX_TABLE_REGIONS = 8  # of SET_MEM_TABLE; more come one by one, with ADD_MEM_REG
MAX_CONFIG = 256
VRING_INDEX_MASK = 0xFF
VRING_NO_FD = 1 << 8


class Request(IntEnum):
    """From the front end."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SET_BACKEND_REQ_FD = 21
    GET_CONFIG = 24
    SET_CONFIG = 25
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38


class BackendRequest(IntEnum):
    """From the back end, on its own channel."""

    CONFIG_CHANGE_MSG = 2


class ProtocolFeature(IntFlag):
    MQ = 1 << 0
    REPLY_ACK = 1 << 3
    BACKEND_REQ = 1 << 5
    CONFIG = 1 << 9
    CONFIGURE_MEM_SLOTS = 1 << 15


class MessageError(Exception):
    """A message that breaks the protocol: its session ends."""


class Header(NamedTuple):
    request: int
    flags: int
    size: int

    @classmethod
    def parse(cls, data: bytes | bytearray) -> Header:
        """Of a message from the front end, 12 bytes."""
        header = cls(*HEADER.unpack(data))
        if header.flags & VERSION_MASK != VERSION:
            raise MessageError(f"request {header.request}: version {header.flags & VERSION_MASK} is not 1")
        if header.flags & ~(VERSION_MASK | NEED_REPLY):
            raise MessageError(f"request {header.request}: flags {header.flags:#x} are not valid")
        if header.size > MAX_PAYLOAD:
            raise MessageError(f"request {header.request}: a payload of {header.size} bytes is too long")
        return header

    @property
    def need_reply(self) -> bool:
        return bool(self.flags & NEED_REPLY)


class VringState(NamedTuple):
    queue: int
    num: int


class VringAddress(NamedTuple):
    """Addresses are the front end's own (user addresses)."""

    queue: int
    flags: int
    descriptor: int
    used: int
    available: int
    log: int


class VringDescriptor(NamedTuple):
    """Of SET_VRING_KICK, CALL and ERR. has_fd: a descriptor comes with it."""

    queue: int
    has_fd: bool


class MemoryRegion(NamedTuple):
    guest_address: int
    size: int
    user_address: int
    mmap_offset: int


class Config(NamedTuple):
    """A part of the device's configuration space."""

    offset: int
    size: int
    flags: int
    data: bytes


VRING_STATE = struct.Struct("=II")
VRING_ADDRESS = struct.Struct("=IIQQQQ")
REGION = struct.Struct("=QQQQ")
SINGLE_REGION = struct.Struct("=QQQQQ")  # padding first


def _exact(payload: bytes, size: int) -> None:
    if len(payload) != size:
        raise MessageError(f"a payload of {len(payload)} bytes, where {size} are due")


def _nothing(payload: bytes) -> None:
    _exact(payload, 0)


def _u64(payload: bytes) -> int:
    _exact(payload, U64.size)
    (value,) = U64.unpack(payload)
    return int(value)


def _state(payload: bytes) -> VringState:
    _exact(payload, VRING_STATE.size)
    return VringState(*VRING_STATE.unpack(payload))


def _address(payload: bytes) -> VringAddress:
    _exact(payload, VRING_ADDRESS.size)
    return VringAddress(*VRING_ADDRESS.unpack(payload))


def _vring_descriptor(payload: bytes) -> VringDescriptor:
    value = _u64(payload)
    if value & ~(VRING_INDEX_MASK | VRING_NO_FD):
        raise MessageError(f"the vring descriptor value {value:#x} has unknown bits")
    return VringDescriptor(value & VRING_INDEX_MASK, not value & VRING_NO_FD)


def _table(payload: bytes) -> list[MemoryRegion]:
    if len(payload) < MEMORY_HEADER.size:
        raise MessageError(f"a memory table of {len(payload)} bytes")
    count, _ = MEMORY_HEADER.unpack_from(payload)
    if not 0 < count <= MAX_TABLE_REGIONS:
        raise MessageError(f"a memory table of {count} regions")
    # Front ends may send the whole array of eight.
    if len(payload) not in (MEMORY_HEADER.size + n * REGION.size for n in (count, MAX_TABLE_REGIONS)):
        raise MessageError(f"a memory table of {count} regions in {len(payload)} bytes")
    start = MEMORY_HEADER.size
    return [MemoryRegion(*REGION.unpack_from(payload, start + i * REGION.size)) for i in range(count)]


def _single_region(payload: bytes) -> MemoryRegion:
    _exact(payload, SINGLE_REGION.size)
    return MemoryRegion(*SINGLE_REGION.unpack(payload)[1:])


def _config(payload: bytes) -> Config:
    if len(payload) < CONFIG_HEADER.size:
        raise MessageError(f"a configuration access of {len(payload)} bytes")
    offset, size, flags = CONFIG_HEADER.unpack_from(payload)
    data = payload[CONFIG_HEADER.size :]
    if size != len(data):
        raise MessageError(f"a configuration access of {size} bytes with {len(data)} bytes of data")
    return Config(offset, size, flags, bytes(data))


@dataclass(frozen=True, slots=True)
class Form:
    """How a request looks. fds: None when the payload says how many; replies: it has an answer of its own."""

    parse: Callable[[bytes], Any]
    fds: tuple[int, ...] | None = (0,)
    replies: bool = False


FORMS: dict[Request, Form] = {
    Request.GET_FEATURES: Form(_nothing, replies=True),
    Request.SET_FEATURES: Form(_u64),
    Request.SET_OWNER: Form(_nothing),
    Request.RESET_OWNER: Form(_nothing),
    Request.SET_MEM_TABLE: Form(_table, fds=None),
    Request.SET_VRING_NUM: Form(_state),
    Request.SET_VRING_ADDR: Form(_address),
    Request.SET_VRING_BASE: Form(_state),
    Request.GET_VRING_BASE: Form(_state, replies=True),
    Request.SET_VRING_KICK: Form(_vring_descriptor, fds=None),
    Request.SET_VRING_CALL: Form(_vring_descriptor, fds=None),
    Request.SET_VRING_ERR: Form(_vring_descriptor, fds=None),
    Request.GET_PROTOCOL_FEATURES: Form(_nothing, replies=True),
    Request.SET_PROTOCOL_FEATURES: Form(_u64),
    Request.GET_QUEUE_NUM: Form(_nothing, replies=True),
    Request.SET_VRING_ENABLE: Form(_state),
    Request.SET_BACKEND_REQ_FD: Form(_nothing, fds=(1,)),
    Request.GET_CONFIG: Form(_config, replies=True),
    Request.SET_CONFIG: Form(_config),
    Request.GET_MAX_MEM_SLOTS: Form(_nothing, replies=True),
    Request.ADD_MEM_REG: Form(_single_region, fds=(1,)),
    Request.REM_MEM_REG: Form(_single_region, fds=(0, 1)),  # the specification tells to bear with one
}


def parse(request: Request, payload: bytes, fds: int) -> Any:
    """The payload's value (None, int, or one of the tuples above). fds: how many descriptors came with it."""
    form = FORMS[request]
    try:
        value = form.parse(payload)
    except MessageError as error:
        raise MessageError(f"{request.name}: {error}") from None
    if form.fds is not None:
        due = form.fds
    elif isinstance(value, VringDescriptor):
        due = (int(value.has_fd),)
    else:
        due = (len(value),)
    if fds not in due:
        raise MessageError(f"{request.name}: came with {fds} file descriptors, not {due[0]}")
    return value


def reply(request: int, payload: bytes) -> bytes:
    """The answer to a request."""
    return HEADER.pack(request, VERSION | REPLY, len(payload)) + payload


def reply_u64(request: int, value: int) -> bytes:
    return reply(request, U64.pack(value))


def reply_config(request: int, config: Config) -> bytes:
    """The answer to GET_CONFIG; one without data says that the access is not possible."""
    return reply(request, CONFIG_HEADER.pack(config.offset, config.size, config.flags) + config.data)


def config_changed() -> bytes:
    """CONFIG_CHANGE_MSG, without a wish for an answer."""
    return HEADER.pack(BackendRequest.CONFIG_CHANGE_MSG, VERSION, 0)
