# SPDX-License-Identifier: Apache-2.0
"""A target with two exports: one for a front end that breaks the rules, one for a bystander that watches."""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path

from target.peers.vhost_user_front_end import (
    BLK_HEADER,
    IN,
    UNTOUCHED,
    Buffer,
    FrontEnd,
    PeerError,
)
from tests.support.daemon import Daemon, blockdev
from tests.support.tools import create_image

SIZE = 16 << 20
QUEUES = 2
# Bytes that all tests together may leave behind; a sanitizer keeps what was freed.
MEMORY_SLACK = (512 if "ASAN_OPTIONS" in os.environ else 16) << 20
PAUSE = 3.0  # seconds; how long the bystander may wait for one request on a busy machine


class Bystander(threading.Thread):
    """Another client that reads and writes all the time and checks what it gets."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.longest = 0.0
        self.rounds = 0
        self.trouble: Exception | None = None
        self.leave = threading.Event()

    def run(self) -> None:
        try:
            with FrontEnd.connect(self.path) as front_end:
                while not self.leave.is_set():
                    self._round(front_end)
        except Exception as error:  # noqa: BLE001 - reported by the test
            self.trouble = error

    def _round(self, front_end: FrontEnd) -> None:
        content = random.randbytes(4096)
        begun = time.monotonic()
        front_end.write(8 * (self.rounds % 64), content)
        if front_end.read(8 * (self.rounds % 64), 4096) != content:
            raise PeerError("what was read is not what was written")
        self.longest = max(self.longest, time.monotonic() - begun)
        self.rounds += 1
        time.sleep(0.002)


class Victim:
    """The target with its two exports."""

    def __init__(self, directory: Path, format: str) -> None:
        self.path = str(directory / "hostile")
        other = str(directory / "other")
        argv = ["--object", "iothread,id=t0", "--object", "iothread,id=t1"]
        for name in ("disk", "bystander"):
            image = create_image(directory / name, str(SIZE), format=format)
            file = {"driver": "file", "filename": str(image)}
            argv += blockdev(driver=format, node_name=name, file=file)
        for node, path in (("disk", self.path), ("bystander", other)):
            where = f"addr.type=unix,addr.path={path}"
            threads = "iothread.0=t0,iothread.1=t1" if node == "disk" else "iothread=t0"
            argv += ["--export", f"type=vhost-user-blk,id={node},node-name={node},writable=on,"
                                 f"num-queues={QUEUES},{threads},{where}"]  # fmt: skip
        self.daemon = Daemon(*argv).wait_ready()
        self.bystander = Bystander(other)
        self.bystander.start()
        with self.connect() as front_end:
            front_end.write(0, b"sector 0".ljust(512))
        self.base = self.descriptors()
        self.memory = self.anonymous_memory()

    def connect(self, queues: int = 1, size: int = 128, features: int = -1, protocol: int = -1) -> FrontEnd:
        return FrontEnd.connect(self.path, queues=queues, size=size, features=features, protocol=protocol)

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.daemon.process.pid}/fd"))

    def anonymous_memory(self) -> int:
        """RssAnon in bytes."""
        status = Path(f"/proc/{self.daemon.process.pid}/status").read_text()
        (line,) = (line for line in status.splitlines() if line.startswith("RssAnon:"))
        return int(line.split()[1]) << 10

    def settled(self, more: int = 0) -> None:
        """No descriptors are held that were not at first, but for some of a session."""
        until = time.monotonic() + 5
        while (now := self.descriptors()) > self.base + more and time.monotonic() < until:
            time.sleep(0.01)
        assert now <= self.base + more, f"{now} descriptors, {self.base} at first"

    def check(self) -> None:
        """What must hold after every test."""
        assert self.daemon.process.poll() is None, self.daemon.output()
        with self.connect(queues=QUEUES) as front_end:
            for queue in range(QUEUES):
                assert front_end.read(0, 512, queue=queue) == b"sector 0".ljust(512)
        self.settled()
        if self.bystander.trouble is not None:
            raise self.bystander.trouble
        assert self.bystander.is_alive()
        assert self.bystander.longest < PAUSE

    def close(self) -> None:
        self.bystander.leave.set()
        self.bystander.join()
        grown = self.anonymous_memory() - self.memory
        self.daemon.stop()
        assert grown < MEMORY_SLACK, f"{grown} bytes more than at first"


class Case:
    """One queue with a header, a data buffer of 4 KiB and a status byte at hand."""

    def __init__(self, front_end: FrontEnd, kind: int = IN, sector: int = 0) -> None:
        self.front_end = front_end
        self.memory, self.ring = front_end.memory, front_end.rings[0]
        self.header = self.memory.put(BLK_HEADER.pack(kind, 0, sector))
        self.data = self.memory.allocate(4096, 512)
        self.status = self.memory.put(bytes([UNTOUCHED]))

    def go(self, head: int = 0) -> None:
        self.ring.expose(head)
        self.ring.kick()

    def chain(self, *buffers: Buffer) -> tuple[int, int]:
        """A well-formed chain; returns the status byte and the used length."""
        head = self.ring.add(buffers)
        self.ring.notify()
        (used,) = self.ring.wait_used()
        assert used.head == head
        return self.memory.read(self.status, 1)[0], used.length

    def stopped(self) -> None:
        """The queue stops with an error, nothing is completed, and it can be set up again."""
        assert self.ring.failed()
        assert self.ring.take_used() == []
        assert self.memory.read(self.status, 1)[0] == UNTOUCHED
        base = self.front_end.stop_queue(0)
        self.front_end.start_queue(0, base=base)
        assert self.front_end.read(0, 512) == b"sector 0".ljust(512)
