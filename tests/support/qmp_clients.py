# SPDX-License-Identifier: Apache-2.0
"""NBD clients that hold exports of both programs open, and do the same to both."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from target.peers.nbd_client import NbdClient
from tests.support.qmp_pair import Pair

ANSWER_SECONDS = 20.0


@dataclass
class Client:
    """A client of the export with that id on each program. ``size``: bytes, at the time it came."""

    id: str
    peer: NbdClient
    ours: NbdClient
    size: int


class Clients:
    """Those of one pair of programs."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.attached: list[Client] = []
        self._runner = asyncio.Runner()

    def connect(self, id: str, name: str) -> None:
        paths = [program.directory / "nbd" for program in (self.pair.peer, self.pair.ours)]
        peer, ours = (self._run(NbdClient.connect(str(path), name)) for path in paths)
        assert peer.export.size == ours.export.size, (id, peer.export, ours.export)
        self.attached.append(Client(id, peer, ours, peer.export.size))

    def disconnect(self, client: Client) -> None:
        self.attached.remove(client)
        for each in (client.peer, client.ours):
            self._run(each.close())

    def do(self, client: Client, work: Callable[[NbdClient], Awaitable[Any]]) -> list[Any]:
        """The results, or the errors' numbers: of the peer, of ours."""
        return [self._run(_result(work(each))) for each in (client.peer, client.ours)]

    def cut(self, id: str) -> None:
        """The export is gone: its clients are cut off by both programs."""
        for client in [client for client in self.attached if client.id == id]:
            self.attached.remove(client)
            for each in (client.peer, client.ours):
                self._run(_cut(each))

    def close(self) -> None:
        for client in self.attached:
            for each in (client.peer, client.ours):
                self._runner.run(each.abort())
        self._runner.close()

    def _run(self, work: Awaitable[Any]) -> Any:
        return self._runner.run(asyncio.wait_for(work, ANSWER_SECONDS))


async def _result(work: Awaitable[Any]) -> Any:
    try:
        return await work
    except OSError as error:
        return error.errno


async def _cut(client: NbdClient) -> None:
    try:
        await client.flush()
    except (EOFError, ConnectionError):
        await client.abort()
    else:
        raise AssertionError("a client is attached to an export that is gone")
