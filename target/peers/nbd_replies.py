# SPDX-License-Identifier: Apache-2.0
"""What an NBD server sends in transmission, as bytes: replies and chunks in the three header styles.

Nothing is checked: the honest server and the misbehaving one make their messages with it. Source:
doc/proto.md of the NetworkBlockDevice project, extended headers of its branch extension-ext-header.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from target.exports.nbd.protocol import (
    CHUNK,
    CHUNK_DONE,
    REQUEST,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    ChunkType,
)

EXTENDED_REQUEST_MAGIC = 0x21E41C71
EXTENDED_REPLY_MAGIC = 0x6E8A278C
EXTENDED_REQUEST = struct.Struct(">IHHQQQ")  # magic, flags, type, cookie, offset, length
EXTENDED_CHUNK = struct.Struct(">IHHQQQ")  # magic, flags, type, cookie, offset, length
PAYLOAD_LEN = 1 << 5  # command flag
BLOCK_STATUS_EXT = 6  # chunk type


class Style(IntEnum):
    """What the client negotiated."""

    SIMPLE = 0
    STRUCTURED = 1
    EXTENDED = 2

    @property
    def request(self) -> struct.Struct:
        return EXTENDED_REQUEST if self is Style.EXTENDED else REQUEST


@dataclass(frozen=True)
class Request:
    """One request of a client. ``number`` counts from 0 on its connection."""

    connection: int
    number: int
    command: int
    flags: int
    cookie: int
    offset: int
    length: int
    payload: bytes
    style: Style


def simple(request: Request, error: int = 0, data: bytes = b"", cookie: int | None = None) -> bytes:
    cookie = request.cookie if cookie is None else cookie
    return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie) + data


def chunk(
    request: Request,
    kind: int,
    payload: bytes = b"",
    *,
    done: bool = False,
    cookie: int | None = None,
    length: int | None = None,
    offset: int | None = None,
    magic: int | None = None,
) -> bytes:
    """A chunk in the style of the request. The last four replace what would be right."""
    flags = CHUNK_DONE if done else 0
    cookie = request.cookie if cookie is None else cookie
    length = len(payload) if length is None else length
    if request.style is Style.EXTENDED:
        offset = request.offset if offset is None else offset
        magic = EXTENDED_REPLY_MAGIC if magic is None else magic
        return EXTENDED_CHUNK.pack(magic, flags, kind, cookie, offset, length) + payload
    magic = STRUCTURED_REPLY_MAGIC if magic is None else magic
    return CHUNK.pack(magic, flags, kind, cookie, length) + payload


def data(request: Request, offset: int, content: bytes, *, done: bool = False) -> bytes:
    return chunk(request, ChunkType.OFFSET_DATA, struct.pack(">Q", offset) + content, done=done)


def hole(request: Request, offset: int, length: int, *, done: bool = False) -> bytes:
    return chunk(request, ChunkType.OFFSET_HOLE, struct.pack(">QI", offset, length), done=done)


def status(request: Request, context: int, extents: list[tuple[int, int]], *, done: bool = False) -> bytes:
    """extents: (length, flags)."""
    if request.style is Style.EXTENDED:
        head = struct.pack(">II", context, len(extents))
        body = b"".join(struct.pack(">QQ", *extent) for extent in extents)
        return chunk(request, BLOCK_STATUS_EXT, head + body, done=done)
    body = b"".join(struct.pack(">II", *extent) for extent in extents)
    return chunk(request, ChunkType.BLOCK_STATUS, struct.pack(">I", context) + body, done=done)


def failure(request: Request, error: int, text: bytes = b"", *, done: bool = True) -> bytes:
    """An error reply: a chunk, where the client knows them."""
    if request.style is Style.SIMPLE:
        return simple(request, error)
    payload = struct.pack(">IH", error, len(text)) + text
    return chunk(request, ChunkType.ERROR, payload, done=done)


def success(request: Request, as_simple: bool = False) -> bytes:
    """To a request without content."""
    if request.style is Style.SIMPLE or as_simple:
        return simple(request)
    return chunk(request, ChunkType.NONE, done=True)
