# SPDX-License-Identifier: Apache-2.0
"""quorum and blkverify in a daemon, beside qemu-storage-daemon: data, events, errors, the end."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from target.peers.nbd_client import NbdClient
from tests.support.daemon import Daemon, blockdev, blocktarget_argv, nbd_export, nbd_server_unix
from tests.support.qmp import Qmp, QmpError, monitor_argv
from tests.support.tools import check_image, create_image, qemu_img

MIB = 1 << 20
QEMU = "qemu-storage-daemon"
Json = dict[str, Any]


def file(path: Path, name: str, *rules: Json) -> list[str]:
    """--blockdev for a file of 1 MiB, which blkdebug makes fail by the rules."""
    if not path.exists():
        path.write_bytes(bytes(MIB))
    node = {"driver": "file", "filename": str(path)}
    if not rules:
        return blockdev(node_name=name, **node)
    given = [{"event": "none"} | rule for rule in rules]
    return blockdev(driver="blkdebug", node_name=name, image=node, inject_error=given)


def quorum(children: str = "abc", threshold: int = 2, **options: object) -> list[str]:
    return blockdev(
        driver="quorum", node_name="q", children=list(children), vote_threshold=threshold, **options
    )


@contextmanager
def program(name: str, scratch: Path, *nodes: str, export: str = "q") -> Iterator[tuple[Daemon, Qmp]]:
    """A daemon (QEMU's or ours) with a monitor, that serves a node at nbd.sock."""
    with pytest.MonkeyPatch.context() as patch:
        if name == QEMU:
            patch.setenv("BLOCKTARGET_TEST_DAEMON", QEMU)
        server = nbd_server_unix(scratch / "nbd.sock")
        daemon = Daemon(
            *monitor_argv(scratch / "qmp.sock"), *nodes, *server, *nbd_export(node=export, name="disk")
        )
    try:
        daemon.wait_ready()
        with Qmp(scratch / "qmp.sock") as qmp:
            yield daemon, qmp
        if daemon.process.poll() is None:
            daemon.stop()
    finally:
        daemon.kill()


@asynccontextmanager
async def connected(scratch: Path) -> AsyncIterator[NbdClient]:
    """A client, which is gone afterwards, whether the server is or not."""
    # Simple replies: in the middle of a structured one QEMU cannot tell of an error, and disconnects.
    client = await NbdClient.connect(str(scratch / "nbd.sock"), "disk", structured=False)
    try:
        yield client
    finally:
        await client.abort()


async def attempt(request: Awaitable[Any]) -> object:
    """What a request gives: bytes, "ok", or the error."""
    try:
        result = await request
    except OSError as error:
        return f"errno {error.errno}"
    return "ok" if result is None else result


def events_of(qmp: Qmp, seconds: float = 0.3) -> list[Json]:
    """The events of quorums that come in this time."""
    qmp.socket.settimeout(seconds)
    try:
        while True:
            qmp.events.append(qmp.receive())
    except TimeoutError:
        pass
    qmp.socket.settimeout(30)
    found = [{"event": e["event"], "data": e["data"]} for e in qmp.events if e["event"].startswith("QUORUM")]
    qmp.events.clear()
    return sorted(found, key=lambda event: json.dumps(event, sort_keys=True))


def damage(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as image:
        image.seek(offset)
        image.write(data)


# ---- the same on both ----

Scenario = Callable[[Path, NbdClient], Awaitable[list[object]]]


async def repair(scratch: Path, client: NbdClient) -> list[object]:
    await client.write(0, b"x" * 65536)
    damage(scratch / "b", 4000, b"damage")
    answers = [await client.read(0, 8192), await client.read(4096, 4096)]
    return [*answers, [(scratch / name).read_bytes()[:65536] for name in "abc"]]


async def no_majority(scratch: Path, client: NbdClient) -> list[object]:
    damage(scratch / "a", 0, b"one")
    damage(scratch / "b", 0, b"two")
    return [await attempt(client.read(0, 4096)), await attempt(client.read(4096, 4096))]


async def tie(scratch: Path, client: NbdClient) -> list[object]:
    for name, value in zip("abcd", (b"1", b"2", b"2", b"1"), strict=True):
        damage(scratch / name, 512, value)
    return [await attempt(client.read(0, 4096))]


async def requests(_scratch: Path, client: NbdClient) -> list[object]:
    return [
        await attempt(client.read(4096, 8192)),
        await attempt(client.write(512, b"x" * 1024)),
        await attempt(client.write_zeroes(8192, 4096)),
        await attempt(client.flush()),
    ]


def three(scratch: Path, *rules: Json, also: Json | None = None) -> list[str]:
    """a fails by the rules, b by the other rule."""
    others = [also] if also else []
    return [*file(scratch / "a", "a", *rules), *file(scratch / "b", "b", *others), *file(scratch / "c", "c")]


READ, WRITE = {"iotype": "read"}, {"iotype": "write"}
SCENARIOS: dict[str, tuple[Callable[[Path], list[str]], Scenario]] = {
    "repair": (lambda s: three(s) + quorum(rewrite_corrupted=True), repair),
    "damage": (lambda s: three(s) + quorum(), repair),
    "no-majority": (lambda s: three(s) + quorum(), no_majority),
    "tie": (lambda s: three(s) + file(s / "d", "d") + quorum("abcd", 1), tie),
    "read-error": (lambda s: three(s, READ) + quorum(), requests),
    "read-errors": (lambda s: three(s, READ, also=READ | {"errno": 28}) + quorum(), requests),
    "write-error": (lambda s: three(s, WRITE | {"errno": 28}) + quorum(), requests),
    "write-errors": (lambda s: three(s, WRITE | {"errno": 28}, also=WRITE) + quorum(), requests),
    "flush-errors": (lambda s: three(s, {"iotype": "flush"}) + quorum(threshold=3), requests),
    "fifo": (lambda s: three(s, READ) + quorum(threshold=1, read_pattern="fifo"), requests),
    "fifo-alone": (lambda s: three(s, READ) + quorum("a", 1, read_pattern="fifo"), requests),
}


REPEATED = {"damage", "write-error", "write-errors"}  # events that are held back for a second


@pytest.mark.parametrize("name", SCENARIOS)
async def test_as_qemu(scratch: Path, name: str) -> None:
    nodes, scenario = SCENARIOS[name]
    results = []
    for which in (QEMU, "blocktarget"):
        for child in "abcd":
            (scratch / child).unlink(missing_ok=True)
        with program(which, scratch, *nodes(scratch)) as (_daemon, qmp):
            async with connected(scratch) as client:
                answers = await scenario(scratch, client)
                answers.append(events_of(qmp, 1.3 if name in REPEATED else 0.3))
        results.append(answers)
    assert results[0] == results[1]


REFUSED: dict[str, Callable[[Path], list[str]]] = {
    "Number of provided children must be 1 or more": lambda s: three(s) + quorum(""),
    "Parameter 'vote-threshold' expects a value >= 1": lambda s: three(s) + quorum(threshold=0),
    "threshold may not exceed children count": lambda s: three(s) + quorum(threshold=4),
    "blkverify=on can only be set if there are exactly two files and vote-threshold is 2": lambda s: (
        three(s) + quorum(blkverify=True)
    ),
    "rewrite-corrupted=on cannot be used with blkverify=on": lambda s: (
        three(s) + quorum("ab", blkverify=True, rewrite_corrupted=True)
    ),
    "Could not refresh total sector count: Input/output error": lambda s: (
        three(s) + blockdev(driver="null-co", node_name="n", size=4096) + quorum("an")
    ),
    "Block node is read-only": lambda s: (
        three(s) + quorum("abc", rewrite_corrupted=True, read_only=True)
        if (s / "a").exists()
        else three(s)
        + blockdev(driver="file", node_name="r", filename=str(s / "a"), read_only=True)
        + quorum("r", 1, rewrite_corrupted=True)
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused_as_qemu(scratch: Path, message: str) -> None:
    argv = REFUSED[message](scratch)
    for program_argv in ([QEMU], blocktarget_argv("daemon")):
        done = subprocess.run([*program_argv, *argv], capture_output=True, text=True, timeout=30)
        assert done.returncode == 1
        assert message in done.stderr, program_argv


def test_children_change_as_qemu(scratch: Path) -> None:
    """x-blockdev-change: answers, and the roles that children have afterwards."""
    script: list[Json] = [
        {"parent": "q", "child": "children.1"},
        {"parent": "q", "child": "children.0"},
        {"parent": "q", "node": "b"},
        {"parent": "q", "node": "b"},
        {"parent": "q", "child": "children.3"},
        {"parent": "q", "node": "b"},
        {"parent": "q", "child": "children.7"},
        {"parent": "a", "node": "b"},
        {"parent": "q", "node": "missing"},
        {"parent": "q"},
        {"parent": "q", "node": "b", "child": "children.0"},
        {"parent": "nobody", "node": "b"},
        {"parent": "q", "child": "children.2"},
    ]
    results = []
    for which in (QEMU, "blocktarget"):
        answers: list[object] = []
        with program(which, scratch, *three(scratch), *quorum()) as (_daemon, qmp):
            for given in script:
                try:
                    answers.append(qmp.execute("x-blockdev-change", **given))
                except QmpError as error:
                    answers.append(error.text)
                graph = qmp.execute("x-debug-query-block-graph")
                [top] = [node["id"] for node in graph["nodes"] if node["name"] == "q"]
                answers.append(sorted(edge["name"] for edge in graph["edges"] if edge["parent"] == top))
        results.append(answers)
    assert results[0] == results[1]


# ---- the end ----

DIFFERENT = {
    "blkverify": (
        blockdev(driver="blkverify", node_name="q", test="a", raw="b"),
        "blkverify: read offset=0 bytes=4096 contents mismatch at offset 2345",
    ),
    "quorum": (
        quorum("ab", blkverify=True),
        "quorum: offset=0 bytes=4096 contents mismatch at offset 2345",
    ),
}


@pytest.mark.parametrize("which", [QEMU, "blocktarget"])
@pytest.mark.parametrize("driver", DIFFERENT)
async def test_a_difference_ends_the_process(scratch: Path, driver: str, which: str) -> None:
    node, words = DIFFERENT[driver]
    with program(which, scratch, *three(scratch), *node) as (daemon, _qmp):
        async with connected(scratch) as client:
            await client.write(0, b"x" * 4096)
            assert await client.read(0, 4096) == b"x" * 4096
            damage(scratch / "b", 2345, b"y")
            with pytest.raises((OSError, EOFError)):
                await client.read(0, 4096)
            begin = time.monotonic()
            assert await asyncio.to_thread(daemon.process.wait, 10) == 1
            assert time.monotonic() - begin < 5
            assert words in daemon.output().splitlines()


async def test_images_are_closed_in_order_then(scratch: Path) -> None:
    """The node under test is a qcow2 image: what was acknowledged is in it, and it is sound."""
    image = create_image(scratch / "image.qcow2", "1M")
    test = {"driver": "qcow2", "file": {"driver": "file", "filename": str(image)}}
    node = blockdev(driver="blkverify", node_name="q", test=test, raw="a")
    with program("blocktarget", scratch, *file(scratch / "a", "a"), *node) as (daemon, _qmp):
        async with connected(scratch) as client:
            await client.write(65536, b"x" * 4096)
            damage(scratch / "a", 0, b"y")
            with pytest.raises((OSError, EOFError)):
                await client.read(0, 4096)
            assert await asyncio.to_thread(daemon.process.wait, 10) == 1
    check_image(image)
    done = json.loads(qemu_img("map", "--output=json", image).stdout)
    assert next(extent["start"] for extent in done if extent["data"]) == 65536


# ---- live ----


class Writer:
    """Writes its own blocks and reads them back, all the time."""

    def __init__(self, client: NbdClient, number: int) -> None:
        self.client = client
        self.base = number * 128 * 1024
        self.model = bytearray(128 * 1024)
        self.random = random.Random(number)
        self.rounds = 0
        self.last = (0, b"")

    async def work(self) -> None:
        while True:
            at = self.random.randrange(0, 120 * 1024)
            data = self.random.randbytes(self.random.randrange(1, 8192))
            self.last = at, data
            await self.client.write(self.base + at, data)
            self.model[at : at + len(data)] = data
            at = self.random.randrange(0, 120 * 1024)
            assert await self.client.read(self.base + at, 8192) == self.model[at : at + 8192]
            self.rounds += 1

    def check_last(self, found: bytes) -> None:
        """The last write may have been cut off by the end."""
        at, data = self.last
        after = self.model[:at] + data + self.model[at + len(data) :]
        assert found in (self.model, after)


async def test_children_come_and_go_while_clients_work(scratch: Path) -> None:
    """A child that was away has missed writes; votes repair it."""
    nodes = [*three(scratch), *quorum(rewrite_corrupted=True)]
    with program("blocktarget", scratch, *nodes) as (_daemon, qmp):
        async with AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(connected(scratch)) for _ in range(5)]
            writers = [Writer(client, i) for i, client in enumerate(clients[:4])]
            tasks = [asyncio.create_task(writer.work()) for writer in writers]
            for away in "bca" * 8:
                await asyncio.to_thread(take_away_and_bring_back, qmp, away)
                await clients[4].read(0, MIB)  # repairs it, before another goes away
                assert not any(task.done() for task in tasks), [t.exception() for t in tasks if t.done()]
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            for writer in writers:
                writer.check_last(await clients[4].read(writer.base, len(writer.model)))
        assert not any(event["event"] == "QUORUM_FAILURE" for event in events_of(qmp))
    assert min(writer.rounds for writer in writers) > 20
    assert len({(scratch / name).read_bytes() for name in "abc"}) == 1


def take_away_and_bring_back(qmp: Qmp, node: str) -> None:
    qmp.execute("x-blockdev-change", parent="q", child=role_of(qmp, node))
    time.sleep(0.01)
    qmp.execute("x-blockdev-change", parent="q", node=node)


def role_of(qmp: Qmp, node: str) -> str:
    graph = qmp.execute("x-debug-query-block-graph")
    ids = {n["name"]: n["id"] for n in graph["nodes"]}
    [role] = [str(edge["name"]) for edge in graph["edges"] if edge["child"] == ids[node]]
    return role


async def test_a_format_over_a_quorum_grows_all_children(scratch: Path) -> None:
    for name in "abc":
        (scratch / name).unlink(missing_ok=True)
        create_image(scratch / name, "64M")
    node = blockdev(driver="qcow2", node_name="disk", file="q")
    with program("blocktarget", scratch, *three(scratch), *quorum(), *node, export="disk") as (_daemon, _qmp):
        async with connected(scratch) as client:
            data = random.randbytes(65536)
            for i in range(0, 64, 3):
                await client.write(i * MIB, data)
            await client.flush()
            assert await client.read(63 * MIB, 65536) == data
    for name in "abc":
        check_image(scratch / name)
        assert (scratch / name).stat().st_size > 22 * 65536
    assert len({(scratch / name).read_bytes() for name in "abc"}) == 1
