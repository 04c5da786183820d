# SPDX-License-Identifier: Apache-2.0
"""NBD servers beneath the nbd driver, each a process that can be killed; QEMU's own driver in our place."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from target.graph.errors import BlockError
from target.graph.graph import Graph
from target.graph.node import Node
from target.peers.nbd_script import Armed, ServerOptions
from target.peers.nbd_server import NbdServer, ServerThread
from tests.support.daemon import blocktarget_argv, image_node, nbd_export, nbd_server_unix

START_SECONDS = 30
REFUSED_SECONDS = 20
SERVERS = ("qemu-nbd", "nbdkit", "blocktarget")


def server_argv(kind: str, image: Path, socket: Path, pidfile: Path, *more: str) -> list[str]:
    """Serves the raw image as "disk"."""
    if kind == "qemu-nbd":
        where = ["--socket", str(socket), "--pid-file", str(pidfile), "--export-name", "disk"]
        share = ["--persistent", "--shared=16", "--discard=unmap", "--format=raw"]
        return ["qemu-nbd", *where, *share, *more, str(image)]
    if kind == "nbdkit":
        return ["nbdkit", "-f", "-P", str(pidfile), "-U", str(socket), *more, "file", str(image)]
    daemon = blocktarget_argv("daemon", *image_node(image, "raw"), *nbd_server_unix(socket), *nbd_export())
    return [*daemon, "--pidfile", str(pidfile), *more]


class Process:
    """A server in the foreground that writes a pidfile when it is ready."""

    def __init__(self, argv: list[str], pidfile: Path) -> None:
        self.argv = argv
        self.pidfile = pidfile
        self.log = pidfile.with_suffix(".log")
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        self.pidfile.unlink(missing_ok=True)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(self.argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        end = time.monotonic() + START_SECONDS
        while not (self.pidfile.exists() and self.pidfile.read_text().strip()):
            assert self.process.poll() is None and time.monotonic() < end, f"{self.argv}: {self.said()}"
            time.sleep(0.01)

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        """-9."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@contextmanager
def server(kind: str, image: Path, socket: Path, *more: str) -> Iterator[Process]:
    pidfile = socket.with_suffix(".pid")
    process = Process(server_argv(kind, image, socket, pidfile, *more), pidfile)
    try:
        yield process
    finally:
        process.kill()
        socket.unlink(missing_ok=True)


def unix(socket: Path | str) -> dict[str, Any]:
    return {"type": "unix", "path": os.fspath(socket)}


def nbd_node(socket: Path | str, **options: Any) -> list[str]:
    """--blockdev for the node `disk`: the nbd driver on a unix socket; underscores stand for dashes."""
    node: dict[str, Any] = {"driver": "nbd", "node-name": "disk", "export": "disk", "discard": "unmap"}
    node |= {"server": unix(socket)} | dashed(options)
    return ["--blockdev", json.dumps(node)]


@contextmanager
def qemu_front(node: list[str], socket: Path, writable: bool = True) -> Iterator[Path]:
    """qemu-storage-daemon with the node, exported as "disk" at the socket."""
    pidfile = socket.with_suffix(".pid")
    export = [*nbd_server_unix(socket), *nbd_export(writable=writable), "--pidfile", str(pidfile)]
    process = Process(["qemu-storage-daemon", *node, *export], pidfile)
    try:
        yield socket
    finally:
        process.kill()


@contextmanager
def mock(path: Path, options: ServerOptions, *faults: Armed, proper: bool = True) -> Iterator[NbdServer]:
    """The scriptable server at a unix socket; at the end the client must have kept to the protocol."""
    with ServerThread(NbdServer(options, *faults), str(path)) as peer:
        yield peer
    assert not proper or peer.violations == []


def dashed(options: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("_", "-"): value for name, value in options.items()}


async def open_node(graph: Graph, socket: Path | str, **options: Any) -> Node:
    """A node in this process; underscores in names stand for dashes."""
    node = {
        "driver": "nbd",
        "node-name": "disk",
        "server": unix(socket),
        "export": "disk",
        "discard": "unmap",
    }
    return await graph.add(node | dashed(options))


async def refused(graph: Graph, **options: Any) -> str:
    """What is said about a node that cannot be opened: it names the node, and comes soon."""
    async with asyncio.timeout(REFUSED_SECONDS):
        with pytest.raises(BlockError) as caught:
            await graph.add({"driver": "nbd", "node-name": "lost", **dashed(options)})
    message = str(caught.value)
    assert "node 'lost'" in message, message
    return message
