# SPDX-License-Identifier: Apache-2.0
"""A raw NBD client: sends any bytes, options and requests, as wrong as a test wants; returns what comes back.

It keeps no rules and no state of requests; nbd_client.py is the proper client on top of it. No TLS, no
extended headers.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from target.exports.nbd.protocol import (
    CHUNK,
    CHUNK_DONE,
    CHUNK_IS_ERROR,
    CLIENT_FLAGS,
    EXPORT_REPLY,
    GREETING,
    IHAVEOPT,
    NBDMAGIC,
    OPTION_REPLY,
    REPLY_MAGIC,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    HandshakeFlag,
    Info,
    Option,
    Reply,
    TransmissionFlag,
    encode_info_request,
    encode_meta_request,
    encode_option,
    encode_request,
)

Address = str | tuple[str, int]
"""the path of a unix socket, or host and port"""

CLIENT_FLAGS_ALL = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
MAX_CHUNK = (64 << 20) + 64


class ServerError(Exception):
    """The server broke the protocol."""


class OptionFailed(Exception):
    """The server refused an option."""

    def __init__(self, reply: int, message: str) -> None:
        super().__init__(f"{reply:#x}: {message}")
        self.reply = reply


@dataclass(frozen=True)
class OptionReply:
    option: int
    type: int
    data: bytes

    @property
    def is_error(self) -> bool:
        return bool(self.type & 0x80000000)


@dataclass(frozen=True)
class Chunk:
    """One message of the server: a structured reply chunk, or a simple reply (type None, error set)."""

    cookie: int
    type: int | None
    done: bool
    payload: bytes = b""
    error: int = 0


@dataclass(frozen=True)
class Export:
    """What the server told at the end of the handshake."""

    size: int
    flags: TransmissionFlag
    name: str | None = None
    description: str | None = None
    block_sizes: tuple[int, int, int] | None = None
    """minimum, preferred, maximum payload"""


class RawClient:
    """A connection and the messages on it, with no rules. EOFError when the server closes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.structured = False

    @classmethod
    async def connect(cls, address: Address) -> RawClient:
        if isinstance(address, str):
            return cls(*await asyncio.open_unix_connection(sock=await _connect_unix(address)))
        return cls(*await asyncio.open_connection(*address))

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(OSError):  # the server was first
            await self.writer.wait_closed()

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def receive(self, length: int) -> bytes:
        try:
            return await self.reader.readexactly(length)
        except asyncio.IncompleteReadError as error:
            raise EOFError(f"server closed after {len(error.partial)} of {length} bytes") from None

    async def at_end(self) -> bool:
        """Waits for the server to close; False when it sends something instead."""
        try:
            return await self.reader.read(1) == b""
        except OSError:
            return True

    # ---- handshake ----

    async def greet(self, flags: int = CLIENT_FLAGS_ALL) -> HandshakeFlag:
        """Takes the greeting and answers with client flags."""
        magic, style, handshake_flags = GREETING.unpack(await self.receive(GREETING.size))
        if (magic, style) != (NBDMAGIC, IHAVEOPT):
            raise ServerError("greeting is not newstyle")
        await self.send(CLIENT_FLAGS.pack(flags))
        return HandshakeFlag(handshake_flags)

    async def option_reply(self) -> OptionReply:
        magic, option, kind, length = OPTION_REPLY.unpack(await self.receive(OPTION_REPLY.size))
        if magic != REPLY_MAGIC:
            raise ServerError(f"magic {magic:#x} of an option reply")
        return OptionReply(option, kind, await self.receive(length))

    async def option(self, option: int, data: bytes = b"") -> list[OptionReply]:
        """Sends an option; all replies, the final one last. Nothing is raised for an error reply."""
        await self.send(encode_option(option, data))
        replies = []
        while True:
            reply = await self.option_reply()
            replies.append(reply)
            if reply.option != option:
                raise ServerError(f"reply to option {reply.option}, not {option}")
            if reply.is_error or reply.type == Reply.ACK:
                return replies

    async def good_option(self, option: int, data: bytes = b"") -> list[OptionReply]:
        """As option, without the ACK. OptionFailed."""
        replies = await self.option(option, data)
        if replies[-1].is_error:
            raise OptionFailed(replies[-1].type, replies[-1].data.decode(errors="replace"))
        return replies[:-1]

    async def request_structured(self) -> None:
        await self.good_option(Option.STRUCTURED_REPLY)
        self.structured = True

    async def list_exports(self) -> list[tuple[str, str]]:
        """Names and descriptions."""
        found = []
        for reply in await self.good_option(Option.LIST):
            (length,) = struct.unpack_from(">I", reply.data)
            found.append((reply.data[4 : 4 + length].decode(), reply.data[4 + length :].decode()))
        return found

    async def meta_contexts(
        self, name: str, queries: Sequence[str], option: Option = Option.SET_META_CONTEXT
    ) -> dict[str, int]:
        """Selects (or lists) metadata contexts: their ids by name."""
        replies = await self.good_option(option, encode_meta_request(name, queries))
        return {reply.data[4:].decode(): int.from_bytes(reply.data[:4], "big") for reply in replies}

    async def info(self, name: str, infos: Sequence[int] = (), option: Option = Option.GO) -> Export:
        """INFO or GO."""
        replies = await self.good_option(option, encode_info_request(name, infos))
        return parse_infos([reply.data for reply in replies if reply.type == Reply.INFO])

    async def export_name(self, name: str, zeroes: bool = False) -> Export:
        """EXPORT_NAME; zeroes: NO_ZEROES was not negotiated."""
        await self.send(encode_option(Option.EXPORT_NAME, name.encode()))
        size, flags = EXPORT_REPLY.unpack(await self.receive(EXPORT_REPLY.size))
        if zeroes and any(await self.receive(124)):
            raise ServerError("the zeroes after EXPORT_NAME are not")
        return Export(size, TransmissionFlag(flags))

    # ---- transmission ----

    async def request(
        self, command: int, cookie: int, offset: int, length: int, flags: int = 0, payload: bytes = b""
    ) -> None:
        await self.send(encode_request(command, cookie, offset, length, flags) + payload)

    async def message(self, read_length: Callable[[int], int] = lambda cookie: 0) -> Chunk:
        """The next reply or chunk. read_length: the READ's with a cookie, as simple replies lack it."""
        (magic,) = struct.unpack(">I", head := await self.receive(4))
        if magic == SIMPLE_REPLY_MAGIC:
            _, error, cookie = SIMPLE_REPLY.unpack(head + await self.receive(SIMPLE_REPLY.size - 4))
            length = 0 if error else read_length(cookie)
            return Chunk(cookie, None, True, await self.receive(length), error)
        if magic != STRUCTURED_REPLY_MAGIC:
            raise ServerError(f"magic {magic:#x} of a reply")
        _, flags, kind, cookie, length = CHUNK.unpack(head + await self.receive(CHUNK.size - 4))
        if length > MAX_CHUNK:
            raise ServerError(f"chunk of {length} bytes")
        payload = await self.receive(length)
        error = int.from_bytes(payload[:4], "big") if kind & CHUNK_IS_ERROR else 0
        return Chunk(cookie, kind, bool(flags & CHUNK_DONE), payload, error)


async def _connect_unix(path: str) -> socket.socket:
    """Connects, waiting while the listener's backlog is full (asyncio takes EAGAIN for progress)."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        while True:
            try:
                sock.connect(path)
                return sock
            except BlockingIOError:
                await asyncio.sleep(0.001)
    except BaseException:
        sock.close()
        raise


def parse_infos(datas: Sequence[bytes]) -> Export:
    """The payloads of REP_INFO. ServerError without an INFO_EXPORT."""
    size = flags = name = description = sizes = None
    for data in datas:
        kind, rest = int.from_bytes(data[:2], "big"), data[2:]
        if kind == Info.EXPORT:
            size, flags = struct.unpack(">QH", rest)
        elif kind == Info.NAME:
            name = rest.decode()
        elif kind == Info.DESCRIPTION:
            description = rest.decode()
        elif kind == Info.BLOCK_SIZE:
            sizes = struct.unpack(">III", rest)
    if size is None or flags is None:
        raise ServerError("no INFO_EXPORT")
    return Export(size, TransmissionFlag(flags), name, description, sizes)
