# SPDX-License-Identifier: Apache-2.0
"""A target with two exports: one for a front end that breaks the rules, one for a bystander that watches."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from target.peers.vhost_user_front_end import (
    BLK_HEADER,
    IN,
    UNTOUCHED,
    Buffer,
    Connection,
    FrontEnd,
    GuestMemory,
    PeerError,
)
from tests.support.daemon import Daemon, blockdev
from tests.support.tools import create_image
from tests.support.warnings import Log

SIZE = 16 << 20
QUEUES = 2
# Bytes that one test, and all tests together, may leave behind; a sanitizer keeps what was freed.
SLACK = (256 if "ASAN_OPTIONS" in os.environ else 4) << 20
MEMORY_SLACK = (512 if "ASAN_OPTIONS" in os.environ else 8) << 20
SETTLE_SECONDS = 5
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

    def check(self) -> None:
        """Asserts that it still works, and has not waited since the last check."""
        rounds, end = self.rounds, time.monotonic() + SETTLE_SECONDS
        while self.rounds < rounds + 3 and self.is_alive():
            assert time.monotonic() < end, "the bystander is stuck"
            time.sleep(0.001)
        if self.trouble is not None:
            raise self.trouble
        longest, self.longest = self.longest, 0.0
        assert longest < PAUSE, f"the bystander waited {longest:.1f} s"


class Guest(FrontEnd):
    """A front end of the victim."""

    victim: Victim


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
        self.log = Log(self.daemon)
        self._warm_up()
        self.base = self.descriptors()
        self.first_memory = self.memory = self.anonymous_memory()

    def _warm_up(self) -> None:
        """What is made on first use belongs to the base."""
        for _ in range(10):
            with self.connect(queues=QUEUES) as front_end:
                for sector in range(0, SIZE // 512, 2048):
                    front_end.write(sector, bytes(1 << 20))
        with self.connect() as front_end:
            front_end.write(0, b"sector 0".ljust(512))

    def connect(
        self,
        queues: int = 1,
        size: int = 128,
        features: int = -1,
        protocol: int = -1,
        memories: Sequence[GuestMemory] | None = None,
    ) -> Guest:
        guest = Guest.connect(
            self.path, queues=queues, size=size, features=features, protocol=protocol, memories=memories
        )
        guest.victim = self
        return guest

    def says(self, text: str) -> None:
        """Asserts that a new warning names the export."""
        self.log.says("export 'disk'", text)

    def ends(self, connection: Connection, why: str = "") -> None:
        """Asserts that the connection is ended, with a warning."""
        assert connection.ended()
        self.says(f"{why}; the session is ended")

    def counters(self) -> Any:
        """What SIGUSR1 makes it print."""
        until, seen = time.monotonic() + SETTLE_SECONDS, len(self.daemon.output())
        self.daemon.process.send_signal(signal.SIGUSR1)
        while True:
            lines = re.findall(r"^({.*})\n", self.daemon.output()[seen:], re.MULTILINE)
            if lines:
                return json.loads(lines[-1])
            assert time.monotonic() < until
            time.sleep(0.005)

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.daemon.process.pid}/fd"))

    def anonymous_memory(self) -> int:
        """RssAnon in bytes."""
        status = Path(f"/proc/{self.daemon.process.pid}/status").read_text()
        (line,) = (line for line in status.splitlines() if line.startswith("RssAnon:"))
        return int(line.split()[1]) << 10

    def settled(self, more: int = 0) -> None:
        """No descriptors are held that were not at first, but for some of a session."""
        until = time.monotonic() + SETTLE_SECONDS
        while (now := self.descriptors()) > self.base + more and time.monotonic() < until:
            time.sleep(0.01)
        assert now <= self.base + more, f"{now} descriptors, {self.base} at first"

    def _memory_settled(self) -> None:
        """Anonymous memory is what it was after the test before."""
        until = time.monotonic() + SETTLE_SECONDS
        before = self.memory
        while (now := self.anonymous_memory()) > before + SLACK and time.monotonic() < until:
            time.sleep(0.05)
        self.memory = now
        assert now <= before + SLACK, f"RssAnon {before >> 10} -> {now >> 10} KiB"

    def check(self) -> None:
        """What must hold after every test."""
        assert self.daemon.process.poll() is None, self.daemon.output()
        with self.connect(queues=QUEUES) as front_end:
            for queue in range(QUEUES):
                assert front_end.read(0, 512, queue=queue) == b"sector 0".ljust(512)
        self.settled()
        self._memory_settled()
        self.bystander.check()
        self.log.skip()

    def close(self) -> None:
        try:
            self.bystander.check()
            grown = self.anonymous_memory() - self.first_memory
        finally:
            self.bystander.leave.set()
            self.bystander.join()
            self.daemon.stop()
        assert grown < MEMORY_SLACK, f"{grown} bytes more than at first"


class Case:
    """One queue with a header, a data buffer of 4 KiB and a status byte at hand."""

    def __init__(self, front_end: Guest, kind: int = IN, sector: int = 0) -> None:
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
        """The queue stops with an error and a warning, nothing is completed, and it can be set up again."""
        assert self.ring.failed()
        self.front_end.victim.says("queue 0 is stopped: ")
        assert self.ring.take_used() == []
        assert self.memory.read(self.status, 1)[0] == UNTOUCHED
        base = self.front_end.stop_queue(0)
        self.front_end.start_queue(0, base=base)
        assert self.front_end.read(0, 512) == b"sector 0".ljust(512)
