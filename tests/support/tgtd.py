# SPDX-License-Identifier: Apache-2.0
"""Runs tgtd, a userspace iSCSI target, on a free port of loopback; it can go away and come back as it was.

It ignores SIGTERM, so it is killed; what it was told to serve is told again when it starts the next time.
Its LUN 0 is a controller: disks have numbers from 1 on.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from tests.support.daemon import blockdev, free_port
from tests.support.tools import Argument, run

START_SECONDS = 20
TARGET = "iqn.2026-11.org.example:disk"


class Account(NamedTuple):
    """A CHAP name and its password."""

    user: str
    password: str


class Tgtd:
    """One running target program. ``directory`` holds its control socket and its log."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self._environment = {**os.environ, "TGT_IPC_SOCKET": str(directory / "tgtd-ipc")}
        self._configuration: list[list[Argument]] = []
        self._targets: dict[str, int] = {}

    # ---- the process ----

    def start(self) -> Self:
        """Starts it, with the targets it had. It listens a moment before the targets are there."""
        argv = ["tgtd", "-f", "--iscsi", f"portal={self.portal}"]
        with (self.directory / "tgtd.log").open("ab") as log:
            self.process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment
            )
        self._wait_ready()
        for words in self._configuration:
            self._tgtadm(*words)
        return self

    def stop(self) -> None:
        """Kills it; connections to it break, and its port is closed."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def restart(self, seconds: float = 0) -> None:
        """Kills it and starts it again that much later."""
        self.stop()
        time.sleep(seconds)
        self.start()

    def freeze(self) -> None:
        """It keeps its connections and answers nothing, until `thaw`."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _wait_ready(self) -> None:
        assert self.process is not None
        end = time.monotonic() + START_SECONDS
        while not self._answers():
            assert self.process.poll() is None, f"tgtd ended with {self.process.returncode}: {self.log()}"
            assert time.monotonic() < end, f"tgtd is not ready after {START_SECONDS} s: {self.log()}"
            time.sleep(0.02)

    def _answers(self) -> bool:
        with socket.socket() as probe:
            listening = probe.connect_ex(("127.0.0.1", self.port)) == 0
        return listening and self._call("--op", "show", "--mode", "sys").returncode == 0

    def log(self) -> str:
        return (self.directory / "tgtd.log").read_text(errors="replace")

    # ---- what it serves ----

    def add_target(
        self, name: str = TARGET, *, user: Account | None = None, outgoing: Account | None = None
    ) -> str:
        """A target for every initiator; with ``user`` for those that know the password (CHAP), to whom the
        target proves itself with ``outgoing`` (mutual CHAP)."""
        number = self._targets[name] = len(self._targets) + 1
        tid: list[Argument] = ["--tid", str(number)]
        self._configure("--op", "new", "--mode", "target", *tid, "-T", name)
        for account, words in ((user, []), (outgoing, ["--outgoing"])):
            if account is None:
                continue
            name_of: list[Argument] = ["--mode", "account", "--user", account.user]
            self._configure("--op", "new", *name_of, "--password", account.password)
            self._configure("--op", "bind", *name_of, *tid, *words)
        self._configure("--op", "bind", "--mode", "target", *tid, "-I", "ALL")
        return name

    def set(self, name: str, value: str, *, target: str = TARGET) -> None:
        """A key of the login, as the target is to negotiate it."""
        tid: list[Argument] = ["--tid", str(self._targets[target])]
        self._configure("--op", "update", "--mode", "target", *tid, "--name", name, "--value", value)

    def add_lun(
        self,
        path: Path,
        *,
        target: str = TARGET,
        lun: int = 1,
        block_size: int = 512,
        thin: bool = True,
        read_only: bool = False,
    ) -> Path:
        """A disk stored in a file. ``thin``: it takes UNMAP and tells what is mapped."""
        of: list[Argument] = ["--mode", "logicalunit", "--tid", str(self._targets[target]), "--lun", str(lun)]
        self._configure("--op", "new", *of, "-b", path, "--blocksize", str(block_size))
        params = f"thin_provisioning={int(thin)},readonly={int(read_only)}"
        self._configure("--op", "update", *of, "--params", params)
        return path

    def remove_lun(self, *, target: str = TARGET, lun: int = 1) -> None:
        """Takes it away under its users. It stays away after a restart."""
        words = ["--mode", "logicalunit", "--tid", str(self._targets[target]), "--lun", str(lun)]
        self._tgtadm("--op", "delete", *words)
        self._configuration = [had for had in self._configuration if had[2 : 2 + len(words)] != words]

    def _configure(self, *words: Argument) -> None:
        self._tgtadm(*words)
        self._configuration.append(list(words))

    def _tgtadm(self, *words: Argument) -> None:
        done = self._call(*words)
        assert done.returncode == 0, f"tgtadm {words} failed: {done.stdout}{done.stderr}{self.log()}"

    def _call(self, *words: Argument) -> subprocess.CompletedProcess[str]:
        argv = [os.fspath(word) for word in ("tgtadm", "--lld", "iscsi", *words)]
        return subprocess.run(argv, capture_output=True, text=True, timeout=20, env=self._environment)

    # ---- how to reach it ----

    @property
    def portal(self) -> str:
        return f"127.0.0.1:{self.port}"

    def options(self, *, target: str = TARGET, lun: int = 1, **more: Any) -> dict[str, Any]:
        """Options of an `iscsi` node (QEMU's and ours); underscores in names stand for dashes."""
        added = {name.replace("_", "-"): value for name, value in more.items()}
        return {
            "driver": "iscsi",
            "transport": "tcp",
            "portal": self.portal,
            "target": target,
            "lun": lun,
            **added,
        }

    def node(self, name: str = "disk", **options: Any) -> list[str]:
        """--blockdev for an iscsi node that may discard."""
        return blockdev(node_name=name, **{"discard": "unmap", **self.options(**options)})

    def url(self, *, target: str = TARGET, lun: int = 1, account: Account | None = None) -> str:
        """As libiscsi's tools and qemu-img take it."""
        login = f"{account.user}%{account.password}@" if account else ""
        return f"iscsi://{login}{self.portal}/{target}/{lun}"


def make_disk(path: Path, size: int) -> Path:
    """A sparse file."""
    with path.open("wb") as handle:
        handle.truncate(size)
    return path


def capacity(url: str) -> int:
    """Bytes, as libiscsi's tool reads it."""
    return int(run("iscsi-readcapacity16", "-s", url).stdout.split()[-1])
