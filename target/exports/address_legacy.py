# SPDX-License-Identifier: Apache-2.0
"""QMP's older form of socket addresses, SocketAddressLegacy: a type, and the rest inside ``data``."""

from __future__ import annotations

import msgspec

from target.config.options import Options
from target.exports.address import FdAddress, InetAddress, UnixAddress


class InetSocketAddress(Options, kw_only=True):
    host: str
    port: str
    numeric: bool = False
    to: int | None = None
    ipv4: bool | None = None
    ipv6: bool | None = None
    keep_alive: bool = False


class UnixSocketAddress(Options, kw_only=True):
    path: str
    abstract: bool = False
    tight: bool = True


class VsockSocketAddress(Options, kw_only=True):
    cid: str
    port: str


class FdSocketAddress(Options, kw_only=True):
    number: str = msgspec.field(name="str")  # or a name, of getfd


class InetSocketAddressWrapper(Options, kw_only=True, tag_field="type", tag="inet"):
    data: InetSocketAddress


class UnixSocketAddressWrapper(Options, kw_only=True, tag_field="type", tag="unix"):
    data: UnixSocketAddress


class VsockSocketAddressWrapper(Options, kw_only=True, tag_field="type", tag="vsock"):
    data: VsockSocketAddress


class FdSocketAddressWrapper(Options, kw_only=True, tag_field="type", tag="fd"):
    data: FdSocketAddress


ServerAddressLegacy = UnixSocketAddressWrapper | InetSocketAddressWrapper | FdSocketAddressWrapper
SocketAddressLegacy = ServerAddressLegacy | VsockSocketAddressWrapper


def plain(given: ServerAddressLegacy) -> UnixAddress | InetAddress | FdAddress:
    """The same address in the newer form."""
    match given:
        case UnixSocketAddressWrapper(data=unix):
            return UnixAddress(unix.path, unix.abstract, unix.tight)
        case InetSocketAddressWrapper(data=inet):
            return InetAddress(
                inet.host, inet.port, inet.numeric, inet.to, inet.ipv4, inet.ipv6, inet.keep_alive
            )
        case FdSocketAddressWrapper(data=fd):
            return FdAddress(fd.number)
