# SPDX-License-Identifier: Apache-2.0
"""How this target and its peers are started on an image. All of them get the same node and export options.

qemu-storage-daemon serves vhost-user-blk in an iothread, as this target does. Its NBD export stays in the
main loop: version 7.2 aborts when a client leaves an NBD export that is in an iothread.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench.rows import GIB, NBDKIT, QEMU_NBD, QSD, TARGET, Image, Transport
from tests.support.daemon import blocktarget_argv

START_SECONDS, STOP_SECONDS, SETTLE_SECONDS = 30, 30, 0.1
NEVER_REACHED = "throttle-group,id=g,limits.iops-total=100000000,limits.bps-total=1000000000000"


class BenchError(Exception):
    """A server or client that did not do its part; says which and why."""


@dataclass(frozen=True)
class Server:
    pid: int
    socket: Path


@dataclass
class Backends:
    """Starts servers. ``sockets``: a directory with a short name; ``target``: this target's command line."""

    sockets: Path
    target: list[str] = field(default_factory=lambda: blocktarget_argv("daemon"))

    @contextmanager
    def running(
        self, backend: str, transport: Transport, image: Image, path: Path | None
    ) -> Iterator[Server]:
        """A server that is ready, and ended afterwards."""
        if image == "remote":
            with (
                self.running(backend, transport, "raw", path) as lower,
                self._process(backend, transport, image, lower.socket) as server,
            ):
                yield server
        else:
            with self._process(backend, transport, image, path) as server:
                yield server

    @contextmanager
    def _process(
        self, backend: str, transport: Transport, image: Image, path: Path | None
    ) -> Iterator[Server]:
        """``path``: the image, or the socket of the server below."""
        with tempfile.TemporaryDirectory(dir=self.sockets, prefix="s") as scratch:
            socket, pidfile = Path(scratch) / "socket", Path(scratch) / "pid"
            argv = self._argv(backend, transport, image, path, socket, pidfile)
            with tempfile.TemporaryFile("w+") as log:
                process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
                try:
                    if not _ready(process, pidfile):
                        log.seek(0)
                        raise BenchError(f"{backend} does not start: {log.read()[-300:].strip()}")
                    yield Server(process.pid, socket)
                finally:
                    _stop(process)

    def _argv(
        self, backend: str, transport: Transport, image: Image, path: Path | None, socket: Path, pidfile: Path
    ) -> list[str]:
        if backend == NBDKIT:
            return ["nbdkit", "-f", "-P", str(pidfile), "-U", str(socket), "file", str(path)]
        if backend == QEMU_NBD:
            format = "qcow2" if image in ("qcow2", "empty") else "raw"
            where = ["--persistent", "--socket", str(socket), "--pid-file", str(pidfile)]
            return ["qemu-nbd", *where, "--format", format, str(path)]
        program = {TARGET: self.target, QSD: ["qemu-storage-daemon"]}[backend]
        export = _nbd_export(socket, backend == TARGET) if transport == "nbd" else _vhost_export(socket)
        objects = ["--object", "iothread,id=t0", "--object", NEVER_REACHED]
        node = ["--blockdev", json.dumps(_node(image, path))]
        return [*program, "--pidfile", str(pidfile), *objects, *node, *export]


def _node(image: Image, path: Path | None) -> dict[str, object]:
    if image == "null":
        return {"driver": "null-co", "node-name": "disk", "size": GIB}
    if image == "remote":
        return {"driver": "nbd", "node-name": "disk", "server": {"type": "unix", "path": str(path)}}
    if image == "throttled":
        below = _node("raw", path) | {"node-name": "below"}
        return {"driver": "throttle", "node-name": "disk", "throttle-group": "g", "file": below}
    if image == "populated":
        return {
            "driver": "copy-on-read",
            "node-name": "disk",
            "file": _node("qcow2", path) | {"node-name": "below"},
        }
    format = "qcow2" if image in ("qcow2", "empty") else "raw"
    file = {"driver": "file", "filename": str(path), "aio": "io_uring"}
    direct = {"cache": {"direct": True}} if image == "direct" else {}
    return {"driver": format, "node-name": "disk", "file": file | direct, **direct}


def _vhost_export(socket: Path) -> list[str]:
    options = "type=vhost-user-blk,id=v0,node-name=disk,num-queues=1,writable=on,iothread=t0"
    return ["--export", f"{options},addr.type=unix,addr.path={socket}"]


def _nbd_export(socket: Path, iothread: bool) -> list[str]:
    server = ["--nbd-server", f"addr.type=unix,addr.path={socket}"]
    thread = ",iothread=t0" if iothread else ""
    return [*server, "--export", f"type=nbd,id=n0,node-name=disk,name=,writable=on{thread}"]


def _ready(process: subprocess.Popen[bytes], pidfile: Path) -> bool:
    """Waits for the pidfile, which all of these programs write when they have begun to listen."""
    end = time.monotonic() + START_SECONDS
    while not (pidfile.exists() and pidfile.read_text().strip()):
        if process.poll() is not None or time.monotonic() > end:
            return False
        time.sleep(0.01)
    time.sleep(SETTLE_SECONDS)
    return True


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
