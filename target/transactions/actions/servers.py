# SPDX-License-Identifier: Apache-2.0
"""Actions on NBD servers, which here there may be several of."""

from __future__ import annotations

from target.declarative.state import address, encode
from target.exports.address import FdAddress, InetAddress, UnixAddress
from target.exports.nbd.server import NbdServerOptions
from target.graph.errors import BlockError
from target.qmp.registry import Arguments
from target.transactions.action import Action


class NbdServerStart(Action, type="x-nbd-server-start"):
    """One more listener."""

    Data = NbdServerOptions
    data: NbdServerOptions

    async def prepare(self) -> None:
        server = await self.service.start_nbd_server(self.data)
        self.change.undo(lambda: self.service.drop_nbd_server(server))


class NbdServerStop(Action, type="x-nbd-server-stop"):
    """Ends the listener at an address when all has succeeded; its clients are cut off."""

    class Data(Arguments):
        addr: UnixAddress | InetAddress | FdAddress

    data: Data

    async def prepare(self) -> None:
        wanted = address(encode(self.data))
        servers = self.service.nbd_servers
        found = [server.id for server in servers if address(encode(server.options)) == wanted]
        if not found:
            raise BlockError("NBD server not running")
        await self.service.stop_nbd_server_in(self.change, found[0])
