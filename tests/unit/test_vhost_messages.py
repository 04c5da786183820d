# SPDX-License-Identifier: Apache-2.0
"""vhost-user messages: sizes and layouts as the specification has them; anything else is refused."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from target.exports.vhost_user_blk import messages
from target.exports.vhost_user_blk.messages import (
    Config,
    Header,
    MemoryRegion,
    MessageError,
    Request,
    VringAddress,
    VringDescriptor,
    VringState,
    parse,
)


def u64(value: int) -> bytes:
    return struct.pack("=Q", value)


def test_header_of_qemu() -> None:
    """SET_FEATURES with NEED_REPLY as QEMU 7.2 sends it."""
    header = Header.parse(bytes.fromhex("020000000900000008000000"))
    assert header == Header(Request.SET_FEATURES, 9, 8)
    assert header.need_reply


@pytest.mark.parametrize(
    ("flags", "size"),
    [(0, 8), (2, 8), (3, 8), (1 | 4, 8), (1 | 16, 8), (1 | 1 << 31, 8), (1, 1025), (1, 0xFFFFFFFF)],
    ids=["version 0", "version 2", "version 3", "a reply", "bit 4", "bit 31", "long", "4 GiB"],
)
def test_bad_header(flags: int, size: int) -> None:
    with pytest.raises(MessageError):
        Header.parse(struct.pack("=III", Request.SET_FEATURES, flags, size))


REGION = MemoryRegion(0x1000, 0x2000, 0x7F0000001000, 0x3000)
REGION_BYTES = struct.pack("=QQQQ", *REGION)


@pytest.mark.parametrize(
    ("request_", "payload", "fds", "value"),
    [
        (Request.GET_FEATURES, b"", 0, None),
        (Request.SET_FEATURES, u64(1 << 32), 0, 1 << 32),
        (Request.SET_VRING_NUM, struct.pack("=II", 3, 128), 0, VringState(3, 128)),
        (Request.SET_VRING_ADDR, struct.pack("=IIQQQQ", 1, 0, 2, 3, 4, 5), 0, VringAddress(1, 0, 2, 3, 4, 5)),
        (Request.SET_VRING_KICK, u64(2), 1, VringDescriptor(2, True)),
        (Request.SET_VRING_CALL, u64(2 | 1 << 8), 0, VringDescriptor(2, False)),
        (Request.SET_MEM_TABLE, struct.pack("=II", 1, 0) + REGION_BYTES, 1, [REGION]),
        (Request.SET_MEM_TABLE, struct.pack("=II", 2, 0) + REGION_BYTES * 8, 2, [REGION] * 2),
        (Request.ADD_MEM_REG, u64(0) + REGION_BYTES, 1, REGION),
        (Request.REM_MEM_REG, u64(0) + REGION_BYTES, 0, REGION),
        (Request.REM_MEM_REG, u64(0) + REGION_BYTES, 1, REGION),
        (Request.GET_CONFIG, struct.pack("=III", 4, 3, 0) + b"abc", 0, Config(4, 3, 0, b"abc")),
        (Request.SET_BACKEND_REQ_FD, b"", 1, None),
    ],
)
def test_good_payloads(request_: Request, payload: bytes, fds: int, value: object) -> None:
    assert parse(request_, payload, fds) == value


@pytest.mark.parametrize(
    ("request_", "payload", "fds"),
    [
        (Request.GET_FEATURES, b"x", 0),
        (Request.GET_FEATURES, b"", 1),
        (Request.SET_FEATURES, b"", 0),
        (Request.SET_FEATURES, bytes(7), 0),
        (Request.SET_FEATURES, bytes(9), 0),
        (Request.SET_VRING_NUM, bytes(4), 0),
        (Request.SET_VRING_ADDR, bytes(39), 0),
        (Request.SET_VRING_KICK, u64(0), 0),
        (Request.SET_VRING_KICK, u64(0), 2),
        (Request.SET_VRING_KICK, u64(1 << 8), 1),
        (Request.SET_VRING_KICK, u64(1 << 9), 1),
        (Request.SET_MEM_TABLE, b"", 0),
        (Request.SET_MEM_TABLE, struct.pack("=II", 0, 0), 0),
        (Request.SET_MEM_TABLE, struct.pack("=II", 1, 0), 1),
        (Request.SET_MEM_TABLE, struct.pack("=II", 1, 0) + REGION_BYTES, 0),
        (Request.SET_MEM_TABLE, struct.pack("=II", 1, 0) + REGION_BYTES, 2),
        (Request.SET_MEM_TABLE, struct.pack("=II", 9, 0) + REGION_BYTES * 9, 8),
        (Request.SET_MEM_TABLE, struct.pack("=II", 65535, 0) + REGION_BYTES * 8, 8),
        (Request.ADD_MEM_REG, REGION_BYTES, 1),
        (Request.ADD_MEM_REG, u64(0) + REGION_BYTES, 0),
        (Request.ADD_MEM_REG, u64(0) + REGION_BYTES, 2),
        (Request.REM_MEM_REG, u64(0) + REGION_BYTES, 2),
        (Request.GET_CONFIG, bytes(11), 0),
        (Request.GET_CONFIG, struct.pack("=III", 0, 4, 0), 0),
        (Request.GET_CONFIG, struct.pack("=III", 0, 0xFFFFFFFF, 0) + bytes(8), 0),
        (Request.SET_BACKEND_REQ_FD, b"", 0),
    ],
)
def test_bad_payloads(request_: Request, payload: bytes, fds: int) -> None:
    with pytest.raises(MessageError, match=request_.name):
        parse(request_, payload, fds)


@given(st.sampled_from(Request), st.binary(max_size=messages.MAX_PAYLOAD), st.integers(0, 9))
def test_any_bytes(request_: Request, payload: bytes, fds: int) -> None:
    """Nothing but a value or a MessageError comes out."""
    with contextlib.suppress(MessageError):
        parse(request_, payload, fds)


def test_answers() -> None:
    assert messages.reply_u64(1, 5) == bytes.fromhex("0100000005000000080000000500000000000000")
    answer = messages.reply_config(24, Config(8, 2, 0, b"ab"))
    assert answer == struct.pack("=IIIIII", 24, 5, 14, 8, 2, 0) + b"ab"
    assert messages.config_changed() == struct.pack("=III", 2, 1, 0)
