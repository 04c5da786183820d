# SPDX-License-Identifier: Apache-2.0
"""Fuzz target: the nbd driver's part of the handshake with any server, and its URIs.

Only BlockError and EOFError may come out, and no message is long. The client takes only so much, and what it
has negotiated is what the datapath may be given. Input: one byte of mode; then a URI, or replies with their
magic, option and length made up, or raw bytes.
"""

from __future__ import annotations

import struct

import atheris

from tests.fuzz.python.common import Input, finish, main

with atheris.instrument_imports(include=["target.drivers.protocol.nbd"]):
    from target.connecting import InetPeer, UnixPeer
    from target.drivers.protocol.nbd.negotiate import (
        MAX_BLOCK,
        MAX_PAYLOAD,
        MAX_REPLIES,
        MAX_REPLY,
        MAX_SIZE,
        Link,
        negotiate,
    )
    from target.drivers.protocol.nbd.options import Place, parse_uri
    from target.exports.address import FdAddress
    from target.exports.nbd.protocol import GREETING, IHAVEOPT, NBDMAGIC, Option, Reply, encode_reply
    from target.graph.errors import BlockError

OPTIONS = (Option.EXTENDED_HEADERS, Option.STRUCTURED_REPLY, Option.SET_META_CONTEXT, Option.GO)
REPLIES = (*Reply, 0, 5, 0x80000063)
MOST = 8 * MAX_REPLIES * (MAX_REPLY + 64)
LONGEST = 20_000  # characters of a message


class Stream:
    """All that the server sends is there from the start."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0
        self.written = 0

    async def read_exactly(self, length: int) -> bytes:
        assert 0 <= length <= MAX_REPLY
        if self.at + length > len(self.data):
            raise EOFError
        self.at += length
        assert self.at <= MOST
        return self.data[self.at - length : self.at]

    async def write(self, data: bytes) -> None:
        self.written += len(data)
        assert self.written < 100_000


def infos(input: Input) -> bytes:
    """Data of a reply: an INFO that makes sense in part, a context, or any bytes."""
    kind = input.number()
    if kind < 0x40:
        return struct.pack(">HQH", 0, input.number(8), input.number(2))
    if kind < 0x80:
        sizes = [1 << input.number() % 33 for _ in range(3)]
        return struct.pack(">HIII", 3, *(min(size, 0xFFFFFFFF) for size in sizes))
    if kind < 0xA0:
        return struct.pack(">I", input.number(4)) + b"base:allocation"
    return input.take(input.number())


def sent(input: Input, mode: int) -> bytes:
    """What the server says."""
    if mode & 0x40:
        return input.rest()
    parts = [GREETING.pack(NBDMAGIC, IHAVEOPT, mode & 3)]
    while input.left:
        choice = input.number()
        option = OPTIONS[choice & 3]
        reply = REPLIES[choice >> 2 & 15]
        if choice & 0x80:
            parts.append(input.take(input.number()))
        else:
            parts.append(encode_reply(option, reply, infos(input) if input.number() & 1 else b""))
    return b"".join(parts)


def check_link(link: Link) -> None:
    """As bt_nbdc_attach and bt_nbdc_new want it."""
    assert 0 <= link.size <= MAX_SIZE
    assert 0 < link.block <= MAX_BLOCK and link.block & (link.block - 1) == 0
    assert 0 < link.max_payload <= MAX_PAYLOAD and link.max_payload % link.block == 0
    assert link.context_id is None or (0 <= link.context_id < 1 << 32 and link.mode)


def check_place(place: Place) -> None:
    """A server that a socket may be tried for."""
    if isinstance(place.server, UnixPeer):
        assert place.server.path
    else:
        assert not isinstance(place.server, FdAddress)
        assert place.server.port.isdecimal() and int(place.server.port) < 1 << 32
        assert not isinstance(place.server, InetPeer) or place.server.host


def test_one_input(data: bytes) -> None:
    input = Input(data)
    mode = input.number()
    try:
        if mode & 0x80:
            check_place(parse_uri(input.rest().decode(errors="surrogateescape")))
            return
        bitmap = "qemu:dirty-bitmap:b" if mode & 0x20 else None
        check_link(finish(negotiate(Stream(sent(input, mode)), "disk", bitmap)))
    except BlockError as error:
        assert 0 < len(str(error)) < LONGEST
    except EOFError:
        pass


if __name__ == "__main__":
    main(test_one_input)
