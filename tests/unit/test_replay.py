# SPDX-License-Identifier: Apache-2.0
"""Logs of writes: the layout, bad logs, and what a power cut leaves. The bytes are written out by hand."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from target.replay import Discarded, LogError, PowerCut, WriteLog, rebuild

SECTOR = 512
FLUSH, FUA, DISCARD, MARK = 1, 2, 4, 8


class Maker:
    """Writes a log entry by entry, as drivers/md/dm-log-writes.c describes it."""

    def __init__(self, sector_size: int = SECTOR) -> None:
        self.size = sector_size
        self.parts: list[bytes] = []
        self.count = 0

    def entry(
        self, sector: int, sectors: int, flags: int = 0, data: bytes = b"", inline: bytes = b""
    ) -> Maker:
        head = struct.pack("<QQQQ", sector, sectors, flags, len(inline)) + inline
        self.parts += [head.ljust(self.size, b"\0"), data]
        self.count += 1
        return self

    def write(self, sector: int, value: int, sectors: int = 1, flags: int = 0) -> Maker:
        return self.entry(sector, sectors, flags, bytes([value]) * sectors * self.size)

    def save(self, path: Path, count: int | None = None) -> Path:
        count = self.count if count is None else count
        head = struct.pack("<QQQI", 0x6A736677736872, 1, count, self.size)
        path.write_bytes(head.ljust(self.size, b"\0") + b"".join(self.parts))
        return path


@pytest.fixture
def log(scratch: Path) -> Path:
    """Two writes, a flush, a write over the first, a discard, a FUA write, a mark, a flush, a write."""
    maker = Maker().write(0, 1, 2).write(4, 2).entry(0, 0, FLUSH).write(0, 3).entry(4, 1, DISCARD)
    maker.write(8, 4, flags=FUA).entry(0, 0, MARK, inline=b"half").entry(0, 0, FLUSH).write(9, 5)
    return maker.save(scratch / "log")


@pytest.fixture
def image(scratch: Path) -> Path:
    path = scratch / "image"
    path.write_bytes(b"\xee" * 10 * SECTOR)
    return path


def sectors(image: Path) -> list[int]:
    """The first byte of each; all of a sector are the same."""
    data = image.read_bytes()
    for at in range(0, len(data), SECTOR):
        assert len(set(data[at : at + SECTOR])) == 1
    return list(data[::SECTOR])


E = 0xEE


def test_entries_are_what_was_logged(log: Path) -> None:
    with WriteLog(log) as opened:
        assert [str(entry) for entry in opened.entries] == [
            "0 write 0 1024",
            "1 write 2048 512",
            "2 flush",
            "3 write 0 512",
            "4 discard 2048 512",
            "5 write fua 4096 512",
            "6 mark half",
            "7 flush",
            "8 write 4608 512",
        ]
        assert opened.flushes() == [2, 7]
        assert opened.mark("half") == 6
        with pytest.raises(LogError, match="there is no mark 'whole'"):
            opened.mark("whole")


def test_rebuilding_replays_in_order(log: Path, image: Path) -> None:
    with WriteLog(log) as opened:
        rebuild(opened, image, until=4)
        assert sectors(image) == [3, 1, E, E, 2, E, E, E, E, E]
        rebuild(opened, image)
        assert sectors(image) == [3, 1, E, E, 0, E, E, E, 4, 5]


def test_a_power_cut_loses_what_was_not_flushed(log: Path, image: Path) -> None:
    with WriteLog(log) as opened:
        PowerCut(2).make(opened, image)
        assert sectors(image) == [E] * 10
        PowerCut(7).make(opened, image)  # a write with FUA is there without a flush
        assert sectors(image) == [1, 1, E, E, 2, E, E, E, 4, E]
        PowerCut(8).make(opened, image)
        assert sectors(image) == [3, 1, E, E, 0, E, E, E, 4, E]


def test_a_random_cut_keeps_some_sectors_and_repeats(scratch: Path, image: Path) -> None:
    start = image.read_bytes()
    maker = Maker()
    for number in range(20):
        maker.write(0, number, 100)
    path = maker.save(scratch / "log")
    seen = set()
    with WriteLog(path) as opened:
        for seed in range(20):
            image.write_bytes(start)
            PowerCut(20, keep=0.3, seed=seed).make(opened, image)
            first = sectors(image)
            image.write_bytes(start)
            PowerCut(20, keep=0.3, seed=seed).make(opened, image)
            assert sectors(image) == first
            seen.add(tuple(first))
    assert len(seen) > 10
    assert max(len(set(values)) for values in seen) > 3, "no write was torn"


@pytest.mark.parametrize(
    ("discarded", "value"), [(Discarded.KEEP, 2), (Discarded.ZERO, 0), (Discarded.POISON, 0xDC)]
)
def test_discarded_sectors_read_as_chosen(log: Path, image: Path, discarded: Discarded, value: int) -> None:
    with WriteLog(log) as opened:
        rebuild(opened, image, discarded=discarded)
    assert sectors(image)[4] == value


def test_larger_sectors(scratch: Path, image: Path) -> None:
    path = Maker(4096).write(1, 7).save(scratch / "log")
    image.write_bytes(bytes(4096))
    with WriteLog(path) as opened:
        assert opened.sector_size == 4096
        rebuild(opened, image)
    assert image.read_bytes() == bytes(4096) + b"\7" * 4096


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "Could not read log superblock"),
        (bytes(512), "Invalid log superblock magic"),
        (struct.pack("<QQQI", 0x6A736677736872, 2, 0, 512), "Unsupported log version 2"),
        (struct.pack("<QQQI", 0x6A736677736872, 1, 0, 0), "Invalid log sector size 0"),
        (struct.pack("<QQQI", 0x6A736677736872, 1, 0, 1536), "Invalid log sector size 1536"),
        (struct.pack("<QQQI", 0x6A736677736872, 1, 1, 512), "it ends before log entry 0 of 1"),
        (struct.pack("<QQQI", 0x6A736677736872, 1, 1 << 63, 512), "it ends before log entry 0"),
    ],
)
def test_bad_logs_are_refused(scratch: Path, data: bytes, message: str) -> None:
    path = scratch / "log"
    path.write_bytes(data)
    with pytest.raises(LogError, match=message) as caught:
        WriteLog(path)
    assert str(path) in str(caught.value)


def test_bad_entries_are_refused(scratch: Path) -> None:
    with pytest.raises(LogError, match="Invalid flags 0x100 in log entry 1"):
        WriteLog(Maker().write(0, 1).entry(0, 0, 0x100).save(scratch / "flags"))
    with pytest.raises(LogError, match="the data of log entry 0 lies past the end"):
        WriteLog(Maker().entry(0, 1 << 50).save(scratch / "long"))
    with pytest.raises(LogError, match="it ends before log entry 1 of 2"):
        WriteLog(Maker().write(0, 1).save(scratch / "count", count=2))
