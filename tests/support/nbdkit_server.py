# SPDX-License-Identifier: Apache-2.0
"""Real nbdkit with a Python script, and the same script as a node of this target: what tests compare."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from target.peers.nbd_client import NbdClient
from tests.support.daemon import Daemon, nbd_server_unix, nbd_uri

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ROOT / "plugins"
SYSTEM_PYTHON = "/usr/bin/python3"  # which nbdkit embeds
START_SECONDS = 30
STOP_SECONDS = 30


def environment() -> dict[str, str]:
    """The embedded interpreter has the packages of the python3 on PATH, which shall be the system's."""
    return {**os.environ, "PATH": "/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"}


class Nbdkit:
    """A running nbdkit that serves a Python script on a unix socket."""

    def __init__(
        self, scratch: Path, script: Path, *parameters: str, options: tuple[str, ...] = (), wait: bool = True
    ) -> None:
        self.sock = scratch / "nbdkit.sock"
        self.log = scratch / "nbdkit.log"
        self._pidfile = scratch / "nbdkit.pid"
        self._pidfile.unlink(missing_ok=True)
        self.sock.unlink(missing_ok=True)
        files = ["-f", "-U", str(self.sock), "-P", str(self._pidfile)]
        argv = ["nbdkit", "--exit-with-parent", *files, *options, "python", str(script), *parameters]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment()
            )
        self._late = time.monotonic() + START_SECONDS
        while wait and not self.ready():
            time.sleep(0.01)

    def ready(self) -> bool:
        """Whether it serves. AssertionError when it has ended, or takes too long."""
        status = self.process.poll()
        assert status is None, f"nbdkit ended with {status}: {self.output()}"
        assert time.monotonic() < self._late, f"nbdkit is not ready: {self.output()}"
        return self._pidfile.exists() and bool(self._pidfile.read_text().strip())

    def uri(self, name: str = "") -> str:
        return nbd_uri(self.sock, name)

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def dies(self) -> bool:
        """Whether a signal has ended it, or does so now."""
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(5)
            sock.connect(str(self.sock))
            if sock.recv(1):
                return False  # it greets the next client
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(2) < 0
        return False  # it hangs up, and goes on

    def stop(self) -> None:
        """Asks it to end, and asserts that it did so cleanly."""
        if self.process.returncode is not None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(STOP_SECONDS)
        finally:
            self.kill()
        assert status == 0, f"nbdkit ended with {status}: {self.output()}"

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


class Hosted:
    """A target with the script as the node `disk`, exported under its name."""

    def __init__(
        self, scratch: Path, script: Path, *parameters: str, read_only: bool = False, **options: object
    ) -> None:
        self.sock = scratch / "target.sock"
        argv = hosted_argv(self.sock, script, *parameters, read_only=read_only, **options)
        self.daemon = Daemon(*argv)
        try:
            self.daemon.wait_ready()
        except AssertionError:
            self.daemon.kill()
            raise

    def uri(self, name: str = "disk") -> str:
        return nbd_uri(self.sock, name)

    def output(self) -> str:
        return self.daemon.output()

    def stop(self) -> None:
        self.daemon.stop()

    def kill(self) -> None:
        self.daemon.kill()


def hosted_argv(
    sock: Path, script: Path, *parameters: str, read_only: bool = False, **options: object
) -> list[str]:
    """Command line of a target; a later parameter of the same key is an error of the test."""
    config = dict(parameter.split("=", 1) for parameter in parameters)
    assert len(config) == len(parameters), parameters
    node: dict[str, object] = {
        "driver": "nbdkit-plugin",
        "node-name": "disk",
        "discard": "unmap",
        "script": str(script),
        "config": config,
        "python": SYSTEM_PYTHON,
        "read-only": read_only,
        **{name.replace("_", "-"): value for name, value in options.items()},
    }
    export = {"type": "nbd", "id": "e", "node-name": "disk", "name": "disk", "writable": not read_only}
    return ["--blockdev", json.dumps(node), *nbd_server_unix(sock), "--export", json.dumps(export)]


Server = Nbdkit | Hosted


def serve(kind: str, scratch: Path, script: Path, *parameters: str) -> Server:
    """`nbdkit` or `target`."""
    if kind == "nbdkit":
        return Nbdkit(scratch, script, *parameters)
    return Hosted(scratch, script, *parameters)


def refusal(kind: str, scratch: Path, script: Path, *parameters: str) -> str:
    """What the server says that does not start; an assertion error when it does."""
    try:
        server = serve(kind, scratch, script, *parameters)
    except AssertionError as error:
        return str(error)
    server.kill()
    raise AssertionError(f"{kind} takes {parameters}")


@asynccontextmanager
async def clients(*addresses: Path, name: str = "disk") -> AsyncIterator[list[NbdClient]]:
    """A client of each server; nbdkit takes every name. What is in flight at the end is given up."""
    async with AsyncExitStack() as stack:
        connected = []
        for address in addresses:
            connected.append(await NbdClient.connect(str(address), name))
            stack.push_async_callback(connected[-1].abort)
        yield connected
