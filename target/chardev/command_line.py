# SPDX-License-Identifier: Apache-2.0
"""The options of ``--chardev`` and of the YAML file, which are flat: socket,id=qmp,path=qmp.sock,server=on.

QEMU's names, and its defaults, which differ from QMP's: ``server`` is off, and a server waits for its client.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from msgspec import UNSET, UnsetType

from target.chardev import options
from target.config.options import Notation, OptionError, Options, Size, Unsigned, expected, parse
from target.exports import address_legacy as legacy
from target.objects import IDENTIFIER


class _Common(Options, kw_only=True):
    id: str
    logfile: str | None = None
    logappend: bool = False

    def common(self) -> dict[str, Any]:
        return {"logfile": self.logfile, "logappend": self.logappend}


class NullLine(_Common, kw_only=True):
    def backend(self) -> options.CommonOptions:
        return options.CommonOptions(**self.common())


class FileLine(_Common, kw_only=True):
    path: str
    input_path: str | None = None
    append: bool = False

    def backend(self) -> options.CommonOptions:
        return options.FileOptions(out=self.path, in_=self.input_path, append=self.append, **self.common())


class PipeLine(_Common, kw_only=True):
    path: str

    def backend(self) -> options.CommonOptions:
        return options.PipeOptions(device=self.path, **self.common())


class PtyLine(_Common, kw_only=True):
    path: str | None = None

    def backend(self) -> options.CommonOptions:
        return options.PtyOptions(path=self.path, **self.common())


class StdioLine(_Common, kw_only=True):
    signal: bool = True

    def backend(self) -> options.CommonOptions:
        return options.StdioOptions(signal=self.signal, **self.common())


class RingbufLine(_Common, kw_only=True):
    size: Size = options.RINGBUF_BYTES

    def backend(self) -> options.CommonOptions:
        return options.RingbufOptions(size=self.size, **self.common())


class SocketLine(_Common, kw_only=True):
    """``path``, ``fd`` or ``host`` says where."""

    path: str | None = None
    abstract: bool = False
    tight: bool = True
    host: str | None = None
    port: str | None = None
    to: int | None = None
    ipv4: bool | None = None
    ipv6: bool | None = None
    fd: str | None = None
    server: bool = False
    wait: bool | UnsetType = UNSET
    delay: bool | UnsetType = UNSET
    nodelay: bool | UnsetType = UNSET
    reconnect: Unsigned | UnsetType = UNSET
    reconnect_ms: Unsigned | UnsetType = UNSET
    max_connections: Unsigned = options.MAX_CLIENTS
    telnet: bool = False
    tn3270: bool = False
    websocket: bool = False
    tls_creds: str | None = None
    tls_authz: str | None = None

    def backend(self) -> options.CommonOptions:
        if self.delay is not UNSET and self.nodelay is not UNSET:
            raise OptionError("'delay' and 'nodelay' are mutually exclusive")
        same = ("server", "reconnect", "reconnect_ms", "max_connections")
        refused = ("telnet", "tn3270", "websocket", "tls_creds", "tls_authz")
        return options.SocketOptions(
            addr=self._address(),
            wait=True if self.server and self.wait is UNSET else self.wait,
            nodelay=self.delay is False or self.nodelay is True,
            **{name: getattr(self, name) for name in (*same, *refused)},
            **self.common(),
        )

    def _address(self) -> legacy.SocketAddressLegacy:
        given = [where for where in (self.path, self.fd, self.host) if where is not None]
        if len(given) != 1:
            raise OptionError("One of 'path', 'fd' or 'host' option required.")
        if self.path is not None:
            unix = legacy.UnixSocketAddress(path=self.path, abstract=self.abstract, tight=self.tight)
            return legacy.UnixSocketAddressWrapper(data=unix)
        if self.fd is not None:
            return legacy.FdSocketAddressWrapper(data=legacy.FdSocketAddress(number=self.fd))
        assert self.host is not None
        if self.port is None:
            raise OptionError("chardev: socket: no port given")
        inet = legacy.InetSocketAddress(
            host=self.host, port=self.port, to=self.to, ipv4=self.ipv4, ipv6=self.ipv6
        )
        return legacy.InetSocketAddressWrapper(data=inet)


LINES: dict[str, type[Any]] = {
    "file": FileLine,
    "memory": RingbufLine,
    "null": NullLine,
    "pipe": PipeLine,
    "pty": PtyLine,
    "ringbuf": RingbufLine,
    "socket": SocketLine,
    "stdio": StdioLine,
}


class ChardevRequest(NamedTuple):
    """A device to be made."""

    id: str
    type: str
    options: options.CommonOptions


def parse_chardev(value: Any, notation: Notation = Notation.KEYVAL) -> ChardevRequest:
    """From flat options, with the member ``backend``. OptionError says which is wrong."""
    if not isinstance(value, dict):
        raise expected("chardev", "object")
    rest = dict(value)
    kind = rest.pop("backend", None)
    if "id" not in rest:
        raise OptionError("chardev: no id specified")
    if kind is None:
        raise OptionError(f'chardev: "{rest["id"]}" missing backend')
    if not isinstance(kind, str):
        raise expected("backend", "string")
    if kind not in LINES:
        raise OptionError(f"'{kind}' is not a valid char driver name")
    line = parse(rest, LINES[kind], notation)
    if not IDENTIFIER.match(line.id):
        raise OptionError("Parameter 'id' expects an identifier")
    return ChardevRequest(line.id, kind, line.backend())
