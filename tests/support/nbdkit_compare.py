# SPDX-License-Identifier: Apache-2.0
"""Runs a script under real nbdkit and as a node of a target in this process, and notes what a client sees."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from target import drivers, exports
from target.config.options import Notation
from target.config.parse import parse_blockdev, parse_export, parse_nbd_server
from target.exports.nbd.protocol import CommandFlag, TransmissionFlag
from target.graph.errors import BlockError
from target.peers.nbd_client import NbdClient
from target.peers.nbd_raw import OptionFailed
from target.service import Service
from tests.support.nbdkit_server import SYSTEM_PYTHON, Nbdkit

SCRIPTS = Path(__file__).with_name("nbdkit_scripts")
FLAGS = (
    TransmissionFlag.READ_ONLY
    | TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.SEND_FUA
    | TransmissionFlag.ROTATIONAL
    | TransmissionFlag.SEND_TRIM
    | TransmissionFlag.SEND_WRITE_ZEROES
    | TransmissionFlag.CAN_MULTI_CONN
    | TransmissionFlag.SEND_CACHE
    | TransmissionFlag.SEND_FAST_ZERO
)

Probe = Callable[[NbdClient, "Seen"], Awaitable[None]]


@dataclass(frozen=True)
class Case:
    """A script and its parameters, in their order."""

    script: str
    parameters: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    export: str = ""
    read_only: bool = False

    def __str__(self) -> str:
        environment = [f"{value}" for _, value in self.environment]
        more = [self.export] * bool(self.export) + ["read-only"] * self.read_only
        return " ".join([self.script, *self.parameters, *environment, *more])

    @property
    def path(self) -> Path:
        return SCRIPTS / f"{self.script}.py"

    @contextlib.contextmanager
    def surroundings(self) -> Iterator[None]:
        """The environment in which a server is started."""
        before = {name: os.environ.get(name) for name, _ in self.environment}
        os.environ.update(self.environment)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


@dataclass
class Seen:
    """What a client saw, by step; and what a server said when it refused to serve."""

    steps: dict[str, Any] = field(default_factory=dict)
    refused: str = ""
    died: bool = False
    journal: list[list[Any]] = field(default_factory=list)

    async def note(self, step: str, work: Awaitable[Any]) -> None:
        """Notes a result (of data its digest), or the errno."""
        assert step not in self.steps, step
        try:
            result = await work
        except OSError as error:
            self.steps[step] = f"errno {error.errno}"
            return
        self.steps[step] = digest(result) if isinstance(result, bytes) else result


def digest(data: bytes) -> str:
    """Its beginning, and what tells it from other data."""
    return f"{data[:40]!r} of {len(data)}, {hashlib.sha256(data).hexdigest()[:16]}"


def read_journal(path: Path) -> list[list[Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


async def both(case: Case, scratch: Path, probe: Probe) -> tuple[Seen, Seen]:
    """Here, and under nbdkit."""
    with case.surroundings():
        ours, theirs = await asyncio.gather(here(case, scratch, probe), under_nbdkit(case, scratch, probe))
    return ours, theirs


async def under_nbdkit(case: Case, scratch: Path, probe: Probe) -> Seen:
    seen = Seen()
    journal = scratch / "nbdkit.journal"
    options = ("-r",) if case.read_only else ()
    server = Nbdkit(scratch, case.path, *_parameters(case, journal), options=options, wait=False)
    try:
        while not server.ready():
            await asyncio.sleep(0.005)
    except AssertionError as error:
        server.kill()
        seen.refused = str(error)
        return seen
    try:
        client = await NbdClient.connect(str(server.sock), case.export)
        try:
            await probe(client, seen)
            sizes = client.export.block_sizes or (0, 0, 0)
            seen.steps["told"] = client.export.description or "", sizes[0], sizes[2]
        finally:
            await client.close()
        server.stop()
    except (OptionFailed, EOFError, ConnectionError) as error:
        seen.refused = f"{error!r}: {server.output()}"
        seen.died = server.dies()
    finally:
        server.kill()
    seen.journal = read_journal(journal)
    return seen


async def here(case: Case, scratch: Path, probe: Probe, **options: Any) -> Seen:
    seen = Seen()
    journal = scratch / "here.journal"
    try:
        async with serving(case, scratch, _parameters(case, journal), options) as (service, address):
            client = await NbdClient.connect(address, "disk")
            try:
                await probe(client, seen)
                plugin = service.graph.get("disk").counters()["plugin"]
                seen.steps["told"] = plugin["description"], plugin["minimum"], plugin["maximum"]
            finally:
                await client.close()
    except BlockError as error:
        seen.refused = str(error)
        assert seen.refused.startswith("node 'disk': "), seen.refused
    seen.journal = read_journal(journal)
    return seen


def _parameters(case: Case, journal: Path) -> list[str]:
    return [word.replace("JOURNAL", str(journal)) for word in case.parameters]


@contextlib.asynccontextmanager
async def serving(
    case: Case, scratch: Path, parameters: list[str], options: dict[str, Any]
) -> AsyncIterator[tuple[Service, str]]:
    """A target with the script as the node `disk`, exported as far as it can be written to."""
    drivers.load()
    exports.load()
    node = {
        "driver": "nbdkit-plugin",
        "node-name": "disk",
        "script": str(case.path),
        "config": parameters,
        "export": case.export,
        "python": SYSTEM_PYTHON,
        "read-only": case.read_only,
        "auto-read-only": True,
        "discard": "unmap",
        **options,
    }
    service = Service()
    try:
        await service.add_blockdev(parse_blockdev(node, Notation.JSON))
        server = {"addr": {"type": "unix", "path": str(scratch / "here.sock")}}
        await service.start_nbd_server(parse_nbd_server(server, Notation.JSON))
        writable = not service.graph.get("disk").read_only
        export = {"type": "nbd", "id": "e", "node-name": "disk", "name": "disk", "writable": writable}
        await service.add_export(*parse_export(export, Notation.JSON))
        yield service, str(scratch / "here.sock")
    finally:
        assert not await service.close()


async def look(client: NbdClient, seen: Seen) -> None:
    """Flags, and one request of each kind that they offer; then all content and its status."""
    export = client.export
    seen.steps["size"], seen.steps["flags"] = export.size, sorted(flag.name for flag in export.flags & FLAGS)
    if export.size < 65536:
        await seen.note("all", client.read(0, export.size))
        return
    await _reads(client, seen, "")
    if not export.flags & TransmissionFlag.READ_ONLY:
        await _changes(client, seen)
    if export.flags & TransmissionFlag.SEND_FLUSH:
        await seen.note("flush", client.flush())
    if export.flags & TransmissionFlag.SEND_CACHE:
        await seen.note("cache", client.cache(0, 8192))
    await _reads(client, seen, " afterwards")


async def _reads(client: NbdClient, seen: Seen, when: str) -> None:
    for offset, length in ((0, 512), (0, 65536), (4095, 3)):
        await seen.note(f"read {offset}+{length}{when}", client.read(offset, length))
    await seen.note(f"map{when}", status(client, 0, 65536))
    await seen.note(f"status of one{when}", status(client, 0, 65536, CommandFlag.REQ_ONE))
    await seen.note(f"status of a part{when}", status(client, 6000, 30000))


async def status(client: NbdClient, offset: int, length: int, flags: int = 0) -> list[tuple[int, int]]:
    """The extents of a range, cut at its end and merged: how a server cuts them is its own affair.

    With REQ_ONE the first one only.
    """
    found: list[tuple[int, int]] = []
    end = offset + length
    while offset < end:
        for part, kind in await client.block_status(offset, end - offset, flags):
            part = min(part, end - offset)
            offset += part
            if found and found[-1][1] == kind:
                part += found.pop()[0]
            found.append((part, kind))
        if flags:
            break
    return [extent for extent in found if extent[0]]


async def _changes(client: NbdClient, seen: Seen) -> None:
    flags = client.export.flags
    fua = [CommandFlag(0)] + [CommandFlag.FUA] * bool(flags & TransmissionFlag.SEND_FUA)
    for flag in fua:
        name = "FUA" if flag else "plain"
        await seen.note(f"write {name}", client.write(4096, b"w" * 20000, flag))
        await seen.note(f"write of a part {name}", client.write(40001, b"odd", flag))
        await seen.note(f"zero {name}", client.write_zeroes(8192, 4096, flag))
        await seen.note(f"zero without a hole {name}", client.write_zeroes(9, 3, flag | CommandFlag.NO_HOLE))
        if flags & TransmissionFlag.SEND_FAST_ZERO:
            for more in (CommandFlag.FAST_ZERO, CommandFlag.FAST_ZERO | CommandFlag.NO_HOLE):
                await seen.note(f"zero {name} {more!r}", client.write_zeroes(16384, 4096, flag | more))
        if flags & TransmissionFlag.SEND_TRIM:
            await seen.note(f"trim {name}", client.trim(20480, 8192, flag))
        await seen.note(f"read after {name}", client.read(0, 65536))
