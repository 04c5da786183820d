# SPDX-License-Identifier: Apache-2.0
"""The transmission phase of the scriptable NBD server: what a client may send, and the honest answer."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from target.exports.nbd.protocol import Command, CommandFlag, NbdErrno, TransmissionFlag
from target.peers.nbd_disk import SparseDisk
from target.peers.nbd_replies import (
    PAYLOAD_LEN,
    Request,
    Style,
    data,
    failure,
    hole,
    simple,
    status,
    success,
)
from target.peers.nbd_script import ServerOptions


@dataclass
class Terms:
    """What a connection has negotiated, and the rules that follow for its client."""

    options: ServerOptions
    flags: TransmissionFlag = TransmissionFlag.HAS_FLAGS
    style: Style = Style.SIMPLE
    contexts: dict[str, int] = field(default_factory=dict)

    def judge(self, request: Request, in_flight: set[int]) -> Iterator[str]:
        """What a client must not send."""
        for wrong, text in (
            (request.cookie in in_flight, "cookie in flight"),
            (request.command not in self.commands(), "a command that was not offered"),
            (request.flags & ~self._command_flags(request), "flags that were not offered"),
            (self._outside(request), "past the end, or empty"),
            (self._unaligned(request), "not aligned to the minimum block"),
            (self._too_long(request), "payload longer than the maximum"),
        ):
            if wrong:
                command = f"{request.command} flags {request.flags} {request.offset}+{request.length}"
                yield f"command {command}: {text}"

    def commands(self) -> set[int]:
        offered = {
            TransmissionFlag.SEND_FLUSH: Command.FLUSH,
            TransmissionFlag.SEND_TRIM: Command.TRIM,
            TransmissionFlag.SEND_CACHE: Command.CACHE,
            TransmissionFlag.SEND_WRITE_ZEROES: Command.WRITE_ZEROES,
        }
        commands = {int(command) for flag, command in offered.items() if self.flags & flag}
        if self.contexts:
            commands.add(Command.BLOCK_STATUS)
        if self.flags & TransmissionFlag.READ_ONLY:
            return (commands | {Command.READ}) - {Command.TRIM, Command.WRITE_ZEROES}
        return commands | {Command.READ, Command.WRITE}

    def _command_flags(self, request: Request) -> int:
        allowed = CommandFlag.FUA if self.flags & TransmissionFlag.SEND_FUA else 0
        if request.command == Command.WRITE and self.style is Style.EXTENDED:
            return allowed | PAYLOAD_LEN
        if request.command == Command.WRITE_ZEROES:
            fast = self.flags & TransmissionFlag.SEND_FAST_ZERO
            return allowed | CommandFlag.NO_HOLE | (CommandFlag.FAST_ZERO if fast else 0)
        if request.command == Command.READ and self.flags & TransmissionFlag.SEND_DF:
            return CommandFlag.DF
        if request.command == Command.BLOCK_STATUS:
            return CommandFlag.REQ_ONE
        return allowed if request.command in (Command.WRITE, Command.TRIM) else 0

    def _outside(self, request: Request) -> bool:
        if request.command == Command.FLUSH:
            return bool(request.offset or request.length)
        return not request.length or request.offset + request.length > self.options.size

    def _unaligned(self, request: Request) -> bool:
        block = self.options.blocks[0]
        return self.options.tell_blocks and bool(request.offset % block or request.length % block)

    def _too_long(self, request: Request) -> bool:
        most = self.options.blocks[2] if self.options.tell_blocks else 32 << 20
        return request.command in (Command.READ, Command.WRITE) and request.length > most


class Answer:
    """Carries out one request on the disk, and the honest messages for it."""

    def __init__(self, terms: Terms, disk: SparseDisk, request: Request) -> None:
        self.terms = terms
        self.options = terms.options
        self.disk = disk
        self.request = request

    def messages(self) -> list[bytes]:
        request = self.request
        error = self._error()
        if error:
            return [failure(request, error, b"refused")]
        if request.command == Command.READ:
            return self._read()
        if request.command == Command.BLOCK_STATUS:
            return self._status()
        if request.command == Command.WRITE:
            self.disk.write(request.offset, request.payload)
        elif request.command == Command.WRITE_ZEROES:
            self.disk.zero(request.offset, request.length, not request.flags & CommandFlag.NO_HOLE)
        elif request.command == Command.TRIM:
            self.disk.zero(request.offset, request.length)
        return [success(request, self.options.simple_replies and request.style is Style.STRUCTURED)]

    def _error(self) -> int:
        request, block = self.request, self.options.blocks[0]
        changes = request.command in (Command.WRITE, Command.TRIM, Command.WRITE_ZEROES)
        if changes and self.terms.flags & TransmissionFlag.READ_ONLY:
            return NbdErrno.EPERM
        if request.command not in self.terms.commands():
            return NbdErrno.EINVAL
        if request.offset + request.length > self.options.size:
            return NbdErrno.ENOSPC if changes else NbdErrno.EINVAL
        if request.offset % block or request.length % block:
            return NbdErrno.EINVAL
        return 0

    def _read(self) -> list[bytes]:
        request = self.request
        content = self.disk.read(request.offset, request.length)
        if request.style is Style.SIMPLE:
            return [simple(request, 0, content)]
        if request.flags & CommandFlag.DF:
            return [data(request, request.offset, content, done=True)]
        pieces = list(self._pieces())
        if self.options.shuffle is not None:
            random.Random(request.cookie).shuffle(pieces)
        messages = []
        for number, (offset, length, is_data) in enumerate(pieces):
            done = number == len(pieces) - 1 and not self.options.chunk
            start = offset - request.offset
            part = content[start : start + length]
            messages.append(
                data(request, offset, part, done=done)
                if is_data
                else hole(request, offset, length, done=done)
            )
        return messages if not self.options.chunk else [*messages, success(request)]

    def _pieces(self) -> Iterator[tuple[int, int, bool]]:
        """Content chunks: offset, length, whether data."""
        offset, length = self.request.offset, self.request.length
        runs = self.disk.extents(offset, length) if self.options.holes else iter([(length, True)])
        for run, is_data in runs:
            most = self.options.chunk or run
            for at in range(0, run, most):
                yield offset + at, min(most, run - at), is_data
            offset += run

    def _status(self) -> list[bytes]:
        messages = []
        names = list(self.terms.contexts)
        for number, name in enumerate(names):
            extents = self._cut_to_request(list(self._extents(name)))
            context = self.terms.contexts[name]
            messages.append(status(self.request, context, extents, done=number == len(names) - 1))
        return messages

    def _extents(self, name: str) -> Iterator[tuple[int, int]]:
        """Runs from the request's offset to the end of the disk."""
        offset, end = self.request.offset, self.options.size
        if name == "base:allocation":
            for length, is_data in self.disk.extents(offset, end - offset):
                yield length, 0 if is_data else 3
            return
        for start, length in self.options.bitmaps[name.removeprefix("qemu:dirty-bitmap:")]:
            if start + length <= offset:
                continue
            if start > offset:
                yield start - offset, 0
            yield start + length - max(start, offset), 1
            offset = start + length
        if offset < end:
            yield end - offset, 0

    def _cut_to_request(self, runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
        one = self.request.flags & CommandFlag.REQ_ONE
        past_end = self.options.past_end and not one
        bound = (1 << 63) if self.request.style is Style.EXTENDED else 0xFFFF0000
        extents: list[tuple[int, int]] = []
        left = self.request.length
        for length, flags in runs[: 1 if one else self.options.extents]:
            if left <= 0:
                break
            told = min(length if past_end else min(length, left), bound)
            extents.append((told, flags))
            if told < min(length, left):
                break
            left -= length
        return extents
