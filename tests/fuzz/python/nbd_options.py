# SPDX-License-Identifier: Apache-2.0
"""Fuzz target: an NBD client's part of the handshake, over a stream in memory.

Only ProtocolError and EOFError may come out. What the server says must be well formed: each option that is
answered gets replies of its own and one final one, no reply is long, and not a byte is read that the client
did not have to send. Input: one byte of mode, then options with their magic and length made up, or raw bytes.
"""

from __future__ import annotations

import contextlib

import atheris

from tests.fuzz.python.common import Input, finish, main

with atheris.instrument_imports(include=["target.exports.nbd"]):
    from target.exports.nbd.handshake import (
        MAX_DROPPED,
        MAX_OPTION,
        Negotiated,
        ProtocolError,
        negotiate,
    )
    from target.exports.nbd.protocol import (
        CLIENT_FLAGS,
        EXPORT_REPLY,
        GREETING,
        OPTION_REPLY,
        REPLY_MAGIC,
        ExportInfo,
        Option,
        Reply,
        TransmissionFlag,
        encode_option,
    )

FLAGS = TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FLUSH
INFOS = [
    ExportInfo("disk", 1 << 20, FLAGS, "first"),
    ExportInfo("\N{LATIN SMALL LETTER E WITH ACUTE}" * 2048, 4096, FLAGS, "d" * 4096),
    ExportInfo("", 1 << 62, FLAGS),
]
LONGEST = 2 * (2 * 4096 + 64)  # of one reply's data


class Exports:
    def infos(self) -> list[ExportInfo]:
        return INFOS

    async def find(self, name: str) -> ExportInfo | None:
        return next((info for info in INFOS if info.name == name), None)


class Stream:
    """All that the client sends is there from the start."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0
        self.options = 0
        self.written = bytearray()

    async def read_exactly(self, length: int) -> bytes:
        assert 0 <= length <= max(MAX_OPTION, MAX_DROPPED)
        if self.at + length > len(self.data):
            raise EOFError
        self.at += length
        return self.data[self.at - length : self.at]

    async def write(self, data: bytes) -> None:
        self.written += data


def sent(input: Input) -> bytes:
    """Client flags and options; or, where the mode says so, bytes as they are."""
    mode = input.number()
    if mode & 0x80:
        return input.rest()
    parts = [CLIENT_FLAGS.pack(mode & 7)]
    while input.left:
        option = input.number()
        length = input.number(2) if option & 0x80 else input.number()
        parts.append(encode_option(option & 0x0F, input.take(length)))
    return b"".join(parts)


def check_replies(stream: Stream, negotiated: Negotiated | None) -> None:
    """Every byte that the server sent belongs to a reply."""
    written, at = stream.written, GREETING.size
    while at < len(written) and written[at : at + 8] == REPLY_MAGIC.to_bytes(8, "big"):
        _, option, kind, length = OPTION_REPLY.unpack_from(written, at)
        assert length <= LONGEST, length
        assert kind in {int(reply) for reply in Reply}
        assert kind != Reply.SERVER or option == Option.LIST
        at += OPTION_REPLY.size + length
    left = len(written) - at
    assert left == 0 or (negotiated is not None and left in (EXPORT_REPLY.size, EXPORT_REPLY.size + 124))


def test_one_input(data: bytes) -> None:
    stream = Stream(sent(Input(data)))
    negotiated = None
    with contextlib.suppress(ProtocolError, EOFError):
        negotiated = finish(negotiate(stream, Exports()))
    if negotiated is not None:
        assert negotiated.export.name in {info.name for info in INFOS}
        assert not negotiated.allocation or negotiated.structured
    check_replies(stream, negotiated)


if __name__ == "__main__":
    main(test_one_input)
