# SPDX-License-Identifier: Apache-2.0
"""Starts a target with the command line of qemu-storage-daemon, and ends it.

BLOCKTARGET_TEST_DAEMON names another program with that command line, for a control run:
    BLOCKTARGET_TEST_DAEMON=qemu-storage-daemon scripts/test tests/guest
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

START_SECONDS = 30
STOP_SECONDS = 30
_ROOT = str(Path(__file__).resolve().parents[2])
# A sanitizer's runtime has to be in this process and in the target, but not in qemu-img and the like.
_PRELOAD = os.environ.pop("LD_PRELOAD", "")
_REPORTS = ("runtime error:", "Sanitizer")
_MAIN = f"import sys; sys.path.insert(0, {_ROOT!r}); from target.cli.main import main; sys.exit(main())"


def blocktarget_argv(*argv: str | os.PathLike[str]) -> list[str]:
    """The console command, or its entry point where the package is used without being installed."""
    command = Path(sys.executable).with_name("blocktarget")
    prefix = [str(command)] if command.exists() else [sys.executable, "-c", _MAIN]
    if _PRELOAD:
        prefix = ["env", f"LD_PRELOAD={_PRELOAD}", *prefix]
    return [*prefix, *(os.fspath(word) for word in argv)]


def daemon_argv() -> list[str]:
    other = shlex.split(os.environ.get("BLOCKTARGET_TEST_DAEMON", ""))
    return other or blocktarget_argv("daemon")


def blockdev(**options: object) -> list[str]:
    """--blockdev with JSON; underscores in names stand for dashes."""
    return ["--blockdev", json.dumps({name.replace("_", "-"): value for name, value in options.items()})]


def image_node(path: Path, format: str, **options: object) -> list[str]:
    """--blockdev for the node `disk`: a format over a file, which may discard."""
    file = {"driver": "file", "filename": str(path), "discard": "unmap"}
    return blockdev(driver=format, node_name="disk", discard="unmap", file=file, **options)


def nbd_server_unix(path: Path) -> list[str]:
    return ["--nbd-server", f"addr.type=unix,addr.path={path}"]


def nbd_server_tcp(port: int) -> list[str]:
    return ["--nbd-server", f"addr.type=inet,addr.host=127.0.0.1,addr.port={port}"]


def nbd_export(*, node: str = "disk", name: str = "disk", writable: bool = True) -> list[str]:
    switch = "on" if writable else "off"
    return ["--export", f"type=nbd,id=nbd-{name},node-name={node},name={name},writable={switch}"]


def vhost_user_export(path: Path, *, node: str = "disk", queues: int = 1, writable: bool = True) -> list[str]:
    switch = "on" if writable else "off"
    where = f"addr.type=unix,addr.path={path}"
    options = f"id=vhost,node-name={node},writable={switch},num-queues={queues}"
    return ["--export", f"type=vhost-user-blk,{options},{where}"]


def nbd_uri(path: Path, name: str = "disk") -> str:
    return f"nbd+unix:///{name}?socket={path}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Daemon:
    """A running target. Ready when its pidfile is written, as it promises."""

    def __init__(self, *argv: str) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="bt-daemon-")
        self.log = Path(self._directory.name) / "log"
        self._pidfile = Path(self._directory.name) / "pid"
        self.argv = [*daemon_argv(), *argv, "--pidfile", str(self._pidfile)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )

    def wait_ready(self) -> Daemon:
        end = time.monotonic() + START_SECONDS
        while not (self._pidfile.exists() and self._pidfile.read_text().strip()):
            status = self.process.poll()
            assert status is None, f"the target ended with {status}: {self.output()}"
            assert time.monotonic() < end, f"the target is not ready after {START_SECONDS} s: {self.output()}"
            time.sleep(0.02)
        return self

    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def state(self) -> str:
        """What it has printed, with its counters now if it still runs."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGUSR1)
            time.sleep(0.5)
        return f"target {self.process.pid}, status {self.process.poll()}: {self.output()}"

    def stop(self) -> None:
        """Asks it to end, and asserts that it did so cleanly. Does nothing when it has ended before."""
        if not self.log.exists():
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(STOP_SECONDS)
        finally:
            output = self.kill()
        assert status == 0, f"the target ended with {status} after SIGTERM: {output}"

    def kill(self) -> str:
        """Ends it at once, as a crash does, and returns what it had printed, which no sanitizer has."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        output = self.output()
        self._directory.cleanup()
        assert not any(report in output for report in _REPORTS), output
        return output
