# SPDX-License-Identifier: Apache-2.0
"""Options of the nbd driver, and the URIs that may stand for a part of them.

Source of the URIs: doc/uri.md of the NetworkBlockDevice project; what needs TLS is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated
from urllib.parse import unquote_to_bytes, urlsplit

import msgspec
from msgspec import UNSET, UnsetType

from target.connecting import InetPeer, PeerAddress, UnixPeer
from target.datapath import lib
from target.exports.address import VsockAddress
from target.exports.nbd.protocol import MAX_STRING
from target.graph.errors import BlockError
from target.graph.options import NodeOptions

DEFAULT_PORT = "10809"
HOST_CID = "2"  # VMADDR_CID_HOST
MAX_CONNECTIONS: int = lib.BT_NBDC_MAX_CONNECTIONS
Seconds = Annotated[int, msgspec.Meta(ge=0, le=(1 << 32) - 1)]


class NbdOptions(NodeOptions):
    """QEMU's BlockdevOptionsNbd, and of our own: ``uri`` instead of server and export, ``connections``."""

    server: PeerAddress | UnsetType = UNSET
    export: str | None = None
    uri: str | None = None
    tls_creds: str | None = None
    tls_hostname: str | None = None
    x_dirty_bitmap: str | None = None
    reconnect_delay: Seconds = 0
    open_timeout: Seconds = 0
    connections: Annotated[int, msgspec.Meta(ge=1, le=MAX_CONNECTIONS)] | None = None


@dataclass(frozen=True)
class Place:
    """Which export of which server."""

    server: PeerAddress
    export: str


def place(options: NbdOptions) -> Place:
    """What the options name. BlockError names the option that is wrong or not supported."""
    for option, value in (("tls-creds", options.tls_creds), ("tls-hostname", options.tls_hostname)):
        if value is not None:
            raise BlockError(f"option '{option}' is not supported: TLS is not built")
    if options.x_dirty_bitmap is not None:
        _check_text("x-dirty-bitmap", options.x_dirty_bitmap)
    if options.uri is not None:
        for option, given in (("server", options.server), ("export", options.export)):
            if given is not UNSET and given is not None:
                raise BlockError(f"options 'uri' and '{option}' cannot be used together")
        found = parse_uri(options.uri)
    elif options.server is UNSET:
        raise BlockError("NBD server address missing: option 'server' or 'uri' is needed")
    else:
        found = Place(options.server, options.export or "")
    _check_text("export", found.export)
    return found


def _check_text(option: str, text: str) -> None:
    try:
        length = len(text.encode())
    except UnicodeEncodeError:
        raise BlockError(f"option '{option}': not a text that NBD can carry") from None
    if length > MAX_STRING:
        raise BlockError(f"option '{option}': longer than {MAX_STRING} bytes")
    if "\0" in text:
        raise BlockError(f"option '{option}' contains a null byte")


def parse_uri(uri: str) -> Place:
    """nbd://, nbd+unix:// or nbd+vsock://; BlockError says what is wrong with it."""

    def wrong(why: str) -> BlockError:
        return BlockError(f"option 'uri': '{uri}': {why}")

    try:
        parts = urlsplit(uri)
        port = parts.port
    except ValueError as error:
        raise wrong(str(error)) from None
    scheme = parts.scheme
    if scheme in ("nbds", "nbds+unix", "nbds+vsock", "nbds+tcp"):
        raise wrong(f"scheme '{scheme}' is not supported: TLS is not built")
    if scheme not in ("nbd", "nbd+tcp", "nbd+unix", "nbd+vsock") or "://" not in uri:
        raise wrong("must start with nbd://, nbd+unix:// or nbd+vsock://")
    if parts.fragment or uri.endswith("#"):
        raise wrong("has a fragment; '#' in a name is written %23")
    if "@" in parts.netloc:
        raise wrong("has a user name, which only TLS uses; TLS is not built")
    try:
        export = _decode(parts.path.removeprefix("/"))
        query = _parse_query(parts.query)
        host = _decode(parts.hostname or "")
    except ValueError as error:
        raise wrong(str(error)) from None
    if scheme == "nbd+unix":
        if parts.netloc:
            raise wrong("a host has no meaning with a unix socket")
        path = query.get("socket", "")
        if path in ("", "\0"):
            raise wrong("parameter 'socket' is missing")
        return Place(UnixPeer(path.removeprefix("\0"), abstract=path.startswith("\0")), export)
    if "socket" in query:
        raise wrong("parameter 'socket' belongs to nbd+unix")
    text = DEFAULT_PORT if port is None else str(port)
    if scheme == "nbd+vsock":
        return Place(VsockAddress(host or HOST_CID, text), export)
    return Place(InetPeer(host or "localhost", text), export)


def _parse_query(query: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in query.split("&") if query else ():
        name, _, value = part.partition("=")
        name = _decode(name)
        if name.startswith("tls-"):
            raise ValueError(f"parameter '{name}' is not supported: TLS is not built")
        if name != "socket":
            raise ValueError(f"unknown parameter '{name}'")
        if name in found:
            raise ValueError(f"parameter '{name}' is there twice")
        found[name] = _decode(value)
    return found


def _decode(text: str) -> str:
    """Percent-decoding, in which '+' is an ordinary character. ValueError when it is not one."""
    for part in text.split("%")[1:]:
        if len(part) < 2 or not all(c in "0123456789abcdefABCDEF" for c in part[:2]):
            raise ValueError(f"'%{part[:2]}' is not a percent-encoded byte")
    try:
        return unquote_to_bytes(text).decode()
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8") from None
