# SPDX-License-Identifier: Apache-2.0
"""NBD negotiation, client side, over an abstract stream of bytes.

It never reads past what the server has to send next, so that what follows stays in the socket for the
transmission phase. The caller bounds the time; sizes and numbers of replies are bounded here. Source:
doc/proto.md of the NetworkBlockDevice project, and its extension "extended headers".
"""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import NoReturn, Protocol

from target.datapath import lib
from target.exports.nbd.protocol import (
    BLOCK_SIZES,
    CLIENT_FLAGS,
    EXPORT_REPLY,
    EXPORT_REPLY_ZEROES,
    GREETING,
    IHAVEOPT,
    MAX_STRING,
    NBDMAGIC,
    OLDSTYLE_MAGIC,
    OPTION_REPLY,
    REPLY_MAGIC,
    HandshakeFlag,
    Info,
    Option,
    Reply,
    TransmissionFlag,
    encode_info_request,
    encode_meta_request,
    encode_option,
)
from target.exports.warnings import printable
from target.graph.errors import BlockError

ALLOCATION = "base:allocation"
DEPTH = "qemu:allocation-depth"
MAX_PAYLOAD: int = lib.BT_NBDC_MAX_PAYLOAD
MAX_BLOCK = 64 << 10
MAX_REPLY = 64 << 10  # data of one reply to an option (bytes)
MAX_REPLIES = 256  # to one option
MAX_SIZE = (1 << 63) - 512
REPLY_ERROR = 1 << 31
OLD_REPLY = struct.Struct(">QI")  # oldstyle: size, flags; then 124 zeros


class Stream(Protocol):
    """Bytes to and from a server."""

    async def read_exactly(self, length: int) -> bytes:
        """Exactly length bytes, and not one more is taken. EOFError when the server has closed."""

    async def write(self, data: bytes) -> None: ...


@dataclass(frozen=True)
class Link:
    """What one connection starts transmission with. Sizes in bytes."""

    size: int
    flags: TransmissionFlag
    mode: int = lib.BT_NBDC_SIMPLE
    context_id: int | None = None
    depth: bool = False
    block: int = 1
    max_payload: int = MAX_PAYLOAD


class Refused(BlockError):
    """The server answered an option with an error."""

    def __init__(self, reply: int, message: str) -> None:
        super().__init__(message)
        self.reply = reply


async def negotiate(stream: Stream, export: str, bitmap: str | None = None) -> Link:
    """From the greeting to transmission. BlockError says why not; OSError, EOFError are the connection's.

    bitmap: the context that stands in for base:allocation (x-dirty-bitmap); it must be there.
    """
    return await _Negotiation(stream, export, bitmap).run()


class _Negotiation:
    def __init__(self, stream: Stream, export: str, bitmap: str | None) -> None:
        self._stream = stream
        self._export = export
        self._bitmap = bitmap
        self._context = bitmap or ALLOCATION
        self._mode = lib.BT_NBDC_SIMPLE
        self._context_id: int | None = None
        self._no_zeroes = False

    async def run(self) -> Link:
        magic, version = struct.unpack(">QQ", await self._stream.read_exactly(16))
        if magic != NBDMAGIC:
            _broken("it is not an NBD server (bad magic)")
        if version == OLDSTYLE_MAGIC:
            return await self._oldstyle()
        if version != IHAVEOPT:
            _broken("bad magic in the greeting")
        flags = HandshakeFlag(int.from_bytes(await self._stream.read_exactly(GREETING.size - 16), "big"))
        known = flags & (HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)
        self._no_zeroes = HandshakeFlag.NO_ZEROES in known
        await self._stream.write(CLIENT_FLAGS.pack(known))
        if HandshakeFlag.FIXED_NEWSTYLE not in known:
            return await self._export_name()
        await self._choose_replies()
        if self._mode != lib.BT_NBDC_SIMPLE:
            await self._choose_context()
        self._check_bitmap()
        try:
            return await self._go()
        except Refused as refused:
            if refused.reply != Reply.ERR_UNSUP or self._mode == lib.BT_NBDC_EXTENDED:
                raise
        return await self._export_name()

    # ---- options ----

    async def _choose_replies(self) -> None:
        if await self._simple_option(Option.EXTENDED_HEADERS):
            self._mode = lib.BT_NBDC_EXTENDED
        elif await self._simple_option(Option.STRUCTURED_REPLY):
            self._mode = lib.BT_NBDC_STRUCTURED

    async def _simple_option(self, option: Option) -> bool:
        """Whether the server takes it. One that wants TLS, or is going away, is an error."""
        try:
            async for reply, _ in self._ask(option):
                _broken(f"unexpected reply {reply} to option {option.name}")
        except Refused as refused:
            if refused.reply in (Reply.ERR_TLS_REQD, Reply.ERR_SHUTDOWN):
                raise
            return False
        return True

    async def _choose_context(self) -> None:
        data = encode_meta_request(self._export, [self._context])
        try:
            async for reply, answer in self._ask(Option.SET_META_CONTEXT, data):
                if reply != Reply.META_CONTEXT:
                    _broken(f"unexpected reply {reply} to option SET_META_CONTEXT")
                self._take_context(answer)
        except Refused as refused:
            if refused.reply in (Reply.ERR_TLS_REQD, Reply.ERR_SHUTDOWN):
                raise
            self._context_id = None

    def _take_context(self, answer: bytes) -> None:
        if len(answer) < 4 or len(answer) > 4 + MAX_STRING:
            _broken("metadata context with a bad length")
        if answer[4:] != self._context.encode():
            _broken("the server selected a metadata context that was not asked for")
        if self._context_id is not None:
            _broken("the server selected a metadata context twice")
        self._context_id = int.from_bytes(answer[:4], "big")

    def _check_bitmap(self) -> None:
        if self._bitmap is not None and self._context_id is None:
            raise BlockError(f"requested x-dirty-bitmap {self._bitmap} not found")

    async def _go(self) -> Link:
        size: int | None = None
        flags = TransmissionFlag(0)
        blocks: tuple[int, int] | None = None
        data = encode_info_request(self._export, [Info.BLOCK_SIZE])
        async for reply, answer in self._ask(Option.GO, data):
            if reply != Reply.INFO or len(answer) < 2:
                _broken(f"unexpected reply {reply} to option GO")
            kind, rest = int.from_bytes(answer[:2], "big"), answer[2:]
            if kind == Info.EXPORT:
                if len(rest) != EXPORT_REPLY.size:
                    _broken("information on the export with a bad length")
                size, flags = _take_export(rest)
            elif kind == Info.BLOCK_SIZE:
                blocks = _take_blocks(rest)
        if size is None:
            _broken("option GO ended without the export's size")
        return self._link(size, flags, blocks)

    async def _export_name(self) -> Link:
        """The older option, which a server can only refuse by closing."""
        self._check_bitmap()
        await self._stream.write(encode_option(Option.EXPORT_NAME, self._export.encode()))
        try:
            size, flags = _take_export(await self._stream.read_exactly(EXPORT_REPLY.size))
        except EOFError:
            raise BlockError(f"export '{self._export}' is not there: the server closed") from None
        if not self._no_zeroes:
            await self._stream.read_exactly(len(EXPORT_REPLY_ZEROES))
        return self._link(size, flags, None)

    async def _oldstyle(self) -> Link:
        """No options at all."""
        if self._export:
            raise BlockError("Server does not support non-empty export names")
        self._check_bitmap()
        size, flags = OLD_REPLY.unpack(await self._stream.read_exactly(OLD_REPLY.size))
        await self._stream.read_exactly(len(EXPORT_REPLY_ZEROES))
        return self._link(_check_size(size), TransmissionFlag(flags & 0xFFFF), None)

    # ---- results ----

    def _link(self, size: int, flags: TransmissionFlag, blocks: tuple[int, int] | None) -> Link:
        """Without block sizes as QEMU: bytes if anything shows that the server knows them, else sectors."""
        if blocks is None:
            bytewise = size % 512 != 0 or self._context_id is not None
            blocks = (1 if bytewise else 512, MAX_PAYLOAD)
        block, payload = blocks
        if size % block:  # what is past the last block could not be reached
            raise BlockError(f"the export has {size} bytes, no multiple of its minimum block of {block}")
        return Link(
            size=size,
            flags=flags,
            mode=self._mode,
            context_id=self._context_id,
            depth=self._bitmap == DEPTH,
            block=block,
            max_payload=min(payload, MAX_PAYLOAD) // block * block,
        )

    # ---- the wire ----

    async def _ask(self, option: Option, data: bytes = b"") -> AsyncIterator[tuple[int, bytes]]:
        """Sends an option and gives the replies before its ACK. Refused when there is an error instead."""
        await self._stream.write(encode_option(option, data))
        for _ in range(MAX_REPLIES):
            head = await self._stream.read_exactly(OPTION_REPLY.size)
            magic, answered, reply, length = OPTION_REPLY.unpack(head)
            if magic != REPLY_MAGIC or answered != option:
                _broken(f"a reply that does not belong to option {option.name}")
            if length > MAX_REPLY:
                _broken(f"a reply of {length} bytes to option {option.name}")
            answer = await self._stream.read_exactly(length)
            if reply & REPLY_ERROR:
                raise self._refused(option, reply, answer)
            if reply == Reply.ACK:
                if length:
                    _broken(f"an acknowledgement of option {option.name} with data")
                return
            yield reply, answer
        _broken(f"more than {MAX_REPLIES} replies to option {option.name}")

    def _refused(self, option: Option, reply: int, answer: bytes) -> Refused:
        reasons = {
            Reply.ERR_UNKNOWN: f"export '{printable(self._export)}' is not there",
            Reply.ERR_TLS_REQD: "the server wants TLS, which is not built",
            Reply.ERR_POLICY: "the server's policy forbids it",
            Reply.ERR_SHUTDOWN: "the server is shutting down",
            Reply.ERR_UNSUP: "the server does not support it",
            Reply.ERR_BLOCK_SIZE_REQD: "the server insists on its block sizes",
        }
        reason = next((why for known, why in reasons.items() if known == reply), f"error {reply:#x}")
        text = printable(answer[:MAX_STRING].decode(errors="replace"))
        return Refused(reply, f"option {option.name}: {reason}" + (f" ({text})" if text else ""))


def _broken(what: str) -> NoReturn:
    raise BlockError(f"the server broke the protocol: {what}")


def _check_size(size: int) -> int:
    if size > MAX_SIZE:
        _broken(f"an export of {size} bytes")
    return size


def _take_export(data: bytes) -> tuple[int, TransmissionFlag]:
    size, flags = EXPORT_REPLY.unpack(data)
    return _check_size(size), TransmissionFlag(flags)


def _take_blocks(data: bytes) -> tuple[int, int]:
    """Minimum and maximum; the preferred size is of no use here, but it must make sense."""
    if len(data) != BLOCK_SIZES.size:
        _broken("information on block sizes with a bad length")
    minimum, preferred, maximum = BLOCK_SIZES.unpack(data)
    if minimum & (minimum - 1) or not 0 < minimum <= MAX_BLOCK:
        _broken(f"minimum block size {minimum}")
    if preferred & (preferred - 1) or preferred < minimum:
        _broken(f"preferred block size {preferred}")
    if maximum < minimum:
        _broken(f"maximum payload {maximum}")
    return minimum, maximum
