# SPDX-License-Identifier: Apache-2.0
"""The fixed newstyle negotiation, server side, over an abstract stream of bytes.

It never reads past what the client has to send next, so that requests pipelined behind GO stay in the socket
for the transmission phase. Time and connections are bounded by the caller. TLS is not built: STARTTLS is
refused.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

from target.exports.nbd.protocol import (
    CLIENT_FLAGS,
    EXPORT_REPLY,
    EXPORT_REPLY_ZEROES,
    GREETING,
    IHAVEOPT,
    NBDMAGIC,
    OPTION,
    ExportInfo,
    HandshakeFlag,
    Info,
    InfoRequest,
    Option,
    OptionRefused,
    Reply,
    TransmissionFlag,
    encode_info,
    encode_refusal,
    encode_reply,
    encode_server,
    parse_info_request,
    parse_meta_request,
    parse_string,
)

# The longest option data that is looked at, and that is read and dropped; more ends the connection (bytes).
MAX_OPTION = 64 << 10
MAX_DROPPED = 1 << 20

ALLOCATION = "base:allocation"
ALLOCATION_ID = 1


class Stream(Protocol):
    """Bytes to and from a client."""

    async def read_exactly(self, length: int) -> bytes:
        """Exactly length bytes, and not one more is taken. EOFError when the client has closed."""

    async def write(self, data: bytes) -> None: ...


class Exports(Protocol):
    """The exports that a client may see."""

    def infos(self) -> Iterable[ExportInfo]: ...

    async def find(self, name: str) -> ExportInfo | None:
        """The export of this name; the empty name may stand for a default one."""


class ProtocolError(Exception):
    """The client broke the protocol, or the rules leave no way to answer: the connection must be closed."""


@dataclass(frozen=True)
class Negotiated:
    """What transmission begins with."""

    export: ExportInfo
    structured: bool
    allocation: bool
    """base:allocation was selected, with the id ALLOCATION_ID"""


Handler = Callable[["Handshake", int, bytes], Awaitable[Negotiated | None]]


class Handshake:
    """One client's negotiation; ``run`` does it."""

    def __init__(self, stream: Stream, exports: Exports) -> None:
        self.stream = stream
        self.exports = exports
        self.client_flags = HandshakeFlag(0)
        self.structured = False
        self.contexts_of: str | None = None  # the export for which base:allocation is selected

    async def run(self) -> Negotiated | None:
        """None when the client gave up properly. ProtocolError, EOFError, OSError."""
        flags = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
        await self.stream.write(GREETING.pack(NBDMAGIC, IHAVEOPT, flags))
        (raw,) = CLIENT_FLAGS.unpack(await self.stream.read_exactly(CLIENT_FLAGS.size))
        if raw & ~int(flags):
            raise ProtocolError(f"unknown client flags {raw:#x}")
        self.client_flags = HandshakeFlag(raw)
        while True:
            magic, option, length = OPTION.unpack(await self.stream.read_exactly(OPTION.size))
            if magic != IHAVEOPT:
                raise ProtocolError("wrong magic of an option")
            if option == Option.ABORT:
                await self._drop(length)
                await self.reply(option, Reply.ACK)
                return None
            done = await self._option(option, length)
            if done is not None:
                return done

    async def _option(self, option: int, length: int) -> Negotiated | None:
        handler = HANDLERS.get(option)
        if option != Option.EXPORT_NAME and not self.client_flags & HandshakeFlag.FIXED_NEWSTYLE:
            raise ProtocolError("only EXPORT_NAME goes without fixed newstyle")
        try:
            if handler is None:
                await self._drop(length)
                raise OptionRefused(Reply.ERR_UNSUP, f"option {option} is not supported")
            if length > MAX_OPTION:
                await self._drop(length)
                raise OptionRefused(Reply.ERR_TOO_BIG, f"option is longer than {MAX_OPTION} bytes")
            return await handler(self, option, await self.stream.read_exactly(length))
        except OptionRefused as refused:
            if option == Option.EXPORT_NAME:
                raise ProtocolError(str(refused)) from None  # it has no reply for errors
            await self.stream.write(encode_refusal(option, refused))
            return None

    async def _drop(self, length: int) -> None:
        if length > MAX_DROPPED:
            raise ProtocolError(f"option of {length} bytes")
        while length:
            length -= len(await self.stream.read_exactly(min(length, MAX_OPTION)))

    async def reply(self, option: int, reply: Reply, data: bytes = b"") -> None:
        await self.stream.write(encode_reply(option, reply, data))

    async def find(self, name: str) -> ExportInfo:
        """OptionRefused when there is no such export."""
        info = await self.exports.find(name)
        if info is None:
            raise OptionRefused(Reply.ERR_UNKNOWN, f"export '{name}' is not present")
        return info

    def shown(self, info: ExportInfo) -> ExportInfo:
        """As this client may use it: DF needs structured replies."""
        return replace(info, flags=info.flags | TransmissionFlag.SEND_DF) if self.structured else info

    def negotiated(self, info: ExportInfo) -> Negotiated:
        return Negotiated(self.shown(info), self.structured, self.contexts_of == info.name)

    def want_no_data(self, data: bytes) -> None:
        if data:
            raise OptionRefused(Reply.ERR_INVALID, "option takes no data")


async def _export_name(self: Handshake, option: int, data: bytes) -> Negotiated:
    info = await self.find(parse_string(data, "export name"))
    zeroes = b"" if self.client_flags & HandshakeFlag.NO_ZEROES else EXPORT_REPLY_ZEROES
    await self.stream.write(EXPORT_REPLY.pack(info.size, self.shown(info).flags) + zeroes)
    return self.negotiated(info)


async def _list(self: Handshake, option: int, data: bytes) -> None:
    self.want_no_data(data)
    for info in list(self.exports.infos()):
        await self.reply(option, Reply.SERVER, encode_server(info))
    await self.reply(option, Reply.ACK)


async def _starttls(self: Handshake, option: int, data: bytes) -> None:
    self.want_no_data(data)
    raise OptionRefused(Reply.ERR_POLICY, "TLS is not configured")


async def _structured_reply(self: Handshake, option: int, data: bytes) -> None:
    self.want_no_data(data)
    if self.structured:
        raise OptionRefused(Reply.ERR_INVALID, "structured replies are negotiated already")
    self.structured = True
    await self.reply(option, Reply.ACK)


def _info_replies(self: Handshake, option: int, request: InfoRequest, info: ExportInfo) -> bytes:
    """All replies in one: what was asked for, and the name when it is another than asked for."""
    shown = self.shown(info)
    kinds = [Info.EXPORT]
    if Info.NAME in request.infos or request.name != info.name:
        kinds.append(Info.NAME)
    if Info.DESCRIPTION in request.infos and info.description:
        kinds.append(Info.DESCRIPTION)
    if Info.BLOCK_SIZE in request.infos:
        kinds.append(Info.BLOCK_SIZE)
    return b"".join(encode_reply(option, Reply.INFO, encode_info(kind, shown)) for kind in kinds)


async def _info(self: Handshake, option: int, data: bytes) -> None:
    request = parse_info_request(data)
    replies = _info_replies(self, option, request, await self.find(request.name))
    await self.stream.write(replies + encode_reply(option, Reply.ACK))


async def _go(self: Handshake, option: int, data: bytes) -> Negotiated:
    request = parse_info_request(data)
    info = await self.find(request.name)
    replies = _info_replies(self, option, request, info)
    await self.stream.write(replies + encode_reply(option, Reply.ACK))
    return self.negotiated(info)


def _check_query(query: str) -> None:
    if ":" not in query:
        raise OptionRefused(Reply.ERR_INVALID, "query has no namespace")


async def _list_meta_context(self: Handshake, option: int, data: bytes) -> None:
    request = parse_meta_request(data)
    if not self.structured:
        raise OptionRefused(Reply.ERR_INVALID, "structured replies come first")
    await self.find(request.name)
    for query in request.queries:
        _check_query(query)
    if not request.queries or {"base:", ALLOCATION} & set(request.queries):
        await self.reply(option, Reply.META_CONTEXT, bytes(4) + ALLOCATION.encode())
    await self.reply(option, Reply.ACK)


async def _set_meta_context(self: Handshake, option: int, data: bytes) -> None:
    self.contexts_of = None  # even when this option fails
    request = parse_meta_request(data)
    if not self.structured:
        raise OptionRefused(Reply.ERR_INVALID, "structured replies come first")
    info = await self.find(request.name)
    for query in request.queries:
        _check_query(query)
    if ALLOCATION in request.queries:
        self.contexts_of = info.name
        identity = ALLOCATION_ID.to_bytes(4, "big")
        await self.reply(option, Reply.META_CONTEXT, identity + ALLOCATION.encode())
    await self.reply(option, Reply.ACK)


HANDLERS: dict[int, Handler] = {
    Option.EXPORT_NAME: _export_name,
    Option.LIST: _list,
    Option.STARTTLS: _starttls,
    Option.INFO: _info,
    Option.GO: _go,
    Option.STRUCTURED_REPLY: _structured_reply,
    Option.LIST_META_CONTEXT: _list_meta_context,
    Option.SET_META_CONTEXT: _set_meta_context,
}


async def negotiate(stream: Stream, exports: Exports) -> Negotiated | None:
    """A client's negotiation. None when it gave up properly; ProtocolError, EOFError or OSError otherwise."""
    return await Handshake(stream, exports).run()
