# SPDX-License-Identifier: Apache-2.0
"""NBD servers that misbehave at every step: the nbd driver says so with the node's name, in bounded time.

Each fault strikes once, in the handshake or at one request, with each style of headers. Another node, on a
proper server, works on beside it. Faults that only the passing of time shows end when the node is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from target.exports.nbd.protocol import SIMPLE_REPLY, SIMPLE_REPLY_MAGIC
from target.graph.errors import BlockError
from target.graph.graph import Graph
from target.graph.node import Node
from target.peers.nbd_client import NbdClient
from target.peers.nbd_faults import OPENING, REPLYING
from target.peers.nbd_replies import Style
from target.peers.nbd_reply_faults import EXTENDED_ONLY
from target.peers.nbd_script import Armed, ServerOptions
from target.peers.nbd_server import NbdServer
from tests.support.daemon import Daemon, blocktarget_argv, nbd_export, nbd_server_unix
from tests.support.nbd import undisturbed
from tests.support.nbd_peers import mock, open_node, unix
from tests.support.tools import run

MIB = 1 << 20
SECONDS = 5
AT, LENGTH = 65536, 8192  # of the request that the fault strikes

STYLES = {
    Style.SIMPLE: ServerOptions(structured=False),
    Style.STRUCTURED: ServerOptions(),
    Style.EXTENDED: ServerOptions(extended=True),
}
# The first reply is right, so the request may succeed before the server is found out.
FOUND_LATER = {"reply-twice", "read-after-done"}
# What the server means is clear, so it may do.
HARMLESS = {"status-extents-past-request", "extended-lengths-wrap"}
MAY_SUCCEED = FOUND_LATER | HARMLESS
# A client may put up with these; if so, the node works.
TOLERABLE = {
    "option-ack-with-data",
    "meta-not-asked",
    "meta-twice",
    "go-export-long",
    "go-without-has-flags",
    "go-preferred-0",
    "go-preferred-below-minimum",
    "go-preferred-1000",
}
# The connection is lost, but no rule is broken.
LOSSES = {"close", "reset", "cut-short", "cut-in-header", "read-cut-in-data"}
# Simple replies have no chunks: only what is wrong in any style.
IN_ANY_STYLE = LOSSES - {"read-cut-in-data"} | {
    "stall",
    "stall-short",
    "garbage",
    "reply-magic",
    "reply-unknown-cookie",
    "reply-twice",
    "reply-other-style",
    "deaf",
}


class Beside:
    """Another node, on a proper server, that is written and read all the time."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.rounds = 0
        self.slowest = 0.0
        self.task = asyncio.create_task(self._work())

    async def _work(self) -> None:
        while True:
            before = time.monotonic()
            data = self.rounds.to_bytes(8, "big") * 512
            await self.node.write(0, data)
            assert await self.node.read(0, len(data)) == data
            self.rounds += 1
            self.slowest = max(self.slowest, time.monotonic() - before)
            await asyncio.sleep(0.001)

    async def stop(self) -> None:
        rounds = self.rounds
        async with asyncio.timeout(SECONDS):
            while self.rounds < rounds + 3 and not self.task.done():
                await asyncio.sleep(0.001)
        if self.task.done():
            await self.task
        self.task.cancel()
        await asyncio.wait([self.task])
        assert self.slowest < 2


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("target.drivers.protocol.nbd.node.CLOSE_SECONDS", 0.2)


@pytest.fixture
async def beside(
    graph: Graph, tmp_path_factory: pytest.TempPathFactory, scratch: Path
) -> AsyncIterator[Beside]:
    with mock(scratch / "proper.sock", ServerOptions(size=MIB)):
        other = Beside(await open_node(graph, scratch / "proper.sock", node_name="other"))
        yield other
        await other.stop()
        await graph.remove("other")


# ---- the handshake ----

OPENINGS = [(name, step) for name, fault in OPENING.items() for step in fault.steps]


@pytest.mark.parametrize(("name", "step"), OPENINGS, ids=[f"{name}-{step}" for name, step in OPENINGS])
async def test_handshake(
    scratch: Path, graph: Graph, beside: Beside, name: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = OPENING[name]
    if fault.silent:
        monkeypatch.setattr("target.drivers.protocol.nbd.connections.ESTABLISH_SECONDS", 0.5)
    options = ServerOptions(size=MIB, extended=step == "EXTENDED_HEADERS")
    with mock(scratch / "s.sock", options, fault.at(step), proper=False) as peer:
        before = time.monotonic()
        try:
            async with asyncio.timeout(SECONDS):
                node = await open_node(graph, scratch / "s.sock", node_name="lost")
        except BlockError as error:
            assert "node 'lost'" in str(error), str(error)
        else:
            assert name in TOLERABLE, f"it was opened in spite of {name}"
            async with asyncio.timeout(SECONDS):
                assert await node.read(0, 512) == bytes(512)
                await graph.remove("lost")
        assert peer.struck == 1
        assert time.monotonic() - before < SECONDS
        await gone(peer)
        assert await opens_now(graph, scratch)


async def gone(peer: NbdServer) -> None:
    """The client keeps no connection."""
    async with asyncio.timeout(SECONDS):
        while peer.live:
            await asyncio.sleep(0.01)


async def opens_now(graph: Graph, scratch: Path) -> bool:
    """The fault is over: the same name and server can be used."""
    node = await open_node(graph, scratch / "s.sock", node_name="lost")
    good = await node.read(0, 512) == bytes(512)
    await graph.remove("lost")
    return good


# ---- requests ----


def requests(node: Node) -> dict[str, Callable[[], Awaitable[object]]]:
    return {
        "READ": lambda: node.read(AT, LENGTH),
        "WRITE": lambda: node.write(AT, b"w" * LENGTH),
        "FLUSH": node.flush,
        "TRIM": lambda: node.discard(AT, LENGTH),
        "WRITE_ZEROES": lambda: node.write_zeroes(AT, LENGTH),
        "BLOCK_STATUS": lambda: node.block_status(AT, LENGTH),
        "CACHE": lambda: node.object.cache(AT, LENGTH),
    }


def cases() -> Iterator[tuple[Style, str]]:
    for style in STYLES:
        for name in REPLYING:
            known = name in IN_ANY_STYLE if style is Style.SIMPLE else True
            if known and (style is Style.EXTENDED or name not in EXTENDED_ONLY):
                yield style, name


CASES = list(cases())


@pytest.mark.parametrize(("style", "name"), CASES, ids=[f"{style.name}-{name}" for style, name in CASES])
async def test_reply(
    scratch: Path, graph: Graph, beside: Beside, caplog: pytest.LogCaptureFixture, style: Style, name: str
) -> None:
    """At each command to which the fault applies, each on a node and a server of its own, all at once."""
    steps = [step for step in REPLYING[name].steps if style is not Style.SIMPLE or step != "BLOCK_STATUS"]
    if name == "read-simple-error" and style is Style.EXTENDED:
        steps = []  # the test beneath has it
    await asyncio.gather(*(strike(scratch, graph, caplog, STYLES[style], name, step) for step in steps))


async def strike(
    scratch: Path,
    graph: Graph,
    caplog: pytest.LogCaptureFixture,
    options: ServerOptions,
    name: str,
    step: str,
) -> None:
    fault, node_name = REPLYING[name], f"lost-{step}"
    path = scratch / f"{step}.sock"
    async with serving(path, options, fault.at(step)) as peer:
        peer.disk.write(0, b"x" * 1_000_000)
        node = await open_node(graph, path, node_name=node_name, connections=1)
        if fault.silent:
            await meets_silence(graph, node_name, requests(node)[step])
            return
        await meets(requests(node)[step], name)
        assert peer.struck == 1
        if name not in LOSSES | HARMLESS:
            await said(caplog, node_name)
        if name not in HARMLESS:  # else the connection lives on, and the server is silent on it
            await works_or_fails(node)
        async with asyncio.timeout(SECONDS):
            await graph.remove(node_name)
        await gone(peer)


@contextlib.asynccontextmanager
async def serving(path: Path, options: ServerOptions, *faults: Armed) -> AsyncIterator[NbdServer]:
    """The scriptable server in this loop."""
    peer = NbdServer(options, *faults)
    await peer.start(str(path))
    try:
        yield peer
    finally:
        await peer.stop()


async def meets(request: Callable[[], Awaitable[object]], name: str) -> None:
    async with asyncio.timeout(SECONDS):
        try:
            found = await request()
        except OSError:
            return
    assert name in MAY_SUCCEED, f"no error, but {found!r}"
    if isinstance(found, bytes):
        assert found in (b"x" * LENGTH, bytes(LENGTH))  # the honest answer, or the fault's hole


async def meets_silence(graph: Graph, node_name: str, request: Callable[[], Awaitable[object]]) -> None:
    """Nothing comes; closing the node ends the request."""
    task = asyncio.ensure_future(request())
    await asyncio.wait([task], timeout=0.2)
    async with asyncio.timeout(SECONDS):
        await graph.remove(node_name)
        with contextlib.suppress(OSError):
            await task


async def said(caplog: pytest.LogCaptureFixture, node: str) -> None:
    """A warning or an error names the node."""

    def found() -> bool:
        loud = [record for record in caplog.records if record.levelno >= logging.WARNING]
        return any(f"'{node}'" in record.getMessage() for record in loud)

    async with asyncio.timeout(SECONDS):
        while not found():
            await asyncio.sleep(0.01)


async def works_or_fails(node: Node) -> None:
    """After it the node reconnects or not; either way each request ends soon, and none has wrong bytes."""
    for _ in range(2):
        async with asyncio.timeout(SECONDS):
            with contextlib.suppress(OSError):
                assert await node.read(0, 4096) == b"x" * 4096
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.name)
async def test_a_reply_to_nothing(
    scratch: Path, graph: Graph, caplog: pytest.LogCaptureFixture, beside: Beside, style: Style
) -> None:
    """It comes right behind the handshake."""
    reply = SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, 5) + bytes(16)
    early = Armed(lambda step: [b"".join(step.messages) + reply], "GO")
    with mock(scratch / "s.sock", STYLES[style], early, proper=False):
        with contextlib.suppress(BlockError):
            node = await open_node(graph, scratch / "s.sock", node_name="lost")
            async with asyncio.timeout(SECONDS):
                with contextlib.suppress(OSError):
                    assert await node.read(0, 4096) == bytes(4096)
            await graph.remove("lost")
        await said(caplog, "lost")


# ---- a whole target ----

SOME = [
    ("reset", "READ"),
    ("garbage", "READ"),
    ("reply-unknown-cookie", "READ"),
    ("reply-twice", "READ"),
    ("chunk-4gib", "READ"),
    ("read-too-long", "READ"),
    ("read-offset-wraps", "READ"),
    ("read-overlap", "READ"),
    ("read-hole-4gib", "READ"),
    ("read-first-half", "READ"),
    ("error-text-past-end", "READ"),
    ("none-not-done", "READ"),
]


async def test_a_target_with_many_bad_servers(scratch: Path, start: Callable[..., Daemon]) -> None:
    """A dozen nodes on servers of that kind in one target; a node on a good one is used all the time."""
    with ExitStack() as stack:
        words = bad_nodes(stack, scratch)
        stack.enter_context(mock(scratch / "good.sock", ServerOptions(size=MIB)))
        words += [*exported("good", unix(scratch / "good.sock"))]
        daemon = start(*nbd_server_unix(scratch / "nbd.sock"), *words)
        async with undisturbed(daemon.process.pid, str(scratch / "nbd.sock"), "good"):
            for number, (name, _) in enumerate(SOME):
                await read_meets(scratch / "nbd.sock", f"bad{number}", name)
        said_by = daemon.output()
        daemon.stop()
    for number, (name, _) in enumerate(SOME):
        assert name in LOSSES or f"'bad{number}'" in said_by, name


def exported(name: str, server: dict[str, object]) -> list[str]:
    node = {"driver": "nbd", "node-name": name, "server": server, "export": "disk"}
    return ["--blockdev", json.dumps(node), *nbd_export(node=name, name=name)]


def bad_nodes(stack: ExitStack, scratch: Path) -> list[str]:
    words = []
    for number, (name, step) in enumerate(SOME):
        path = scratch / f"{number}.sock"
        peer = stack.enter_context(mock(path, ServerOptions(size=MIB), proper=False))
        peer.disk.write(0, b"x" * 500_000)
        peer.faults = [REPLYING[name].at(step, times=1 << 30)]
        words += exported(f"bad{number}", unix(path))
    return words


async def read_meets(socket: Path, export: str, fault: str) -> None:
    client = await NbdClient.connect(str(socket), export)
    async with asyncio.timeout(SECONDS):
        try:
            found = await client.read(AT, LENGTH)
        except OSError as error:
            assert error.errno == errno.EIO
        else:
            assert fault in MAY_SUCCEED and found == b"x" * LENGTH
        await client.close()


def test_the_target_does_not_start_on_garbage(scratch: Path) -> None:
    """The error is one line on stderr that names the node, and comes soon."""
    with mock(scratch / "s.sock", ServerOptions(), OPENING["other-protocol"].at("greeting"), proper=False):
        words = exported("lost", unix(scratch / "s.sock"))
        done = run(*blocktarget_argv("daemon", *words), check=False, timeout=10)
    assert done.returncode == 1 and "node 'lost'" in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1


async def test_a_close_that_is_cancelled_in_its_flush_still_ends_the_connections(
    scratch: Path, graph: Graph
) -> None:
    """The connections outlived the node's object, and crashed the process when the server went."""
    for turn in range(3):
        with mock(scratch / "s", ServerOptions(), REPLYING["stall"].at("FLUSH"), proper=False) as peer:
            await open_node(graph, scratch / "s", node_name=f"node{turn}")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await graph.remove(f"node{turn}")
            for _ in range(100):
                if not peer.live:
                    break
                await asyncio.sleep(0.02)
            assert not peer.live
