# SPDX-License-Identifier: Apache-2.0
"""nbdkit serves a graph by plugins/blocktarget-nbdkit.py, as the target's own export of the node does."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from target.exports.nbd.protocol import CommandFlag, TransmissionFlag
from target.peers.nbd_client import NbdClient
from tests.support.daemon import blocktarget_argv, nbd_uri
from tests.support.nbdkit_server import PLUGINS, Hosted, Nbdkit, clients
from tests.support.tools import check_image, create_image, fill, image_map, qemu_img, qemu_io, run

SCRIPT = PLUGINS / "blocktarget-nbdkit.py"
MIB = 1 << 20
Serve = Callable[..., Nbdkit]
Work = Callable[[NbdClient], Awaitable[Any]]


@pytest.fixture
def serve(scratch: Path) -> Iterator[Serve]:
    """serve(nodes, *parameters): nbdkit with the node `disk`, which has an NBD export of its own as well."""
    servers: list[Nbdkit] = []

    def begin(nodes: list[dict[str, Any]], *parameters: str, writable: bool = True) -> Nbdkit:
        own = {"type": "nbd", "id": "own", "node-name": "disk", "name": "disk", "writable": writable}
        server = {"addr": {"type": "unix", "path": str(scratch / "own.sock")}}
        graph = {"blockdevs": nodes, "nbd-server": server, "exports": [own]}
        (scratch / "graph.yaml").write_text(json.dumps(graph))  # JSON is YAML
        words = (f"graph={scratch / 'graph.yaml'}", "node=disk", f"python={sys.executable}", *parameters)
        servers.append(Nbdkit(scratch, SCRIPT, *words))
        return servers[-1]

    yield begin
    try:
        for server in servers:
            server.stop()
    finally:
        for server in servers:
            server.kill()


@pytest.fixture
def directories() -> Iterator[None]:
    """No private directory is left."""
    before = private_directories()
    yield
    assert private_directories() == before


def private_directories() -> set[str]:
    return {str(path) for path in Path("/tmp").glob("blocktarget-nbdkit-*")}


def image(path: Path, format: str = "raw", read_only: bool = False) -> dict[str, Any]:
    file = {"driver": "file", "filename": str(path), "discard": "unmap"}
    return {"driver": format, "node-name": "disk", "discard": "unmap", "file": file, "read-only": read_only}


def child_of(server: Nbdkit) -> int:
    pid = server.process.pid
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


async def outcome(work: Awaitable[Any]) -> Any:
    """What comes of a request: its result, or its error's name."""
    try:
        return await work
    except OSError as error:
        return error.errno


async def test_content_extents_and_flags_agree(serve: Serve, scratch: Path) -> None:
    raw = fill(scratch / "disk.raw", 64 * MIB, seed=1, pieces=40)
    qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, scratch / "disk.qcow2")
    server = serve([image(scratch / "disk.qcow2", "qcow2")])
    async with clients(server.sock, scratch / "own.sock") as (relayed, own):
        assert relayed.export.size == own.export.size == 64 * MIB
        assert relayed.export.flags | TransmissionFlag.SEND_DF == own.export.flags | TransmissionFlag.SEND_DF
        assert relayed.export.block_sizes == own.export.block_sizes
        assert await relayed.map() == await own.map()
        chance = random.Random(2)
        for _ in range(50):
            offset = chance.randrange(64 * MIB)
            length = min(chance.choice((1, 4096, 70_001, 3 * MIB)), 64 * MIB - offset)
            assert await relayed.read(offset, length) == await own.read(offset, length)
            flags = chance.choice((0, CommandFlag.REQ_ONE))
            assert covered(await relayed.block_status(offset, length, flags), length) == covered(
                await own.block_status(offset, length, flags), length
            )
    qemu_img("compare", "-f", "raw", "-F", "raw", raw, server.uri())
    ours, theirs = (image_map(uri, "raw") for uri in (server.uri(), nbd_uri(scratch / "own.sock")))
    assert ours == theirs
    run("nbdcopy", server.uri(), scratch / "copy")
    assert (scratch / "copy").read_bytes() == raw.read_bytes()


def covered(extents: list[tuple[int, int]], length: int) -> list[int]:
    """The status of each byte of a beginning of the range, in steps: servers cut extents where they like."""
    end = min(length, sum(part for part, _ in extents))
    flags: list[int] = []
    for part, flag in extents:
        if not flags or flags[-1] != flag:
            flags.append(flag)
        end -= part
        if end <= 0:
            break
    return flags


async def test_random_use_in_parallel(serve: Serve, scratch: Path) -> None:
    """Sixteen requests at a time on each of two connections, against a flat model."""
    create_image(scratch / "disk.qcow2", "16M")
    server = serve([image(scratch / "disk.qcow2", "qcow2")])
    async with clients(server.sock, server.sock) as connected:
        model = bytearray(16 * MIB)
        part = MIB // 2

        async def use(client: NbdClient, base: int) -> None:
            chance = random.Random(base)
            for _ in range(40):
                offset = chance.randrange(base, base + part)
                length = min(chance.choice((1, 512, 4096, 65536, 200_000)), base + part - offset)
                where = slice(offset, offset + length)
                match chance.randrange(4):
                    case 0:
                        assert await client.read(offset, length) == model[where]
                    case 1:
                        model[where] = bytes(length)
                        await client.write_zeroes(
                            offset, length, chance.choice((0, CommandFlag.NO_HOLE, CommandFlag.FUA))
                        )
                    case _:
                        model[where] = chance.randbytes(length)
                        await client.write(offset, bytes(model[where]), chance.choice((0, CommandFlag.FUA)))

        await asyncio.gather(*(use(connected[i % 2], i * part) for i in range(32)))
        await connected[0].flush()
        assert await connected[1].read(0, len(model)) == model
        await connected[0].trim(0, 4 * MIB)
        assert (await connected[0].map(0, 4 * MIB)) == [(4 * MIB, 3)]
    server.stop()
    check_image(scratch / "disk.qcow2")
    qemu_img("convert", "-f", "qcow2", "-O", "raw", scratch / "disk.qcow2", scratch / "after")
    assert (scratch / "after").read_bytes() == bytes(4 * MIB) + model[4 * MIB :]


async def test_requests_larger_than_the_target_takes(serve: Serve, scratch: Path) -> None:
    """nbdkit takes 64 MiB, the target 32."""
    fill(scratch / "disk.raw", 64 * MIB, seed=3)
    server = serve([image(scratch / "disk.raw")])
    async with clients(server.sock) as (client,):
        data = random.Random(4).randbytes(48 * MIB)
        await client.write(MIB, data, CommandFlag.FUA)
        assert await client.read(MIB, len(data)) == data
        await client.cache(0, 64 * MIB)
        await client.write_zeroes(0, 64 * MIB)
        assert await client.map() == [(64 * MIB, 3)]


OPERATIONS: dict[str, Work] = {
    "fast zeroes": lambda client: client.write_zeroes(4096, 65536, CommandFlag.FAST_ZERO),
    "fast zeroes without a hole": lambda client: client.write_zeroes(
        0, 65536, CommandFlag.FAST_ZERO | CommandFlag.NO_HOLE
    ),
    "zeroes": lambda client: client.write_zeroes(1, 70_000),
    "trim": lambda client: client.trim(0, MIB, CommandFlag.FUA),
    "write": lambda client: client.write(0, b"x" * 512, CommandFlag.FUA),
    "write of a part": lambda client: client.write(3, b"x"),
    "flush": lambda client: client.flush(),
    "cache": lambda client: client.cache(0, MIB),
    "read": lambda client: client.read(0, 4096),
    "status": lambda client: client.block_status(0, MIB),
    "status of one": lambda client: client.block_status(0, MIB, CommandFlag.REQ_ONE),
}


def failing(iotype: str, number: int, scratch: Path) -> dict[str, Any]:
    rule = {"event": "none", "iotype": iotype, "errno": number}
    file = image(scratch / "disk.raw")["file"]
    return {"driver": "blkdebug", "node-name": "disk", "image": file, "inject-error": [rule]}


@pytest.mark.parametrize(
    ("iotype", "number"), [("read", 5), ("write", 28), ("write", 12), ("write-zeroes", 95), ("flush", 28)]
)
async def test_errors_agree(serve: Serve, scratch: Path, iotype: str, number: int) -> None:
    """One kind of request fails in the graph."""
    fill(scratch / "disk.raw", 4 * MIB, seed=3)
    server = serve([failing(iotype, number, scratch)])
    async with clients(server.sock, scratch / "own.sock") as connected:
        failed = 0
        for name, work in OPERATIONS.items():
            relayed, own = [await outcome(work(client)) for client in connected]
            assert relayed == own, name
            failed += isinstance(own, int)
        assert failed


async def test_read_only(serve: Serve, scratch: Path) -> None:
    fill(scratch / "disk.raw", 4 * MIB, seed=3)
    server = serve([image(scratch / "disk.raw", read_only=True)], "readonly=true", writable=False)
    async with clients(server.sock, scratch / "own.sock") as connected:
        assert connected[0].export.flags & TransmissionFlag.READ_ONLY
        for name, work in OPERATIONS.items():
            relayed, own = [await outcome(work(client)) for client in connected]
            changes = name not in ("flush", "cache", "read", "status", "status of one")
            # A request that was not offered: nbdkit says EPERM, the target EPERM or EINVAL.
            assert (relayed, own) in ((1, 1), (1, 22)) if changes else relayed == own, name


async def test_runs_under_the_target_too(scratch: Path) -> None:
    """It is a plugin like others: a target serves the node of another target."""
    raw = fill(scratch / "disk.raw", 16 * MIB, seed=5)
    (scratch / "graph.yaml").write_text(json.dumps({"blockdevs": [image(raw)]}))
    words = (f"graph={scratch / 'graph.yaml'}", "node=disk", f"python={sys.executable}")
    server = Hosted(scratch, SCRIPT, *words)
    try:
        assert image_map(server.uri(), "raw") == image_map(raw, "raw")
        qemu_img("compare", "-f", "raw", "-F", "raw", raw, server.uri())
        qemu_io(server.uri(), "write -P 9 1M 3M", "write -z 5M 1M", "discard 8M 1M", "flush")
    finally:
        server.stop()
    qemu_io(raw, "read -P 9 1M 3M", "read -P 0 5M 1M", "read -P 0 8M 1M")


# ---- the end of one and of the other ----


async def test_death_of_the_target_is_an_io_error(serve: Serve, scratch: Path, directories: None) -> None:
    fill(scratch / "disk.raw", 4 * MIB, seed=3)
    server = serve([image(scratch / "disk.raw")])
    async with clients(server.sock) as (client,):
        assert await client.read(0, 512)
        os.kill(child_of(server), signal.SIGKILL)
        for work in OPERATIONS.values():
            assert await outcome(asyncio.wait_for(work(client), 10)) == 5
    refused = run("nbdinfo", server.uri(), check=False)
    assert refused.returncode and server.process.poll() is None
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) is not None
    assert "the target ended with status -9" in server.output()


def test_the_target_does_not_outlive_nbdkit(serve: Serve, scratch: Path) -> None:
    """Even when that is killed; the image is closed in an orderly way."""
    create_image(scratch / "disk.qcow2", "16M")
    server = serve([image(scratch / "disk.qcow2", "qcow2")])
    qemu_io(server.uri(), "write -P 7 1M 3M")
    pid = child_of(server)
    server.kill()
    end = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    check_image(scratch / "disk.qcow2")
    qemu_io(scratch / "disk.qcow2", "read -P 7 1M 3M", format="qcow2")


def test_clean_end(serve: Serve, scratch: Path, directories: None) -> None:
    create_image(scratch / "disk.qcow2", "16M")
    server = serve([image(scratch / "disk.qcow2", "qcow2")])
    qemu_io(server.uri(), "write -P 7 1M 3M")
    server.stop()
    check_image(scratch / "disk.qcow2")


def test_command_and_directory(scratch: Path) -> None:
    """Names in the file are relative to where nbdkit was started; the command has arguments."""
    (scratch / "graph.yaml").write_text("blockdevs: [{driver: file, node-name: disk, filename: disk.raw}]")
    fill(scratch / "disk.raw", MIB, seed=3)
    command = " ".join(f"'{word}'" for word in blocktarget_argv())
    script = (
        f"cd {scratch} && exec timeout 60 nbdkit -U - python {SCRIPT} graph=graph.yaml node=disk "
        f'blocktarget="$COMMAND" --run \'nbdcopy "$uri" copy\''
    )
    run("env", f"COMMAND={command}", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "sh", "-c", script)
    assert (scratch / "copy").read_bytes() == (scratch / "disk.raw").read_bytes()


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        (["node=disk"], "the parameter graph= is required"),
        (["graph=GRAPH"], "the parameter node= is required"),
        (["graph=/absent.yaml", "node=disk"], "No such file or directory"),
        (["graph=GRAPH", "node=other"], "Cannot find device='' nor node-name='other'"),
        (["graph=GRAPH", "node=disk"], "read-only"),
        (["graph=BAD", "node=disk"], "Parameter 'driver' does not accept value 'nonsense'"),
        (["graph=GRAPH", "node=disk", "readonly=perhaps"], "readonly=true or readonly=false"),
        (["graph=GRAPH", "node=disk", "blocktarget=x"], "exclude each other"),
        (["graph=GRAPH", "node=disk", "graph=GRAPH"], "graph is given twice"),
        (["graph=GRAPH", "node=disk", "nodes=x"], "unknown parameter 'nodes'"),
    ],
)
def test_refuses(scratch: Path, directories: None, parameters: list[str], says: str) -> None:
    """At the start, with the target's own reason; nothing stays behind."""
    (scratch / "graph.yaml").write_text(
        f"blockdevs: [{{driver: file, node-name: disk, read-only: true, filename: {scratch / 'disk'}}}]"
    )
    (scratch / "disk").write_bytes(bytes(4096))
    (scratch / "bad.yaml").write_text("blockdevs: [{driver: nonsense, node-name: disk}]")
    names = {"GRAPH": str(scratch / "graph.yaml"), "BAD": str(scratch / "bad.yaml")}
    words = [word.replace("GRAPH", names["GRAPH"]).replace("BAD", names["BAD"]) for word in parameters]
    assert says in refused(scratch, *words, f"python={sys.executable}")


def test_refuses_a_command_that_does_not_exist(scratch: Path) -> None:
    (scratch / "graph.yaml").write_text("{}")
    words = (f"graph={scratch / 'graph.yaml'}", "node=disk", "blocktarget=absent-command --fast")
    assert "absent-command: no such command" in refused(scratch, *words)


def refused(scratch: Path, *words: str) -> str:
    """What nbdkit says, which ends; it writes its pidfile before it starts the target."""
    try:
        server = Nbdkit(scratch, SCRIPT, *words)
    except AssertionError as error:
        return str(error)
    try:
        assert server.process.wait(30)
        return server.output()
    finally:
        server.kill()
