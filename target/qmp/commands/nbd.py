# SPDX-License-Identifier: Apache-2.0
"""The NBD server that clients of a monitor start and stop, and QEMU's older way to add NBD exports."""

from __future__ import annotations

from typing import Literal

from target.config.options import Unsigned
from target.exports.address_legacy import ServerAddressLegacy, plain
from target.exports.nbd.export import NbdExport, NbdOptions
from target.exports.nbd.server import HANDSHAKE_SECONDS, MAX_CONNECTIONS, NbdServerOptions
from target.graph.errors import BlockError
from target.qmp.registry import Arguments, Context, command


class NbdServerStart(Arguments):
    """QAPI's NbdServerOptionsLegacy: as --nbd-server, with the address in the form of older commands."""

    addr: ServerAddressLegacy
    handshake_max_seconds: Unsigned = HANDSHAKE_SECONDS
    tls_creds: str | None = None
    tls_authz: str | None = None
    max_connections: Unsigned = MAX_CONNECTIONS


@command("nbd-server-start", NbdServerStart)
async def nbd_server_start(context: Context, given: NbdServerStart) -> None:
    options = NbdServerOptions(
        addr=plain(given.addr),
        tls_creds=given.tls_creds,
        tls_authz=given.tls_authz,
        max_connections=given.max_connections,
        handshake_max_seconds=given.handshake_max_seconds,
    )
    await context.service.start_nbd_server(options, "")


@command("nbd-server-stop")
async def nbd_server_stop(context: Context, given: None) -> None:
    """Cuts its clients off. With the last server all NBD exports go, too."""
    await context.service.stop_nbd_server("")


class NbdServerAdd(Arguments):
    """QAPI's NbdServerAddOptions. ``name`` is the export's id, too."""

    device: str
    name: str | None = None
    description: str = ""
    writable: bool = False
    bitmap: str | None = None


@command("nbd-server-add", NbdServerAdd, features=("deprecated",))
async def nbd_server_add(context: Context, given: NbdServerAdd) -> None:
    """Offers a node under a name. Unlike block-export-add it makes what cannot be written read-only."""
    service = context.service
    node = service.graph.lookup(given.device, given.device)
    name = given.device if given.name is None else given.name
    options = NbdOptions(
        id=name,
        node_name=node.name,
        writable=given.writable and not node.read_only,
        name=name,
        description=given.description,
        bitmaps=None if given.bitmap is None else [given.bitmap],
    )
    async with service.graph.change() as change:
        await service.add_export_in(change, NbdExport, options)


class NbdServerRemove(Arguments):
    name: str
    mode: Literal["safe", "hard"] = "safe"


@command("nbd-server-remove", NbdServerRemove, features=("deprecated",))
async def nbd_server_remove(context: Context, given: NbdServerRemove) -> None:
    export = context.service.exports.get(given.name)
    if export is not None and not isinstance(export, NbdExport):
        raise BlockError(f"Block export '{given.name}' is not an NBD export")
    await context.service.remove_export(given.name, given.mode)
