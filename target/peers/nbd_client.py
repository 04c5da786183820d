# SPDX-License-Identifier: Apache-2.0
"""A proper NBD client with many requests in flight, for tests and for looking at servers.

It checks the server strictly: a reply that the protocol document does not allow is a ServerError.
"""

from __future__ import annotations

import asyncio
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from target.exports.nbd.protocol import (
    CHUNK_IS_ERROR,
    ChunkType,
    Command,
    CommandFlag,
    Info,
    encode_request,
)
from target.peers.nbd_raw import Address, Chunk, Export, RawClient, ServerError

__all__ = ["Address", "NbdClient", "ReadReply", "ServerError"]


@dataclass
class _Pending:
    """A request in flight, and what has come of its reply."""

    command: Command
    offset: int
    length: int
    flags: int
    done: asyncio.Future[None]
    data: bytearray
    covered: list[tuple[int, int]] = field(default_factory=list)
    """content chunks so far: start, end"""
    holes: list[tuple[int, int]] = field(default_factory=list)
    extents: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    error: int = 0


@dataclass(frozen=True)
class ReadReply:
    """A READ's answer; holes are (offset, length) of the OFFSET_HOLE chunks."""

    data: bytes
    holes: list[tuple[int, int]]


class NbdClient:
    """A proper client in transmission. Requests may be made at the same time; they raise OSError."""

    def __init__(self, raw: RawClient, export: Export, contexts: dict[str, int]) -> None:
        self.raw = raw
        self.export = export
        self.contexts = contexts
        self._cookie = 0
        self._pending: dict[int, _Pending] = {}
        self._sending = asyncio.Lock()
        self._failure: Exception | None = None
        self._reader = asyncio.create_task(self._read_replies())

    @classmethod
    async def connect(
        cls,
        address: Address,
        name: str = "",
        *,
        structured: bool = True,
        contexts: Sequence[str] = ("base:allocation",),
    ) -> NbdClient:
        """Negotiates with GO. Contexts need structured replies."""
        raw = await RawClient.connect(address)
        try:
            await raw.greet()
            selected = {}
            if structured:
                await raw.request_structured()
                if contexts:
                    selected = await raw.meta_contexts(name, contexts)
            export = await raw.info(name, [Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE])
        except BaseException:
            await raw.close()
            raise
        return cls(raw, export, selected)

    async def close(self) -> None:
        """DISC, then waits for the server to close."""
        if self._failure is None:
            await self._send(encode_request(Command.DISC, 0, 0, 0))
        await asyncio.wait([self._reader])
        await self.raw.close()

    async def abort(self) -> None:
        """Closes at once, whatever is in flight."""
        self._reader.cancel()
        await asyncio.wait([self._reader])
        self._fail(ConnectionAbortedError("client has gone"))
        await self.raw.close()

    # ---- commands ----

    async def read(self, offset: int, length: int, flags: int = 0) -> bytes:
        return (await self.read_reply(offset, length, flags)).data

    async def read_reply(self, offset: int, length: int, flags: int = 0) -> ReadReply:
        pending = await self._do(Command.READ, offset, length, flags)
        return ReadReply(bytes(pending.data), sorted(pending.holes))

    async def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        await self._do(Command.WRITE, offset, len(data), flags, data)

    async def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        await self._do(Command.WRITE_ZEROES, offset, length, flags)

    async def trim(self, offset: int, length: int, flags: int = 0) -> None:
        await self._do(Command.TRIM, offset, length, flags)

    async def flush(self) -> None:
        await self._do(Command.FLUSH, 0, 0)

    async def cache(self, offset: int, length: int) -> None:
        await self._do(Command.CACHE, offset, length)

    async def block_status(
        self, offset: int, length: int, flags: int = 0, context: str = "base:allocation"
    ) -> list[tuple[int, int]]:
        """Extents (length, status flags) from offset on, as many as the server tells at once."""
        pending = await self._do(Command.BLOCK_STATUS, offset, length, flags)
        return pending.extents[self.contexts[context]]

    async def map(self, offset: int = 0, length: int | None = None) -> list[tuple[int, int]]:
        """block_status of a whole range, neighbours of equal flags merged."""
        end = self.export.size if length is None else offset + length
        extents: list[tuple[int, int]] = []
        while offset < end:
            for part, flags in await self.block_status(offset, min(end - offset, 0xFFFFF000)):
                usable = min(part, end - offset)
                if extents and extents[-1][1] == flags:
                    extents[-1] = (extents[-1][0] + usable, flags)
                elif usable:
                    extents.append((usable, flags))
                offset += usable
        return extents

    # ---- plumbing ----

    async def _send(self, data: bytes) -> None:
        async with self._sending:
            await self.raw.send(data)

    async def _do(
        self, command: Command, offset: int, length: int, flags: int = 0, payload: bytes = b""
    ) -> _Pending:
        if self._failure is not None:
            raise self._failure
        self._cookie += 1
        data = bytearray(length if command is Command.READ else 0)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        pending = self._pending[self._cookie] = _Pending(command, offset, length, flags, done, data)
        await self._send(encode_request(command, self._cookie, offset, length, flags) + payload)
        await done
        if pending.error:
            raise OSError(pending.error, os.strerror(pending.error))
        return pending

    async def _read_replies(self) -> None:
        try:
            while True:
                self._take(await self.raw.message(self._read_length))
        except (EOFError, OSError, ServerError) as error:
            self._fail(error)

    def _read_length(self, cookie: int) -> int:
        pending = self._pending.get(cookie)
        return pending.length if pending and pending.command is Command.READ else 0

    def _fail(self, error: Exception) -> None:
        self._failure = error
        for pending in self._pending.values():
            if not pending.done.done():
                pending.done.set_exception(error)
                pending.done.exception()  # seen, also by a request that could not be sent and does not wait
        self._pending.clear()

    def _take(self, chunk: Chunk) -> None:
        pending = self._pending.get(chunk.cookie)
        if pending is None:
            raise ServerError(f"reply to a request {chunk.cookie} that is not in flight")
        if chunk.type is None:
            self._take_simple(pending, chunk)
        else:
            _take_chunk(pending, chunk, set(self.contexts.values()))
        if chunk.done:
            _check_complete(pending, chunk, set(self.contexts.values()))
            del self._pending[chunk.cookie]
            if not pending.done.cancelled():
                pending.done.set_result(None)

    def _take_simple(self, pending: _Pending, chunk: Chunk) -> None:
        needs_chunks = pending.command in (Command.READ, Command.BLOCK_STATUS)
        if self.raw.structured and needs_chunks:
            raise ServerError(f"simple reply to {pending.command.name} in spite of structured replies")
        pending.error = chunk.error
        pending.data[:] = chunk.payload
        if not chunk.error:
            pending.covered = [(pending.offset, pending.offset + pending.length)]


def _take_chunk(pending: _Pending, chunk: Chunk, contexts: set[int]) -> None:
    if chunk.type is not None and chunk.type & CHUNK_IS_ERROR:
        pending.error = pending.error or chunk.error
        if not chunk.error:
            raise ServerError("error chunk without an error")
    elif chunk.type == ChunkType.OFFSET_DATA and pending.command is Command.READ:
        start = int.from_bytes(chunk.payload[:8], "big")
        data = chunk.payload[8:]
        _cover(pending, start, len(data))
        at = start - pending.offset
        pending.data[at : at + len(data)] = data
    elif chunk.type == ChunkType.OFFSET_HOLE and pending.command is Command.READ:
        start, length = struct.unpack(">QI", chunk.payload)
        _cover(pending, start, length)
        pending.holes.append((start, length))
    elif chunk.type == ChunkType.BLOCK_STATUS and pending.command is Command.BLOCK_STATUS:
        _take_extents(pending, chunk.payload, contexts)
    elif chunk.type != ChunkType.NONE or not chunk.done or chunk.payload:
        raise ServerError(f"chunk of type {chunk.type} in the reply to {pending.command.name}")


def _cover(pending: _Pending, start: int, length: int) -> None:
    end = start + length
    if length == 0 or start < pending.offset or end > pending.offset + pending.length:
        raise ServerError(f"content chunk {start}+{length} outside of {pending.offset}+{pending.length}")
    if any(start < other_end and other_start < end for other_start, other_end in pending.covered):
        raise ServerError(f"content chunk {start}+{length} overlaps another")
    if pending.flags & CommandFlag.DF and pending.covered:
        raise ServerError("two content chunks in spite of DF")
    pending.covered.append((start, end))


def _take_extents(pending: _Pending, payload: bytes, contexts: set[int]) -> None:
    context, rest = int.from_bytes(payload[:4], "big"), payload[4:]
    if context not in contexts or context in pending.extents or not rest or len(rest) % 8:
        raise ServerError(f"status chunk of context {context} with {len(rest)} bytes")
    extents = list(struct.iter_unpack(">II", rest))
    lengths = [length for length, _ in extents]
    if 0 in lengths or sum(lengths[:-1]) >= pending.length:
        raise ServerError("extents past the request, or empty ones")
    if pending.flags & CommandFlag.REQ_ONE and (len(extents) > 1 or lengths[0] > pending.length):
        raise ServerError("more than REQ_ONE asked for")
    pending.extents[context] = extents


def _check_complete(pending: _Pending, chunk: Chunk, contexts: set[int]) -> None:
    if pending.error:
        return
    if pending.command is Command.READ:
        if sum(end - start for start, end in pending.covered) != pending.length:
            raise ServerError("a read was not answered in full")
    elif pending.command is Command.BLOCK_STATUS and set(pending.extents) != contexts:
        raise ServerError("a metadata context has no status")
