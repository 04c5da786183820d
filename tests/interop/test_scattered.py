# SPDX-License-Identifier: Apache-2.0
"""Scattered requests over vhost-user-blk touch the buffers they name and no other byte of guest memory."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from target.peers.vhost_user_front_end import (
    BLK_HEADER,
    IN,
    OK,
    OUT,
    UNTOUCHED,
    Buffer,
    FrontEnd,
    GuestMemory,
)
from tests.support.daemon import Daemon, blockdev, vhost_user_export
from tests.support.tools import check_image, create_image, qemu_img

SLOT = 4096
SLOTS = 1024  # of guest memory that requests use; each slot belongs to one piece of one request at a time
ZONE = 160 << 10  # of the disk, for one request of a batch
BATCH = 20
SIZE = BATCH * ZONE
ROUNDS = 40


class Model:
    """What guest memory and the disk have to hold, and requests that change both."""

    def __init__(self, front_end: FrontEnd, seed: int) -> None:
        self.random = random.Random(seed)
        self.memory = front_end.memory
        self.ring = front_end.rings[0]
        self.arena = self.memory.allocate(SLOT * SLOTS, SLOT)
        self.content = bytearray(self.random.randbytes(SLOT * SLOTS))
        self.memory.write(self.arena, self.content)
        self.disk = bytearray(SIZE)
        self.mark = self.memory.mark

    def batch(self) -> None:
        """Runs requests side by side, then compares the whole of guest memory."""
        self.memory.release_all(self.mark)
        self.slots = self.random.sample(range(SLOTS), SLOTS)
        heads = [self._request(zone * ZONE) for zone in range(BATCH)]
        self.ring.notify()
        for used in self.ring.wait_used(BATCH):
            heads.remove(used.head)
            self.ring.reclaim(used.head)
        assert not heads
        assert self.memory.read(self.arena, SLOT * SLOTS) == self.content

    def _place(self, length: int) -> int:
        """An offset in the arena for a piece; often one that is aligned."""
        room = SLOT - length
        inside = self.random.choice([0, min(room, 512), self.random.randrange(room + 1)])
        return self.slots.pop() * SLOT + inside

    def _request(self, zone: int) -> int:
        """Makes one request available, and tells the model what it will do. Returns its head."""
        write = self.random.random() < 0.5
        pieces = self._pieces()
        length = sum(size for _, size in pieces)
        offset = zone + self.random.randrange((ZONE - length) // 512 + 1) * 512
        at = offset
        for place, size in pieces:
            if write:
                self.disk[at : at + size] = self.content[place : place + size]
            else:
                self.content[place : place + size] = self.disk[at : at + size]
            at += size
        buffers = [Buffer(self.arena + place, size, not write) for place, size in pieces]
        return self._add(write, offset, buffers)

    def _add(self, write: bool, offset: int, buffers: list[Buffer]) -> int:
        header = self.memory.put(BLK_HEADER.pack(OUT if write else IN, 0, offset // 512))
        status = self._place(1)
        self.memory.write(self.arena + status, bytes([UNTOUCHED]))
        self.content[status] = OK
        chain = [Buffer(header, BLK_HEADER.size), *buffers, Buffer(self.arena + status, 1, True)]
        return self.ring.add(chain, indirect=True)

    def _pieces(self) -> list[tuple[int, int]]:
        """(offset in the arena, length) of the parts of one request, in all a number of sectors."""
        count = self.random.choice([1, 2, 3, 5, 9, 33])
        sizes = [self.random.choice([512, 4096, self.random.randrange(1, 4096)]) for _ in range(count)]
        excess = -sum(sizes) % 512
        if excess:
            sizes.append(excess)
        return [(self._place(size), size) for size in sizes]


@pytest.mark.parametrize(
    ("aio", "direct"),
    [("threads", False), ("io_uring", False), ("threads", True), ("native", True), ("io_uring", True)],
)
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_guest_memory(
    scratch: Path, start: Callable[..., Daemon], format: str, aio: str, direct: bool
) -> None:
    image = create_image(scratch / "disk", str(SIZE), format=format)
    file = {"driver": "file", "filename": str(image), "aio": aio, "cache": {"direct": direct}}
    node = blockdev(driver=format, node_name="disk", file=file)
    daemon = start(*node, *vhost_user_export(scratch / "s"))
    with FrontEnd.connect(str(scratch / "s"), memories=[GuestMemory(16 << 20)]) as front_end:
        model = Model(front_end, seed=len(format) + len(aio))
        for lap in range(ROUNDS):
            model.batch()
            if lap % 4 == 3:
                forget_cache(image)
    daemon.stop()
    if format == "qcow2":
        check_image(image)
    qemu_img("convert", "-f", format, "-O", "raw", image, scratch / "flat")
    assert (scratch / "flat").read_bytes() == model.disk


def forget_cache(image: Path) -> None:
    """Drops the file from the page cache, so that cached reads have to wait."""
    fd = os.open(image, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
