# SPDX-License-Identifier: Apache-2.0
"""The images, and the state of the page cache under them.

Buffered figures depend on three things that nobody sees: whether the pages are there at all (an idle page may
be reclaimed within seconds), in folios of which size they lie (writes to pages in large folios are several
times slower) and whether they are dirty already (the first write of a page costs more). So an image is
dropped from the cache, read back page by page without read-ahead, which gives small folios, and locked. A
cell starts while nothing is being written back, and one that writes from pages that are all dirty. What this
achieved is looked up in the kernel and goes to the results.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from tests.bench.rows import EMPTY_SIZE, MIB, Image, Work

PAGE = os.sysconf("SC_PAGE_SIZE")
_SAMPLES = 2048
_PRESENT, _FRAME = 1 << 63, (1 << 55) - 1
_COMPOUND = 1 << 15 | 1 << 16  # KPF_COMPOUND_HEAD, KPF_COMPOUND_TAIL

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = _libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


def _check(result: int, what: str) -> None:
    if result:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")


class Cached:
    """An image that lies in the page cache from its first pin() to close()."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._address: int | None = None
        self.pins = 0

    def pin(self) -> None:
        self._unmap()
        os.fsync(self._fd)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)
        for offset in range(0, self.size, PAGE):
            os.pread(self._fd, PAGE, offset)
        prot_read, map_shared = 1, 1
        address = _libc.mmap(None, self.size, prot_read, map_shared, self._fd, 0)
        if address == ctypes.c_void_p(-1).value:
            _check(1, f"mmap {self.path}")
        self._address = address
        _check(_libc.mlock(address, self.size), f"mlock {self.path} (needs root, or a higher 'ulimit -l')")
        self.pins += 1

    @contextmanager
    def ready(self, work: Work) -> Iterator[Path]:
        """The state for one cell: pinned, and for writes dirty in every page. Written back afterwards."""
        if self.resident() < 1:
            self.pin()
        if work.writes:
            for offset in range(0, self.size, MIB):
                os.pwrite(self._fd, os.pread(self._fd, MIB, offset), offset)
        try:
            yield self.path
        finally:
            os.fsync(self._fd)

    def resident(self) -> float:
        """The part of the image that is in the page cache."""
        if self._address is None:
            return 0.0
        vector = np.zeros(-(-self.size // PAGE), dtype=np.uint8)
        _check(_libc.mincore(self._address, self.size, vector.ctypes.data), "mincore")
        return float(np.mean(vector & 1))

    def in_large_folios(self) -> float | None:
        """The part of the pages, by a sample, in folios of several pages; None where not permitted."""
        assert self._address is not None
        pages = np.unique(np.linspace(0, self.size // PAGE - 1, _SAMPLES, dtype=np.int64))
        try:
            frames = _lookup("/proc/self/pagemap", pages + self._address // PAGE)
            frames = frames[(frames & _PRESENT) != 0] & _FRAME
            if not frames.size or not frames.all():
                return None
            return float(np.mean((_lookup("/proc/kpageflags", frames.astype(np.int64)) & _COMPOUND) != 0))
        except OSError:
            return None  # a kernel without these files, or one that hides them from this user

    def close(self) -> None:
        self._unmap()
        os.close(self._fd)

    def _unmap(self) -> None:
        if self._address is not None:
            _check(_libc.munmap(self._address, self.size), "munmap")
            self._address = None


def _lookup(table: str, indices: np.ndarray) -> np.ndarray:
    """The 64-bit words at these indices of a file in /proc."""
    fd = os.open(table, os.O_RDONLY)
    try:
        return np.array([int.from_bytes(os.pread(fd, 8, 8 * int(i)), "little") for i in indices], np.uint64)
    finally:
        os.close(fd)


def qemu_img(*argv: str | Path) -> None:
    subprocess.run(["qemu-img", *map(str, argv)], check=True, stdout=subprocess.DEVNULL)


def create_qcow2(path: Path, size: int, *options: str) -> None:
    """A new empty image, with QEMU's defaults unless other options are given."""
    path.unlink(missing_ok=True)
    more = ["-o", ",".join(options)] if options else []
    qemu_img("create", "-q", "-f", "qcow2", *more, path, str(size))


class Images:
    """The images of one run, in a directory of their own, all with ``size`` bytes of random data."""

    def __init__(self, directory: Path, size: int) -> None:
        self.directory = directory
        self.size = size
        self._cached: dict[Image, Cached] = {}

    def _path(self, image: Image) -> Path:
        return self.directory / ("disk." + image)

    @contextmanager
    def ready(self, image: Image, work: Work) -> Iterator[Path | None]:
        """The state that one cell starts from, and what it leaves cleaned up. No path for the null device."""
        if image == "null":
            yield None
        elif image == "direct":
            yield self._direct()
        elif image in ("empty", "sparse"):
            path = self._path(image)
            self._create_empty(image, path)
            try:
                yield path
            finally:
                path.unlink(missing_ok=True)
        else:
            with self.cached(image).ready(work) as path:
                yield path

    @staticmethod
    def _create_empty(image: Image, path: Path) -> None:
        if image == "empty":
            create_qcow2(path, EMPTY_SIZE)
            return
        with path.open("wb") as handle:
            handle.truncate(EMPTY_SIZE)

    def cached(self, image: Image) -> Cached:
        """The pinned image, made at its first use."""
        if image not in self._cached:
            path = self._path(image)
            if image == "raw":
                self._fill(path)
            else:
                qemu_img("convert", "-q", "-f", "raw", "-O", "qcow2", self.cached("raw").path, path)
            self._cached[image] = Cached(path)
            self._cached[image].pin()
        return self._cached[image]

    def state(self) -> dict[str, dict[str, object]]:
        """What the page cache holds of each pinned image."""
        return {
            name: {
                "resident": image.resident(),
                "in_large_folios": image.in_large_folios(),
                "pins": image.pins,
            }
            for name, image in self._cached.items()
        }

    def close(self) -> None:
        for image in self._cached.values():
            image.close()
        self._cached.clear()

    def _direct(self) -> Path:
        """A file of its own, not cached: O_DIRECT writes would drop the pinned pages of the others."""
        path = self._path("direct")
        if not path.exists():
            self._fill(path)
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
        return path

    def _fill(self, path: Path) -> None:
        with path.open("wb") as handle:
            for _ in range(self.size // MIB):
                handle.write(os.urandom(MIB))
            handle.flush()
            os.fsync(handle.fileno())
