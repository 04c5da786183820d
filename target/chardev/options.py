# SPDX-License-Identifier: Apache-2.0
"""The options of each backend in QMP's form (ChardevBackend of QEMU's char.json): a type, and data for it."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType

from target.config.options import Options, Unsigned
from target.exports.address_legacy import SocketAddressLegacy

RINGBUF_BYTES = 65536
MAX_CLIENTS = 100


class CommonOptions(Options, kw_only=True):
    """Of every backend. ``logfile`` gets a copy of all that is written to the device."""

    logfile: str | None = None
    logappend: bool = False


class FileOptions(CommonOptions, kw_only=True):
    """``in_``: commands are read from there."""

    out: str
    in_: str | None = msgspec.field(default=None, name="in")
    append: bool = False


class PipeOptions(CommonOptions, kw_only=True):
    """Two FIFOs, ``device``.in and ``device``.out, or one."""

    device: str


class PtyOptions(CommonOptions, kw_only=True):
    """``path``: of a symbolic link to the terminal."""

    path: str | None = None


class StdioOptions(CommonOptions, kw_only=True):
    """``signal`` off: ^C at a terminal is a character."""

    signal: bool = True


class RingbufOptions(CommonOptions, kw_only=True):
    """``size``: a power of two (bytes)."""

    size: int = RINGBUF_BYTES


class SocketOptions(CommonOptions, kw_only=True):
    """``wait``: for the first client. ``reconnect``: seconds after which a client tries again; 0: never.

    ``max_connections`` is this program's own: so many clients are served at once, the others wait.
    """

    addr: SocketAddressLegacy
    server: bool = True
    wait: bool | UnsetType = UNSET
    nodelay: bool = False
    reconnect: Unsigned | UnsetType = UNSET
    reconnect_ms: Unsigned | UnsetType = UNSET
    max_connections: Unsigned = MAX_CLIENTS
    telnet: bool = False
    tn3270: bool = False
    websocket: bool = False
    tls_creds: str | None = None
    tls_authz: str | None = None


class NullBackend(Options, kw_only=True, tag_field="type", tag="null"):
    data: CommonOptions


class FileBackend(Options, kw_only=True, tag_field="type", tag="file"):
    data: FileOptions


class PipeBackend(Options, kw_only=True, tag_field="type", tag="pipe"):
    data: PipeOptions


class PtyBackend(Options, kw_only=True, tag_field="type", tag="pty"):
    data: PtyOptions


class StdioBackend(Options, kw_only=True, tag_field="type", tag="stdio"):
    data: StdioOptions


class RingbufBackend(Options, kw_only=True, tag_field="type", tag="ringbuf"):
    data: RingbufOptions


class MemoryBackend(Options, kw_only=True, tag_field="type", tag="memory"):
    data: RingbufOptions


class SocketBackend(Options, kw_only=True, tag_field="type", tag="socket"):
    data: SocketOptions


ChardevBackend = (
    NullBackend
    | FileBackend
    | PipeBackend
    | PtyBackend
    | StdioBackend
    | RingbufBackend
    | MemoryBackend
    | SocketBackend
)
