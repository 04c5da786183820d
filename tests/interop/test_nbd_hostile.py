# SPDX-License-Identifier: Apache-2.0
"""NBD clients that misbehave: their connection gets an error or is closed, others go on, nothing leaks.

Each test runs beside a client that works on, and checks that descriptors and memory come back to their base.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import signal
import socket
import struct
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from target.exports.nbd.protocol import (
    CLIENT_FLAGS,
    OPTION,
    Command,
    CommandFlag,
    NbdErrno,
    Option,
    Reply,
    encode_info_request,
    encode_meta_request,
    encode_option,
    encode_request,
    encode_string,
)
from target.peers.nbd_client import NbdClient
from target.peers.nbd_raw import Address, Chunk, OptionFailed, RawClient
from tests.support.daemon import Daemon, blockdev, free_port
from tests.support.nbd import (
    MIB,
    anonymous_memory,
    closes,
    descriptors,
    enter,
    never_reads,
    raw_client,
    settles,
    undisturbed,
)
from tests.support.tools import create_image
from tests.support.warnings import Log

SIZE = 64 * MIB
HANDSHAKE_SECONDS = 2
U32 = 0xFFFFFFFF


class Server:
    """A target with writable and read-only exports, on a unix socket and on TCP."""

    def __init__(self, directory: Path, format: str) -> None:
        self.image = create_image(directory / "disk", str(SIZE), format=format)
        self.unix = str(directory / "nbd.sock")
        self.tcp = ("127.0.0.1", free_port())
        file = {"driver": "file", "filename": str(self.image)}
        limits = f"max-connections=100,handshake-max-seconds={HANDSHAKE_SECONDS}"
        self.daemon = Daemon(
            *blockdev(driver=format, node_name="disk", file=file),
            *blockdev(driver="null-co", node_name="zero", size=SIZE, read_zeroes=True),
            *blockdev(driver="null-co", node_name="huge", size=1 << 40, read_zeroes=True),
            *["--nbd-server", f"addr.type=unix,addr.path={self.unix},{limits}"],
            *["--nbd-server", f"addr.type=inet,addr.host=127.0.0.1,addr.port={self.tcp[1]},{limits}"],
            *["--export", "type=nbd,id=disk,node-name=disk,name=disk,writable=on"],
            *["--export", "type=nbd,id=frozen,node-name=disk,name=frozen"],
            *["--export", "type=nbd,id=zero,node-name=zero,name=zero"],
            *["--export", "type=nbd,id=huge,node-name=huge,name=huge,writable=on"],
        )
        self.log = Log(self.daemon)

    @property
    def pid(self) -> int:
        return self.daemon.process.pid

    async def complains(self, text: str, export: str = "") -> None:
        """Asserts that a new warning names the export, or the server when none was chosen yet."""
        await self.log.will_say(f"export '{export}'" if export else "NBD server", text)


@pytest.fixture(scope="module", params=["raw", "qcow2"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("hostile"), request.param)
    try:
        server.daemon.wait_ready()
        asyncio.run(warm_up(server))
        yield server
        server.daemon.stop()
    finally:
        server.daemon.kill()


async def warm_up(server: Server) -> None:
    """What is made on first use belongs to the base."""
    clients = [await NbdClient.connect(server.unix, "disk") for _ in range(20)]
    await asyncio.gather(*(client.write(32 * MIB, bytes(MIB)) for client in clients))
    await asyncio.gather(*(client.close() for client in clients))


@pytest.fixture
async def beside(server: Server) -> AsyncIterator[Server]:
    """The server, with another client at work while the test runs."""
    server.log.skip()
    async with undisturbed(server.pid, server.unix):
        yield server


@pytest.fixture
async def raw(beside: Server) -> AsyncIterator[RawClient]:
    """A connection on which nothing was sent yet."""
    async with raw_client(beside.unix) as raw:
        yield raw


# ---- the handshake ----


@pytest.mark.timed
async def test_01_silence_and_single_bytes_end_at_the_deadline(beside: Server) -> None:
    before = time.monotonic()
    async with raw_client(beside.unix) as silent, raw_client(beside.unix) as slow:
        data = CLIENT_FLAGS.pack(3) + encode_option(Option.LIST) * 100

        async def trickle() -> None:
            with contextlib.suppress(OSError):
                for byte in data:
                    await slow.send(bytes([byte]))
                    await asyncio.sleep(0.05)

        sending = asyncio.create_task(trickle())
        await silent.reader.readexactly(18)
        assert await closes(silent)
        while await slow.reader.read(4096):
            pass
        assert HANDSHAKE_SECONDS - 0.5 < time.monotonic() - before < HANDSHAKE_SECONDS + 2
        sending.cancel()
        await asyncio.wait([sending])
    for _ in range(2):
        await beside.complains("the handshake was not finished in time")


@pytest.mark.parametrize("flags", [4, 0x80000000, U32])
async def test_03_unknown_client_flags(beside: Server, raw: RawClient, flags: int) -> None:
    await raw.greet(flags)
    assert await closes(raw)
    await beside.complains("unknown client flags")


@pytest.mark.timed
@pytest.mark.parametrize("length", [U32, 64 * MIB])
@pytest.mark.parametrize("option", [Option.GO, Option.LIST, 0x7FFFFFFF])
async def test_04_absurd_option_length(beside: Server, raw: RawClient, option: int, length: int) -> None:
    await raw.greet()
    await raw.send(OPTION.pack(0x49484156454F5054, option, length))
    assert await closes(raw, seconds=1)
    await beside.complains(f"option of {length} bytes")


@pytest.mark.parametrize("name", [b"n" * 4097, b"di\0sk", b"\xff\xfe\xfd", b"n" * 4096])
async def test_05_names_that_are_none(beside: Server, name: bytes) -> None:
    async with raw_client(beside.unix) as raw:
        await raw.greet()
        for option in (Option.INFO, Option.GO):
            data = struct.pack(">I", len(name)) + name + b"\0\0"
            reply = (await raw.option(option, data))[-1]
            assert reply.type == (Reply.ERR_UNKNOWN if len(name) == 4096 else Reply.ERR_INVALID)
            assert len(reply.data) <= 4096
    async with raw_client(beside.unix) as raw:
        await raw.greet()
        await raw.send(encode_option(Option.EXPORT_NAME, name))
        assert await closes(raw)
    await beside.complains("client (process ")
    assert all(len(line) < 400 and line.isprintable() for line in beside.log.new())


@pytest.mark.parametrize("option", [Option.INFO, Option.GO])
async def test_06_information_requests_and_names_past_the_option(raw: RawClient, option: Option) -> None:
    await raw.greet()
    for data in (
        encode_string("disk") + b"\xff\xff" + bytes(100),  # 65535 requests announced
        struct.pack(">I", 5) + b"disk",
        struct.pack(">I", U32) + b"disk\0\0",
        struct.pack(">I", U32 - 3) + b"disk\0\0",
    ):
        assert (await raw.option(option, data))[-1].type == Reply.ERR_INVALID
    too_long = encode_info_request("disk", [3] * 65535)
    assert (await raw.option(option, too_long))[-1].type == Reply.ERR_TOO_BIG
    assert (await raw.info("disk")).size == SIZE


async def test_07_ten_thousand_lists_without_reading(beside: Server) -> None:
    async with raw_client(beside.unix) as raw:
        await raw.greet()
        raw.writer.write(encode_option(Option.LIST) * 10_000)
        await asyncio.sleep(HANDSHAKE_SECONDS + 0.5)
        assert anonymous_memory(beside.pid) < 300 * MIB
        raw.writer.transport.abort()


async def test_08_meta_context_queries(beside: Server) -> None:
    async with raw_client(beside.unix) as raw:
        await raw.greet()
        with pytest.raises(OptionFailed):  # before structured replies
            await raw.meta_contexts("disk", ["base:allocation"])
        await raw.request_structured()
        for data in (
            encode_string("disk") + struct.pack(">I", U32),
            encode_string("disk") + struct.pack(">II", 1, 100) + b"base:",
            encode_string("disk") + struct.pack(">II", 1, U32) + b"base:",
            struct.pack(">I", U32) + b"disk",
        ):
            for option in (Option.SET_META_CONTEXT, Option.LIST_META_CONTEXT):
                assert (await raw.option(option, data))[-1].type == Reply.ERR_INVALID
        many = encode_meta_request("disk", ["base:x"] * 5000)
        assert (await raw.option(Option.SET_META_CONTEXT, many))[-1].type == Reply.ACK
        assert await raw.meta_contexts("zero", ["base:allocation"])
        await raw.info("disk")  # another export than the contexts are for
        await raw.request(Command.BLOCK_STATUS, 1, 0, 4096)
        assert (await raw.message()).error == NbdErrno.EINVAL


async def test_09_starttls_twice_with_data_behind_it(raw: RawClient) -> None:
    await raw.greet()
    await raw.send(encode_option(Option.STARTTLS) * 2 + encode_option(Option.STRUCTURED_REPLY))
    assert [(await raw.option_reply()).type for _ in range(3)] == [
        Reply.ERR_POLICY,
        Reply.ERR_POLICY,
        Reply.ACK,
    ]


async def test_10_structured_reply_twice(raw: RawClient) -> None:
    await raw.greet()
    await raw.request_structured()
    assert (await raw.option(Option.STRUCTURED_REPLY))[-1].type == Reply.ERR_INVALID
    assert (await raw.info("disk")).size == SIZE


async def test_11_export_name_of_a_missing_export(beside: Server, raw: RawClient) -> None:
    await raw.greet()
    await raw.send(encode_option(Option.EXPORT_NAME, b"absent\nblocktarget: ready"))
    assert await closes(raw)
    await beside.complains(r"export 'absent\nblocktarget: ready' is not present")


async def test_handshake_with_a_wrong_magic(beside: Server, raw: RawClient) -> None:
    await raw.greet()
    await raw.send(b"GET / HTTP/1.1\r\n\r\n")
    assert await closes(raw)
    await beside.complains("wrong magic of an option")


async def test_ordinary_ends_are_not_worth_a_word(beside: Server) -> None:
    for leave in ("at once", "greeted", "aborted", "asked", "disconnected"):
        async with raw_client(beside.unix) as raw:
            if leave == "greeted":
                await raw.greet()
            elif leave == "aborted":
                await raw.greet()
                assert (await raw.option(Option.GO, encode_info_request("absent")))[-1].is_error
                await raw.send(encode_option(Option.ABORT))
            elif leave != "at once":
                await enter(raw)
                await raw.request(Command.READ, 1, 0, MIB)
            if leave == "disconnected":
                await raw.message(lambda cookie: MIB)
                await raw.request(Command.DISC, 2, 0, 0)
    await asyncio.sleep(0.5)
    assert beside.log.new() == []


# ---- requests ----


async def is_silent(raw: RawClient, seconds: float = 0.2) -> bool:
    """Whether nothing comes, and the connection stays."""
    try:
        async with asyncio.timeout(seconds):
            await raw.reader.read(1)
    except TimeoutError:
        return True
    return False


HALVES = [
    (encode_request(Command.FLUSH, 1, 0, 0), 1),
    (encode_request(Command.FLUSH, 1, 0, 0), 27),
    (encode_request(Command.WRITE, 1, 4 * MIB, 8 * MIB) + bytes(8 * MIB), 3 * MIB),
]


@pytest.mark.parametrize("leave", [False, True], ids=["the rest comes late", "it never comes"])
async def test_02_half_a_request_then_silence(beside: Server, leave: bool) -> None:
    """It is waited for, without an answer; when the rest comes after all, the session goes on."""
    for request, part in HALVES:
        async with raw_client(beside.unix) as raw:
            await enter(raw)
            await raw.send(request[:part])
            assert await is_silent(raw)
            if not leave:
                await raw.send(request[part:])
                assert await raw.message() == good(1)


async def test_12_wrong_magic(beside: Server, raw: RawClient) -> None:
    await enter(raw)
    await raw.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert await closes(raw)
    await beside.complains("a wrong magic", export="disk")


async def test_12_wrong_magic_after_good_requests(beside: Server, raw: RawClient) -> None:
    """What came before is still answered."""
    await enter(raw, "zero")
    await raw.send(encode_request(Command.FLUSH, 7, 0, 0) + bytes(28))
    assert await raw.message() == good(7)
    assert await closes(raw)
    await beside.complains("a wrong magic", export="zero")


def good(cookie: int) -> Chunk:
    """A simple reply without an error."""
    return Chunk(cookie, None, True)


PAST_END = [(SIZE, 1), (SIZE - 1, 2), (1 << 63, 512), ((1 << 64) - 512, 1024), ((1 << 64) - 1, 1)]


@pytest.mark.parametrize("structured", [False, True])
async def test_13_ranges_outside_of_the_export(raw: RawClient, structured: bool) -> None:
    await enter(raw, structured=structured)
    for offset, length in [*PAST_END, (0, 0), (SIZE, 0)]:
        for command in (
            Command.READ,
            Command.TRIM,
            Command.CACHE,
            Command.WRITE_ZEROES,
            Command.BLOCK_STATUS,
        ):
            await raw.request(command, 5, offset, length)
            past = command is Command.WRITE_ZEROES and length > 0
            assert (await raw.message()).error == (NbdErrno.ENOSPC if past else NbdErrno.EINVAL)
        await raw.request(Command.WRITE, 5, offset, length, payload=bytes(length))
        assert (await raw.message()).error == (NbdErrno.ENOSPC if length else NbdErrno.EINVAL)


@pytest.mark.parametrize("structured", [False, True])
async def test_13_reads_of_4_gib(raw: RawClient, structured: bool) -> None:
    await enter(raw, structured=structured)
    for length in (U32, 32 * MIB + 1):
        await raw.request(Command.READ, 5, 0, length)
        assert (await raw.message()).error in (NbdErrno.EINVAL, NbdErrno.EOVERFLOW)
    await raw.request(Command.READ, 6, 0, 512)
    assert not (await raw.message(lambda cookie: 512)).error


async def test_13_write_of_4_gib_is_not_awaited(beside: Server, raw: RawClient) -> None:
    await enter(raw)
    await raw.request(Command.WRITE, 5, 0, U32)
    assert (await raw.message()).error == NbdErrno.ENOSPC
    assert await closes(raw)
    await beside.complains("more data than is read and dropped", export="disk")


async def test_13_write_over_the_maximum_is_drained(raw: RawClient) -> None:
    await enter(raw)
    await raw.request(Command.WRITE, 5, 0, 33 * MIB, payload=bytes(33 * MIB))
    assert (await raw.message()).error == NbdErrno.EINVAL
    await raw.request(Command.FLUSH, 6, 0, 0)
    assert await raw.message() == good(6)


@pytest.mark.parametrize("export", ["frozen", "zero"])
@pytest.mark.parametrize("length", [512, 300_000, 5 * MIB])
async def test_14_writes_to_a_read_only_export_are_drained(
    beside: Server, raw: RawClient, length: int, export: str
) -> None:
    """`frozen` is the image that `disk` may write to."""
    client = await NbdClient.connect(beside.unix, "disk")
    content = random.Random(length).randbytes(8192)
    await client.write(2 * MIB, content)
    await enter(raw, export)
    await raw.send(encode_request(Command.WRITE, 5, 2 * MIB, length) + b"\x25\x60\x95\x13" * (length // 4))
    assert (await raw.message()).error == NbdErrno.EPERM
    for command in (Command.TRIM, Command.WRITE_ZEROES):
        await raw.request(command, 5, 2 * MIB, length)
        assert (await raw.message()).error == NbdErrno.EPERM
    await raw.request(Command.READ, 6, 2 * MIB, 8192)
    chunk = await raw.message(lambda cookie: 8192)
    assert (chunk.cookie, chunk.error) == (6, 0)
    assert chunk.payload == (content if export == "frozen" else bytes(8192))
    assert await client.read(2 * MIB, 8192) == content
    await client.close()


WRONG_FLAGS = [
    (Command.READ, CommandFlag.DF),  # without structured replies
    (Command.READ, CommandFlag.NO_HOLE),
    (Command.TRIM, CommandFlag.NO_HOLE),
    (Command.CACHE, CommandFlag.REQ_ONE),
    (Command.WRITE_ZEROES, CommandFlag.DF),
    (Command.FLUSH, CommandFlag.FAST_ZERO),
    (Command.TRIM, 1 << 15),
    (Command.READ, 1 << 5),
    (8, 0),  # RESIZE
    (99, 0),
    (0xFFFF, 0xFFFF),
]


async def test_15_unknown_commands_and_flags(raw: RawClient) -> None:
    await enter(raw)
    for command, flags in WRONG_FLAGS:
        await raw.request(command, 5, 0, 0 if command == Command.FLUSH else 512, flags)
        assert (await raw.message()).error == NbdErrno.EINVAL
    await raw.request(Command.WRITE, 6, 0, 4096, CommandFlag.DF, bytes(4096))
    assert (await raw.message()).error == NbdErrno.EINVAL
    for command in (Command.TRIM, Command.READ, Command.CACHE):  # FUA goes with every command
        cookie = 512 if command is Command.READ else 0
        await raw.request(command, cookie, SIZE - 512, 512, CommandFlag.FUA)
        assert not (await raw.message(lambda cookie: cookie)).error


@pytest.mark.parametrize("length", [4096, 128 << 10, 32 * MIB])
@pytest.mark.parametrize("structured", [False, True])
async def test_16_five_thousand_requests_without_reading(
    beside: Server, structured: bool, length: int
) -> None:
    before = anonymous_memory(beside.pid)
    clients = []
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(5):
            raw = await stack.enter_async_context(raw_client(beside.unix))
            clients.append(raw)
            await enter(raw, structured=structured)
            raw.writer.write(b"".join(encode_request(Command.READ, i, 0, length) for i in range(5000)))
        await asyncio.sleep(1)
        assert anonymous_memory(beside.pid) - before < 5 * 20 * MIB
        for raw in clients:
            raw.writer.transport.abort()


async def test_17_block_status(beside: Server) -> None:
    async with raw_client(beside.unix) as raw:
        await enter(raw, structured=False)
        await raw.request(Command.BLOCK_STATUS, 1, 0, 4096)
        assert (await raw.message()).error == NbdErrno.EINVAL
    async with raw_client(beside.unix) as raw:
        await enter(raw, structured=True)
        await raw.request(Command.BLOCK_STATUS, 2, 0, 0, CommandFlag.REQ_ONE)
        assert (await raw.message()).error == NbdErrno.EINVAL
        await raw.request(Command.BLOCK_STATUS, 3, 0, U32)
        assert (await raw.message()).error == NbdErrno.EINVAL


async def test_17_ranges_of_4_gib(beside: Server) -> None:
    client = await NbdClient.connect(beside.unix, "huge")
    for offset in (0, 1, (1 << 40) - U32):
        for flags in (0, CommandFlag.REQ_ONE):
            assert await client.block_status(offset, U32, flags) == [(U32, 2)]
        await client.trim(offset, U32)
        await client.write_zeroes(offset, U32)
        await client.cache(offset, U32)
    await client.close()


PIECE = 512 << 10  # larger writes are done in pieces of this size


@pytest.mark.parametrize("abort", [False, True])
async def test_18_disconnect_with_writes_in_flight(beside: Server, abort: bool) -> None:
    """Each piece is wholly old or wholly new, and what did not arrive is old."""
    old, new = bytes([0xAA]) * PIECE, bytes([0x55]) * PIECE
    client = await NbdClient.connect(beside.unix, "disk")
    places = [MIB * (i + 1) for i in range(16)]
    for _ in range(5):
        await asyncio.gather(*(client.write(place, old * 2) for place in [*places, 40 * MIB]))
        before = descriptors(beside.pid)
        async with raw_client(beside.unix) as raw:
            await enter(raw)
            for i, place in enumerate(places):
                await raw.send(encode_request(Command.WRITE, i, place, MIB) + new * 2)
            await raw.send(encode_request(Command.WRITE, 99, 40 * MIB, MIB) + new[:1000])
            if abort:
                raw.writer.transport.abort()
        await settles(beside.pid, before, U32)
        found = [await client.read(place + half, PIECE) for place in places for half in (0, PIECE)]
        assert all(piece in (old, new) for piece in found)
        assert new in found
        assert await client.read(40 * MIB, MIB) == old * 2
    await client.close()


async def test_19_disconnect_then_more(raw: RawClient) -> None:
    """What came before DISC is answered, what comes after is not."""
    await enter(raw)
    after = encode_request(Command.FLUSH, 2, 0, 0)
    await raw.send(encode_request(Command.FLUSH, 1, 0, 0) + encode_request(Command.DISC, 0, 0, 0) + after)
    assert await raw.message() == good(1)
    assert await closes(raw)


async def test_20_duplicate_cookies(raw: RawClient) -> None:
    """Cookies are the client's affair: each request gets its reply, and the session goes on."""
    await enter(raw)
    content = random.Random(20).randbytes(512)
    await raw.request(Command.WRITE, 7, 3 * MIB, 512, payload=content)
    assert await raw.message() == good(7)
    await raw.send(encode_request(Command.READ, 7, 3 * MIB, 512) * 50)
    for _ in range(50):
        assert await raw.message(lambda cookie: 512) == Chunk(7, None, True, content)
    await raw.request(Command.FLUSH, 7, 0, 0)
    assert await raw.message() == good(7)
    assert await is_silent(raw)


@pytest.mark.parametrize("family", ["unix", "tcp"])
async def test_21_shutdown_of_reading_while_replies_are_large(beside: Server, family: str) -> None:
    """The kernel does not tell the server, which waits for room as for any client that does not read."""
    before = descriptors(beside.pid), anonymous_memory(beside.pid)
    async with raw_client(beside.unix if family == "unix" else beside.tcp) as raw:
        await enter(raw)
        never_reads(raw)
        sock = raw.writer.get_extra_info("socket")
        raw.writer.write(b"".join(encode_request(Command.READ, i, 0, 8 * MIB) for i in range(20)))
        await asyncio.sleep(0.1)
        sock.shutdown(socket.SHUT_RD)
        await asyncio.sleep(0.5)
        assert descriptors(beside.pid) == before[0] + 1
        assert anonymous_memory(beside.pid) - before[1] < 20 * MIB
        raw.writer.transport.abort()
        await settles(beside.pid, *before)


async def test_21_shutdown_of_writing_by_one_that_never_reads(beside: Server, raw: RawClient) -> None:
    """It is cut off after a few seconds."""
    await enter(raw)
    never_reads(raw)
    await raw.request(Command.READ, 1, 0, 8 * MIB)
    raw.writer.write_eof()
    await beside.complains("it does not take its replies", export="disk")


async def test_21_shutdown_of_writing_still_gets_the_replies(raw: RawClient) -> None:
    await enter(raw)
    raw.writer.write(b"".join(encode_request(Command.READ, i, 0, MIB) for i in range(20)))
    raw.writer.write_eof()
    for _ in range(20):
        assert not (await raw.message(lambda cookie: MIB)).error
    assert await closes(raw)


async def test_23_connections_over_the_maximum_wait(server: Server) -> None:
    """Further clients are not greeted until there is room; the other server of the process is not touched."""
    base = descriptors(server.pid), anonymous_memory(server.pid)
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(raw_client(server.tcp)) for _ in range(101)]
        for raw in clients[:100]:
            await enter(raw)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await clients[100].reader.read(1)
        other = await NbdClient.connect(server.unix, "disk")
        await other.read(0, 512)
        await other.close()
        await clients[0].request(Command.DISC, 0, 0, 0)
        assert (await enter(clients[100])).size == SIZE
    await settles(server.pid, *base)


PER_SECOND, SECONDS = 1000, 10


@pytest.mark.timed
@pytest.mark.slow
async def test_24_a_thousand_connects_a_second(beside: Server) -> None:
    """For ten seconds, as far as the machine gets: at least a third of it."""
    source = random.Random(24)
    go = CLIENT_FLAGS.pack(3) + encode_option(Option.GO, encode_info_request("disk"))
    visits, failures = 0, 0
    room = asyncio.Semaphore(60)  # below the bound on connections

    async def visit(address: Address) -> None:
        nonlocal visits, failures
        async with room:
            try:
                raw = await RawClient.connect(address)
                await raw.send(go[: source.randrange(len(go) + 1)])
                if source.random() < 0.25:
                    raw.writer.transport.abort()
                await raw.close()
                visits += 1
            except OSError:
                failures += 1

    begun = time.monotonic()
    due: set[asyncio.Task[None]] = set()
    for i in range(PER_SECOND * SECONDS):
        await asyncio.sleep(max(0.0, begun + i / PER_SECOND - time.monotonic()) if i % 10 == 0 else 0)
        if time.monotonic() > begun + 1.5 * SECONDS:
            break
        due.add(asyncio.create_task(visit(beside.unix if i % 4 else beside.tcp)))
        if len(due) >= 200:
            _, due = await asyncio.wait(due, return_when=asyncio.FIRST_COMPLETED)
    if due:
        await asyncio.wait(due)
    rate = visits / (time.monotonic() - begun)
    print(f"{visits} connects, {rate:.0f} each second; {failures} failed")
    assert failures == 0
    assert rate > PER_SECOND / 3 and visits > PER_SECOND * SECONDS / 3


@pytest.mark.parametrize("family", ["unix", "tcp"])
async def test_25_out_of_band_data(beside: Server, family: str) -> None:
    """The byte is not in the stream, which goes on as if it were not there."""
    async with raw_client(beside.unix if family == "unix" else beside.tcp) as raw:
        await raw.greet()
        sock = raw.writer.get_extra_info("socket")
        send_out_of_band(sock)
        assert (await raw.info("disk")).size == SIZE
        send_out_of_band(sock)
        await raw.request(Command.FLUSH, 1, 0, 0)
        assert await raw.message() == good(1)


def send_out_of_band(sock: Any) -> None:
    """asyncio's sockets do not send."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(sock.fileno())) as copy:
        copy.send(b"!", socket.MSG_OOB)  # a kernel may not know it on unix sockets


async def test_garbage_in_both_phases(beside: Server) -> None:
    source = random.Random(1)
    for i in range(60):
        async with raw_client(beside.unix) as raw:
            if i % 2:
                await enter(raw, structured=True)
            else:
                await raw.greet()
            with contextlib.suppress(OSError):
                await raw.send(b"\xff" + source.randbytes(source.randrange(40, 5000)))
            assert await closes(raw)
        await beside.complains("wrong magic", export="disk" if i % 2 else "")


async def test_floods_of_errors_are_a_few_lines(beside: Server) -> None:
    """A client cannot fill the disk with what is said about it."""
    begun = time.monotonic()
    for i in range(300):
        async with raw_client(beside.unix) as raw:
            await enter(raw)
            await raw.send(bytes(28))
            assert await closes(raw), i
    await asyncio.sleep(0.5)
    lines = beside.log.new()
    assert lines and all(line.startswith("blocktarget: export 'disk': client") for line in lines)
    assert len(lines) < 60 + 5 * (time.monotonic() - begun)
    more = (re.search(r"and (\d+) more", line) for line in lines)
    assert len(lines) + sum(int(found[1]) for found in more if found) == 300


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_22_stop_with_live_requests_and_half_open_handshakes(tmp_path: Path, format: str) -> None:
    """SIGTERM ends the process in time and cleanly, whatever its clients are doing."""
    server = Server(tmp_path, format)
    sockets = []
    try:
        server.daemon.wait_ready()
        for i in range(30):
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(server.unix)
            sockets.append(sock)
            if i % 3 == 1:
                sock.send(CLIENT_FLAGS.pack(3))
            elif i % 3 == 2:
                sock.send(CLIENT_FLAGS.pack(3) + encode_option(Option.GO, encode_info_request("disk")))
                sock.send(b"".join(encode_request(Command.READ, n, 0, MIB) for n in range(200)))
        before = time.monotonic()
        server.daemon.process.send_signal(signal.SIGTERM)
        try:
            assert server.daemon.process.wait(20) == 0
        except subprocess.TimeoutExpired:
            pytest.fail("the target does not end")
        assert time.monotonic() - before < 10
        assert not Path(server.unix).exists()
    finally:
        for sock in sockets:
            sock.close()
        server.daemon.kill()
