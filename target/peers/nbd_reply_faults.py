# SPDX-License-Identifier: Apache-2.0
"""Faults of the scriptable NBD server in the transmission phase: wrong replies, by the name of the fault."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

from target.exports.nbd.protocol import CHUNK, STRUCTURED_REPLY_MAGIC, ChunkType
from target.peers.nbd_faults import ANY, OPENING, REPLYING, replying
from target.peers.nbd_replies import (
    BLOCK_STATUS_EXT,
    EXTENDED_CHUNK,
    EXTENDED_REPLY_MAGIC,
    Request,
    Style,
    chunk,
    data,
    failure,
    hole,
    simple,
    status,
    success,
)
from target.peers.nbd_script import Action, Armed, Ending, Step


def armed(text: str) -> Armed:
    """NAME@STEP[:NTH[:TIMES]], as on the command line. ValueError."""
    name, _, where = text.partition("@")
    step, *numbers = where.split(":")
    for faults in (OPENING, REPLYING):
        if name in faults and step in faults[name].steps:
            return faults[name].at(step, *map(int, numbers))
    raise ValueError(f"no fault {name!r} at {step!r}")


# ---- whatever was asked ----


@replying("reply-magic", *ANY)
def reply_magic(step: Step) -> list[Action]:
    return [b"\x12\x34\x56\x78" + b"".join(step.messages)[4:], Ending.STALL]


@replying("reply-unknown-cookie", *ANY)
def reply_unknown_cookie(step: Step) -> list[Action]:
    request = step.asked
    wrong = request.cookie ^ 0x5555_5555_0000_FFFF
    reply = simple(request, cookie=wrong)
    return [reply if request.style is not Style.EXTENDED else chunk(request, 0, done=True, cookie=wrong)]


@replying("reply-twice", *ANY)
def reply_twice(step: Step) -> list[Action]:
    return [*step.messages, *step.messages]


@replying("reply-error-without-error", "WRITE", "READ", "BLOCK_STATUS")
def reply_error_0(step: Step) -> list[Action]:
    return [chunk(step.asked, ChunkType.ERROR, struct.pack(">IH", 0, 0), done=True)]


@replying("reply-other-style", *ANY)
def reply_other_style(step: Step) -> list[Action]:
    """The chunk header that was not negotiated."""
    request = step.asked
    if request.style is Style.EXTENDED:
        return [CHUNK.pack(STRUCTURED_REPLY_MAGIC, 1, 0, request.cookie, 0), Ending.STALL]
    header = EXTENDED_CHUNK.pack(EXTENDED_REPLY_MAGIC, 1, 0, request.cookie, request.offset, 0)
    return [header, Ending.STALL]


Make = Callable[[Request], Sequence[Action]]


def _chunk_fault(name: str, *steps: str) -> Callable[[Make], None]:
    """A fault that sends these instead, and nothing after it."""

    def keep(make: Make) -> None:
        replying(name, *steps)(lambda step: [*make(step.asked), Ending.STALL])

    return keep


@_chunk_fault("chunk-4gib", *ANY)
def _(request: Request) -> Sequence[Action]:
    return [chunk(request, ChunkType.OFFSET_DATA, bytes(64), length=0xFFFFFFFF)]


@_chunk_fault("chunk-40mib", "READ", "WRITE", "BLOCK_STATUS")
def _(request: Request) -> Sequence[Action]:
    return [chunk(request, ChunkType.ERROR, length=40 << 20, done=True), *[bytes(1 << 20)] * 40]


@_chunk_fault("chunk-unknown", *ANY)
def _(request: Request) -> Sequence[Action]:
    return [chunk(request, 77, b"what is it", done=True)]


@_chunk_fault("none-with-payload", *ANY)
def _(request: Request) -> Sequence[Action]:
    return [chunk(request, ChunkType.NONE, b"payload", done=True)]


@_chunk_fault("none-not-done", *ANY)
def _(request: Request) -> Sequence[Action]:
    return [chunk(request, ChunkType.NONE)]


@_chunk_fault("error-short", *ANY)
def _(request: Request) -> Sequence[Action]:
    return [chunk(request, ChunkType.ERROR, b"\0\0\0\5\0", done=True)]


@_chunk_fault("error-text-past-end", "READ", "WRITE", "BLOCK_STATUS")
def _(request: Request) -> Sequence[Action]:
    return [chunk(request, ChunkType.ERROR, struct.pack(">IH", 5, 100) + b"short", done=True)]


@_chunk_fault("error-offset-short", "READ")
def _(request: Request) -> Sequence[Action]:
    return [chunk(request, ChunkType.ERROR_OFFSET, struct.pack(">IHI", 5, 0, 0), done=True)]


@_chunk_fault("error-offset-outside", "READ")
def _(request: Request) -> Sequence[Action]:
    outside = request.offset + request.length + 1
    return [chunk(request, ChunkType.ERROR_OFFSET, struct.pack(">IHQ", 5, 0, outside), done=True)]


@_chunk_fault("data-for-no-read", "WRITE", "FLUSH", "BLOCK_STATUS")
def _(request: Request) -> Sequence[Action]:
    return [data(request, request.offset, b"data" * 128, done=True)]


@_chunk_fault("status-for-no-status", "READ", "WRITE", "FLUSH")
def _(request: Request) -> Sequence[Action]:
    return [status(request, 1, [(65536, 0)], done=True)]


# ---- READ ----


@_chunk_fault("read-simple", "READ")
def _(request: Request) -> Sequence[Action]:
    return [simple(request, 0, bytes(request.length))]


@_chunk_fault("read-simple-error", "READ")
def _(request: Request) -> Sequence[Action]:
    return [simple(request, 5)]


@_chunk_fault("read-nothing", "READ")
def _(request: Request) -> Sequence[Action]:
    return [success(request)]


@_chunk_fault("read-first-half", "READ")
def _(request: Request) -> Sequence[Action]:
    return [data(request, request.offset, bytes(request.length // 2), done=True)]


@_chunk_fault("read-too-long", "READ")
def _(request: Request) -> Sequence[Action]:
    return [data(request, request.offset, bytes(request.length + 1), done=True)]


@_chunk_fault("read-1mib-too-long", "READ")
def _(request: Request) -> Sequence[Action]:
    return [data(request, request.offset, bytes(request.length + (1 << 20)), done=True)]


@_chunk_fault("read-before", "READ")
def _(request: Request) -> Sequence[Action]:
    return [data(request, request.offset - 512, bytes(512)), success(request)]


@_chunk_fault("read-after", "READ")
def _(request: Request) -> Sequence[Action]:
    return [data(request, request.offset + request.length, bytes(512)), success(request)]


@_chunk_fault("read-offset-wraps", "READ")
def _(request: Request) -> Sequence[Action]:
    return [data(request, (1 << 64) - 256, bytes(512)), success(request)]


@_chunk_fault("read-overlap", "READ")
def _(request: Request) -> Sequence[Action]:
    half = data(request, request.offset, bytes(request.length // 2))
    return [half, half, success(request)]


@_chunk_fault("read-overlap-hole", "READ")
def _(request: Request) -> Sequence[Action]:
    half = data(request, request.offset, b"x" * (request.length // 2))
    return [half, hole(request, request.offset, request.length, done=True)]


@_chunk_fault("read-overlap-backwards", "READ")
def _(request: Request) -> Sequence[Action]:
    quarter = request.length // 4
    end = data(request, request.offset + 3 * quarter, bytes(quarter))
    middle = data(request, request.offset + quarter, bytes(3 * quarter))
    return [end, middle, data(request, request.offset, bytes(quarter)), success(request)]


@_chunk_fault("read-data-without-data", "READ")
def _(request: Request) -> Sequence[Action]:
    return [data(request, request.offset, b""), success(request)]


@_chunk_fault("read-data-short", "READ")
def _(request: Request) -> Sequence[Action]:
    return [chunk(request, ChunkType.OFFSET_DATA, b"\0" * 7, done=True)]


@_chunk_fault("read-hole-0", "READ")
def _(request: Request) -> Sequence[Action]:
    return [hole(request, request.offset, 0), success(request)]


@_chunk_fault("read-hole-13", "READ")
def _(request: Request) -> Sequence[Action]:
    payload = struct.pack(">QI", request.offset, request.length) + b"\0"
    return [chunk(request, ChunkType.OFFSET_HOLE, payload, done=True)]


@_chunk_fault("read-hole-4gib", "READ")
def _(request: Request) -> Sequence[Action]:
    return [hole(request, request.offset, 0xFFFFFFFF, done=True)]


@_chunk_fault("read-hole-wraps", "READ")
def _(request: Request) -> Sequence[Action]:
    return [hole(request, (1 << 64) - 1024, 4096, done=True)]


@_chunk_fault("read-after-done", "READ")
def _(request: Request) -> Sequence[Action]:
    return [hole(request, request.offset, request.length, done=True), success(request)]


@replying("read-cut-in-data", "READ")
def read_cut_in_data(step: Step) -> list[Action]:
    whole = data(step.asked, step.asked.offset, b"\xee" * step.asked.length, done=True)
    return [whole[: len(whole) // 2], Ending.CUT]


@replying("endless-errors", "READ", "WRITE", silent=True)
def endless_errors(step: Step) -> list[Action]:
    return [*[failure(step.asked, 5, b"again", done=False) * 1000] * 1000, Ending.STALL]


@replying("deaf", "WRITE", "READ", silent=True)
def deaf(step: Step) -> list[Action]:
    return [Ending.DEAF]


# ---- BLOCK_STATUS ----


def _descriptors(request: Request, count: int, extents: list[tuple[int, int]]) -> bytes:
    """A status payload for context 1; count is told, where the style has one."""
    if request.style is Style.EXTENDED:
        return struct.pack(">II", 1, count) + b"".join(struct.pack(">QQ", *extent) for extent in extents)
    return struct.pack(">I", 1) + b"".join(struct.pack(">II", *extent) for extent in extents)


def _status_chunk(request: Request, payload: bytes, *, done: bool = True) -> bytes:
    kind = BLOCK_STATUS_EXT if request.style is Style.EXTENDED else ChunkType.BLOCK_STATUS
    return chunk(request, kind, payload, done=done)


@_chunk_fault("status-empty", "BLOCK_STATUS")
def _(request: Request) -> Sequence[Action]:
    return [status(request, 1, [], done=True)]


@_chunk_fault("status-without-chunk", "BLOCK_STATUS")
def _(request: Request) -> Sequence[Action]:
    return [success(request)]


@_chunk_fault("status-simple", "BLOCK_STATUS")
def _(request: Request) -> Sequence[Action]:
    return [simple(request)]


@_chunk_fault("status-length-0", "BLOCK_STATUS")
def _(request: Request) -> Sequence[Action]:
    return [status(request, 1, [(0, 0), (request.length, 0)], done=True)]


@_chunk_fault("status-odd", "BLOCK_STATUS")
def _(request: Request) -> Sequence[Action]:
    return [_status_chunk(request, _descriptors(request, 1, [(request.length, 0)]) + b"\0")]


@_chunk_fault("status-short", "BLOCK_STATUS")
def _(request: Request) -> Sequence[Action]:
    return [_status_chunk(request, b"\0\0\1")]


@_chunk_fault("status-unknown-context", "BLOCK_STATUS")
def _(request: Request) -> Sequence[Action]:
    return [status(request, 99, [(request.length, 0)]), success(request)]


@_chunk_fault("status-context-twice", "BLOCK_STATUS")
def _(request: Request) -> Sequence[Action]:
    return [status(request, 1, [(request.length, 0)])] * 2 + [success(request)]


@_chunk_fault("status-other-width", "BLOCK_STATUS")
def _(request: Request) -> Sequence[Action]:
    kind = ChunkType.BLOCK_STATUS if request.style is Style.EXTENDED else BLOCK_STATUS_EXT
    return [chunk(request, kind, _descriptors(request, 1, [(request.length, 0)]), done=True)]


@_chunk_fault("status-extents-past-request", "BLOCK_STATUS")
def _(request: Request) -> Sequence[Action]:
    """Only the last extent may go past the end."""
    return [status(request, 1, [(request.length, 0), (4096, 3)], done=True)]


@_chunk_fault("status-4-million", "BLOCK_STATUS")
def _(request: Request) -> Sequence[Action]:
    size = 16 if request.style is Style.EXTENDED else 8
    return [chunk(request, ChunkType.BLOCK_STATUS, bytes(4), length=4 + (4 << 20) * size, done=True)]


# ---- only with extended headers ----

EXTENDED_ONLY = frozenset(
    ("extended-offset", "extended-length-2^63", "extended-count", "extended-lengths-wrap", "extended-simple")
)


@_chunk_fault("extended-offset", *ANY)
def _(request: Request) -> Sequence[Action]:
    return [chunk(request, ChunkType.NONE, done=True, offset=request.offset + 1)]


@_chunk_fault("extended-length-2^63", *ANY)
def _(request: Request) -> Sequence[Action]:
    return [chunk(request, ChunkType.OFFSET_DATA, bytes(64), length=1 << 63)]


@_chunk_fault("extended-simple", "WRITE", "FLUSH")
def _(request: Request) -> Sequence[Action]:
    return [simple(request)]


@_chunk_fault("extended-count", "BLOCK_STATUS")
def _(request: Request) -> Sequence[Action]:
    return [_status_chunk(request, _descriptors(request, 1 << 28, [(request.length, 0)]))]


@_chunk_fault("extended-lengths-wrap", "BLOCK_STATUS")
def _(request: Request) -> Sequence[Action]:
    return [status(request, 1, [((1 << 64) - 4096, 0), (8192, 3)], done=True)]
