# SPDX-License-Identifier: Apache-2.0
"""Processes of plugins: how they start, die, are started again, block, flood, lie, and end."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from target.drivers.protocol.nbdkit_plugin import life
from target.drivers.protocol.nbdkit_plugin.node import NbdkitPlugin
from target.graph.errors import BlockError
from target.graph.graph import Graph
from target.nbdkit import wire

SIZE = 1 << 20
RAM = f"""
import errno, nbdkit, os, sys, threading, time
API_VERSION = 2
disk = bytearray({SIZE})
def open(readonly): return 1
def get_size(h): return len(disk)
def pread(h, buf, offset, flags): buf[:] = disk[offset:offset + len(buf)]
def pwrite(h, buf, offset, flags): disk[offset:offset + len(buf)] = buf
"""
PARALLEL = "\ndef thread_model(): return nbdkit.THREAD_MODEL_PARALLEL\n"
# The socket of the channel is the first of the two descriptors that the process was given.
CHANNEL = """
def channel():
    for fd in sorted(map(int, os.listdir("/proc/self/fd"))):
        try:
            if fd > 2 and os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
                return fd
        except OSError:
            pass
"""

Add = Callable[..., Awaitable[NbdkitPlugin]]


@pytest.fixture
def add(graph: Graph, scratch: Path) -> Add:
    """add(source, option=...) opens a node with a script of this source."""

    async def opened(source: str, **options: Any) -> NbdkitPlugin:
        script = scratch / "plugin.py"
        script.write_text(source)
        named = {name.replace("_", "-"): value for name, value in options.items()}
        node = await graph.add(
            {"driver": "nbdkit-plugin", "node-name": "p", "script": str(script), "discard": "unmap", **named}
        )
        assert isinstance(node, NbdkitPlugin)
        return node

    return opened


@pytest_asyncio.fixture
async def bystander(graph: Graph, scratch: Path) -> AsyncIterator[NbdkitPlugin]:
    """Another plugin's node, which has to work at the end as before."""
    script = scratch / "bystander.py"
    script.write_text(RAM)
    node = await graph.add({"driver": "nbdkit-plugin", "node-name": "bystander", "script": str(script)})
    assert isinstance(node, NbdkitPlugin)
    yield node
    await node.object.write(0, b"still here")
    assert await node.object.read(0, 10) == b"still here"


def pid(node: NbdkitPlugin) -> int:
    assert node.plugin is not None and node.plugin._process is not None
    return node.plugin._process.pid


async def until(condition: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


async def error_of(work: Awaitable[object]) -> int:
    with pytest.raises(OSError) as caught:
        await work
    assert caught.value.errno is not None
    return caught.value.errno


def gone(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return True
    return False


# ---- serving ----


async def test_reads_and_writes_of_any_size(add: Add) -> None:
    node = await add(RAM)
    data = os.urandom(SIZE)
    await node.object.write(0, data)
    assert await node.object.read(0, SIZE) == data
    assert await node.object.read(SIZE - 3, 3) == data[-3:]
    await node.object.write(4095, b"xyz")
    assert await node.object.read(4090, 12) == data[4090:4095] + b"xyz" + data[4098:4102]


async def test_many_requests_at_once(add: Add) -> None:
    """More than there are slots, of all kinds; each gets its own answer."""
    node = await add(RAM + PARALLEL)
    blocks = [bytes([n]) * 4096 for n in range(200)]
    await asyncio.gather(*(node.object.write(4096 * n, block) for n, block in enumerate(blocks)))
    assert await asyncio.gather(*(node.object.read(4096 * n, 4096) for n in range(200))) == blocks


@pytest.mark.timed
async def test_parallel_requests_block_each_for_itself(add: Add) -> None:
    slow = "\ndef pread(h, buf, offset, flags):\n    time.sleep(0.3); buf[:] = bytes(len(buf))\n"
    node = await add(RAM + PARALLEL + slow, threads=8)
    begin = time.monotonic()
    await asyncio.gather(*(node.object.read(0, 512) for _ in range(16)))
    assert 0.55 < time.monotonic() - begin < 1.8  # two rounds of eight


@pytest.mark.parametrize("model", ["SERIALIZE_CONNECTIONS", "SERIALIZE_ALL_REQUESTS", "SERIALIZE_REQUESTS"])
async def test_serialized_requests_never_overlap(add: Add, model: str) -> None:
    counting = f"""
def thread_model(): return nbdkit.THREAD_MODEL_{model}
inside = 0
def pread(h, buf, offset, flags):
    global inside
    inside += 1
    time.sleep(0.005)
    buf[:] = bytes([inside]) * len(buf)
    inside -= 1
"""
    node = await add(RAM + counting)
    assert set(await asyncio.gather(*(node.object.read(0, 1) for _ in range(20)))) == {b"\1"}


async def test_a_long_zero_is_split_where_a_count_ends(add: Add) -> None:
    source = """
import nbdkit
API_VERSION = 2
seen = []
def open(readonly): return 1
def get_size(h): return 10 << 30
def pread(h, buf, offset, flags): buf[:] = repr(seen).encode().ljust(len(buf))
def pwrite(h, buf, offset, flags): pass
def zero(h, count, offset, flags): seen.append((count, offset))
"""
    node = await add(source)
    await node.object.zeroes(4096, 9 << 30)
    seen = eval(await node.object.read(0, 4096))
    assert sum(count for count, _ in seen) == 9 << 30
    assert all(count < 1 << 32 for count, _ in seen)
    assert seen[0][1] == 4096 and all(a[1] + a[0] == b[1] for a, b in pairwise(seen))


async def test_maximum_block_size_splits_and_minimum_aligns(add: Add) -> None:
    checks = """
seen = []
def block_size(h): return 4096, 4096, 65536
def check(count, offset):
    if count % 4096 or offset % 4096 or count > 65536:
        os._exit(1)
def pread(h, buf, offset, flags):
    check(len(buf), offset); buf[:] = disk[offset:offset + len(buf)]
def pwrite(h, buf, offset, flags):
    check(len(buf), offset); disk[offset:offset + len(buf)] = buf
"""
    node = await add(RAM + checks)
    data = os.urandom(SIZE)
    await node.object.write(0, data)
    await node.object.write(1, b"unaligned" * 50000)
    assert await node.object.read(1, 450000) == b"unaligned" * 50000
    assert await node.object.read(450001, 100000) == data[450001:550001]


async def test_memory_of_an_idle_node_is_given_back(add: Add, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("target.drivers.protocol.nbdkit_plugin.channel.IDLE_SECONDS", 0.2)
    node = await add(RAM)
    await asyncio.gather(*(node.object.write(0, bytes(512 << 10)) for _ in range(20)))
    assert node.plugin is not None and node.plugin._process is not None
    memory = node.plugin._process.memory
    assert os.fstat(memory.fd).st_blocks * 512 >= 8 << 20
    await until(lambda: os.fstat(memory.fd).st_blocks == 0, 5)
    await node.object.write(0, b"after")
    assert await node.object.read(0, 5) == b"after"


async def test_what_it_can_do_shows_through_raw(graph: Graph, add: Add) -> None:
    able = "\ndef is_rotational(h): return True\ndef export_description(h): return 'text'\n"
    node = await add(RAM + able)
    raw = await graph.add({"driver": "raw", "node-name": "raw", "file": "p"})
    assert raw.features == node.features
    assert node.features.rotational and not node.features.flush and node.features.description == "text"
    await graph.remove("raw")


# ---- dying ----


async def test_killed_process_fails_its_requests_and_says_so_once(
    add: Add, bystander: NbdkitPlugin, caplog: pytest.LogCaptureFixture
) -> None:
    node = await add(RAM + "\ndef pread(h, buf, offset, flags): time.sleep(60)\n")
    requests = [asyncio.ensure_future(node.object.read(0, 512)) for _ in range(100)]
    await asyncio.sleep(0.2)
    os.kill(pid(node), signal.SIGKILL)
    assert {await error_of(request) for request in requests} == {errno.EIO}
    assert await error_of(node.object.read(0, 512)) == errno.EIO
    await until(lambda: caplog.records)
    lines = [record.getMessage() for record in caplog.records if "'p'" in record.getMessage()]
    assert len(lines) == 1 and "node 'p'" in lines[0] and "signal 9 (SIGKILL)" in lines[0]


@pytest.mark.parametrize(
    ("death", "how"),
    [
        ("os._exit(7)", "ended with status 7"),
        ("os.abort()", "signal 6 (SIGABRT)"),
        ("import ctypes; ctypes.string_at(0)", "signal 11 (SIGSEGV)"),
        ("os.kill(os.getpid(), 15)", "signal 15 (SIGTERM)"),
    ],
)
async def test_ways_to_die(
    add: Add, bystander: NbdkitPlugin, caplog: pytest.LogCaptureFixture, death: str, how: str
) -> None:
    node = await add(RAM + f"\ndef pwrite(h, buf, offset, flags): {death}\n")
    assert await error_of(node.object.write(0, b"x")) == errno.EIO
    await until(lambda: how in caplog.text)


async def test_what_was_answered_before_the_end_counts(add: Add) -> None:
    dies = "\ndef pread(h, buf, offset, flags):\n    if offset: os._exit(0)\n    buf[:] = b'x' * len(buf)\n"
    node = await add(RAM + dies)
    results = await asyncio.gather(
        node.object.read(0, 512), node.object.read(512, 512), return_exceptions=True
    )
    assert isinstance(results[1], OSError)
    assert results[0] == b"x" * 512 or isinstance(results[0], OSError)


async def test_its_children_end_with_it(add: Add) -> None:
    spawns = """
import subprocess
child = subprocess.Popen(["sleep", "1000"])
def pread(h, buf, offset, flags): buf[:] = str(child.pid).encode().ljust(len(buf))
"""
    node = await add(RAM + spawns)
    child = int(await node.object.read(0, 20))
    assert not gone(child)
    os.kill(pid(node), signal.SIGKILL)
    await until(lambda: gone(child))


# ---- starting again ----


async def test_restart_on_failure(add: Add, caplog: pytest.LogCaptureFixture) -> None:
    node = await add(
        RAM + "\ndef config(k, v): disk[:5] = v.encode()\n", restart="on-failure", config={"k": "again"}
    )
    await node.object.write(0, b"other")
    first = pid(node)
    os.kill(first, signal.SIGKILL)
    await until(lambda: "SIGKILL" in caplog.text)
    assert await node.object.read(0, 5) == b"again"  # waits for the new one
    assert pid(node) != first
    assert node.counters()["plugin"]["restarts"] == 1


async def test_restarts_become_rarer(
    add: Add, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(life, "FIRST_DELAY", 0.4)
    node = await add(RAM + "\ndef pread(h, buf, offset, flags): os._exit(1)\n", restart="on-failure")
    times = []
    for _ in range(4):
        begin = time.monotonic()
        await until(lambda: node.plugin is not None and node.plugin._channel is not None)
        times.append(time.monotonic() - begin)
        assert await error_of(node.object.read(0, 1)) == errno.EIO
        await until(lambda: node.plugin is not None and node.plugin._process is None)
    assert times[2] > 0.35 and times[3] > 0.75
    assert "started again in 0.4 s" in caplog.text and "started again in 0.8 s" in caplog.text


@pytest.mark.timed
async def test_requests_fail_while_nothing_starts(add: Add, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(life, "FIRST_DELAY", 30.0)
    node = await add(RAM + "\ndef pread(h, buf, offset, flags): os._exit(1)\n", restart="on-failure")
    for _ in range(2):
        await error_of(node.object.read(0, 1))
        await asyncio.sleep(0.5)
    begin = time.monotonic()
    assert await error_of(node.object.read(0, 1)) == errno.EIO
    assert time.monotonic() - begin < 1


async def test_a_plugin_that_came_back_different_is_refused(
    add: Add, scratch: Path, caplog: pytest.LogCaptureFixture
) -> None:
    node = await add(RAM, restart="on-failure")
    (scratch / "plugin.py").write_text(RAM.replace(str(SIZE), "4096"))
    os.kill(pid(node), signal.SIGKILL)
    await until(lambda: "size was 1048576 and is 4096 now" in caplog.text)
    assert await error_of(node.object.read(0, 512)) == errno.EIO


async def test_waiting_requests_fail_with_a_start_that_fails(add: Add, scratch: Path) -> None:
    node = await add(RAM, restart="on-failure")
    (scratch / "plugin.py").write_text("import time; time.sleep(0.5)\nraise RuntimeError\n")
    os.kill(pid(node), signal.SIGKILL)
    await until(lambda: node.plugin is not None and node.plugin._held is not None)
    assert await error_of(node.object.read(0, 512)) == errno.EIO


async def test_the_bound_on_an_attempt_that_failed_does_not_fail_the_next(
    add: Add, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(life, "FIRST_DELAY", 1.0)
    monkeypatch.setattr(life, "HOLD_SECONDS", 2.0)
    node = await add(RAM, restart="on-failure")
    plugin = node.plugin
    assert plugin is not None
    (scratch / "plugin.py").write_text("raise RuntimeError\n")
    os.kill(pid(node), signal.SIGKILL)
    await until(lambda: plugin._held is not None)
    begin = time.monotonic()
    await until(lambda: plugin._held is None)
    (scratch / "plugin.py").write_text(f"{RAM}\nimport time; time.sleep(1.5)\n")
    await until(lambda: plugin._held is not None)  # after a second it is tried again
    await node.object.read(0, 512)
    assert time.monotonic() - begin > 2.2


# ---- asked for by the plugin ----


@pytest.mark.parametrize("call", ["shutdown()", "disconnect(False)", "disconnect(True)"])
async def test_shutdown_and_disconnect(
    add: Add, caplog: pytest.LogCaptureFixture, scratch: Path, call: str
) -> None:
    """The request under way is answered, later ones get ESHUTDOWN, and the plugin is closed in order."""
    marks = scratch / "marks"
    source = f"""
def mark(what):
    with __builtins__["open"]({str(marks)!r}, "a") as file: file.write(what)
def pwrite(h, buf, offset, flags): nbdkit.{call}
def close(h): mark("close ")
def cleanup(): mark("cleanup ")
"""
    node = await add(RAM + source, restart="on-failure")
    await node.object.write(0, b"x")
    await until(lambda: marks.exists() and marks.read_text() == "close cleanup ")
    assert await error_of(node.object.read(0, 1)) == errno.ESHUTDOWN
    assert "asked for" in caplog.text


async def test_shutdown_before_the_first_request(add: Add) -> None:
    node = await add(RAM + "\ndef get_ready(): nbdkit.shutdown()\n")
    await until(lambda: node.plugin is not None and node.plugin._shut)
    assert await error_of(node.object.read(0, 1)) == errno.ESHUTDOWN


# ---- closing ----


async def test_close_and_cleanup_run_at_the_end(graph: Graph, add: Add, scratch: Path) -> None:
    marks = scratch / "marks"
    source = f"""
import atexit
def mark(what):
    with __builtins__["open"]({str(marks)!r}, "a") as file: file.write(what)
def close(h): mark(f"close {{h}} ")
def cleanup(): mark("cleanup ")
atexit.register(mark, "exit")
"""
    node = await add(RAM + source)
    number = pid(node)
    await graph.remove("p")
    assert marks.read_text() == "close 1 cleanup exit"
    assert gone(number)


@pytest.mark.parametrize("deaf", ["", "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"])
async def test_a_close_that_blocks_is_bounded(
    graph: Graph, add: Add, deaf: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("target.drivers.protocol.nbdkit_plugin.process.TERM_SECONDS", 0.5)
    node = await add(RAM + f"\n{deaf}\ndef close(h): time.sleep(1000)\n", close_timeout=1)
    number = pid(node)
    begin = time.monotonic()
    await graph.remove("p")
    assert 0.9 < time.monotonic() - begin < 5
    assert gone(number)


async def test_a_request_that_blocks_does_not_hold_up_the_end(graph: Graph, add: Add) -> None:
    node = await add(RAM + "\ndef pread(h, buf, offset, flags): time.sleep(1000)\n", close_timeout=1)
    request = asyncio.ensure_future(node.object.read(0, 1))
    await asyncio.sleep(0.1)
    node.interrupt()
    assert await error_of(request) == errno.EIO
    await graph.remove("p")


async def test_stopped_process_is_killed_at_the_end(graph: Graph, add: Add) -> None:
    node = await add(RAM, close_timeout=1)
    number = pid(node)
    os.kill(number, signal.SIGSTOP)
    await graph.remove("p")
    assert gone(number)


async def test_a_plugin_that_sleeps_by_nbdkit_wakes_for_the_end(graph: Graph, add: Add) -> None:
    sleeps = "\ndef pread(h, buf, offset, flags): nbdkit.nanosleep(1000, 0)\n"
    node = await add(RAM + PARALLEL + sleeps + "\ndef pwrite(h, buf, offset, flags): nbdkit.shutdown()\n")
    request = asyncio.ensure_future(node.object.read(0, 1))
    await asyncio.sleep(0.1)
    begin = time.monotonic()
    await node.object.write(0, b"x")
    assert await error_of(request) == errno.EIO
    assert time.monotonic() - begin < 5


# ---- opening ----


async def test_open_may_be_given_up(graph: Graph, add: Add, scratch: Path) -> None:
    number = scratch / "pid"
    source = f"import os, time\nopen({str(number)!r}, 'w').write(str(os.getpid()))\ntime.sleep(1000)\n"
    opening = asyncio.ensure_future(add(source))
    await until(lambda: number.exists() and number.read_text())
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    await until(lambda: gone(int(number.read_text())))
    assert not graph.nodes


REFUSALS = [
    (
        "API_VERSION = 2\ndef open(r): pass\n",
        {},
        "one of the required callbacks 'open', 'get_size' or 'pread'",
    ),
    (RAM + "API_VERSION = 3\n", {}, "API_VERSION requested unknown version: 3"),
    ("def x(:\n", {}, "error running this script: SyntaxError"),
    ("raise KeyError('here')\n", {}, "error running this script: KeyError: 'here'"),
    ("import sys; sys.exit(4)\n", {}, "ended with status 4 before it was open"),
    ("import os; os.kill(os.getpid(), 9)\n", {}, "was killed by signal 9 (SIGKILL) before it was open"),
    (RAM, {"config": {"a": "b"}}, "this plugin does not need command line configuration"),
    (
        RAM + "def config(k, v): raise ValueError('not ' + k)\n",
        {"config": ["a=b"]},
        "config: ValueError: not a",
    ),
    (RAM + "def config_complete(): raise ValueError('more')\n", {}, "config_complete: ValueError: more"),
    (RAM + "def get_ready(): 1 / 0\n", {}, "get_ready: ZeroDivisionError"),
    (RAM + "def open(r): raise OSError('shut')\n", {}, "open: OSError: shut"),
    (RAM + "def get_size(h): return -1\n", {}, ".get_size function returned invalid value (-1)"),
    (RAM + "def get_size(h): return 'x'\n", {}, "get_size: not a 64 bit integer: 'x'"),
    (RAM + "def block_size(h): return 3, 4096, 4096\n", {}, "minimum block size to a power of 2"),
    (RAM + "def block_size(h): return 4096, 4096, -1\ndef get_size(h): return 5000\n", {}, "not a multiple"),
    (RAM + "def can_write(h): return False\n", {"read_only": False}, "the plugin is read-only"),
    (RAM + "def thread_model(): return 'x'\n", {}, "thread_model method did not return a thread model"),
    (RAM, {"config": {"script": "x"}}, "'script' is an option of the node"),
    (RAM, {"config": ["novalue"]}, "option 'config': expects key=value, not 'novalue'"),
    (RAM, {"config": {"k": ["v"]}}, "option 'config': the value of 'k' has to be a string"),
    (RAM, {"python": "/nonexistent/python"}, "option 'python': cannot run '/nonexistent/python'"),
    (RAM, {"python": "/bin/false"}, "ended with status 1 before it was open"),
    (
        RAM
        + "def open(r): raise OSError('which')\ndef list_exports(r, t): return ['a', ('b', 'the second')]\n",
        {"export": "c"},
        "it offers: a, b",
    ),
]


@pytest.mark.parametrize(("source", "options", "message"), REFUSALS)
async def test_what_cannot_be_opened(
    graph: Graph, add: Add, source: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(BlockError) as caught:
        await add(source, **options)
    assert message in str(caught.value) and str(caught.value).startswith("node 'p': ")
    assert "\n" not in str(caught.value)
    assert not graph.nodes


async def test_script_that_is_not_there(graph: Graph) -> None:
    with pytest.raises(BlockError, match="node 'p': /no/script: cannot open file: No such file or directory"):
        await graph.add({"driver": "nbdkit-plugin", "node-name": "p", "script": "/no/script"})


@pytest.mark.parametrize("options", [{}, {"auto_read_only": True, "read_only": False}, {"read_only": True}])
async def test_plugin_without_pwrite_is_read_only(add: Add, options: dict[str, Any]) -> None:
    node = await add(
        RAM + "\ndel pwrite\ndef open(readonly): print('readonly', readonly); return 1\n", **options
    )
    assert node.read_only
    assert await error_of(node.object.write(0, b"x")) == errno.EIO


# ---- hostile ----


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xff" * 64,
        wire.REPLY.pack(wire.DONE, 0, 5, 0),
        wire.REPLY.pack(wire.DONE, 1, 0, 0),
        wire.REPLY.pack(9, 0, 0, 0),
        wire.REPLY.pack(wire.SHUTDOWN, 0, 0, 0) * 2,
        wire.REPLY.pack(wire.DONE, 0, 65535, -5),
    ],
)
async def test_garbage_on_the_channel(
    add: Add, bystander: NbdkitPlugin, caplog: pytest.LogCaptureFixture, garbage: bytes
) -> None:
    lies = (
        f"{CHANNEL}\ndef pwrite(h, buf, offset, flags): os.write(channel(), {garbage!r}); time.sleep(0.5)\n"
    )
    node = await add(RAM + lies)
    assert await error_of(node.object.write(0, b"x")) in (errno.EIO, errno.ESHUTDOWN)
    await until(lambda: "broke its channel" in caplog.text)
    assert await error_of(node.object.read(0, 1)) in (errno.EIO, errno.ESHUTDOWN)


@pytest.mark.parametrize("result", [5, -100000])
async def test_a_wrong_result_for_a_request_of_its_own(
    add: Add, bystander: NbdkitPlugin, caplog: pytest.LogCaptureFixture, result: int
) -> None:
    answer = wire.REPLY.pack(wire.DONE, 0, wire.SLOTS - 1, result)  # the last slot is the first to be used
    lies = f"{CHANNEL}\ndef pwrite(h, buf, offset, flags): os.write(channel(), {answer!r}); time.sleep(1)\n"
    node = await add(RAM + lies)
    assert await error_of(node.object.write(0, b"x")) == errno.EIO
    await until(lambda: "broke its channel" in caplog.text)


@pytest.mark.parametrize(("length", "kind"), [(0, 0), (1 << 63, 0), (SIZE + 1, 0), (512, 4)])
async def test_extents_that_are_none(
    add: Add, bystander: NbdkitPlugin, caplog: pytest.LogCaptureFixture, length: int, kind: int
) -> None:
    lies = f"""
import mmap, struct
{CHANNEL}
def extents(h, count, offset, flags):
    for fd in sorted(map(int, os.listdir("/proc/self/fd"))):
        try:
            if "memfd" in os.readlink(f"/proc/self/fd/{{fd}}"): break
        except OSError: pass
    with mmap.mmap(fd, {wire.MEMORY_BYTES}) as memory:
        struct.pack_into("<QI", memory, {(wire.SLOTS - 1) * wire.SLOT_BYTES}, {length}, {kind})
    os.write(channel(), struct.pack("<BBHi", 0, 0, {wire.SLOTS - 1}, 1))
    time.sleep(1)
"""
    node = await add(RAM + lies)
    assert await error_of(node.object.status(0, SIZE)) == errno.EIO
    await until(lambda: "broke its channel" in caplog.text)


async def test_the_memory_cannot_be_shortened(add: Add) -> None:
    lies = """
def pwrite(h, buf, offset, flags):
    for fd in map(int, os.listdir("/proc/self/fd")):
        try:
            os.ftruncate(fd, 0)
        except OSError:
            pass
    disk[offset:offset + len(buf)] = buf
"""
    node = await add(RAM + lies)
    await node.object.write(0, b"whole")
    assert await node.object.read(0, 5) == b"whole"


async def test_closing_the_channel_is_noticed(
    add: Add, bystander: NbdkitPlugin, caplog: pytest.LogCaptureFixture
) -> None:
    node = await add(
        f"{RAM}{CHANNEL}\ndef pwrite(h, buf, offset, flags): os.close(channel()); time.sleep(1000)\n"
    )
    assert await error_of(node.object.write(0, b"x")) == errno.EIO
    assert await error_of(node.object.read(0, 1)) == errno.EIO
    await until(lambda: "SIGTERM" in caplog.text)


async def test_a_flood_of_output(add: Add, bystander: NbdkitPlugin, caplog: pytest.LogCaptureFixture) -> None:
    """The log gets a few lines a second, and the loop has time for others."""
    flood = """
def flood():
    while True: os.write(2, b"noise\\n" * 10000)
threading.Thread(target=flood, daemon=True).start()
"""
    node = await add(RAM + flood)
    begin = time.monotonic()
    for _ in range(50):
        assert await bystander.object.read(0, 512) == bytes(512)
        assert await node.object.read(0, 512) == bytes(512)
    taken = time.monotonic() - begin
    assert taken < 10
    await asyncio.sleep(0.5)
    assert "node 'p': noise" in caplog.text
    assert len(caplog.records) < 100


async def test_errors_are_logged_with_their_traceback(add: Add, caplog: pytest.LogCaptureFixture) -> None:
    node = await add(RAM + "\ndef pread(h, buf, offset, flags):\n    raise ValueError('no such block')\n")
    assert await error_of(node.object.read(0, 1)) == errno.EIO
    await until(lambda: "ValueError: no such block" in caplog.text)
    assert "plugin.py: pread: error: Traceback (most recent call last):" in caplog.text
    assert "runner.py" not in caplog.text and "connection.py" not in caplog.text
    assert all(record.levelno == logging.WARNING for record in caplog.records)


async def test_the_process_has_nothing_of_the_target(add: Add) -> None:
    source = (
        RAM
        + """
import json
found = json.dumps({
    "fds": {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
            if os.path.lexists(f"/proc/self/fd/{fd}")},
    "argv": sys.argv,
    "modules": list(sys.modules),
    "path": sys.path,
    "first to go": __builtins__["open"]("/proc/self/oom_score_adj").read(),
}).encode()
def pread(h, buf, offset, flags): buf[:] = found.ljust(len(buf))
"""
    )
    node = await add(source)
    found = json.loads(await node.object.read(0, 65536))
    kinds = [link.split(":")[0] for link in found["fds"].values()]
    assert kinds.count("socket") == 1 and kinds.count("pipe") == 2 and "anon_inode" not in kinds
    foreign = {"target", "numpy", "cffi", "uvloop", "asyncio", "msgspec"}
    assert not foreign & {name.split(".")[0] for name in found["modules"]} and found["argv"] == [""]
    assert int(found["first to go"]) == 1000
    assert not any(path.endswith("/target") or path == "" for path in found["path"])


@pytest.mark.parametrize(
    ("config", "seen"),
    [
        ({"a": "1", "b": 2, "c": True}, [("a", "1"), ("b", "2"), ("c", "true")]),
        (["a=1", {"b": "x=y"}, "a=z=2"], [("a", "1"), ("b", "x=y"), ("a", "z=2")]),
        ("a=", [("a", "")]),
        ([], []),
    ],
)
async def test_config_in_its_order(add: Add, config: object, seen: list[tuple[str, str]]) -> None:
    notes = """
seen = []
def config(key, value): seen.append((key, value))
def pread(h, buf, offset, flags): buf[:] = repr(seen).encode().ljust(len(buf))
"""
    node = await add(RAM + notes, config=config)
    assert eval(await node.object.read(0, 512)) == seen
