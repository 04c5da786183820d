# SPDX-License-Identifier: Apache-2.0
"""A real file system that is full: the client gets ENOSPC, nothing flushed is lost, new space is used."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.crash import images
from tests.crash.history import SECTOR, History, Kind
from tests.crash.images import KINDS
from tests.crash.load import Load
from tests.crash.targets import Nursery, Target
from tests.support.tools import check_image, create_image, run

MIB = 1 << 20
DISK = 8 * MIB
PIECE = 128  # sectors in a write
ROOM = 160 << 10


@contextlib.contextmanager
def mounted(kind: str, scratch: Path) -> Iterator[Path]:
    """A file system of some 5 MiB; needs root, as the machine that runs these tests has it."""
    place = scratch / "mnt"
    place.mkdir()
    if kind == "tmpfs":
        run("mount", "-t", "tmpfs", "-o", "size=5M", "none", place)
    else:
        store = scratch / "store"
        store.write_bytes(bytes(6 * MIB))
        run("mkfs.ext4", "-q", "-O", "^has_journal", "-m", "0", "-F", store)
        run("mount", "-o", "loop", store, place)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def options(format: str, disk: Path) -> dict[str, Any]:
    if format == "raw":
        return {"driver": "raw", "node-name": "disk", "file": images.file(disk)}
    return images.qcow2(images.Kind(""), images.file(disk))


def make(format: str, disk: Path) -> None:
    if format == "raw":
        disk.touch()
        with disk.open("r+b") as file:
            file.truncate(DISK)
    else:
        create_image(disk, str(DISK), options="cluster_size=16k")


@pytest.mark.parametrize("system", ["tmpfs", "ext4"])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
async def test_a_full_file_system(nursery: Nursery, scratch: Path, system: str, format: str) -> None:
    history = History(bytes(DISK))
    with mounted(system, scratch) as place:
        disk = place / "disk"
        make(format, disk)
        filler = place / "filler"
        filler.write_bytes(b"x" * MIB)
        with Target(nursery, options(format, disk)) as target:
            assert await target.ready(), target.output()
            client = await target.connect()
            failed = await fill(client, history)
            begun = history.begin_read(0, failed)
            history.check_read(0, await client.read(0, failed * SECTOR), begun)
            filler.unlink()
            change = history.begin(Kind.WRITE, failed, PIECE)
            await client.write(change.offset, change.data())
            history.complete(change)
            await flush(client, history)
            await client.close()
            assert await target.stop() == 0, target.output()
        copy = Path(shutil.copy(disk, scratch))
    if format == "qcow2":
        check_image(copy)
        history.check_content(images.content(copy))
    else:
        history.check_content(copy.read_bytes())


@pytest.mark.parametrize("system", ["tmpfs", "ext4"])
async def test_a_full_file_system_below_a_chain_with_a_snapshot(
    nursery: Nursery, scratch: Path, system: str
) -> None:
    """Many requests in flight, which need new clusters, tables and counts while there is no space."""
    kind = KINDS["2k-chain-snapshot"]
    made = images.make(kind, scratch)
    history = History(images.content(made))
    fixed = images.untouchable(kind, made)
    with mounted(system, scratch) as place:
        disk = Path(shutil.copy(made, place))
        filler = place / "filler"
        leave(filler, ROOM)
        with Target(nursery, images.qcow2(kind, images.file(disk)), grants=kind.grants) as target:
            assert await target.ready(), target.output()
            load = Load([await target.connect() for _ in range(2)], history, system, kind.largest)
            for _ in range(20):
                await load.run(40, in_flight=6)
                await load.flush(load.clients[0])  # what was done has room for its metadata
                if load.errors:
                    break
            assert set(load.errors) == {errno.ENOSPC}, load.errors
            filler.unlink()
            before = len(load.errors)
            await load.run(200, in_flight=6)
            await load.flush(load.clients[0])
            assert len(load.errors) == before and not load.gone, "errors went on with space"
            await asyncio.gather(*(client.close() for client in load.clients))
            assert await target.stop() == 0, target.output()
        shutil.copy(disk, made)
    check_image(made)
    history.check_content(images.content(made))
    assert images.untouchable(kind, made) == fixed


def leave(filler: Path, room: int) -> None:
    """A file that takes all space but so much."""
    with filler.open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while file.write(b"x" * 4096):
                pass
        file.truncate(file.tell() - room)
        os.fsync(file.fileno())


async def flush(client: Any, history: History) -> None:
    begun = history.begin_flush()
    await client.flush()
    history.complete_flush(begun)


async def fill(client: Any, history: History) -> int:
    """Writes, and flushes now and then, until a write fails; the sector where it began."""
    for number, first in enumerate(range(0, DISK // SECTOR, PIECE)):
        change = history.begin(Kind.WRITE, first, PIECE)
        try:
            await client.write(change.offset, change.data())
        except OSError as error:
            assert error.errno == errno.ENOSPC
            assert first * SECTOR > 2 * MIB, "it was full too early"
            return first
        history.complete(change)
        if number % 8 == 0:
            await flush(client, history)
    raise AssertionError("the file system never was full")
