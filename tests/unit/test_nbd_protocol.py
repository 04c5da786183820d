# SPDX-License-Identifier: Apache-2.0
"""NBD encoding and parsing against bytes written out from the protocol document."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from target.exports.nbd import protocol
from target.exports.nbd.protocol import (
    ExportInfo,
    Info,
    InfoRequest,
    MetaRequest,
    Option,
    OptionRefused,
    Reply,
    TransmissionFlag,
)

INFO = ExportInfo("disk", 0x123456789A, TransmissionFlag.HAS_FLAGS | TransmissionFlag.READ_ONLY, "a disk")
names = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=200)


def test_greeting_is_that_of_the_document() -> None:
    data = protocol.GREETING.pack(protocol.NBDMAGIC, protocol.IHAVEOPT, 3)
    assert data == b"NBDMAGICIHAVEOPT\x00\x03"


def test_request_has_28_bytes_in_the_order_of_the_document() -> None:
    data = protocol.encode_request(protocol.Command.WRITE, 0x1122334455667788, 0x1000, 0x200, flags=1)
    assert data.hex() == "25609513" + "0001" + "0001" + "1122334455667788" + "0000000000001000" + "00000200"


def test_option_and_its_reply() -> None:
    assert protocol.encode_option(Option.LIST).hex() == "49484156454f5054" + "00000003" + "00000000"
    refused = OptionRefused(Reply.ERR_UNKNOWN, "no")
    data = protocol.encode_refusal(Option.GO, refused)
    assert data.hex() == "0003e889045565a9" + "00000007" + "80000006" + "00000002" + b"no".hex()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Info.EXPORT, "0000" + "000000123456789a" + "0003"),
        (Info.NAME, "0001" + b"disk".hex()),
        (Info.DESCRIPTION, "0002" + b"a disk".hex()),
        (Info.BLOCK_SIZE, "0003" + "00000001" + "00001000" + "02000000"),
    ],
)
def test_information(kind: Info, expected: str) -> None:
    assert protocol.encode_info(kind, INFO).hex() == expected


def test_server_entry_has_name_and_description() -> None:
    assert protocol.encode_server(INFO) == b"\0\0\0\4diska disk"


@given(names, st.lists(st.integers(0, 0xFFFF), max_size=20))
def test_info_request_round_trip(name: str, infos: list[int]) -> None:
    data = protocol.encode_info_request(name, infos)
    assert protocol.parse_info_request(data) == InfoRequest(name, tuple(infos))


@given(names, st.lists(names, max_size=10))
def test_meta_request_round_trip(name: str, queries: list[str]) -> None:
    data = protocol.encode_meta_request(name, queries)
    assert protocol.parse_meta_request(data) == MetaRequest(name, tuple(queries))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0",
        b"\0\0\0\5disk\0\0",  # the name is longer than the option
        b"\xff\xff\xff\xffdisk\0\0",
        b"\0\0\0\4disk",  # no number of requests
        b"\0\0\0\4disk\xff\xff\0\3",  # 65535 requests announced, one sent
        b"\0\0\0\4disk\0\0\0",  # data past the end
        b"\0\0\0\4d\0sk\0\0",
        b"\0\0\0\4\xff\xfesk\0\0",
        struct.pack(">I", 4097) + bytes(4097).replace(b"\0", b"n") + b"\0\0",
    ],
)
def test_malformed_info_request(data: bytes) -> None:
    with pytest.raises(OptionRefused) as refused:
        protocol.parse_info_request(data)
    assert refused.value.reply is Reply.ERR_INVALID


@pytest.mark.parametrize(
    "data",
    [
        b"\0\0\0\4disk",
        b"\0\0\0\4disk\xff\xff\xff\xff",  # 2^32-1 queries
        b"\0\0\0\4disk\0\0\0\1\0\0\0\x09base:",  # a query past the end
        b"\0\0\0\4disk\0\0\0\2\0\0\0\5base:",
        b"\0\0\0\4disk\0\0\0\1\0\0\0\5base:x",
    ],
)
def test_malformed_meta_request(data: bytes) -> None:
    with pytest.raises(OptionRefused) as refused:
        protocol.parse_meta_request(data)
    assert refused.value.reply is Reply.ERR_INVALID


@given(st.binary(max_size=200))
def test_any_bytes_parse_or_are_refused(data: bytes) -> None:
    for parse in (protocol.parse_info_request, protocol.parse_meta_request):
        with contextlib.suppress(OptionRefused):
            parse(data)
