# SPDX-License-Identifier: Apache-2.0
"""The server's negotiation over a stream in memory: replies byte by byte, and never a byte read too many."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from target.exports.nbd.handshake import MAX_OPTION, Negotiated, ProtocolError, negotiate
from target.exports.nbd.protocol import (
    CLIENT_FLAGS,
    GREETING,
    OPTION,
    OPTION_REPLY,
    ExportInfo,
    Info,
    Option,
    Reply,
    TransmissionFlag,
    encode_info_request,
    encode_meta_request,
    encode_option,
)

FLAGS = TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FLUSH
DISK = ExportInfo("disk", 1 << 20, FLAGS, "first")
OTHER = ExportInfo("other", 4096, FLAGS)
START = CLIENT_FLAGS.pack(3)
STRUCTURED = encode_option(Option.STRUCTURED_REPLY)


class Exports:
    def infos(self) -> Iterable[ExportInfo]:
        return [DISK, OTHER]

    async def find(self, name: str) -> ExportInfo | None:
        return {"disk": DISK, "other": OTHER}.get(name)


class MemoryStream:
    """What the client sends is all there from the start; what the server sends is kept."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0
        self.written = b""

    async def read_exactly(self, length: int) -> bytes:
        if self.at + length > len(self.data):
            raise EOFError
        self.at += length
        return self.data[self.at - length : self.at]

    async def write(self, data: bytes) -> None:
        self.written += data


def serve(*parts: bytes, start: bytes = START) -> tuple[Negotiated | None, MemoryStream]:
    stream = MemoryStream(start + b"".join(parts))
    return asyncio.run(negotiate(stream, Exports())), stream


def go(name: str = "disk", infos: tuple[int, ...] = (), option: int = Option.GO) -> bytes:
    return encode_option(option, encode_info_request(name, infos))


def replies(stream: MemoryStream) -> list[tuple[int, int, bytes]]:
    """(option, reply type, data) of each reply."""
    found = []
    at = GREETING.size
    while at < len(stream.written):
        magic, option, kind, length = OPTION_REPLY.unpack_from(stream.written, at)
        assert magic == 0x3E889045565A9
        at += OPTION_REPLY.size
        found.append((option, kind, stream.written[at : at + length]))
        at += length
    assert at == len(stream.written)
    return found


def kinds(stream: MemoryStream) -> list[int]:
    return [kind for _, kind, _ in replies(stream)]


def refused(stream: MemoryStream, which: int = 0) -> int:
    """The type of an error reply, which must have a text."""
    _, kind, data = replies(stream)[which]
    assert kind & 0x80000000
    assert data.decode().isprintable() and data
    return kind


def test_go_tells_the_export_and_leaves_what_follows_unread() -> None:
    negotiated, stream = serve(go(), b"pipelined requests")
    assert negotiated == Negotiated(DISK, structured=False, allocation=False)
    assert stream.data[stream.at :] == b"pipelined requests"
    assert stream.written[: GREETING.size] == b"NBDMAGICIHAVEOPT\0\3"
    export = b"\0\0" + (1 << 20).to_bytes(8, "big") + int(FLAGS).to_bytes(2, "big")
    assert replies(stream) == [(7, Reply.INFO, export), (7, Reply.ACK, b"")]


def test_go_with_information_requests_and_unknown_ones() -> None:
    asked = (Info.NAME, Info.BLOCK_SIZE, 999, Info.DESCRIPTION)
    _, stream = serve(go(infos=asked))
    found = {
        int.from_bytes(data[:2], "big"): data[2:] for _, kind, data in replies(stream) if kind == Reply.INFO
    }
    assert found[Info.NAME] == b"disk"
    assert found[Info.DESCRIPTION] == b"first"
    assert found[Info.BLOCK_SIZE].hex() == "00000001" + "00001000" + "02000000"
    assert set(found) == {0, 1, 2, 3}


def test_df_is_offered_only_with_structured_replies() -> None:
    assert not serve(go())[0].export.flags & TransmissionFlag.SEND_DF  # type: ignore[union-attr]
    negotiated, _ = serve(STRUCTURED, go())
    assert negotiated is not None and negotiated.structured
    assert negotiated.export.flags & TransmissionFlag.SEND_DF


@pytest.mark.parametrize(("flags", "zeroes"), [(1, 124), (3, 0)])
def test_export_name_with_and_without_zeroes(flags: int, zeroes: int) -> None:
    negotiated, stream = serve(encode_option(Option.EXPORT_NAME, b"other"), start=CLIENT_FLAGS.pack(flags))
    assert negotiated == Negotiated(OTHER, structured=False, allocation=False)
    expected = (4096).to_bytes(8, "big") + int(FLAGS).to_bytes(2, "big") + bytes(zeroes)
    assert stream.written[GREETING.size :] == expected


def test_export_name_of_a_missing_export_closes() -> None:
    with pytest.raises(ProtocolError, match="'absent'"):
        serve(encode_option(Option.EXPORT_NAME, b"absent"))


def test_go_for_a_missing_export_goes_on() -> None:
    negotiated, stream = serve(go("absent"), go("other"))
    assert refused(stream) == Reply.ERR_UNKNOWN
    assert negotiated is not None and negotiated.export == OTHER


def test_info_does_not_end_the_negotiation_and_may_come_twice() -> None:
    info = go(option=Option.INFO)
    negotiated, stream = serve(info, info, go())
    assert negotiated is not None
    assert kinds(stream) == [Reply.INFO, Reply.ACK] * 3


def test_list() -> None:
    negotiated, stream = serve(encode_option(Option.LIST), encode_option(Option.ABORT))
    assert negotiated is None
    assert replies(stream) == [
        (3, Reply.SERVER, b"\0\0\0\4diskfirst"),
        (3, Reply.SERVER, b"\0\0\0\5other"),
        (3, Reply.ACK, b""),
        (2, Reply.ACK, b""),
    ]


@pytest.mark.parametrize("option", [Option.LIST, Option.STARTTLS, Option.STRUCTURED_REPLY])
def test_data_where_none_belongs(option: Option) -> None:
    _, stream = serve(encode_option(option, b"x"), go())
    assert refused(stream) == Reply.ERR_INVALID


@pytest.mark.parametrize("option", [Option.EXTENDED_HEADERS, 4, 999, 0x7FFFFFFF])
def test_unknown_options_are_skipped_with_their_data(option: int) -> None:
    negotiated, stream = serve(encode_option(option, b"data" * 10), go())
    assert refused(stream) == Reply.ERR_UNSUP
    assert negotiated is not None


def test_starttls_is_refused_each_time() -> None:
    _, stream = serve(encode_option(Option.STARTTLS), encode_option(Option.STARTTLS), go())
    assert [refused(stream, 0), refused(stream, 1)] == [Reply.ERR_POLICY] * 2


def test_structured_reply_twice() -> None:
    negotiated, stream = serve(STRUCTURED, STRUCTURED, go())
    assert kinds(stream)[:2] == [Reply.ACK, Reply.ERR_INVALID]
    assert negotiated is not None and negotiated.structured


def set_meta(name: str, *queries: str, option: int = Option.SET_META_CONTEXT) -> bytes:
    return encode_option(option, encode_meta_request(name, queries))


def test_meta_context_for_the_export_of_go() -> None:
    negotiated, stream = serve(STRUCTURED, set_meta("disk", "base:allocation", "x-unknown:y"), go())
    assert replies(stream)[1] == (10, Reply.META_CONTEXT, b"\0\0\0\1base:allocation")
    assert negotiated is not None and negotiated.allocation


@pytest.mark.parametrize(
    "options",
    [
        [set_meta("other", "base:allocation")],  # for another export than GO's
        [set_meta("disk", "base:allocation"), set_meta("disk")],  # replaced by none
        [set_meta("disk", "base:allocation"), set_meta("disk", "colonless")],  # replaced by a failure
        [set_meta("disk", "base:")],  # no wildcard in SET
        [set_meta("disk", "base:unknown")],
    ],
)
def test_no_meta_context(options: list[bytes]) -> None:
    negotiated, _ = serve(STRUCTURED, *options, go())
    assert negotiated is not None and not negotiated.allocation


@pytest.mark.parametrize("queries", [[], ["base:"], ["base:allocation"], ["base:x", "base:"]])
def test_list_meta_context(queries: list[str]) -> None:
    _, stream = serve(STRUCTURED, set_meta("disk", *queries, option=Option.LIST_META_CONTEXT), go())
    assert replies(stream)[1:3] == [(9, Reply.META_CONTEXT, b"\0\0\0\0base:allocation"), (9, Reply.ACK, b"")]


def test_meta_context_before_structured_replies() -> None:
    _, stream = serve(set_meta("disk", "base:allocation"), go())
    assert refused(stream) == Reply.ERR_INVALID


def test_meta_context_of_a_missing_export() -> None:
    _, stream = serve(STRUCTURED, set_meta("absent", "base:allocation"), go())
    assert refused(stream, 1) == Reply.ERR_UNKNOWN


@pytest.mark.parametrize("flags", [4, 0x80000000, 7])
def test_unknown_client_flags_close(flags: int) -> None:
    with pytest.raises(ProtocolError, match="flags"):
        serve(go(), start=CLIENT_FLAGS.pack(flags))


def test_without_fixed_newstyle_only_export_name_is_understood() -> None:
    with pytest.raises(ProtocolError):
        serve(encode_option(Option.LIST), start=CLIENT_FLAGS.pack(0))


def test_wrong_magic_closes() -> None:
    with pytest.raises(ProtocolError, match="magic"):
        serve(OPTION.pack(0x1234, Option.GO, 0))


@pytest.mark.parametrize("option", [Option.GO, Option.LIST, 999, Option.ABORT])
@pytest.mark.parametrize("length", [0xFFFFFFFF, 64 << 20])
def test_absurd_option_length_closes_at_once(option: int, length: int) -> None:
    with pytest.raises(ProtocolError, match="bytes"):
        serve(OPTION.pack(0x49484156454F5054, option, length))


def test_too_long_an_option_is_dropped_and_refused() -> None:
    negotiated, stream = serve(encode_option(Option.GO, bytes(MAX_OPTION + 1)), go())
    assert refused(stream) == Reply.ERR_TOO_BIG
    assert negotiated is not None


def test_65535_information_requests() -> None:
    """They do not fit into an option that is looked at; the longest that does is answered."""
    most = (MAX_OPTION - 10) // 2
    negotiated, _ = serve(go(infos=tuple([Info.BLOCK_SIZE] * most)))
    assert negotiated is not None


@given(st.binary(max_size=100), st.integers(0, 12))
def test_no_option_data_breaks_the_server(data: bytes, option: int) -> None:
    stream = MemoryStream(START + STRUCTURED + encode_option(option, data) + go())
    with contextlib.suppress(ProtocolError, EOFError):
        asyncio.run(negotiate(stream, Exports()))
