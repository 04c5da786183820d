# SPDX-License-Identifier: Apache-2.0
"""A scriptable NBD server, to test clients with: proper unless a fault is armed (nbd_faults.py).

It speaks fixed newstyle with structured replies and extended headers, metadata contexts, block sizes and
several connections, and can do what is legal and rare: chunks in any order and interleaved, holes, simple
replies beside structured ones, few extents at a time. It judges the client too: what the protocol document
forbids a client to send is noted in ``violations``. No TLS. Source: doc/proto.md of the NetworkBlockDevice
project.

    python -m target.peers.nbd_server --unix PATH [--size BYTES] [--fault NAME@STEP[:NTH]]...
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import os
import random
import socket
import struct
import threading

from target.exports.nbd.protocol import (
    CLIENT_FLAGS,
    EXPORT_REPLY,
    EXPORT_REPLY_ZEROES,
    GREETING,
    IHAVEOPT,
    NBDMAGIC,
    OPTION,
    REQUEST_MAGIC,
    Command,
    ExportInfo,
    HandshakeFlag,
    Info,
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
)
from target.peers.nbd_answers import Answer, Terms
from target.peers.nbd_disk import SparseDisk
from target.peers.nbd_raw import Address
from target.peers.nbd_replies import EXTENDED_REQUEST_MAGIC, PAYLOAD_LEN, Request, Style
from target.peers.nbd_script import Action, Armed, Ending, Pause, ServerOptions, Step

PAYLOAD_BOUND = 64 << 20  # of a request, whatever its header says
LOGGED = 200_000


class NbdServer:
    """Listens at one address. Everything that a test looks at stays here when it has stopped."""

    def __init__(self, options: ServerOptions | None = None, *faults: Armed) -> None:
        self.options = options or ServerOptions()
        self.disk = SparseDisk(self.options.size)
        self.faults = list(faults)
        self.accepted = 0
        self.live: set[Connection] = set()
        self.log: collections.deque[Request] = collections.deque(maxlen=LOGGED)
        self.violations: list[str] = []
        self.struck = 0
        self._listener: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, address: Address | socket.socket) -> None:
        """``address`` may be a socket that listens; it is closed at the end."""
        self._listener = address if isinstance(address, socket.socket) else _listen(address)
        self._listener.setblocking(False)
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    async def stop(self) -> None:
        """Listens no more and cuts every connection."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        await asyncio.sleep(0)  # a task that is cancelled before it starts closes nothing
        while self._tasks:
            self.cut()
            await asyncio.wait(self._tasks)
        await asyncio.sleep(0)  # transports close

    def cut(self) -> None:
        for task in self._tasks:
            task.cancel()

    def change(self, step: Step) -> list[Action]:
        """What is sent instead of the step's messages."""
        for armed in self.faults:
            if armed.strikes(step.about):
                self.struck += 1
                return armed.change(step)
        return [*step.messages]

    def info(self) -> ExportInfo:
        options = self.options
        flags = options.flags | TransmissionFlag.HAS_FLAGS
        return ExportInfo(options.name, options.size, flags, options.description, *options.blocks)

    def contexts(self) -> list[str]:
        names = ["base:allocation"] if self.options.allocation else []
        return names + [f"qemu:dirty-bitmap:{name}" for name in self.options.bitmaps]

    def commands(self, command: Command) -> list[Request]:
        return [request for request in list(self.log) if request.command == command]

    def _accept(self) -> None:
        assert self._listener is not None
        with contextlib.suppress(BlockingIOError):
            sock, _ = self._listener.accept()
            task = asyncio.create_task(self._serve(sock, self.accepted))
            self.accepted += 1
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, sock: socket.socket, number: int) -> None:
        try:
            reader, writer = await asyncio.open_connection(sock=sock)
        except BaseException:
            sock.close()
            raise
        connection = Connection(self, number, reader, writer)
        self.live.add(connection)
        try:
            await connection.run()
        except asyncio.CancelledError:
            writer.transport.abort()
        finally:
            self.live.discard(connection)


def _listen(address: Address) -> socket.socket:
    if isinstance(address, str):
        sock = socket.socket(socket.AF_UNIX)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(address)
        sock.bind(address)
        sock.listen(128)
        return sock
    return socket.create_server(address, backlog=128)


class _Leave(Exception):
    """The conversation is over."""


class Connection:
    """One client: the handshake, then requests one after another; replies may be late or in any order."""

    def __init__(
        self, server: NbdServer, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.server = server
        self.options = server.options
        self.number = number
        self.reader = reader
        self.writer = writer
        self.terms = Terms(server.options)
        self.no_zeroes = False
        self.in_flight: set[int] = set()
        self.shuffler = _Shuffler(self, self.options.shuffle) if self.options.shuffle is not None else None
        self._later: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        try:
            await self._greet()
            while not await self._option():
                pass
            await self._transmit()
        except (_Leave, OSError, asyncio.IncompleteReadError):
            pass
        finally:
            for task in [*self._later, *([self.shuffler.task] if self.shuffler else [])]:
                task.cancel()
            self.writer.close()
            with contextlib.suppress(OSError):
                await self.writer.wait_closed()

    async def perform(self, step: Step) -> None:
        """Sends the step, as the faults change it."""
        for action in self.server.change(step):
            if isinstance(action, Pause):
                await asyncio.sleep(action.seconds)
            elif isinstance(action, Ending):
                await self._end(action)
            else:
                self.writer.write(action)
                await self.writer.drain()

    async def _end(self, ending: Ending) -> None:
        if ending is Ending.RESET:
            self.writer.transport.abort()
        elif ending is Ending.DEAF:
            transport = self.writer.transport
            assert isinstance(transport, asyncio.Transport)
            transport.pause_reading()
            await asyncio.Event().wait()
        elif ending is Ending.STALL:
            while await self.reader.read(1 << 16):
                pass
        raise _Leave

    # ---- handshake ----

    async def _greet(self) -> None:
        fixed = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES if self.options.fixed else 0
        await self.perform(Step("greeting", [GREETING.pack(NBDMAGIC, IHAVEOPT, fixed)]))
        (flags,) = CLIENT_FLAGS.unpack(await self.reader.readexactly(4))
        if flags & ~fixed:
            self._violation(f"client flags {flags:#x} to {fixed:#x}")
        self.no_zeroes = bool(flags & HandshakeFlag.NO_ZEROES)

    async def _option(self) -> bool:
        """Serves one option; whether transmission begins."""
        magic, option, length = OPTION.unpack(await self.reader.readexactly(OPTION.size))
        if magic != IHAVEOPT or length > PAYLOAD_BOUND:
            self._violation(f"option of magic {magic:#x}, {length} bytes")
            raise _Leave
        content = await self.reader.readexactly(length)
        name = Option(option).name if option in {int(o) for o in Option} else str(option)
        try:
            messages = self._answer_option(option, content)
        except OptionRefused as refused:
            messages = [encode_refusal(option, refused)]
            option = 0 if option == Option.GO else option
        await self.perform(Step(name, messages, option=option))
        if option == Option.ABORT:
            raise _Leave
        return option in (Option.GO, Option.EXPORT_NAME)

    def _answer_option(self, option: int, content: bytes) -> list[bytes]:
        options = self.options
        if option == Option.EXPORT_NAME:
            return self._export_name(content)
        if option == Option.ABORT:
            return [encode_reply(option, Reply.ACK)]
        if not options.fixed:
            self._violation(f"option {option} without fixed newstyle")
            raise _Leave
        if options.tls_required:
            raise OptionRefused(Reply.ERR_TLS_REQD, "this server wants TLS")
        if option == Option.LIST:
            return [
                encode_reply(option, Reply.SERVER, encode_server(self.server.info())),
                encode_reply(option, Reply.ACK),
            ]
        if option in (Option.INFO, Option.GO) and options.go:
            return self._info(option, content)
        if option == Option.STRUCTURED_REPLY and options.structured:
            return self._take_style(option, Style.STRUCTURED)
        if option == Option.EXTENDED_HEADERS and options.extended:
            return self._take_style(option, Style.EXTENDED)
        if option in (Option.SET_META_CONTEXT, Option.LIST_META_CONTEXT) and self.server.contexts():
            return self._meta(option, content)
        raise OptionRefused(Reply.ERR_UNSUP, f"option {option} is not known")

    def _export_name(self, content: bytes) -> list[bytes]:
        if content.decode() != self.options.name or self.options.tls_required:
            raise _Leave
        self.terms.flags = self._offered_flags()
        reply = EXPORT_REPLY.pack(self.options.size, self.terms.flags)
        return [reply + (b"" if self.no_zeroes else EXPORT_REPLY_ZEROES)]

    def _offered_flags(self) -> TransmissionFlag:
        flags = self.server.info().flags
        return flags if self.terms.style else flags & ~TransmissionFlag.SEND_DF

    def _info(self, option: int, content: bytes) -> list[bytes]:
        request = parse_info_request(content)
        self._must_be_export(request.name)
        self.terms.flags = self._offered_flags()
        info = self.server.info()
        info = ExportInfo(info.name, info.size, self.terms.flags, info.description, *self.options.blocks)
        kinds = [Info.EXPORT]
        kinds += [kind for kind in (Info.NAME, Info.DESCRIPTION) if kind in request.infos]
        if self.options.tell_blocks:
            kinds.append(Info.BLOCK_SIZE)
            if Info.BLOCK_SIZE not in request.infos and self.options.blocks[0] > 1:
                raise OptionRefused(Reply.ERR_BLOCK_SIZE_REQD, "the block sizes were not asked for")
        infos = [encode_reply(option, Reply.INFO, encode_info(kind, info)) for kind in kinds]
        return [*infos, encode_reply(option, Reply.ACK)]

    def _must_be_export(self, name: str) -> None:
        if name != self.options.name:
            raise OptionRefused(Reply.ERR_UNKNOWN, f"export '{name}' is not here")

    def _take_style(self, option: int, style: Style) -> list[bytes]:
        if self.terms.style >= style:
            self._violation(f"option {option} when {self.terms.style.name} was negotiated")
            raise OptionRefused(Reply.ERR_INVALID, "negotiated before")
        self.terms.style = style
        return [encode_reply(option, Reply.ACK)]

    def _meta(self, option: int, content: bytes) -> list[bytes]:
        request = parse_meta_request(content)
        self._must_be_export(request.name)
        if self.terms.style is Style.SIMPLE:
            raise OptionRefused(Reply.ERR_INVALID, "structured replies were not negotiated")
        known = self.server.contexts()
        found = [name for name in known if name in request.queries]
        if option == Option.LIST_META_CONTEXT:
            found = [name for name in known if not request.queries or name in request.queries]
        ids = {name: number for number, name in enumerate(found, 1)}
        if option == Option.SET_META_CONTEXT:
            self.terms.contexts = ids
        replies = [
            encode_reply(option, Reply.META_CONTEXT, struct.pack(">I", number) + name.encode())
            for name, number in ids.items()
        ]
        return [*replies, encode_reply(option, Reply.ACK)]

    # ---- transmission ----

    async def _transmit(self) -> None:
        number = 0
        while True:
            request = await self._receive(number)
            number += 1
            self.server.log.append(request)
            if request.command == Command.DISC:
                return
            for text in self.terms.judge(request, self.in_flight):
                self._violation(text)
            self.in_flight.add(request.cookie)
            known = {int(command) for command in Command}
            name = Command(request.command).name if request.command in known else str(request.command)
            await self._send(
                Step(name, Answer(self.terms, self.server.disk, request).messages(), request=request)
            )

    async def _receive(self, number: int) -> Request:
        fields = self.terms.style.request
        magic, flags, command, cookie, offset, length = fields.unpack(
            await self.reader.readexactly(fields.size)
        )
        if magic != (EXTENDED_REQUEST_MAGIC if self.terms.style is Style.EXTENDED else REQUEST_MAGIC):
            self._violation(f"request of magic {magic:#x}")
            raise _Leave
        carries = flags & PAYLOAD_LEN if self.terms.style is Style.EXTENDED else command == Command.WRITE
        if carries and length > PAYLOAD_BOUND:
            self._violation(f"payload of {length} bytes")
            raise _Leave
        payload = await self.reader.readexactly(length) if carries else b""
        return Request(self.number, number, command, flags, cookie, offset, length, payload, self.terms.style)

    async def _send(self, step: Step) -> None:
        if self.options.delay:
            task = asyncio.create_task(self._send_late(step))
            self._later.add(task)
            task.add_done_callback(self._later.discard)
        elif self.shuffler is not None:
            self.shuffler.add(step)
        else:
            self.in_flight.discard(step.asked.cookie)
            await self.perform(step)

    async def _send_late(self, step: Step) -> None:
        await asyncio.sleep(self.options.delay)
        self.in_flight.discard(step.asked.cookie)
        with contextlib.suppress(_Leave, OSError):
            await self.perform(step)

    def _violation(self, text: str) -> None:
        self.server.violations.append(text)


class _Shuffler:
    """Sends the messages of several replies interleaved; the last one of each, which is final, stays last."""

    def __init__(self, connection: Connection, seed: int | None) -> None:
        self.connection = connection
        self.random = random.Random(seed)
        self.pending: list[tuple[Step, list[bytes]]] = []
        self.some = asyncio.Event()
        self.task = asyncio.create_task(self._run())

    def add(self, step: Step) -> None:
        self.pending.append((step, list(step.messages)))
        self.some.set()

    async def _run(self) -> None:
        with contextlib.suppress(_Leave, OSError):
            while True:
                await self.some.wait()
                await asyncio.sleep(0.001)  # more requests come in
                while self.pending:
                    await self._send_one()
                self.some.clear()

    async def _send_one(self) -> None:
        chosen = self.random.randrange(len(self.pending))
        step, messages = self.pending[chosen]
        message = messages.pop(0)
        if not messages:
            del self.pending[chosen]
            self.connection.in_flight.discard(step.asked.cookie)
        await self.connection.perform(Step("piece", [message], request=step.request))


class ServerThread:
    """A server in a thread and loop of its own, so that a test may block. Use as a context manager."""

    def __init__(self, server: NbdServer, address: Address | socket.socket) -> None:
        self.server = server
        self.address = address
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        self._loop.run_forever()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    def __enter__(self) -> NbdServer:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self.server.start(self.address), self._loop).result(10)
        return self.server

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self.server.stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def cut(self) -> None:
        """Ends every connection; new ones are taken."""
        self._loop.call_soon_threadsafe(self.server.cut)


async def _serve(server: NbdServer, address: str) -> None:
    await server.start(address)
    print("ready", flush=True)
    await asyncio.Event().wait()


def main() -> None:
    """Serves one export named "disk" until it is ended."""
    from target.peers.nbd_reply_faults import armed

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--unix", required=True, metavar="PATH", help="the socket")
    parser.add_argument("--size", type=int, default=64 << 20, metavar="BYTES")
    parser.add_argument("--fault", type=armed, action="append", default=[], metavar="NAME@STEP[:NTH[:TIMES]]")
    parser.add_argument("--extended", action="store_true", help="offer extended headers")
    arguments = parser.parse_args()
    options = ServerOptions(size=arguments.size, extended=arguments.extended)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(NbdServer(options, *arguments.fault), arguments.unix))


if __name__ == "__main__":
    main()
