# SPDX-License-Identifier: Apache-2.0
"""file: a regular file as a disk."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import stat
from functools import cache
from typing import TYPE_CHECKING, Literal

from target import fdsets
from target.config.options import Unsigned
from target.datapath import Object, lib
from target.drivers import locking
from target.drivers.protocol import alignment
from target.graph.describe import (
    BlockStatsSpecificFile,
    BlockStatsSpecificHostDevice,
    Description,
    ImageInfoSpecificFile,
    ImageInfoSpecificFileWrapper,
)
from target.graph.errors import BlockError
from target.graph.node import Node, NodeOptions, Settings
from target.graph.permissions import Perm
from target.reservations.manager import PrManagerHelper, pr_manager
from target.reservations.transports import sg_io

if TYPE_CHECKING:
    from target.graph.change import Change

log = logging.getLogger("blocktarget")
SECTOR = 512


class FileOptions(NodeOptions):
    """Shared with host_device. ``drop-cache``: of what the kernel has cached, when a node becomes active."""

    filename: str
    locking: Literal["auto", "on", "off"] = "auto"
    aio: Literal["threads", "native", "io_uring"] = "threads"
    aio_max_batch: Unsigned = 0
    pr_manager: str | None = None
    drop_cache: bool = True


class PosixNode(Node):
    """What a file and a block device have in common: descriptor, locks, engine, alignment."""

    is_protocol = True
    reopenable = frozenset({"read-only", "cache", "aio", "locking", "drop-cache"})
    may_be_inactive = True
    block_device = False
    Options = FileOptions
    tuning = frozenset({"locking", "aio", "aio_max_batch", "pr_manager", "drop_cache"})
    options: FileOptions
    fd = -1
    lock: locking.ImageLock | None = None
    align = alignment.Alignment(1, 1)
    manager: PrManagerHelper | None = None

    async def open(self) -> None:
        options = self.options
        self._check_options()
        if options.pr_manager is not None:
            try:
                self.manager = pr_manager(self.graph.objects, options.pr_manager)
            except BlockError as error:
                raise self.error(f"option 'pr-manager': {error}") from None
        self.fd = await asyncio.to_thread(self._open_fd, options.filename)
        self._check_type(os.fstat(self.fd).st_mode)
        await self._look_at_fd()
        self.lock = self._new_lock()

    async def _look_at_fd(self) -> None:
        self._set_status_flags()
        self.align = alignment.Alignment(1, 1)
        if self.settings.direct:
            self.align = await asyncio.to_thread(alignment.probe, self.fd)
        self.bytes = await asyncio.to_thread(self._find_size)

    def _check_options(self) -> None:
        if self.options.aio == "native" and not self.settings.direct:
            raise self.error(
                "aio=native was specified, but it requires cache.direct=on, which was not specified."
            )
        if self.options.aio_max_batch:
            raise self.error(f"option 'aio-max-batch': only 0 is supported, not {self.options.aio_max_batch}")
        if self.settings.force_share and not self.read_only:
            raise self.error("force-share=on can only be used with read-only images")

    def _set_status_flags(self) -> None:
        # O_NONBLOCK kept a FIFO from blocking the open; io_uring would take it for "do not wait".
        flags = fcntl.fcntl(self.fd, fcntl.F_GETFL) & ~os.O_NONBLOCK
        try:
            # The access time costs a cached 4k read 4 % of its time. Only a file's owner may leave it alone.
            fcntl.fcntl(self.fd, fcntl.F_SETFL, flags | os.O_NOATIME)
        except PermissionError:
            fcntl.fcntl(self.fd, fcntl.F_SETFL, flags)

    async def close(self) -> None:
        if self.fd >= 0:
            try:
                if self.opened and self.active and not self.read_only:
                    await self.flush()
            finally:
                if self.lock is not None:  # the datapath keeps a copy of the descriptor for a while
                    self.lock.commit(Perm.NONE, Perm.ALL)
                self.graph.fds.close_user(self.fd)
                self.fd = -1

    def make_object(self) -> Object:
        return self.datapath.file(
            self.fd,
            self.bytes,
            direct=self.settings.direct,
            no_flush=self.settings.no_flush,
            block_device=self.block_device,
            engine=self._engine(),
            align=self.align.request,
            mem_align=self.align.memory,
        )

    def prepare_permissions(self, perm: Perm, shared: Perm) -> None:
        if self.lock is not None:
            try:
                self.lock.prepare(perm, _outside(perm, shared))
            except BlockError as error:
                raise self.error(str(error)) from None

    def commit_permissions(self, perm: Perm, shared: Perm) -> None:
        if self.lock is not None:
            self.lock.commit(perm, _outside(perm, shared))

    async def scsi_command(
        self, cdb: bytes, data_out: bytes, data_in_length: int
    ) -> tuple[int, bytes, bytes]:
        """Runs a command for persistent reservations: through the node's manager, or else itself."""
        if self.manager is not None:
            return await self.manager.transport(self.fd).scsi_command(cdb, data_out, data_in_length)
        return await asyncio.to_thread(sg_io, self.fd, cdb, data_out, data_in_length)

    @property
    def filename(self) -> str:
        return self.options.filename

    def describe(self) -> Description:
        return Description(dirty=False)

    async def allocated_size(self) -> int:
        fd = os.dup(self.fd)  # the node may be closed meanwhile
        try:
            return (await asyncio.to_thread(os.fstat, fd)).st_blocks * SECTOR
        finally:
            os.close(fd)

    def driver_statistics(self) -> BlockStatsSpecificFile:
        counters = self.object.counters()
        requests, failed = counters["requests"]["discard"], counters["failed"]["discard"]
        kind = BlockStatsSpecificHostDevice if self.block_device else BlockStatsSpecificFile
        return kind(
            discard_nb_ok=requests - failed,
            discard_nb_failed=failed,
            discard_bytes_ok=counters["bytes"]["discard"] - counters["failed_bytes"]["discard"],
        )

    @property
    def storage(self) -> object | None:
        found = os.fstat(self.fd)
        return (found.st_rdev,) if stat.S_ISBLK(found.st_mode) else (found.st_dev, found.st_ino)

    # ---- changes while it is used ----

    async def activate(self, change: Change) -> None:
        """Another process may have written: what is cached is dropped, as ``drop-cache`` says."""
        if self.options.drop_cache and not self.settings.direct:
            await asyncio.to_thread(os.posix_fadvise, self.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        before = self.object.size
        change.undo(lambda: setattr(self.object, "size", before))
        self.object.size = await asyncio.to_thread(self._find_size)

    async def reopen(self, change: Change, options: NodeOptions, settings: Settings) -> None:
        before = self.fd, self.lock, self.align, self.bytes
        opened_as = self.read_only, self.settings.direct
        locked_as = self.options.locking

        def use_again() -> None:
            self.fd, self.lock, self.align, self.bytes = before

        change.undo(use_again)
        await super().reopen(change, options, settings)
        self._check_options()
        self.bytes = self.object.size
        if (self.read_only, self.settings.direct) != opened_as:
            await self._open_again(change)
        if self.options.locking != locked_as:
            self._lock_again(change)
        # A new object also when nothing else is: one that failed a flush fails all to its end.
        await change.replace_object(self, self.make_object())

    async def _open_again(self, change: Change) -> None:
        """The same file with other flags, whatever its name is by now. Its locks are never let go."""
        old, name = self.fd, self.options.filename
        named = name if name.startswith(fdsets.PREFIX) else f"/proc/self/fd/{old}"
        self.fd = made = await asyncio.to_thread(self._open_fd, named)
        change.undo(lambda: self.graph.fds.close_user(made))
        if not os.path.sameopenfile(old, made):
            raise self.error(f"Could not open '{name}': it is another file now")
        await self._look_at_fd()
        if self.lock is not None:
            kept, self.lock = self.lock, locking.ImageLock(made, name)
            taken = self.lock
            change.undo(lambda: kept.take_over(taken))
            taken.take_over(kept)
        change.later(lambda: self.graph.fds.close_user(old))

    def _lock_again(self, change: Change) -> None:
        """Other rules for locks; those that are needed now are taken when permissions are."""
        old, new = self.lock, self._new_lock()
        if old is None:
            self.lock = new
        elif new is None:
            self.lock = None
            change.later(lambda: old.commit(Perm.NONE, Perm.ALL))

    # ---- for file and host_device to differ in ----

    def _check_type(self, mode: int) -> None:
        raise NotImplementedError

    def _find_size(self) -> int:
        raise NotImplementedError

    # ---- own ----

    def _open_fd(self, name: str) -> int:
        """Opens as the options say; with auto-read-only a file that cannot be written becomes read-only."""
        flags = os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        flags |= os.O_DIRECT if self.settings.direct else 0
        opener = self.graph.fds.open if name.startswith(fdsets.PREFIX) else os.open
        try:
            if self.read_only:
                return opener(name, flags | os.O_RDONLY)
            try:
                return opener(name, flags | os.O_RDWR)
            except (OSError, fdsets.NoFitting) as error:
                no = (errno.EACCES, errno.EROFS, errno.EPERM)
                denied = isinstance(error, fdsets.NoFitting) or error.errno in no
                if not denied or not self.settings.auto_read_only:
                    raise
                fd = opener(name, flags | os.O_RDONLY)
                self.read_only = True
                return fd
        except OSError as error:
            name = self.options.filename
            if error.errno == errno.EINVAL and self.settings.direct:
                raise self.error(
                    f"Could not open '{name}': file system may not support O_DIRECT (cache.direct=on)"
                ) from None
            raise BlockError.from_os(f"{self.label}: Could not open '{name}'", error) from None
        except BlockError as error:
            raise self.error(str(error)) from None
        except ValueError:
            raise self.error(f"option 'filename': {name!r} contains a null byte") from None

    def _new_lock(self) -> locking.ImageLock | None:
        mode = self.options.locking
        if mode == "off":
            return None
        if locking.supported(self.fd):
            return locking.ImageLock(self.fd, self.options.filename)
        if mode == "on":
            raise self.error(f"locking=on: OFD locks are not supported on '{self.options.filename}'")
        return None

    def _engine(self) -> Literal["threads", "native", "io_uring"]:
        if self.options.aio == "io_uring" and not io_uring_works():
            return "threads"
        return self.options.aio


@cache
def io_uring_works() -> bool:
    """Asks the system once, and says so when it refuses."""
    works = bool(lib.bt_probe_io_uring())
    if not works:
        log.warning("io_uring cannot be used here: nodes with aio=io_uring run on the thread pool")
    return works


def _outside(perm: Perm, shared: Perm) -> Perm:
    """What other processes may do. Exports of one node share writing; two programs never write one image.

    qemu-storage-daemon lets a second program write a raw image that it exports; who wants that says
    locking=off here.
    """
    return shared & ~Perm.WRITE if Perm.WRITE in perm else shared


class File(PosixNode, driver="file"):
    """A regular file. Its size rounds up to 512 bytes; what is past its end reads as zeros."""

    cut_in: Change | None = None  # at the end of which it becomes smaller

    def _check_type(self, mode: int) -> None:
        name = self.options.filename
        if stat.S_ISDIR(mode):
            raise self.error(f"Could not open '{name}': Is a directory")
        if not stat.S_ISREG(mode):
            raise self.error(f"'file' driver requires '{name}' to be a regular file")

    def describe(self) -> Description:
        specific = ImageInfoSpecificFileWrapper(data=ImageInfoSpecificFile())
        return Description(dirty=False, specific=specific)

    def _find_size(self) -> int:
        return _rounded(os.fstat(self.fd).st_size)

    async def resize(self, change: Change, size: int) -> None:
        """Larger at once; the file becomes smaller at the end, when no request is behind its new one."""
        if self.read_only:
            raise self.error("Image is read-only")
        before = os.fstat(self.fd).st_size
        if self.cut_in is change and size > self.size:  # requests go on before the file is cut
            raise self.error("it cannot be made larger in the change that makes it smaller")
        if size >= before:
            await self.truncate(size)
            change.undo(lambda: self.truncate(before))
        else:
            shown, self.cut_in = self.size, change
            change.undo(lambda: self._show(shown))
            self._show(size)
            change.later(lambda: self.truncate(size))

    async def truncate(self, size: int) -> None:
        """For a node above: it asks for nothing behind the new end."""
        self._show(size)
        await self.object.synchronize()
        try:
            await asyncio.to_thread(os.ftruncate, self.fd, size)
        except OSError as error:
            self._show(os.fstat(self.fd).st_size)
            raise BlockError.from_os(f"{self.label}: Could not resize file", error) from None
        self._show(size)

    def _show(self, size: int) -> None:
        self.object.size = _rounded(size)


def _rounded(size: int) -> int:
    return -(-size // SECTOR) * SECTOR
