# SPDX-License-Identifier: Apache-2.0
"""The NBD protocol on the wire: constants, and encoding and parsing without any I/O.

Source: doc/proto.md of the NetworkBlockDevice project; names are those of that document. All integers are big
endian. The server's negotiation and the client peer both use it; the transmission phase of the server is C.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag

NBDMAGIC = 0x4E42444D41474943
IHAVEOPT = 0x49484156454F5054
OLDSTYLE_MAGIC = 0x420281861253
REPLY_MAGIC = 0x3E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF
EXTENDED_REQUEST_MAGIC = 0x21E41C71
EXTENDED_REPLY_MAGIC = 0x6E8A278C

# Bound on names, descriptions, queries and messages (bytes).
MAX_STRING = 4096
# Announced bound on the payload of a request (bytes), as QEMU's.
MAX_PAYLOAD = 32 << 20

GREETING = struct.Struct(">QQH")
CLIENT_FLAGS = struct.Struct(">I")
OPTION = struct.Struct(">QII")  # magic, option, length
OPTION_REPLY = struct.Struct(">QIII")  # magic, option, reply type, length
EXPORT_REPLY = struct.Struct(">QH")  # to EXPORT_NAME: size, transmission flags
EXPORT_REPLY_ZEROES = bytes(124)
REQUEST = struct.Struct(">IHHQQI")  # magic, flags, type, cookie, offset, length
SIMPLE_REPLY = struct.Struct(">IIQ")  # magic, error, cookie
CHUNK = struct.Struct(">IHHQI")  # magic, flags, type, cookie, length
EXTENDED_REQUEST = struct.Struct(">IHHQQQ")  # magic, flags, type, cookie, offset, length
EXTENDED_CHUNK = struct.Struct(">IHHQQQ")  # magic, flags, type, cookie, offset, length of the payload
BLOCK_SIZES = struct.Struct(">III")  # in INFO_BLOCK_SIZE: minimum, preferred, maximum payload


class HandshakeFlag(IntFlag):
    FIXED_NEWSTYLE = 1
    NO_ZEROES = 2


class TransmissionFlag(IntFlag):
    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STATUS_PAYLOAD = 1 << 12


class Option(IntEnum):
    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class Reply(IntEnum):
    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 0x80000001
    ERR_POLICY = 0x80000002
    ERR_INVALID = 0x80000003
    ERR_PLATFORM = 0x80000004
    ERR_TLS_REQD = 0x80000005
    ERR_UNKNOWN = 0x80000006
    ERR_SHUTDOWN = 0x80000007
    ERR_BLOCK_SIZE_REQD = 0x80000008
    ERR_TOO_BIG = 0x80000009
    ERR_EXT_HEADER_REQD = 0x8000000A


class Info(IntEnum):
    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class Command(IntEnum):
    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(IntFlag):
    FUA = 1
    NO_HOLE = 2
    DF = 4
    REQ_ONE = 8
    FAST_ZERO = 16
    PAYLOAD_LEN = 32


class ChunkType(IntEnum):
    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = 0x8001
    ERROR_OFFSET = 0x8002


CHUNK_DONE = 1
CHUNK_IS_ERROR = 0x8000


class NbdErrno(IntEnum):
    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


class OptionRefused(Exception):
    """An option that gets an error reply; the negotiation goes on."""

    def __init__(self, reply: Reply, message: str) -> None:
        super().__init__(message)
        self.reply = reply


@dataclass(frozen=True)
class ExportInfo:
    """What a client is told about an export. Sizes in bytes."""

    name: str
    size: int
    flags: TransmissionFlag
    description: str = ""
    minimum_block: int = 1
    preferred_block: int = 4096
    maximum_payload: int = MAX_PAYLOAD


@dataclass(frozen=True)
class InfoRequest:
    """Data of INFO and GO."""

    name: str
    infos: tuple[int, ...]


@dataclass(frozen=True)
class MetaRequest:
    """Data of LIST_META_CONTEXT and SET_META_CONTEXT."""

    name: str
    queries: tuple[str, ...]


class _Parser:
    """Takes fields off the front of an option's data; OptionRefused when there is less than a field wants."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, length: int, what: str) -> bytes:
        if length > len(self.data) - self.at:
            raise OptionRefused(Reply.ERR_INVALID, f"{what} does not fit into the option")
        self.at += length
        return self.data[self.at - length : self.at]

    def uint16(self, what: str) -> int:
        return int.from_bytes(self.take(2, what), "big")

    def uint32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "big")

    def string(self, what: str) -> str:
        length = self.uint32(f"length of the {what}")
        return parse_string(self.take(length, what), what)

    def end(self) -> None:
        if self.at != len(self.data):
            raise OptionRefused(Reply.ERR_INVALID, "option has data past its end")


def parse_string(data: bytes, what: str) -> str:
    """A name or query: at most 4096 bytes of UTF-8 without NUL. OptionRefused."""
    if len(data) > MAX_STRING:
        raise OptionRefused(Reply.ERR_INVALID, f"{what} is longer than {MAX_STRING} bytes")
    if b"\0" in data:
        raise OptionRefused(Reply.ERR_INVALID, f"{what} contains a NUL byte")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise OptionRefused(Reply.ERR_INVALID, f"{what} is not UTF-8") from None


def parse_info_request(data: bytes) -> InfoRequest:
    """OptionRefused when it is malformed."""
    parser = _Parser(data)
    name = parser.string("export name")
    count = parser.uint16("number of information requests")
    infos = tuple(parser.uint16("information request") for _ in range(count))
    parser.end()
    return InfoRequest(name, infos)


def parse_meta_request(data: bytes) -> MetaRequest:
    """OptionRefused when it is malformed. The number of queries is bounded by the option's length."""
    parser = _Parser(data)
    name = parser.string("export name")
    count = parser.uint32("number of queries")
    if count > (len(data) - parser.at) // 4:
        raise OptionRefused(Reply.ERR_INVALID, "queries do not fit into the option")
    queries = tuple(parser.string("query") for _ in range(count))
    parser.end()
    return MetaRequest(name, queries)


def encode_string(text: str) -> bytes:
    data = text.encode()
    return struct.pack(">I", len(data)) + data


def encode_option(option: int, data: bytes = b"") -> bytes:
    return OPTION.pack(IHAVEOPT, option, len(data)) + data


def encode_info_request(name: str, infos: Sequence[int] = ()) -> bytes:
    return encode_string(name) + struct.pack(f">H{len(infos)}H", len(infos), *infos)


def encode_meta_request(name: str, queries: Sequence[str]) -> bytes:
    return encode_string(name) + struct.pack(">I", len(queries)) + b"".join(map(encode_string, queries))


def encode_reply(option: int, reply: int, data: bytes = b"") -> bytes:
    return OPTION_REPLY.pack(REPLY_MAGIC, option, reply, len(data)) + data


def encode_refusal(option: int, refused: OptionRefused) -> bytes:
    text = str(refused).encode()[:MAX_STRING].decode(errors="ignore")  # not a part of a character
    return encode_reply(option, refused.reply, text.encode())


def encode_server(info: ExportInfo) -> bytes:
    """Data of a REP_SERVER."""
    return encode_string(info.name) + info.description.encode()


def encode_info(kind: Info, info: ExportInfo) -> bytes:
    """Data of a REP_INFO."""
    head = struct.pack(">H", kind)
    if kind is Info.EXPORT:
        return head + struct.pack(">QH", info.size, info.flags)
    if kind is Info.NAME:
        return head + info.name.encode()
    if kind is Info.DESCRIPTION:
        return head + info.description.encode()
    return head + BLOCK_SIZES.pack(info.minimum_block, info.preferred_block, info.maximum_payload)


def encode_request(command: int, cookie: int, offset: int, length: int, flags: int = 0) -> bytes:
    return REQUEST.pack(REQUEST_MAGIC, flags, command, cookie, offset, length)
