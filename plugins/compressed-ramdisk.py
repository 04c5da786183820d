# SPDX-License-Identifier: Apache-2.0
"""A ramdisk whose pages are compressed: an nbdkit plugin.

    nbdkit python compressed-ramdisk.py size=4G [level=6]

size   bytes of the disk, with nbdkit's suffixes
level  zlib's: 1 (fastest) to 9 (smallest), 6 unless given

Memory is taken for pages with content only; what is trimmed, zeroed or written as zeros gives it back.
Everything is lost when the server ends.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterator

import nbdkit

API_VERSION = 2

PAGE = 32 << 10
ZERO_PAGE = bytes(PAGE)
LOCKS = 64

size = -1
level = 6
pages: dict[int, bytes] = {}  # page number -> its content, compressed; a page of zeros is not there
# Who changes a page holds its lock. Several pages share one; nobody holds two.
locks = [threading.Lock() for _ in range(LOCKS)]


def config(key: str, value: str) -> None:
    global level, size
    if key == "size":
        size = nbdkit.parse_size(value)
    elif key == "level":
        level = int(value) if value.isdecimal() else 0
        if not 1 <= level <= 9:
            raise ValueError(f"level={value}: a number from 1 to 9 is expected")
    else:
        raise ValueError(f"unknown parameter {key!r}")


def config_complete() -> None:
    if size < 0:
        raise ValueError("the parameter size=SIZE is required")


def thread_model() -> int:
    return int(nbdkit.THREAD_MODEL_PARALLEL)  # zlib runs without the interpreter's lock


def open(readonly: bool) -> None:
    return None


def get_size(h: None) -> int:
    return size


def block_size(h: None) -> tuple[int, int, int]:
    return 1, PAGE, 0xFFFFFFFF


def can_multi_conn(h: None) -> bool:
    return True


def can_fua(h: None) -> int:
    return int(nbdkit.FUA_NATIVE)  # nothing here outlives the server, flushed or not


def pieces(count: int, offset: int) -> Iterator[tuple[int, int, int, int]]:
    """The pages of a range: number of the page, start and end inside of it, position in the range."""
    at = 0
    while at < count:
        number, start = divmod(offset + at, PAGE)
        end = min(PAGE, start + count - at)
        yield number, start, end, at
        at += end - start


def load(number: int) -> bytes:
    page = pages.get(number)
    return ZERO_PAGE if page is None else zlib.decompress(page)


def store(number: int, page: bytes) -> None:
    if page == ZERO_PAGE:
        pages.pop(number, None)
    else:
        pages[number] = zlib.compress(page, level)


def change(number: int, start: int, data: bytes | memoryview) -> None:
    """Puts data into a page."""
    with locks[number % LOCKS]:
        page = bytearray(PAGE if len(data) == PAGE else load(number))
        page[start : start + len(data)] = data
        store(number, bytes(page))


def pread(h: None, buf: memoryview, offset: int, flags: int) -> None:
    for number, start, end, at in pieces(len(buf), offset):
        buf[at : at + end - start] = load(number)[start:end]


def pwrite(h: None, buf: memoryview, offset: int, flags: int) -> None:
    for number, start, end, at in pieces(len(buf), offset):
        change(number, start, buf[at : at + end - start])


def flush(h: None, flags: int) -> None:
    return None


def zero(h: None, count: int, offset: int, flags: int) -> None:
    for number, start, end, _ in pieces(count, offset):
        if number in pages:
            change(number, start, ZERO_PAGE[start:end])


def trim(h: None, count: int, offset: int, flags: int) -> None:
    zero(h, count, offset, flags)


def extents(h: None, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:
    """Runs of pages that are there, or are not."""
    hole = nbdkit.EXTENT_HOLE | nbdkit.EXTENT_ZERO
    runs: list[tuple[int, int, int]] = []
    for number, start, end, at in pieces(count, offset):
        kind = 0 if number in pages else hole
        if runs and runs[-1][2] == kind:
            first, length, _ = runs.pop()
            runs.append((first, length + end - start, kind))
        elif runs and flags & nbdkit.FLAG_REQ_ONE:
            break
        else:
            runs.append((offset + at, end - start, kind))
    return runs
