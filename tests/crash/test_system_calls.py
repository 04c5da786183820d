# SPDX-License-Identifier: Apache-2.0
"""System calls on the image fail below a real target: strace makes the kernel's answer an error.

What blkdebug cannot show: that a failed fdatasync of cached data stays failed, as the kernel reports it once
and calls the pages clean; and that an interrupted call is made again.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from target.peers.nbd_client import NbdClient
from tests.crash import images
from tests.crash.history import History
from tests.crash.images import KINDS, SIZE
from tests.crash.load import Load
from tests.crash.targets import Nursery, Target

_SECONDS = 20
WRITES = "pwrite64,pwritev,pwritev2"
READS = "pread64,preadv,preadv2"


@contextlib.asynccontextmanager
async def failing(target: Target, calls: str, error: str, when: str) -> AsyncIterator[None]:
    """While the body runs, ``when`` ("3", "3+") counts each thread's calls, and that one fails."""
    inject = f"inject={calls}:error={error}:when={when}"
    argv = ["strace", "-f", "-o", "/dev/null", "-e", f"trace={calls}", "-e", inject, "-p", str(target.pid)]
    tracer = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + _SECONDS
        while not all(traced(task) for task in Path(f"/proc/{target.pid}/task").iterdir()):
            assert tracer.poll() is None and time.monotonic() < end, "strace cannot attach"
            await asyncio.sleep(0.01)
        yield
    finally:
        tracer.terminate()
        tracer.communicate()


def traced(task: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):  # a thread that has just ended
        return "TracerPid:\t0\n" not in (task / "status").read_text()
    return True


def make(format: str, scratch: Path) -> tuple[Path, dict[str, Any]]:
    kind = KINDS["4k-one-slice"]
    if format == "qcow2":
        disk = images.make(kind, scratch)
        return disk, images.qcow2(kind, images.file(disk))
    disk = scratch / "disk.raw"
    disk.write_bytes(bytes(SIZE))
    return disk, {"driver": "raw", "node-name": "disk", "file": images.file(disk)}


def content(format: str, disk: Path) -> bytes:
    if format == "raw":
        return disk.read_bytes()
    images.check(disk)
    return images.content(disk)


async def refused(flush: Any) -> None:
    with pytest.raises(OSError) as caught:
        await flush
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("when", ["1", "2", "3"])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
async def test_a_failed_fdatasync_stays_failed(
    nursery: Nursery, scratch: Path, format: str, when: str
) -> None:
    disk, options = make(format, scratch)
    history = History(content(format, disk))
    with Target(nursery, options, grants=4) as target:
        assert await target.ready(), target.output()
        client = await target.connect()
        load = Load([client], history, "sync")
        await load.run(40, in_flight=4)
        await load.flush(client)
        async with failing(target, "fdatasync", "EIO", when):
            await load.run(1, in_flight=1)
            while not load.errors:
                await load.run(5, in_flight=1)  # until it is the turn of a flush
        for _ in range(3):
            await refused(client.flush())
        other = await target.connect()
        await refused(other.flush())
        begun = history.begin_read(0, history.sectors)
        history.check_read(0, await client.read(0, SIZE), begun)
        await asyncio.gather(client.close(), other.close())
        assert await target.stop() == 1, "a stop that could not flush must not look like success"
        assert "Input/output error" in target.output()
    history.check_content(content(format, disk))
    async with reopened(nursery, options) as client:
        await client.flush()


@contextlib.asynccontextmanager
async def reopened(nursery: Nursery, options: dict[str, Any]) -> AsyncIterator[NbdClient]:
    """A new target on the same image, which ends cleanly."""
    with Target(nursery, options) as target:
        assert await target.ready(), target.output()
        client = await target.connect()
        yield client
        await client.close()
        assert await target.stop() == 0, target.output()


@pytest.mark.parametrize("format", ["raw", "qcow2"])
@pytest.mark.parametrize(
    ("calls", "error", "when"),
    [(WRITES, "EIO", "3"), (WRITES, "ENOSPC", "4+"), (READS, "EIO", "2"), ("fallocate", "ENOSPC", "2+")],
)
async def test_a_failed_call_reaches_the_client(
    nursery: Nursery, scratch: Path, format: str, calls: str, error: str, when: str
) -> None:
    disk, options = make(format, scratch)
    history = History(content(format, disk))
    with Target(nursery, options, grants=4) as target:
        assert await target.ready(), target.output()
        clients = [await target.connect() for _ in range(2)]
        load = Load(clients, history, "call")
        await load.run(40, in_flight=4)
        await load.flush(clients[0])
        async with failing(target, calls, error, when):
            await load.run(80, in_flight=4)
        assert not load.gone, target.output()
        assert set(load.errors) <= {getattr(errno, error)}
        assert load.errors or calls == "fallocate"  # zeros may be written instead
        before = len(load.errors)
        await load.run(40, in_flight=4)
        await load.flush(clients[0])
        assert len(load.errors) == before, "errors went on after their cause"
        await asyncio.gather(*(client.close() for client in clients))
        assert await target.stop() == 0, target.output()
    history.check_content(content(format, disk))


@pytest.mark.parametrize("calls", [WRITES, READS, "fdatasync", "fallocate"])
async def test_an_interrupted_call_is_made_again(nursery: Nursery, scratch: Path, calls: str) -> None:
    disk, options = make("qcow2", scratch)
    history = History(content("qcow2", disk))
    with Target(nursery, options, grants=4) as target:
        assert await target.ready(), target.output()
        client = await target.connect()
        load = Load([client], history, "again")
        async with failing(target, calls, "EINTR", "2+3"):
            await load.run(80, in_flight=4)
            await load.flush(client)
        assert not load.errors and not load.gone, target.output()
        await client.close()
        assert await target.stop() == 0, target.output()
    history.check_content(content("qcow2", disk))
