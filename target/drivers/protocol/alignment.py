# SPDX-License-Identifier: Apache-2.0
"""Finds what a file opened with O_DIRECT demands of offsets, lengths and memory addresses."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from typing import NamedTuple

STATX_DIOALIGN = 0x2000
AT_EMPTY_PATH = 0x1000
CANDIDATES = (1, 512, 1024, 2048, 4096)
MAX = 4096


class Alignment(NamedTuple):
    """Both in bytes, powers of two."""

    request: int
    memory: int


def probe(fd: int) -> Alignment:
    """Asks the kernel (Linux 6.1 and later say), else tries small reads."""
    return _statx(fd) or _by_reading(fd)


def _statx(fd: int) -> Alignment | None:
    buffer = ctypes.create_string_buffer(256)
    try:
        statx = ctypes.CDLL(None, use_errno=True).statx
    except AttributeError:
        return None  # a C library without the call
    if statx(fd, b"", AT_EMPTY_PATH, STATX_DIOALIGN, buffer) != 0:
        return None
    (mask,) = struct.unpack_from("@I", buffer, 0)
    memory, request = struct.unpack_from("@II", buffer, 152)  # stx_dio_mem_align, stx_dio_offset_align
    if not mask & STATX_DIOALIGN or not memory or not request:
        return None
    return Alignment(request, memory)


def _by_reading(fd: int) -> Alignment:
    with mmap.mmap(-1, 4 * MAX) as page, memoryview(page) as view:
        request = next((a for a in CANDIDATES if _readable(fd, view[:a])), MAX)
        # A file system that takes single bytes may yet refuse others: be safe.
        request = MAX if request == 1 else request
        memory = next((a for a in CANDIDATES if _readable(fd, view[a : a + MAX])), MAX)
        return Alignment(request, MAX if memory == 1 else memory)


def _readable(fd: int, buffer: memoryview) -> bool:
    with buffer:
        try:
            os.preadv(fd, [buffer], 0)
        except OSError as error:
            if error.errno == errno.EINVAL:
                return False
            raise
    return True
