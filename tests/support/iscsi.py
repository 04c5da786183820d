# SPDX-License-Identifier: Apache-2.0
"""What the iSCSI tests share: servers as fixtures give them, and random use that QEMU's driver can repeat."""

from __future__ import annotations

import asyncio
import random
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from target.peers.iscsi_target import TARGET as MOCK
from target.peers.iscsi_target import Account, Disk, IscsiTarget
from target.peers.nbd_client import NbdClient
from tests.support.daemon import Daemon, blockdev, blocktarget_argv
from tests.support.tools import Completed, run

MIB = 1 << 20


def mock_options(target: IscsiTarget, lun: int = 1, name: str = MOCK, **more: Any) -> dict[str, Any]:
    """Options of an `iscsi` node on a disk of the mock target; underscores in names stand for dashes."""
    added = {key.replace("_", "-"): value for key, value in more.items()}
    return {
        "driver": "iscsi",
        "transport": "tcp",
        "portal": target.portal,
        "target": name,
        "lun": lun,
        "discard": "unmap",
        **added,
    }


def mock_node(target: IscsiTarget, lun: int = 1, node: str = "disk", **more: Any) -> list[str]:
    return blockdev(node_name=node, **mock_options(target, lun, **more))


def fails(*argv: str, seconds: float = 60) -> str:
    """A target that does not start, with one line that says why; returns the line."""
    done: Completed = run(*blocktarget_argv("daemon", *argv), check=False, timeout=seconds)
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


@contextmanager
def daemon(*argv: str) -> Iterator[Daemon]:
    """A target for a part of a test; it ends cleanly."""
    made = Daemon(*argv)
    try:
        made.wait_ready()
        yield made
        made.stop()
    finally:
        if made.log.exists():
            made.kill()


@asynccontextmanager
async def nbd_clients(address: Path, count: int = 1, name: str = "disk") -> AsyncIterator[list[NbdClient]]:
    connected = [await NbdClient.connect(str(address), name) for _ in range(count)]
    try:
        yield connected
    finally:
        await asyncio.gather(*(client.abort() for client in connected))


class Operations:
    """Random operations as commands of qemu-io, with what the disk then holds.

    Discarded bytes are unspecified: the model knows which, by 512 bytes.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.data = bytearray(size)
        self.random = random.Random(seed)
        self.unknown: set[int] = set()

    def commands(self, count: int) -> list[str]:
        return [self._one() for _ in range(count)]

    def _one(self) -> str:
        length = self.random.choice((512, 1024, 4096, 12_288, 65_536, 300_032, 1_048_576))
        offset = self.random.randrange((len(self.data) - length) // 512 + 1) * 512
        sectors = range(offset // 512, (offset + length) // 512)
        match self.random.randrange(8):
            case 0 | 1 | 2 | 3:
                pattern = self.random.randrange(1, 256)
                self.data[offset : offset + length] = bytes((pattern,)) * length
                self.unknown.difference_update(sectors)
                return f"write -q -P {pattern} {offset} {length}"
            case 4:
                self.data[offset : offset + length] = bytes(length)
                self.unknown.difference_update(sectors)
                return f"write -q -z {offset} {length}"
            case 5:
                self.data[offset : offset + length] = bytes(length)
                self.unknown.difference_update(sectors)
                return f"write -q -z -u {offset} {length}"
            case 6:
                self.unknown.update(sectors)
                return f"discard -q {offset} {length}"
        return "flush"

    def agrees(self, data: bytes) -> None:
        """Asserts that the disk holds what it should."""
        assert len(data) == len(self.data)
        for sector in set(range(len(data) // 512)) - self.unknown:
            at = sector * 512
            assert data[at : at + 512] == self.data[at : at + 512], f"sector {sector} differs"

    def file(self, path: Path, data: bytes) -> Path:
        """The model as an image, with ``data``'s content where it has none of its own."""
        merged = bytearray(self.data)
        for sector in self.unknown:
            merged[sector * 512 : sector * 512 + 512] = data[sector * 512 : sector * 512 + 512]
        path.write_bytes(merged)
        return path


@contextmanager
def fresh(account: Account | None = None, size: int = 8 * MIB) -> Iterator[tuple[IscsiTarget, Disk]]:
    """A mock target with one disk, whose first half has content."""
    with IscsiTarget() as target:
        target.add_target(account=account)
        disk = target.add_disk(size)
        disk.fill(0, random.Random(1).randbytes(size // 2))
        yield target, disk


Case = TypeVar("Case")
AT_ONCE = 10


async def together(cases: Iterable[Case], check: Callable[[Case], Awaitable[None]]) -> None:
    """Runs many checks that mostly wait; fails with all of those that failed."""
    free = asyncio.Semaphore(AT_ONCE)

    async def one(case: Case) -> str:
        async with free:
            try:
                await check(case)
            except Exception:  # noqa: BLE001 - reported below
                return f"---- {case}:\n{traceback.format_exc(limit=-3)}"
        return ""

    failures = [text for text in await asyncio.gather(*map(one, cases)) if text]
    assert not failures, "\n".join([f"{len(failures)} fail", *failures])
