# SPDX-License-Identifier: Apache-2.0
"""The client's negotiation over a stream in memory: what each kind of server leads to, what is refused."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from target.datapath import lib
from target.drivers.protocol.nbd.negotiate import MAX_PAYLOAD, Link, negotiate
from target.exports.nbd.protocol import (
    BLOCK_SIZES,
    EXPORT_REPLY,
    GREETING,
    IHAVEOPT,
    NBDMAGIC,
    OLDSTYLE_MAGIC,
    OPTION,
    OPTION_REPLY,
    REPLY_MAGIC,
    Info,
    Option,
    Reply,
    TransmissionFlag,
)
from target.graph.errors import BlockError

FLAGS = TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FLUSH
MIB = 1 << 20
GREETED = GREETING.pack(NBDMAGIC, IHAVEOPT, 3)


class Scripted:
    """Gives the bytes of a script; what the client writes is kept. Asking for more is the end."""

    def __init__(self, *parts: bytes) -> None:
        self.data = b"".join(parts)
        self.written = b""

    async def read_exactly(self, length: int) -> bytes:
        if length > len(self.data):
            raise EOFError
        part, self.data = self.data[:length], self.data[length:]
        return part

    async def write(self, data: bytes) -> None:
        self.written += data


def reply(option: int, kind: int, data: bytes = b"", magic: int = REPLY_MAGIC) -> bytes:
    return OPTION_REPLY.pack(magic, option, kind, len(data)) + data


def ack(option: int) -> bytes:
    return reply(option, Reply.ACK)


def unsupported(option: int) -> bytes:
    return reply(option, Reply.ERR_UNSUP, b"no")


def export(size: int = MIB, flags: int = FLAGS) -> bytes:
    return struct.pack(">H", Info.EXPORT) + EXPORT_REPLY.pack(size, flags)


def blocks(minimum: int, preferred: int, maximum: int) -> bytes:
    return struct.pack(">H", Info.BLOCK_SIZE) + BLOCK_SIZES.pack(minimum, preferred, maximum)


def gone(*infos: bytes) -> bytes:
    return b"".join(reply(Option.GO, Reply.INFO, info) for info in infos) + ack(Option.GO)


def context(number: int, name: bytes = b"base:allocation") -> bytes:
    return reply(Option.SET_META_CONTEXT, Reply.META_CONTEXT, struct.pack(">I", number) + name)


EXTENDED = ack(Option.EXTENDED_HEADERS)
STRUCTURED = unsupported(Option.EXTENDED_HEADERS) + ack(Option.STRUCTURED_REPLY)
SIMPLE = unsupported(Option.EXTENDED_HEADERS) + unsupported(Option.STRUCTURED_REPLY)
META = context(5) + ack(Option.SET_META_CONTEXT)
NO_META = ack(Option.SET_META_CONTEXT)


def run(stream: Scripted, name: str = "disk", bitmap: str | None = None) -> Link:
    """Nothing here has to wait, so no loop is needed."""
    try:
        negotiate(stream, name, bitmap).send(None)
    except StopIteration as ended:
        link: Link = ended.value
        return link
    raise AssertionError("the negotiation waits")


def asked(written: bytes) -> list[tuple[int, bytes]]:
    """Options that the client has sent."""
    found = []
    at = 4
    while at < len(written):
        magic, option, length = OPTION.unpack_from(written, at)
        assert magic == IHAVEOPT
        found.append((option, written[at + 16 : at + 16 + length]))
        at += 16 + length
    return found


# ---- proper servers ----


def test_everything_at_best() -> None:
    stream = Scripted(GREETED, EXTENDED, META, gone(export(), blocks(4096, 65536, 1 << 20)), b"rest")
    link = run(stream)
    assert link == Link(MIB, FLAGS, lib.BT_NBDC_EXTENDED, 5, False, 4096, 1 << 20)
    assert stream.data == b"rest"
    options = asked(stream.written)
    assert [option for option, _ in options] == [
        Option.EXTENDED_HEADERS,
        Option.SET_META_CONTEXT,
        Option.GO,
    ]
    assert options[1][1] == b"\0\0\0\4disk\0\0\0\1\0\0\0\x0fbase:allocation"
    assert options[2][1] == b"\0\0\0\4disk\0\1\0\3"
    assert stream.written[:4] == b"\0\0\0\3"


def test_structured_without_contexts() -> None:
    link = run(Scripted(GREETED, STRUCTURED, NO_META, gone(export())))
    assert (link.mode, link.context_id, link.block) == (lib.BT_NBDC_STRUCTURED, None, 512)


def test_simple_replies_ask_for_no_context() -> None:
    stream = Scripted(GREETED, SIMPLE, gone(export(1000)))
    link = run(stream)
    assert (link.mode, link.size, link.block) == (lib.BT_NBDC_SIMPLE, 1000, 1)
    assert Option.SET_META_CONTEXT not in [option for option, _ in asked(stream.written)]


def test_a_server_without_go() -> None:
    stream = Scripted(GREETED, STRUCTURED, META, unsupported(Option.GO), EXPORT_REPLY.pack(MIB, FLAGS), b"x")
    link = run(stream)
    assert (link.size, link.flags, link.context_id, stream.data) == (MIB, FLAGS, 5, b"x")
    assert asked(stream.written)[-1] == (Option.EXPORT_NAME, b"disk")


@pytest.mark.parametrize("zeroes", [True, False])
def test_newstyle_that_is_not_fixed(zeroes: bool) -> None:
    greeting = GREETING.pack(NBDMAGIC, IHAVEOPT, 0 if zeroes else 2)
    stream = Scripted(greeting, EXPORT_REPLY.pack(MIB, FLAGS), bytes(124) if zeroes else b"", b"x")
    assert run(stream) == Link(MIB, FLAGS, block=512)
    assert stream.data == b"x" and stream.written[:4] == struct.pack(">I", 0 if zeroes else 2)


def test_oldstyle() -> None:
    data = struct.pack(">QQQI", NBDMAGIC, OLDSTYLE_MAGIC, MIB, FLAGS) + bytes(124)
    stream = Scripted(data, b"x")
    assert run(stream, "") == Link(MIB, FLAGS, block=512)
    assert (stream.data, stream.written) == (b"x", b"")
    with pytest.raises(BlockError, match="non-empty export names"):
        run(Scripted(data), "disk")


def test_dirty_bitmap() -> None:
    name = "qemu:dirty-bitmap:day"
    replies = context(7, name.encode()) + ack(Option.SET_META_CONTEXT)
    stream = Scripted(GREETED, STRUCTURED, replies, gone(export()))
    link = run(stream, bitmap=name)
    assert (link.context_id, link.depth) == (7, False)
    assert asked(stream.written)[2][1].endswith(name.encode())
    depth = "qemu:allocation-depth"
    replies = context(7, depth.encode()) + ack(Option.SET_META_CONTEXT)
    assert run(Scripted(GREETED, STRUCTURED, replies, gone(export())), bitmap=depth).depth


@pytest.mark.parametrize(
    "replies",
    [SIMPLE, STRUCTURED + NO_META, STRUCTURED + unsupported(Option.SET_META_CONTEXT)],
)
def test_dirty_bitmap_that_is_not_there(replies: bytes) -> None:
    with pytest.raises(BlockError, match="requested x-dirty-bitmap b not found"):
        run(Scripted(GREETED, replies, gone(export())), bitmap="b")


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ((1, 4096, 0xFFFFFFFF), (MIB, 1, MAX_PAYLOAD)),
        ((512, 512, 1000), (MIB, 512, 512)),
        ((65536, 65536, 65536), (MIB, 65536, 65536)),
    ],
)
def test_block_sizes(told: tuple[int, int, int], expected: tuple[int, int, int]) -> None:
    link = run(Scripted(GREETED, STRUCTURED, META, gone(blocks(*told), export())))
    assert (link.size, link.block, link.max_payload) == expected


def test_a_size_of_which_the_end_cannot_be_reached_is_refused() -> None:
    with pytest.raises(BlockError, match="10000 bytes, no multiple of its minimum block of 4096"):
        run(Scripted(GREETED, STRUCTURED, META, gone(export(10_000), blocks(4096, 4096, 4096))))


# ---- servers that refuse ----


@pytest.mark.parametrize(
    ("replies", "words"),
    [
        (reply(Option.EXTENDED_HEADERS, Reply.ERR_TLS_REQD), "wants TLS, which is not built"),
        (reply(Option.EXTENDED_HEADERS, Reply.ERR_SHUTDOWN), "shutting down"),
        (
            STRUCTURED + META + reply(Option.GO, Reply.ERR_UNKNOWN, b"ask\nlater"),
            r"'disk' is not there \(ask\\n",
        ),
        (STRUCTURED + META + reply(Option.GO, Reply.ERR_POLICY), "policy"),
        (STRUCTURED + META + reply(Option.GO, 0x80001234), "error 0x80001234"),
        (EXTENDED + META + unsupported(Option.GO), "option GO"),
        (STRUCTURED + META + unsupported(Option.GO), "'disk' is not there: the server closed"),
    ],
)
def test_refusals(replies: bytes, words: str) -> None:
    with pytest.raises(BlockError, match=words):
        run(Scripted(GREETED, replies))


# ---- servers that break the protocol ----


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH_9.2p1",
        GREETING.pack(NBDMAGIC, 1, 3),
        GREETED + reply(Option.EXTENDED_HEADERS, Reply.ACK, magic=1),
        GREETED + ack(Option.STRUCTURED_REPLY),
        GREETED + OPTION_REPLY.pack(REPLY_MAGIC, Option.EXTENDED_HEADERS, Reply.ACK, 1 << 31),
        GREETED + reply(Option.EXTENDED_HEADERS, Reply.ACK, b"x"),
        GREETED + reply(Option.EXTENDED_HEADERS, Reply.INFO),
        GREETED + STRUCTURED + context(5, b"base:other") + ack(Option.SET_META_CONTEXT),
        GREETED + STRUCTURED + context(5) + context(6) + ack(Option.SET_META_CONTEXT),
        GREETED + STRUCTURED + reply(Option.SET_META_CONTEXT, Reply.META_CONTEXT, b"abc"),
        GREETED + STRUCTURED + META + ack(Option.GO),
        GREETED + STRUCTURED + META + gone(export()[:-1]),
        GREETED + STRUCTURED + META + gone(b"x"),
        GREETED + STRUCTURED + META + gone(export(1 << 63)),
        GREETED + STRUCTURED + META + gone(export((1 << 63) - 511)),
        GREETED + STRUCTURED + META + gone(export(), blocks(3, 4096, 4096)),
        GREETED + STRUCTURED + META + gone(export(), blocks(0, 4096, 4096)),
        GREETED + STRUCTURED + META + gone(export(), blocks(131072, 131072, 1 << 20)),
        GREETED + STRUCTURED + META + gone(export(), blocks(4096, 512, 4096)),
        GREETED + STRUCTURED + META + gone(export(), blocks(4096, 5000, 8192)),
        GREETED + STRUCTURED + META + gone(export(), blocks(4096, 4096, 512)),
        GREETED + STRUCTURED + META + gone(export(), blocks(1, 1, 1)[:-1]),
        GREETED + STRUCTURED + META + reply(Option.GO, Reply.INFO, bytes([0, 9])) * 300,
    ],
)
def test_nonsense(data: bytes) -> None:
    with pytest.raises(BlockError, match="broke the protocol"):
        run(Scripted(data, bytes(200)))


@settings(deadline=None)
@given(st.binary(max_size=400), st.integers(0, 3))
def test_any_bytes_end_in_a_link_or_an_error(data: bytes, start: int) -> None:
    stages = (b"", GREETED, GREETED + STRUCTURED, GREETED + EXTENDED + META)
    try:
        link = run(Scripted(stages[start], data))
    except (BlockError, EOFError):
        return
    assert link.max_payload % link.block == 0 and link.size < 1 << 63


@pytest.mark.parametrize("length", range(0, 190, 7))
def test_a_server_that_stops_anywhere(length: int) -> None:
    whole = GREETED + STRUCTURED + META + gone(export(), blocks(1, 1, 4096))
    with pytest.raises((EOFError, BlockError)):
        run(Scripted(whole[: min(length, len(whole) - 1)]))
