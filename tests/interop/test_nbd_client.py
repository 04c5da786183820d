# SPDX-License-Identifier: Apache-2.0
"""The nbd driver against qemu-nbd, nbdkit, this target and a scriptable server; beside QEMU's own driver."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from target.exports.nbd.protocol import Command, CommandFlag, TransmissionFlag
from target.peers.nbd_client import NbdClient
from target.peers.nbd_script import ServerOptions
from tests.support.daemon import Daemon, nbd_export, nbd_server_unix, nbd_uri
from tests.support.nbd_peers import SERVERS, mock, nbd_node, qemu_front, server
from tests.support.tools import create_image, fill, qemu_img, qemu_io, run

Start = Callable[..., Daemon]
KIB, MIB = 1 << 10, 1 << 20
SIZE = 16 * MIB


# ---- beside QEMU's driver ----

MOCKS = {
    "mock": ServerOptions(size=SIZE),
    "mock-simple": ServerOptions(size=SIZE, structured=False),
    "mock-extended": ServerOptions(size=SIZE, extended=True),
    "mock-blocks": ServerOptions(size=SIZE, blocks=(512, 4096, MIB)),
    "mock-plain": ServerOptions(size=SIZE, flags=TransmissionFlag(0)),
    "mock-old": ServerOptions(size=SIZE, fixed=False),
}


def step(source: random.Random, preallocate: bool) -> tuple[str, int, int, int]:
    """An operation: what, offset, length, flags.

    Without ``preallocate`` all zeroes may be holes: a file's preallocated blocks show as data once they were
    read, and the daemons do not read alike (QEMU's asks for block status first).
    """
    length = source.choice((512, 4 * KIB, 4 * KIB, 64 * KIB, 200 * KIB, MIB, 3 * MIB))
    offset = source.randrange((SIZE - length) // 512 + 1) * 512
    if source.random() < 0.4:
        offset -= offset % length
    name = source.choice(("read", "read", "write", "write", "write_zeroes", "write_zeroes", "trim", "map"))
    flags = 0
    if name == "write" and source.random() < 0.1:
        flags = CommandFlag.FUA
    elif name == "write_zeroes":
        flags = source.choice((0, 0, CommandFlag.NO_HOLE if preallocate else 0, CommandFlag.FUA))
    return name, offset, length, flags


async def do(client: NbdClient, operation: tuple[str, int, int, int], seed: int) -> object:
    """What the client sees of it: data, extents, or the errno."""
    name, offset, length, flags = operation
    try:
        if name == "read":
            return await client.read(offset, length)
        if name == "map":
            return await client.map(offset, length)
        if name == "write":
            await client.write(offset, random.Random(seed).randbytes(512) * (length // 512), flags)
        else:
            await (client.write_zeroes if name == "write_zeroes" else client.trim)(offset, length, flags)
    except OSError as error:
        return error.errno
    return None


async def compare(fronts: list[Path], steps: int, seed: int, preallocate: bool = True) -> None:
    clients = [await NbdClient.connect(str(path), "disk") for path in fronts]
    assert clients[0].export.size == clients[1].export.size
    source = random.Random(seed)
    for number in range(steps):
        operation = step(source, preallocate)
        found = [await do(client, operation, number) for client in clients]
        assert found[0] == found[1], f"step {number}: {operation}"
    for client in clients:
        await client.flush()
        await client.close()


def maps(fronts: list[Path], context: str = "base:allocation") -> list[Any]:
    found = [run("nbdinfo", "--json", f"--map={context}", nbd_uri(front)).stdout for front in fronts]
    return [json.loads(text) for text in found]


@pytest.mark.parametrize("kind", SERVERS)
async def test_agrees_with_qemu_s_driver(scratch: Path, start: Start, kind: str) -> None:
    """The same operations through both daemons, each in front of a server of its own with the same image."""
    images = [fill(scratch / f"{n}.raw", SIZE, seed=8, pieces=12) for n in range(2)]
    fronts = [scratch / "ours.sock", scratch / "theirs.sock"]
    with ExitStack() as stack:
        for n, image in enumerate(images):
            stack.enter_context(server(kind, image, scratch / f"server{n}.sock"))
        daemon = start(*nbd_node(scratch / "server0.sock"), *nbd_server_unix(fronts[0]), *nbd_export())
        stack.enter_context(qemu_front(nbd_node(scratch / "server1.sock"), fronts[1]))
        await compare(fronts, 250, seed=1, preallocate=False)
        ours, theirs = maps(fronts)
        assert ours == theirs
        daemon.stop()
    assert images[0].read_bytes() == images[1].read_bytes()
    holes = [qemu_img("map", "-f", "raw", "--output=json", image).stdout for image in images]
    assert json.loads(holes[0]) == json.loads(holes[1])


@pytest.mark.parametrize("kind", MOCKS)
async def test_agrees_with_qemu_s_driver_on_odd_servers(scratch: Path, start: Start, kind: str) -> None:
    options = MOCKS[kind]
    fronts = [scratch / "ours.sock", scratch / "theirs.sock"]
    with mock(scratch / "0.sock", options) as mine, mock(scratch / "1.sock", options) as other:
        start(*nbd_node(scratch / "0.sock"), *nbd_server_unix(fronts[0]), *nbd_export())
        with qemu_front(nbd_node(scratch / "1.sock"), fronts[1]):
            await compare(fronts, 200, seed=2)
        assert mine.disk.read(0, SIZE) == other.disk.read(0, SIZE)
        if kind not in ("mock-plain", "mock-old"):
            assert list(mine.disk.extents(0, SIZE)) == list(other.disk.extents(0, SIZE))
            assert mine.commands(Command.TRIM) and mine.commands(Command.WRITE_ZEROES)


async def test_two_daemons_show_the_same_map_of_one_server(scratch: Path, start: Start) -> None:
    image = create_image(scratch / "disk.qcow2", "64M")
    qemu_io(image, "write -P 1 0 3M", "write -z 8M 4M", "write -P 2 20M 64k", "discard 1M 1M", format="qcow2")
    fronts = [scratch / "ours.sock", scratch / "theirs.sock"]
    with server("qemu-nbd", image, scratch / "s.sock", "--format=qcow2"):
        start(*nbd_node(scratch / "s.sock"), *nbd_server_unix(fronts[0]), *nbd_export())
        with qemu_front(nbd_node(scratch / "s.sock"), fronts[1]):
            ours, theirs = maps(fronts)
    assert ours == theirs and len(ours) > 4


@pytest.mark.parametrize("by", ["qemu-nbd", "mock"])
async def test_dirty_bitmap(scratch: Path, start: Start, by: str) -> None:
    """x-dirty-bitmap: the bitmap's bits come as block status, as QEMU's driver shows them."""
    fronts = [scratch / "ours.sock", scratch / "theirs.sock"]
    context = "qemu:dirty-bitmap:day"
    with ExitStack() as stack:
        if by == "qemu-nbd":
            image = create_image(scratch / "disk.qcow2", "64M")
            qemu_img("bitmap", "--add", image, "day")
            qemu_io(image, "write 1M 64k", "write 5M 1M", format="qcow2")
            stack.enter_context(server("qemu-nbd", image, scratch / "s.sock", "--format=qcow2", "-B", "day"))
        else:
            bitmaps = {"day": [(0, 4096), (1 * MIB, 64 * KIB), (63 * MIB, MIB)]}
            stack.enter_context(mock(scratch / "s.sock", ServerOptions(bitmaps=bitmaps)))
        node = nbd_node(scratch / "s.sock", x_dirty_bitmap=context, read_only=True)
        start(*node, *nbd_server_unix(fronts[0]), *nbd_export(writable=False))
        with qemu_front(node, fronts[1], writable=False):
            ours, theirs = maps(fronts)
    assert ours == theirs and len(ours) >= 4
