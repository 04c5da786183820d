# SPDX-License-Identifier: Apache-2.0
"""Runs a target inside of the guest, with the command line of qemu-storage-daemon, and asks it things."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 120.0


def result(name: str, value: object) -> None:
    """A line that the test outside reads."""
    print(f"RESULT {name} {value}", flush=True)


def say(text: str) -> None:
    """A line of the guest's console, with the time since it was booted."""
    print(f"{time.monotonic():6.1f} {text}", flush=True)


class Target:
    """A running target: "daemon" or "serve" with its arguments. One that ends by itself is an error."""

    def __init__(self, *argv: str) -> None:
        directory = Path(tempfile.mkdtemp())
        self._log = directory / "log"
        pidfile = directory / "pid"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                ["blocktarget", *argv, "--pidfile", str(pidfile)], stdout=log, stderr=log, cwd="/tmp"
            )
        self.wait_until(lambda: pidfile.exists() and bool(pidfile.read_text().strip()), "ready")

    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_until(self, reached: Callable[[], bool], what: str, seconds: float = SECONDS) -> None:
        end = time.monotonic() + seconds
        while not reached():
            if self.process.poll() is not None:
                raise RuntimeError(f"the target ended with {self.process.returncode}: {self.output()}")
            if time.monotonic() > end:
                raise RuntimeError(f"not {what} after {seconds} s: {self.output()}")
            time.sleep(0.05)

    def counters(self) -> dict[str, Any]:
        """All counters now."""
        seen = self._reports()
        self.process.send_signal(signal.SIGUSR1)
        self.wait_until(lambda: len(self._reports()) > len(seen), "counted")
        counters: dict[str, Any] = json.loads(self._reports()[-1])
        return counters

    def _reports(self) -> list[str]:
        return [line for line in self.output().splitlines() if line.startswith('{"') and line.endswith("}")]

    def node(self, name: str = "disk") -> dict[str, Any]:
        node: dict[str, Any] = self.counters()["nodes"][name]
        return node

    def warnings(self) -> str:
        """What it has said, without counters."""
        return "\n".join(line for line in self.output().splitlines() if not line.startswith("{"))

    def kill(self) -> None:
        """Ends it as a crash does."""
        self.process.kill()
        self.process.wait(SECONDS)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(SECONDS)
        if status:
            raise RuntimeError(f"the target ended with {status} after SIGTERM: {self.output()}")


def refusal(*argv: str, user: int | None = None) -> str:
    """What a target says that does not start. It has to end soon, with an error."""
    done = subprocess.run(
        ["blocktarget", "daemon", *argv], capture_output=True, text=True, timeout=SECONDS, user=user
    )
    if done.returncode != 1:
        raise RuntimeError(f"status {done.returncode} instead of an error: {done.stdout}{done.stderr}")
    return " ".join(done.stderr.split())


def vfio_bind(*argv: str, fails: bool = False) -> str:
    """What scripts/vfio-bind says."""
    done = subprocess.run(
        ["sh", "/blocktarget/scripts/vfio-bind", *argv], capture_output=True, text=True, timeout=SECONDS
    )
    if bool(done.returncode) != fails:
        raise RuntimeError(f"vfio-bind {argv} ended with {done.returncode}: {done.stdout}{done.stderr}")
    return " ".join((done.stderr if fails else done.stdout).split())


def run(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=SECONDS).stdout


def pci_address(controller: Path) -> str:
    return Path(os.path.realpath(controller / "device")).name
