# SPDX-License-Identifier: Apache-2.0
"""Real targets, started and killed by the hundred: each is forked from a prepared process (nursery.py)."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from target.peers.nbd_client import NbdClient

_ROOT = Path(__file__).resolve().parents[2]
_SECONDS = 30


class Nursery:
    """The process that targets are forked from."""

    def __init__(self) -> None:
        argv = [sys.executable, "-m", "tests.crash.nursery"]
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # no thread before the fork
        self.process = subprocess.Popen(
            argv, cwd=_ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, *request: Any) -> int:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


class Target:
    """One target over NBD on a unix socket; a context manager that leaves nothing running.

    ``grants``: clusters in the grant pool at most. The nodes' options are as for --blockdev; the one named
    `disk` is exported.
    """

    def __init__(self, nursery: Nursery, *nodes: dict[str, Any], grants: int | None = None) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="bt-")
        self.root = Path(self._directory.name)
        self.socket = str(self.root / "s")
        self.nursery = nursery
        argv = ["daemon", "--object", "iothread,id=t1", "--object", "iothread,id=t2"]
        for node in nodes:
            argv += ["--blockdev", json.dumps(node)]
        argv += ["--nbd-server", f"addr.type=unix,addr.path={self.socket}"]
        for node in nodes:
            export = {
                "type": "nbd",
                "id": node["node-name"],
                "node-name": node["node-name"],
                "writable": True,
            }
            argv += ["--export", json.dumps(export | {"iothread": ["t1", "t2"]})]
        argv += ["--pidfile", str(self.root / "pid")]
        self.pid = nursery.ask("start", str(self.root / "log"), {"grants": grants}, *argv)
        self.fd = os.pidfd_open(self.pid)
        self.status: int | None = None

    def __enter__(self) -> Target:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
        os.close(self.fd)
        self._directory.cleanup()

    def output(self) -> str:
        return (self.root / "log").read_text()

    def _signal(self, number: int) -> None:
        if self.status is None:
            signal.pidfd_send_signal(self.fd, number)

    def _wait(self) -> int:
        if self.status is None:
            self.status = self.nursery.ask("wait", self.pid)
        return self.status

    async def ready(self) -> bool:
        """False when it could not start, and has ended by itself."""
        end = time.monotonic() + _SECONDS
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(self.fd, ended.set)
        try:
            while not (self.root / "pid").exists():
                if ended.is_set():
                    self._wait()
                    return False
                assert time.monotonic() < end, self.output()
                await asyncio.sleep(0.003)
        finally:
            loop.remove_reader(self.fd)
        return True

    async def connect(self, name: str = "disk") -> NbdClient:
        return await NbdClient.connect(self.socket, name)

    def counters(self) -> dict[str, Any]:
        """The counters of all nodes."""
        before = self.output().count("\n")
        self._signal(signal.SIGUSR1)
        end = time.monotonic() + _SECONDS
        while self.output().count("\n") == before:
            assert time.monotonic() < end
            time.sleep(0.002)
        nodes: dict[str, Any] = json.loads(self.output().splitlines()[-1])["nodes"]
        return nodes

    def kill(self) -> None:
        """As a crash does."""
        self._signal(signal.SIGKILL)
        self._wait()

    async def stop(self) -> int:
        """Asks it to end; its exit status. A signal that ended it is an error."""
        self._signal(signal.SIGTERM)
        status = await asyncio.wait_for(asyncio.to_thread(self._wait), _SECONDS)
        assert status >= 0, f"signal {-status}: {self.output()}"
        return status
