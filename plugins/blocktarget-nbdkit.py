# SPDX-License-Identifier: Apache-2.0
"""nbdkit serves a node of a blocktarget graph: an nbdkit plugin.

    nbdkit python blocktarget-nbdkit.py graph=disk.yaml node=disk [readonly=true]

graph        the configuration file, as `blocktarget serve` takes it
node         the node to serve
readonly     true for a node that cannot be written to
blocktarget  the command that runs the target, with its arguments; `blocktarget` unless given
python       instead of blocktarget: an interpreter that can run the target out of this file's tree

The target runs as a child process, since the Python that nbdkit embeds seldom has the packages that the
target needs. Requests go to it over a unix socket that nobody else can reach, on as many connections as
nbdkit has threads at work. It ends with nbdkit, in whatever way that ends. When it dies every request fails
with EIO.

The servers and exports that the file describes are started too, and its NBD servers offer this node as well,
under the name nbdkit:NODE; a file for this plugin best has none.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import shlex
import shutil
import socket
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from typing import ParamSpec

import nbdkit

API_VERSION = 2

START_SECONDS = 60.0
STOP_SECONDS = 60.0
TREE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # nbdkit takes __file__ away afterwards
RUN_FROM_TREE = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); from target.cli.main import main; sys.exit(main())"
)
P = ParamSpec("P")

parameters: dict[str, str] = {}


def config(key: str, value: str) -> None:
    if key not in ("graph", "node", "readonly", "blocktarget", "python"):
        raise ValueError(f"unknown parameter {key!r}")
    if key in parameters:
        raise ValueError(f"the parameter {key} is given twice")
    parameters[key] = value


def config_complete() -> None:
    """nbdkit changes its directory later: names are made absolute here, and the child comes back here."""
    for key in ("graph", "node"):
        if key not in parameters:
            raise ValueError(f"the parameter {key}= is required")
    if parameters.setdefault("readonly", "false") not in ("true", "false"):
        raise ValueError("readonly=true or readonly=false is expected")
    if "blocktarget" in parameters and "python" in parameters:
        raise ValueError("the parameters blocktarget= and python= exclude each other")
    parameters["graph"] = os.path.abspath(parameters["graph"])
    os.close(os.open(parameters["graph"], os.O_RDONLY))  # says at once that there is no such file
    parameters["directory"] = os.getcwd()
    if shutil.which(command()[0]) is None:
        raise ValueError(f"{command()[0]}: no such command; blocktarget= or python= names one")


def command() -> list[str]:
    """How the target is run."""
    if "python" in parameters:
        return [parameters["python"], "-c", RUN_FROM_TREE, TREE]
    return shlex.split(parameters.get("blocktarget", "blocktarget"))


def export_name() -> str:
    return f"nbdkit:{parameters['node']}"


# ---- the child ----


class Child:
    """The target. It runs until the pipe to its standard input is closed: it does not outlive nbdkit."""

    def __init__(self) -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            self.path = self._listen(listener)
            self.process = self._start(listener.fileno())
        self._wait_ready()

    @staticmethod
    def _listen(listener: socket.socket) -> str:
        """The socket's address. Its name is taken away at once, so that none is left behind."""
        with tempfile.TemporaryDirectory(prefix="blocktarget-nbdkit-") as directory:
            name = os.path.join(directory, "socket")
            listener.bind(name)
            listener.listen(64)
            return f"/proc/self/fd/{os.open(name, os.O_PATH | os.O_CLOEXEC)}"

    @staticmethod
    def _start(listener: int) -> subprocess.Popen[bytes]:
        export = {
            "type": "nbd",
            "id": "nbdkit-plugin",
            "name": export_name(),
            "node-name": parameters["node"],
            "writable": parameters["readonly"] == "false",
        }
        server = f"addr.type=fd,addr.str={listener},max-connections=0"
        words = ["--nbd-server", server, "--export", json.dumps(export), "--run", "exec cat >/dev/null"]
        return subprocess.Popen(
            [*command(), "serve", *words, "--", parameters["graph"]],
            cwd=parameters["directory"],
            stdin=subprocess.PIPE,
            pass_fds=[listener],
            start_new_session=True,  # an interrupt from the terminal is nbdkit's; it then ends the child
        )

    def _wait_ready(self) -> None:
        """The socket answers when the target is ready, and is closed when it ends before."""
        try:
            Connection(self.path).close()
        except OSError as error:
            status = self.stop(kill=isinstance(error, TimeoutError))
            raise RuntimeError(f"the target does not serve ({error}), its status is {status}") from None

    def stop(self, kill: bool = False) -> int:
        """Lets it end in an orderly way. Its status."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            return self.process.wait(0 if kill else STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


child: Child | None = None


def after_fork() -> None:
    global child
    child = Child()


def cleanup() -> None:
    if child is None:
        return
    status = child.stop()
    if status:
        raise RuntimeError(f"the target ended with status {status}")


# ---- an NBD client: one request at a time on each connection (doc/proto.md of the NBD project) ----

NBDMAGIC, IHAVEOPT, OPTION_REPLY_MAGIC = 0x4E42444D41474943, 0x49484156454F5054, 0x3E889045565A9
REQUEST_MAGIC, SIMPLE_REPLY_MAGIC, CHUNK_MAGIC = 0x25609513, 0x67446698, 0x668E33EF
OPT_GO, OPT_STRUCTURED_REPLY, OPT_SET_META_CONTEXT = 7, 8, 10
REP_ACK, REP_INFO, REP_META_CONTEXT, REP_IS_ERROR = 1, 3, 4, 1 << 31
INFO_EXPORT, INFO_BLOCK_SIZE = 0, 3
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
CMD_FUA, CMD_NO_HOLE, CMD_REQ_ONE, CMD_FAST_ZERO = 1, 2, 8, 16
READ_ONLY, SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_WRITE_ZEROES = 1 << 1, 1 << 2, 1 << 3, 1 << 5, 1 << 6
CAN_MULTI_CONN, SEND_CACHE, SEND_FAST_ZERO = 1 << 8, 1 << 10, 1 << 11
CHUNK_DONE, CHUNK_NONE, CHUNK_DATA, CHUNK_HOLE, CHUNK_STATUS, CHUNK_IS_ERROR = 1, 0, 1, 2, 5, 1 << 15
MAX_REPLY = 1 << 20  # bytes of an option reply, an error or a block status that are believed


class Failed(OSError):
    """The target answered with an error. The connection is good."""


class Lost(OSError):
    """The connection is of no use any more: the target has died, or does not keep to the protocol."""

    def __init__(self, why: object) -> None:
        super().__init__(errno.EIO, f"connection to the target: {why}")


class Connection:
    """One connection in transmission."""

    def __init__(self, path: str) -> None:
        self.size = self.flags = 0
        self.blocks = (1, 4096, 32 << 20)  # minimum, preferred, maximum
        self.context = -1
        self.sock = socket.socket(socket.AF_UNIX)
        try:
            self.sock.settimeout(START_SECONDS)
            self.sock.connect(path)
            self._negotiate()
            self.sock.settimeout(None)
        except BaseException:
            self.sock.close()
            raise

    def close(self) -> None:
        with contextlib.suppress(OSError), self.sock:
            self.sock.sendall(struct.pack(">IHHQQI", REQUEST_MAGIC, 0, DISC, 0, 0, 0))

    # handshake

    def _negotiate(self) -> None:
        magic, style, _ = self._take(">QQH")
        if (magic, style) != (NBDMAGIC, IHAVEOPT):
            raise Lost("not an NBD server")
        self.sock.sendall(struct.pack(">I", 3))  # fixed newstyle, no zeroes
        name = export_name().encode()
        named = struct.pack(">I", len(name)) + name
        query = b"base:allocation"
        self._option(OPT_STRUCTURED_REPLY, b"")
        self._option(OPT_SET_META_CONTEXT, named + struct.pack(">II", 1, len(query)) + query)
        self._option(OPT_GO, named + struct.pack(">HH", 1, INFO_BLOCK_SIZE))
        if not self.flags or self.context < 0:
            raise Lost("the server left something out of its handshake")

    def _option(self, option: int, data: bytes) -> None:
        self.sock.sendall(struct.pack(">QII", IHAVEOPT, option, len(data)) + data)
        while True:
            magic, of, kind, length = self._take(">QIII")
            if magic != OPTION_REPLY_MAGIC or of != option or length > MAX_REPLY:
                raise Lost("bad reply to an option")
            payload = self._receive(bytearray(length))
            if kind & REP_IS_ERROR:
                raise Lost(f"option {option} is refused: {payload.decode(errors='replace')}")
            if kind == REP_ACK:
                return
            self._learn(kind, payload)

    def _learn(self, kind: int, payload: bytearray) -> None:
        if kind == REP_META_CONTEXT and len(payload) >= 4:
            self.context = int.from_bytes(payload[:4], "big")
        elif kind == REP_INFO and len(payload) == 12 and payload[1] == INFO_EXPORT:
            self.size, self.flags = struct.unpack(">QH", payload[2:])
        elif kind == REP_INFO and len(payload) == 14 and payload[1] == INFO_BLOCK_SIZE:
            self.blocks = struct.unpack(">III", payload[2:])

    # transmission

    def request(
        self, command: int, flags: int, offset: int, length: int, data: memoryview | None = None
    ) -> memoryview:
        """Sends a request and waits for its answer: what is read goes to data, extents are returned."""
        try:
            self.sock.sendall(struct.pack(">IHHQQI", REQUEST_MAGIC, flags, command, 1, offset, length))
            if command == WRITE and data is not None:
                self.sock.sendall(data)
            return self._answer(offset, data if command == READ else None)
        except (Failed, Lost):
            raise
        except OSError as error:
            raise Lost(error) from None

    def _answer(self, offset: int, data: memoryview | None) -> memoryview:
        """Takes chunks until the last one."""
        error, extents, missing = 0, memoryview(b""), len(data) if data is not None else 0
        while True:
            (magic,) = self._take(">I")
            if magic == SIMPLE_REPLY_MAGIC:
                error, _ = self._take(">IQ")
                break
            flags, kind, cookie, length = self._take(">HHQI")
            if (magic, cookie) != (CHUNK_MAGIC, 1):
                raise Lost("not a reply to the request")
            if kind & CHUNK_IS_ERROR:
                error = int.from_bytes(self._payload(length)[:4], "big") or errno.EIO
            elif kind in (CHUNK_DATA, CHUNK_HOLE) and data is not None:
                missing -= self._content(kind, length, offset, data)
            elif kind == CHUNK_STATUS:
                extents = memoryview(self._payload(length))[4:]
            elif kind != CHUNK_NONE or length:
                raise Lost(f"chunk of type {kind} in a reply")
            if flags & CHUNK_DONE:
                break
        if error:
            raise Failed(error, os.strerror(error))
        if missing:
            raise Lost("a read was not answered in full")
        return extents

    def _content(self, kind: int, length: int, offset: int, data: memoryview) -> int:
        """A part of what is read. The number of its bytes."""
        (start,) = self._take(">Q")
        (size,) = self._take(">I") if kind == CHUNK_HOLE else (length - 8,)
        at = start - offset
        if size <= 0 or at < 0 or at + size > len(data):
            raise Lost("content outside of what was asked for")
        if kind == CHUNK_HOLE:
            data[at : at + size] = bytes(size)
        else:
            self._receive(data[at : at + size])
        return int(size)

    def _payload(self, length: int) -> bytearray:
        if not 4 <= length <= MAX_REPLY:
            raise Lost(f"chunk of {length} bytes")
        return self._receive(bytearray(length))

    def _take(self, form: str) -> tuple[int, ...]:
        return struct.unpack(form, self._receive(bytearray(struct.calcsize(form))))

    def _receive(self, buffer: bytearray | memoryview) -> bytearray:
        rest = memoryview(buffer)
        while rest:
            count = self.sock.recv_into(rest)
            if not count:
                raise Lost("closed by the target")
            rest = rest[count:]
        return buffer if isinstance(buffer, bytearray) else bytearray()


# ---- what nbdkit calls ----


class Handle:
    """A client of nbdkit, with connections of its own: as many as it has requests at a time."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.idle = [Connection(path)]
        self.size, self.flags, self.blocks = self.idle[0].size, self.idle[0].flags, self.idle[0].blocks

    def request(
        self, command: int, flags: int, offset: int, length: int, data: memoryview | None = None
    ) -> memoryview:
        connection = self._connection()
        try:
            answer = connection.request(command, flags, offset, length, data)
        except Lost:
            connection.sock.close()
            raise
        except Failed:
            self.idle.append(connection)
            raise
        self.idle.append(connection)
        return answer

    def _connection(self) -> Connection:
        with contextlib.suppress(IndexError):  # several threads pop
            return self.idle.pop()
        try:
            return Connection(self.path)
        except OSError as error:
            raise Lost(error) from None

    def parts(self, data: memoryview, offset: int) -> Iterator[tuple[int, memoryview]]:
        """A request's data in parts that the target takes at once."""
        step = self.blocks[2]
        for at in range(0, len(data), step):
            yield offset + at, data[at : at + step]


def tells_errno(callback: Callable[P, None]) -> Callable[P, None]:
    """The client gets the target's error; an exception alone would be EIO."""

    @functools.wraps(callback)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            callback(*args, **kwargs)
        except OSError as error:
            nbdkit.set_error(error.errno or errno.EIO)
            raise

    return wrapper


def fua(flags: int) -> int:
    return CMD_FUA if flags & nbdkit.FLAG_FUA else 0


def thread_model() -> int:
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def open(readonly: bool) -> Handle:
    assert child is not None
    return Handle(child.path)


def close(h: Handle) -> None:
    for connection in h.idle:
        connection.close()


def export_description(h: Handle) -> str:
    return f"node {parameters['node']} of {os.path.basename(parameters['graph'])}"


def get_size(h: Handle) -> int:
    return h.size


def block_size(h: Handle) -> tuple[int, int, int]:
    return h.blocks


def can_multi_conn(h: Handle) -> bool:
    return bool(h.flags & CAN_MULTI_CONN)


def can_write(h: Handle) -> bool:
    return not h.flags & READ_ONLY


def can_flush(h: Handle) -> bool:
    return bool(h.flags & SEND_FLUSH)


def can_fua(h: Handle) -> int:
    return int(nbdkit.FUA_NATIVE if h.flags & SEND_FUA else nbdkit.FUA_NONE)


def can_trim(h: Handle) -> bool:
    return bool(h.flags & SEND_TRIM)


def can_zero(h: Handle) -> bool:
    return bool(h.flags & SEND_WRITE_ZEROES)


def can_fast_zero(h: Handle) -> bool:
    return bool(h.flags & SEND_FAST_ZERO)


def can_cache(h: Handle) -> int:
    return int(nbdkit.CACHE_NATIVE if h.flags & SEND_CACHE else nbdkit.CACHE_NONE)


@tells_errno
def pread(h: Handle, buf: memoryview, offset: int, flags: int) -> None:
    for at, part in h.parts(buf, offset):
        h.request(READ, 0, at, len(part), part)


@tells_errno
def pwrite(h: Handle, buf: memoryview, offset: int, flags: int) -> None:
    for at, part in h.parts(buf, offset):
        h.request(WRITE, fua(flags), at, len(part), part)


@tells_errno
def flush(h: Handle, flags: int) -> None:
    h.request(FLUSH, 0, 0, 0)


@tells_errno
def trim(h: Handle, count: int, offset: int, flags: int) -> None:
    h.request(TRIM, fua(flags), offset, count)


@tells_errno
def zero(h: Handle, count: int, offset: int, flags: int) -> None:
    keep = 0 if flags & nbdkit.FLAG_MAY_TRIM else CMD_NO_HOLE
    fast = CMD_FAST_ZERO if flags & nbdkit.FLAG_FAST_ZERO else 0
    h.request(WRITE_ZEROES, fua(flags) | keep | fast, offset, count)


@tells_errno
def cache(h: Handle, count: int, offset: int, flags: int) -> None:
    h.request(CACHE, 0, offset, count)


def extents(h: Handle, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:
    """base:allocation's flags are nbdkit's own."""
    one = CMD_REQ_ONE if flags & nbdkit.FLAG_REQ_ONE else 0
    found: list[tuple[int, int, int]] = []
    for length, kind in struct.iter_unpack(">II", h.request(BLOCK_STATUS, one, offset, count)):
        found.append((offset, length, kind & (nbdkit.EXTENT_HOLE | nbdkit.EXTENT_ZERO)))
        offset += length
    return found
