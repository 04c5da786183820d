# SPDX-License-Identifier: Apache-2.0
"""A client of a monitor, through a stream that a test holds in its hands: order, bounds, ends, fds."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from target.events import Event, EventBus
from target.graph.errors import BlockError
from target.qmp import commands, registry
from target.qmp.events import EventFeed
from target.qmp.json_stream import TOTAL, Budget
from target.qmp.output import EVENTS_MAX, ROOM, encode
from target.qmp.registry import Arguments, CommandError, Context, command
from target.qmp.session import QUEUE, Session

commands.load()

CAPABILITIES = {"execute": "qmp_capabilities"}
OOB = {"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}


class Stream:
    """Both directions in memory; ``reading`` is off while the client does not read."""

    def __init__(self) -> None:
        self.arriving: asyncio.Queue[tuple[bytes, list[int]]] = asyncio.Queue()
        self.reading = asyncio.Event()
        self.reading.set()
        self.sent: asyncio.Queue[Any] = asyncio.Queue()
        self.gone = False
        self.reads = 0
        self._fds: list[int] = []

    async def read(self) -> bytes:
        self.reads += 1
        data, fds = await self.arriving.get()
        self._fds += fds
        return data

    def take_fds(self) -> list[int]:
        fds, self._fds = self._fds, []
        return fds

    async def write(self, data: bytes) -> None:
        await self.reading.wait()
        if self.gone:
            raise BrokenPipeError
        for line in data.splitlines():
            self.sent.put_nowait(json.loads(line))

    def hung_up(self) -> bool:
        return self.gone

    def close(self) -> None:
        pass

    # ---- the client ----

    def send(self, *messages: Any, fds: list[int] | None = None) -> None:
        data = b"".join(m if isinstance(m, bytes) else json.dumps(m).encode() for m in messages)
        self.arriving.put_nowait((data, fds or []))

    async def receive(self) -> Any:
        return await asyncio.wait_for(self.sent.get(), 5)

    async def ask(self, message: Any) -> Any:
        self.send(message)
        return await self.receive()


class Wait(Arguments):
    name: str


class Bench:
    """Commands for these tests: ``wait`` lasts until it is let go; ``started`` says which ones have begun."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.ended: list[str] = []
        self.gates: dict[str, asyncio.Event] = {}

    def let_go(self, name: str) -> None:
        self.gates.setdefault(name, asyncio.Event()).set()


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    before = set(registry.commands())

    @command("wait", Wait)
    async def wait(context: Context, given: Wait) -> None:
        bench.started.append(given.name)
        await bench.gates.setdefault(given.name, asyncio.Event()).wait()
        bench.ended.append(given.name)

    @command("now", oob=True, returns=str)
    async def now(context: Context, given: None) -> str:
        return "now"

    @command("bug")
    async def bug(context: Context, given: None) -> None:
        raise KeyError("oops")

    @command("cancelled")
    async def cancelled(context: Context, given: None) -> None:
        task = asyncio.ensure_future(asyncio.sleep(60))
        task.cancel()
        await task

    @command("nan", returns=float)
    async def nan(context: Context, given: None) -> float:
        return float("nan")

    @command("refused")
    async def refused(context: Context, given: None) -> None:
        raise BlockError("no")

    @command("absent")
    async def absent(context: Context, given: None) -> None:
        raise CommandError("DeviceNotFound", "nowhere")

    @command("take", returns=list[int])
    async def take(context: Context, given: None) -> list[int]:
        assert context.monitor is not None
        fd = context.monitor.take_fd()
        return [] if fd is None else [fd]

    @command("big", returns=str)
    async def big(context: Context, given: None) -> str:
        bench.started.append("big")
        return "x" * ROOM

    yield bench
    for name in set(registry.commands()) - before:
        registry._commands.pop(name)


@asynccontextmanager
async def session(first: Any = CAPABILITIES) -> AsyncIterator[tuple[Stream, Session, asyncio.Task[None]]]:
    """A session that has negotiated, and the task that serves it."""
    stream = Stream()
    budget = Budget()
    served = Session(None, stream, budget)  # type: ignore[arg-type]  # these commands need no service
    work = asyncio.ensure_future(served.work())
    serve = asyncio.ensure_future(served.serve())
    if first:
        assert await stream.ask(first) == {"return": {}}
    try:
        yield stream, served, serve
    finally:
        for task in (serve, work):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
    assert budget.left == TOTAL


async def wait_for(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("message", "answer"),
    [
        (
            {"execute": "query-version", "id": 1},
            ("CommandNotFound", "Expecting capabilities negotiation with"),
        ),
        (
            {"execute": "none"},
            ("CommandNotFound", "Expecting capabilities negotiation with 'qmp_capabilities'"),
        ),
        ({}, ("GenericError", "QMP input lacks member 'execute'")),
        ({"exec-oob": "qmp_capabilities"}, ("GenericError", "QMP input member 'exec-oob' is unexpected")),
    ],
)
async def test_before_the_negotiation(message: Any, answer: tuple[str, str]) -> None:
    async with session(first=None) as (stream, _, _):
        error = (await stream.ask(message))["error"]
        assert error["class"] == answer[0] and error["desc"].startswith(answer[1])
        assert await stream.ask(CAPABILITIES) == {"return": {}}


@pytest.mark.parametrize(
    ("message", "kind", "text"),
    [
        ([], "GenericError", "QMP input must be a JSON object"),
        ({"execute": 1}, "GenericError", "QMP input member 'execute' must be a string"),
        (
            {"execute": "now", "arguments": 1},
            "GenericError",
            "QMP input member 'arguments' must be an object",
        ),
        ({"execute": "now", "x": 1}, "GenericError", "QMP input member 'x' is unexpected"),
        ({"execute": "now", "exec-oob": "now"}, "GenericError", "QMP input member 'exec-oob' is unexpected"),
        ({"execute": "none"}, "CommandNotFound", "The command none has not been found"),
        ({"execute": "now", "arguments": {"a": 1}}, "GenericError", "Parameter 'a' is unexpected"),
        ({"execute": "wait"}, "GenericError", "Parameter 'name' is missing"),
        ({"execute": "refused"}, "GenericError", "no"),
        ({"execute": "absent"}, "DeviceNotFound", "nowhere"),
        (b'{"execute":}', "GenericError", "JSON parse error, expecting value"),
        (
            CAPABILITIES,
            "CommandNotFound",
            "Capabilities negotiation is already complete, command ignored",
        ),
    ],
)
async def test_errors(bench: Bench, message: Any, kind: str, text: str) -> None:
    async with session() as (stream, _, _):
        assert await stream.ask(message) == {"error": {"class": kind, "desc": text}}
        assert await stream.ask({"execute": "now", "id": [None]}) == {"return": "now", "id": [None]}


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"exec-oob": "query-version"}, "The command query-version does not support OOB"),
        ({"execute": "now", "exec-oob": "now"}, "QMP input member 'exec-oob' clashes with 'execute'"),
        ({"exec-oob": 3}, "QMP input member 'exec-oob' must be a string"),
    ],
)
async def test_errors_with_oob(bench: Bench, message: Any, text: str) -> None:
    async with session(OOB) as (stream, _, _):
        assert await stream.ask(message) == {"error": {"class": "GenericError", "desc": text}}


@pytest.mark.parametrize(
    ("name", "text"),
    [("bug", "in command bug: KeyError"), ("cancelled", "in command cancelled"), ("nan", "is not JSON")],
)
async def test_a_bug_fails_its_command_only(
    bench: Bench, caplog: pytest.LogCaptureFixture, name: str, text: str
) -> None:
    async with session() as (stream, _, _):
        with caplog.at_level(logging.ERROR):
            answer = await stream.ask({"execute": name})
        assert answer["error"]["class"] == "GenericError"
        assert "Internal error" in answer["error"]["desc"] and text in answer["error"]["desc"]
        assert "Traceback" in caplog.text
        assert (await stream.ask({"execute": "now"}))["return"] == "now"


async def test_commands_run_one_after_another(bench: Bench) -> None:
    async with session() as (stream, _, _):
        stream.send(*({"execute": "wait", "arguments": {"name": n}, "id": n} for n in "abc"))
        await wait_for(lambda: bench.started)
        await settle()
        assert bench.started == ["a"]
        for name in "cba":
            bench.let_go(name)
        assert [(await stream.receive())["id"] for _ in "abc"] == ["a", "b", "c"]


async def test_out_of_band_overtakes_and_the_queue_is_bounded(bench: Bench) -> None:
    async with session(OOB) as (stream, _, _):
        names = [str(i) for i in range(QUEUE + 4)]
        for name in names[:QUEUE]:
            stream.send({"execute": "wait", "arguments": {"name": name}, "id": name})
        stream.send({"exec-oob": "now", "id": "quick"})
        assert await stream.receive() == {"return": "now", "id": "quick"}
        # One runs and QUEUE wait: then nothing is read, not even what could overtake.
        for name in names[QUEUE:]:
            stream.send({"execute": "wait", "arguments": {"name": name}, "id": name})
        stream.send({"exec-oob": "now", "id": "late"})
        await settle()
        assert stream.sent.empty() and not stream.arriving.empty()
        for name in names:
            bench.let_go(name)
        ids = [(await stream.receive())["id"] for _ in range(len(names) + 1)]
        assert [id for id in ids if id != "late"] == names


async def test_a_client_that_goes_leaves_the_command_that_runs(bench: Bench) -> None:
    async with session(OOB) as (stream, _, serve):
        stream.send(*({"execute": "wait", "arguments": {"name": n}} for n in "ab"))
        await wait_for(lambda: bench.started)
        stream.gone = True
        stream.send(b"")
        await asyncio.wait_for(serve, 10)  # the next client can come
        bench.let_go("a")
        bench.let_go("b")
        await wait_for(lambda: bench.ended)
        await settle()
        assert bench.started == ["a"]  # what had not begun does not


async def test_a_client_that_has_said_all_still_gets_its_answers(bench: Bench) -> None:
    async with session(OOB) as (stream, _, serve):
        stream.send(*({"execute": "wait", "arguments": {"name": n}, "id": n} for n in "ab"))
        stream.send(b"")
        await asyncio.sleep(0.6)
        bench.let_go("a")
        bench.let_go("b")
        assert [(await stream.receive())["id"] for _ in "ab"] == ["a", "b"]
        await asyncio.wait_for(serve, 10)


async def test_large_messages_take_of_the_budget_until_they_are_answered(bench: Bench) -> None:
    async with session(OOB) as (stream, served, serve):
        large = "x" * (1 << 20)
        stream.send({"execute": "wait", "arguments": {"name": "a"}, "id": large})
        await wait_for(lambda: bench.started)
        assert served._budget.left < TOTAL - (900 << 10)
        stream.send({"execute": "wait", "arguments": {"name": large}})
        stream.send(b'{"' + large.encode())  # the client goes in the middle of it
        await wait_for(lambda: served._budget.left < TOTAL - (2700 << 10))
        bench.let_go("a")
        assert (await stream.receive())["id"] == large
        stream.gone = True
        stream.send(b"")
        await asyncio.wait_for(serve, 10)


async def test_a_client_that_does_not_read_runs_no_commands_and_misses_events(bench: Bench) -> None:
    async with session() as (stream, served, _):
        stream.reading.clear()
        stream.send(*[{"execute": "big"}] * 50)
        await asyncio.sleep(0.1)
        assert 1 <= len(bench.started) <= 3
        for i in range(100):
            served.send_event({"event": "X", "data": {"i": i, "text": "x" * 65536}})
        assert served._output._bytes < EVENTS_MAX + 4 * ROOM
        stream.reading.set()
        await wait_for(lambda: len(bench.started) == 50)
        found = [await stream.receive() for _ in range(50)]
        events = [m["data"]["i"] for m in found if "event" in m]
        assert events and events == list(range(len(events)))  # the first ones, then none


async def test_descriptors_go_to_the_command_they_came_with(bench: Bench) -> None:
    async with session() as (stream, _, _):
        pipes = [os.pipe() for _ in range(4)]
        a, b, c, d = (pipe[0] for pipe in pipes)
        stream.send({"execute": "take"}, fds=[a])
        assert await stream.receive() == {"return": [a]}
        stream.send(b" ", fds=[b])  # as older clients pass them: with a blank before the command
        stream.send({"execute": "take"})
        assert await stream.receive() == {"return": [b]}
        stream.send({"execute": "now"}, {"execute": "take"}, fds=[c, d])
        assert [await stream.receive() for _ in range(2)] == [{"return": "now"}, {"return": [c]}]
        with pytest.raises(OSError):  # what nobody took is closed with the command that took one
            os.fstat(d)
        assert await stream.ask({"execute": "take"}) == {"return": []}
        for fd in (a, b, c, *(pipe[1] for pipe in pipes)):
            os.close(fd)


async def test_descriptors_without_commands_do_not_pile_up(bench: Bench) -> None:
    async with session() as (stream, _, _):
        readers, writers = zip(*(os.pipe() for _ in range(20)), strict=True)
        for fd in readers:
            stream.send(b" ", fds=[fd])
        assert await stream.ask({"execute": "take"}) == {"return": [readers[-1]]}
        for fd in readers[:-1]:
            with pytest.raises(OSError):
                os.fstat(fd)
        for fd in (readers[-1], *writers):
            os.close(fd)


async def test_descriptors_that_nobody_takes_are_closed(bench: Bench) -> None:
    reader, writer = os.pipe()
    async with session() as (stream, _, serve):
        stream.send({"execute": "now"}, fds=[reader])
        await stream.receive()
        os.fstat(reader)
        stream.send(b"")
        await asyncio.wait_for(serve, 10)
    with pytest.raises(OSError):
        os.fstat(reader)
    os.close(writer)


class Often(Event):
    name = "OFTEN"
    rate_ns = 100_000_000
    node: str
    value: int

    def key(self) -> object:
        return self.node


class Rare(Event):
    name = "RARE"


async def test_events_that_come_often_are_passed_on_at_their_rate() -> None:
    bus = EventBus()
    heard: list[Any] = []
    feed = EventFeed(bus, heard.append)
    for value in range(10):
        bus.send(Often(node="a", value=value))
        bus.send(Often(node="b", value=value))
        bus.send(Rare())
    assert [e["data"] for e in heard if e["event"] == "OFTEN"] == [
        {"node": "a", "value": 0},
        {"node": "b", "value": 0},
    ]
    assert sum(e["event"] == "RARE" for e in heard) == 10
    assert "data" not in next(e for e in heard if e["event"] == "RARE")
    await asyncio.sleep(0.25)
    assert sorted(e["data"]["value"] for e in heard if e["event"] == "OFTEN") == [0, 0, 9, 9]
    bus.send(Often(node="a", value=10))
    assert heard[-1]["data"] == {"node": "a", "value": 10}
    feed.close()
    bus.send(Rare())
    assert heard[-1]["event"] == "OFTEN"


def test_answers_are_ascii_and_text() -> None:
    assert encode({"a": "é"}) == b'{"a": "\\u00e9"}\r\n'
    assert encode({"a": os.fsdecode(b"x\xff")}) == b'{"a": "x\\ufffd"}\r\n'
    deep: Any = []
    for _ in range(490):
        deep = [deep]
    for pretty in (False, True):
        answer = json.loads(encode({"return": deep}, pretty))
        assert answer == {"return": deep} or "nested too deeply" in answer["error"]["desc"]
    assert encode({"a": [1]}, pretty=True) == b'{\n    "a": [\n        1\n    ]\n}\r\n'
