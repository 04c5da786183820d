# SPDX-License-Identifier: Apache-2.0
"""NBD sessions over a backend written in Python: what commands ask of the node, and what errors become."""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from target.datapath import FAST_ZERO, HOLE, UNMAP, ZERO, Datapath, Fault, Op, lib
from target.exports.address import UnixAddress
from target.exports.nbd import NbdServer, NbdServerOptions
from target.exports.nbd.export import NbdExport, NbdOptions
from target.exports.nbd.protocol import (
    ChunkType,
    Command,
    CommandFlag,
    NbdErrno,
    TransmissionFlag,
    encode_request,
)
from target.graph.errors import BlockError
from target.graph.node import Features
from target.peers.nbd_client import NbdClient
from target.peers.nbd_raw import RawClient
from tests.support.nbd import enter, raw_client

MIB = 1 << 20
SIZE = 64 * MIB


class Memory:
    """The backend: bytes, a log of what was asked, and faults on demand."""

    def __init__(self) -> None:
        self.data = bytearray(SIZE)
        self.log: list[tuple[Op, int, int, int]] = []
        self.fail: dict[Op, int] = {}
        self.fail_from = 0
        self.extents: list[tuple[int, int]] = [(SIZE, 0)]
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def __call__(self, fault: Fault) -> None:
        self.log.append((fault.op, fault.flags, fault.offset, fault.length))
        await self.go_on.wait()
        if fault.op in self.fail and fault.offset >= self.fail_from:
            fault.done(-self.fail[fault.op])
            return
        end = fault.offset + fault.length
        if fault.op is Op.READ:
            fault.put_data(0, memoryview(self.data)[fault.offset : end].tobytes())
        elif fault.op is Op.WRITE:
            self.data[fault.offset : end] = fault.get_data()
        elif fault.op is Op.ZEROES:
            self.data[fault.offset : end] = bytes(fault.length)
        elif fault.op is Op.STATUS:
            self.status(fault)
        fault.done()

    def status(self, fault: Fault) -> None:
        at = 0
        for length, flags in self.extents:
            start, end = max(at, fault.offset), min(at + length, fault.offset + fault.length)
            if start < end and not fault.put_extent(end - start, flags):
                return
            at += length


class Setup:
    """A server with one export, in this process."""

    def __init__(self, directory: Path) -> None:
        self.address = str(directory / "nbd.sock")
        self.memory = Memory()
        self.datapath = Datapath()
        self.datapath.start(asyncio.get_running_loop())
        self.threads = [self.datapath.add_thread(0), self.datapath.add_thread(0)]
        self.object = self.datapath.upcall(SIZE, self.memory)
        self.gate = self.datapath.gate(self.object, True)
        self.server = NbdServer(self.datapath, NbdServerOptions(addr=UnixAddress(self.address)))

    def export(self, **options: Any) -> NbdExport:
        made = NbdOptions(id="e", node_name="node", **{"name": "disk", "writable": True, **options})
        node: Any = SimpleNamespace(size=SIZE, features=Features())
        edge: Any = SimpleNamespace(gate=self.gate, node=node)
        return NbdExport(made, node, edge, self.threads, self.datapath)

    async def close(self) -> None:
        await self.server.stop()
        self.gate.release()
        self.object.release()
        await self.datapath.close()


@pytest.fixture
async def setup(scratch: Path) -> AsyncIterator[Setup]:
    setup = Setup(scratch)
    await setup.server.start()
    yield setup
    await setup.close()


@pytest.fixture
async def export(setup: Setup) -> AsyncIterator[NbdExport]:
    export = setup.export()
    await export.start()
    yield export
    await export.stop()


@pytest.fixture(params=["structured", "simple"])
async def client(setup: Setup, export: NbdExport, request: pytest.FixtureRequest) -> AsyncIterator[NbdClient]:
    client = await NbdClient.connect(setup.address, "disk", structured=request.param == "structured")
    yield client
    await client.close()


@pytest.fixture
async def structured(setup: Setup, export: NbdExport) -> AsyncIterator[NbdClient]:
    client = await NbdClient.connect(setup.address, "disk")
    yield client
    await client.close()


async def test_each_command_becomes_its_operation(setup: Setup, client: NbdClient) -> None:
    await client.write(4096, b"w" * 512)
    await client.write(4096, b"f" * 512, CommandFlag.FUA)
    await client.write_zeroes(0, 1 << 25)
    await client.write_zeroes(0, 4096, CommandFlag.NO_HOLE | CommandFlag.FUA)
    await client.write_zeroes(0, 4096, CommandFlag.FAST_ZERO)
    await client.trim(8192, 1000)
    await client.trim(8192, 1000, CommandFlag.FUA)
    await client.flush()
    await client.cache(4096, 100)
    await client.read(1, 2, CommandFlag.FUA)
    flush = (Op.FLUSH, 0, 0, 0)  # after a change: what FUA becomes over a node that serves it in Python
    assert setup.memory.log == [
        (Op.WRITE, 0, 4096, 512),
        (Op.WRITE, 0, 4096, 512),
        flush,
        (Op.ZEROES, UNMAP, 0, 1 << 25),
        (Op.ZEROES, 0, 0, 4096),
        flush,
        (Op.ZEROES, UNMAP | FAST_ZERO, 0, 4096),
        (Op.DISCARD, 0, 8192, 1000),
        (Op.DISCARD, 0, 8192, 1000),
        flush,
        flush,
        (Op.CACHE, 0, 4096, 100),
        (Op.READ, 0, 1, 2),
    ]


async def test_writethrough_makes_every_change_durable(setup: Setup) -> None:
    export = setup.export(writethrough=True)
    await export.start()
    client = await NbdClient.connect(setup.address, "disk")
    await client.write(0, b"w" * 512)
    await client.write_zeroes(0, 512)
    await client.trim(0, 512)
    await client.read(0, 512)
    await client.close()
    await export.stop()
    changes = [Op.WRITE, Op.ZEROES, Op.DISCARD]
    flushed = [op for change in changes for op in (change, Op.FLUSH)]
    assert [op for op, _, _, _ in setup.memory.log] == [*flushed, Op.READ]


@pytest.mark.parametrize("length", [1, 511, 4096, 512 << 10, (512 << 10) + 1, 5 * MIB - 3, 32 * MIB])
async def test_lengths_around_the_pieces(setup: Setup, client: NbdClient, length: int) -> None:
    offset = 12345
    data = bytes(range(1, 252)) * (length // 251 + 1)
    await client.write(offset, data[:length])
    assert setup.memory.data[offset : offset + length] == data[:length]
    assert setup.memory.data[offset + length : offset + length + 9] == bytes(9)
    assert await client.read(offset, length) == data[:length]
    asked = [entry for entry in setup.memory.log if entry[0] is Op.READ]
    assert sum(entry[3] for entry in asked) == length
    assert max(entry[3] for entry in asked) <= 512 << 10


async def test_several_large_reads_at_once_with_small_ones_between(setup: Setup, client: NbdClient) -> None:
    setup.memory.data[:] = random.Random(3).randbytes(SIZE)
    reads = [(i * 65536, 3 * MIB + i) if i % 3 else (i * 4096, 1000) for i in range(24)]
    found = await asyncio.gather(*(client.read(offset, length) for offset, length in reads))
    for (offset, length), data in zip(reads, found, strict=True):
        assert data == setup.memory.data[offset : offset + length]


async def test_zeros_are_sent_as_holes(setup: Setup, structured: NbdClient) -> None:
    block = 64 << 10
    setup.memory.data[block : 2 * block] = b"x" * block
    setup.memory.data[3 * block + 5] = 1
    reply = await structured.read_reply(0, 6 * block)
    assert reply.data == setup.memory.data[: 6 * block]
    assert reply.holes == [(0, block), (2 * block, block), (3 * block + 4096, 2 * block + block - 4096)]
    assert (await structured.read_reply(0, 4096)).holes == [(0, 4096)]
    assert (await structured.read_reply(0, 6 * block, CommandFlag.DF)).holes == []


async def test_df_keeps_one_chunk_or_overflows(setup: Setup, structured: NbdClient) -> None:
    setup.memory.data[100_000:200_000] = b"d" * 100_000
    assert await structured.read(0, 512 << 10, CommandFlag.DF) == setup.memory.data[: 512 << 10]
    with pytest.raises(OSError) as raised:
        await structured.read(0, MIB, CommandFlag.DF)
    assert raised.value.errno == NbdErrno.EOVERFLOW


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (errno.EIO, NbdErrno.EIO),
        (errno.ENOSPC, NbdErrno.ENOSPC),
        (errno.EDQUOT, NbdErrno.ENOSPC),
        (errno.EFBIG, NbdErrno.ENOSPC),
        (errno.EROFS, NbdErrno.EPERM),
        (errno.EACCES, NbdErrno.EPERM),
        (errno.ENOMEM, NbdErrno.ENOMEM),
        (errno.EINVAL, NbdErrno.EINVAL),
        (errno.ETIMEDOUT, NbdErrno.EIO),
        (errno.ESHUTDOWN, NbdErrno.ESHUTDOWN),
    ],
)
async def test_errors(setup: Setup, client: NbdClient, error: int, expected: NbdErrno) -> None:
    setup.memory.fail = dict.fromkeys(Op, error)
    calls = [
        client.read(0, 512),
        client.read(0, 5 * MIB),
        client.write(0, bytes(512)),
        client.write(0, bytes(5 * MIB)),
        client.write_zeroes(0, 512),
        client.trim(0, 512),
        client.flush(),
        client.cache(0, 512),
    ]
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert [getattr(result, "errno", result) for result in results] == [expected] * len(calls)
    setup.memory.fail = {}
    assert await client.read(0, 512) == bytes(512)


async def test_fast_zero_that_is_not_fast(setup: Setup, client: NbdClient) -> None:
    setup.memory.fail = {Op.ZEROES: errno.ENOTSUP}
    for flags, expected in ((CommandFlag.FAST_ZERO, NbdErrno.ENOTSUP), (0, NbdErrno.EINVAL)):
        with pytest.raises(OSError) as raised:
            await client.write_zeroes(0, 512, flags)
        assert raised.value.errno == expected


async def test_an_error_in_the_middle_of_a_large_structured_read(setup: Setup, structured: NbdClient) -> None:
    setup.memory.fail, setup.memory.fail_from = {Op.READ: errno.EIO}, 2 * MIB
    with pytest.raises(OSError) as raised:
        await structured.read(0, 4 * MIB)
    assert raised.value.errno == NbdErrno.EIO
    assert await structured.read(0, MIB) == bytes(MIB)


async def test_an_error_in_the_middle_of_a_large_simple_read_closes(setup: Setup, export: NbdExport) -> None:
    """The reply began as a good one; the document leaves nothing else."""
    setup.memory.fail, setup.memory.fail_from = {Op.READ: errno.EIO}, 2 * MIB
    client = await NbdClient.connect(setup.address, "disk", structured=False)
    with pytest.raises(EOFError):
        await client.read(0, 4 * MIB)
    await client.abort()


async def test_block_status(setup: Setup, structured: NbdClient) -> None:
    setup.memory.extents = [(MIB, HOLE | ZERO), (4096, 0), (MIB, ZERO), (SIZE - 2 * MIB - 4096, 0)]
    assert await structured.block_status(0, SIZE) == setup.memory.extents
    assert await structured.block_status(512, SIZE - 512, CommandFlag.REQ_ONE) == [(MIB - 512, HOLE | ZERO)]
    assert await structured.block_status(MIB + 100, 200) == [(200, 0)]


async def test_block_status_of_a_fragmented_range_goes_on(setup: Setup, structured: NbdClient) -> None:
    setup.memory.extents = [(4096, i % 2) for i in range(SIZE // 4096)]
    first = await structured.block_status(0, SIZE)
    assert 1000 < len(first) < SIZE // 4096
    assert await structured.map() == setup.memory.extents


async def test_errors_have_a_text_with_structured_replies(setup: Setup, export: NbdExport) -> None:
    async with raw_client(setup.address) as raw:
        await enter(raw, structured=True)
        await raw.request(Command.READ, 1, SIZE, 512)
        chunk = await raw.message()
        assert (chunk.type, chunk.error, chunk.done) == (ChunkType.ERROR, NbdErrno.EINVAL, True)
        assert b"past the end" in chunk.payload


async def test_requests_pipelined_behind_go(setup: Setup, export: NbdExport) -> None:
    from target.exports.nbd.protocol import CLIENT_FLAGS, Option, encode_info_request, encode_option

    async with raw_client(setup.address) as raw:
        go = encode_option(Option.GO, encode_info_request("disk"))
        await raw.send(CLIENT_FLAGS.pack(3) + go + encode_request(Command.FLUSH, 77, 0, 0))
        await raw.reader.readexactly(18)
        assert [(await raw.option_reply()).type for _ in range(2)] == [3, 1]
        assert (await raw.message()).cookie == 77


async def test_stop_answers_what_is_under_way(setup: Setup) -> None:
    export = setup.export()
    await export.start()
    client = await NbdClient.connect(setup.address, "disk")
    setup.memory.go_on.clear()
    reads = [asyncio.ensure_future(client.read(i * 4096, 4096)) for i in range(20)]
    while len(setup.memory.log) < 20:
        await asyncio.sleep(0.01)
    stopping = asyncio.ensure_future(export.stop())
    await asyncio.sleep(0.05)
    assert not stopping.done()
    setup.memory.go_on.set()
    await stopping
    assert await asyncio.gather(*reads) == [bytes(4096)] * 20
    with pytest.raises(EOFError):
        await client.read(0, 512)
    await client.abort()


async def test_a_drained_gate_holds_requests(setup: Setup, structured: NbdClient) -> None:
    await setup.gate.drain()
    read = asyncio.ensure_future(structured.read(0, 512))
    await asyncio.sleep(0.05)
    assert not read.done() and not setup.memory.log
    setup.gate.resume()
    assert await read == bytes(512)


async def test_more_requests_than_the_session_takes_at_once(setup: Setup, client: NbdClient) -> None:
    """Reading of the socket stops at a bound, and goes on."""
    setup.memory.go_on.clear()
    reads = [asyncio.ensure_future(client.read(i * 512, 512)) for i in range(1000)]
    await asyncio.sleep(0.2)
    assert 16 <= len(setup.memory.log) <= 128
    setup.memory.go_on.set()
    assert await asyncio.gather(*reads) == [bytes(512)] * 1000


async def test_refused_write_after_a_large_one_is_drained_in_bulk(setup: Setup, export: NbdExport) -> None:
    """It once was drained in pieces of a request's header, 28 bytes. Found by fuzzing."""
    async with raw_client(setup.address) as raw:
        await enter(raw)
        await raw.request(Command.WRITE, 1, 0, 65536, payload=bytes(65536))
        assert not (await raw.message()).error
        await raw.request(Command.WRITE, 2, 0, 8 * MIB, CommandFlag.DF, bytes(8 * MIB))
        assert (await raw.message()).error == NbdErrno.EINVAL
        await raw.request(Command.FLUSH, 3, 0, 0)
        assert not (await raw.message()).error
        (counters,) = export.counters()["sessions"]
        assert counters["receives"] < 8 * MIB / 4096


async def test_with_no_shared_memory_left(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each session then goes on with the little that it may always have."""
    monkeypatch.setattr("target.exports.nbd.server.SESSION_MEMORY", 0)
    export = setup.export()
    await export.start()
    setup.memory.data[:] = random.Random(4).randbytes(SIZE)
    clients = [await NbdClient.connect(setup.address, "disk", structured=n > 0) for n in range(3)]

    async def use(client: NbdClient, at: int, length: int) -> None:
        data = random.Random(at).randbytes(length)
        await client.write(at, data)
        assert await client.read(at, length) == data

    lengths = (512, 5000, 70_000, 600_000, 20_000, 3 * MIB, 4096, 300_000)
    places = [(i % 3, i * 2 * MIB, lengths[i % len(lengths)] % (2 * MIB)) for i in range(32)]
    await asyncio.gather(*(use(clients[n], at, length) for n, at, length in places))
    for client in clients:
        await client.close()
    await export.stop()


async def test_sessions_take_the_threads_in_turn(setup: Setup, export: NbdExport) -> None:
    clients = [await NbdClient.connect(setup.address, "disk") for _ in range(4)]
    await asyncio.gather(*(client.read(0, 512) for client in clients))
    sessions = export.counters()["sessions"]
    assert [session["requests"] for session in sessions] == [1, 1, 1, 1]
    assert export._turn == 4
    for client in clients:
        await client.close()


def test_the_ends_of_a_session_are_told_apart() -> None:
    names = ("DISCONNECT", "EOF", "STOPPED", "PROTOCOL", "STUCK")
    assert len({getattr(lib, f"BT_NBD_END_{name}") for name in names}) == len(names)


async def test_flags_of_read_only_and_writable_exports(setup: Setup) -> None:
    for writable, expected in (
        (True, TransmissionFlag.SEND_WRITE_ZEROES),
        (False, TransmissionFlag.READ_ONLY),
    ):
        export = setup.export(writable=writable)
        await export.start()
        client = await NbdClient.connect(setup.address, "disk")
        both = TransmissionFlag.SEND_WRITE_ZEROES | TransmissionFlag.READ_ONLY
        assert client.export.flags & both == expected
        assert client.export.flags & TransmissionFlag.CAN_MULTI_CONN
        assert client.export.block_sizes == (1, 4096, 32 * MIB)
        await client.close()
        await export.stop()


async def test_one_connection_means_no_multi_conn(setup: Setup, export: NbdExport, scratch: Path) -> None:
    address = str(scratch / "single.sock")
    server = NbdServer(setup.datapath, NbdServerOptions(addr=UnixAddress(address), max_connections=1))
    await server.start()
    client = await NbdClient.connect(address, "disk")
    assert not client.export.flags & TransmissionFlag.CAN_MULTI_CONN
    waiting = asyncio.ensure_future(NbdClient.connect(address, "disk"))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    await client.close()
    await (await waiting).close()
    await server.stop()


async def test_the_only_export_is_the_default_one(setup: Setup, export: NbdExport) -> None:
    client = await NbdClient.connect(setup.address, "")
    assert client.export.name == "disk"
    await client.close()
    second = setup.export(name="second", description="another")
    await second.start()
    async with raw_client(setup.address) as raw:
        await raw.greet()
        assert await raw.list_exports() == [("disk", ""), ("second", "another")]
    await second.stop()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"bitmaps": ["b0"]}, "bitmaps"),
        ({"allocation_depth": True}, "allocation-depth"),
        ({"name": "n" * 4097}, "name"),
        ({"description": "\N{EURO SIGN}" * 1366}, "description"),
        ({"name": "a\0b"}, "name"),
    ],
)
async def test_refused_options(setup: Setup, options: dict[str, Any], word: str) -> None:
    with pytest.raises(BlockError, match=f"'{word}'"):
        setup.export(**options)


async def test_a_name_is_taken_once(setup: Setup, export: NbdExport) -> None:
    with pytest.raises(BlockError, match="'disk'"):
        await setup.export().start()


@pytest.mark.parametrize("option", ["tls_creds", "tls_authz"])
async def test_tls_is_refused_by_name(setup: Setup, option: str) -> None:
    options = NbdServerOptions(addr=UnixAddress("unused"), **{option: "tls0"})  # type: ignore[arg-type]
    with pytest.raises(BlockError, match=option.replace("_", "-")):
        NbdServer(setup.datapath, options)


async def test_a_client_that_goes_while_a_request_is_parked(setup: Setup, export: NbdExport) -> None:
    setup.memory.go_on.clear()
    raw = await RawClient.connect(setup.address)
    await enter(raw)
    await raw.request(Command.READ, 1, 0, 4096)
    while not setup.memory.log:
        await asyncio.sleep(0.01)
    await raw.close()
    await asyncio.sleep(0.05)
    assert len(export.sessions) == 1  # its request is still under way
    setup.memory.go_on.set()
    while export.sessions:
        await asyncio.sleep(0.01)
