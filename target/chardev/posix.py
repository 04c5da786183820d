# SPDX-License-Identifier: Apache-2.0
"""Devices that are descriptors: files, FIFOs, standard input and output, pseudo terminals."""

from __future__ import annotations

import asyncio
import contextlib
import os
import termios
import tty
from typing import Any

from target.chardev.base import Chardev, open_file
from target.chardev.options import FileOptions, PipeOptions, PtyOptions, StdioOptions
from target.chardev.stream import FdStream, hung_up
from target.graph.errors import BlockError

PTY_LOOK = 0.2  # seconds between looks at whether somebody has opened a terminal


class _Descriptors(Chardev):
    """What file, pipe and stdio have in common: a descriptor to read and one to write; -1 for none."""

    reader = -1
    writer = -1

    def _attached(self) -> None:
        self._start(FdStream(self.reader, self.writer, self._log))

    async def _close(self) -> None:
        for fd in {self.reader, self.writer} - {-1}:
            os.close(fd)
        self.reader = self.writer = -1


class File(_Descriptors, type="file"):
    """Written to a file; read from another one, if there is one."""

    options: FileOptions

    async def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
        self.writer = open_file(
            self.options.out, flags | (os.O_APPEND if self.options.append else os.O_TRUNC)
        )
        if self.options.in_ is not None:
            self.reader = open_file(self.options.in_, os.O_RDONLY | os.O_CLOEXEC)


class Pipe(_Descriptors, type="pipe"):
    """FIFOs that exist already. Opened for both directions: they outlive the programs at the other end."""

    options: PipeOptions

    async def _open(self) -> None:
        name = self.options.device
        flags = os.O_RDWR | os.O_CLOEXEC
        try:
            self.reader = open_file(f"{name}.in", flags)
            self.writer = open_file(f"{name}.out", flags)
        except BlockError:
            await self._close()
            self.reader = self.writer = open_file(name, flags)


class Stdio(_Descriptors, type="stdio"):
    """Standard input and output of the process; a terminal gives single characters and does not echo."""

    options: StdioOptions
    background = False  # the process has given its terminal up, or will
    _taken = False
    _terminal: list[Any] | None = None

    async def _open(self) -> None:
        if Stdio.background:
            raise BlockError("cannot use stdio with --daemonize")
        if Stdio._taken:
            raise BlockError("cannot use stdio by multiple character devices")
        Stdio._taken = True
        # Copies: what else the process prints goes to standard error from here on.
        self.reader = os.dup(0)
        self.writer = os.dup(1)
        os.set_inheritable(self.reader, False)
        os.dup2(2, 1)
        if os.isatty(self.reader):
            self._terminal = termios.tcgetattr(self.reader)
            _single_characters(self.reader, self.options.signal)

    async def _close(self) -> None:
        if self.writer < 0:
            return
        if self._terminal is not None:
            with contextlib.suppress(termios.error):
                termios.tcsetattr(self.reader, termios.TCSANOW, self._terminal)
        os.dup2(self.writer, 1)
        Stdio._taken = False
        await super()._close()


def _single_characters(fd: int, signal: bool) -> None:
    mode = termios.tcgetattr(fd)
    mode[3] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.IEXTEN)
    if not signal:
        mode[3] &= ~termios.ISIG
    termios.tcsetattr(fd, termios.TCSANOW, mode)


class Pty(Chardev, type="pty"):
    """A new pseudo terminal. Each time that somebody opens it, the front end gets a stream."""

    options: PtyOptions
    name = ""
    _master = -1
    _task: asyncio.Task[None] | None = None
    _link: str | None = None

    @property
    def filename(self) -> str:
        return f"pty:{self.name}"

    async def _open(self) -> None:
        try:
            self._master, slave = os.openpty()
        except OSError as error:
            raise BlockError.from_os("Failed to create PTY", error) from None
        tty.setraw(slave)
        self.name = os.ttyname(slave)
        os.close(slave)
        if self.options.path is not None:
            path = os.path.abspath(self.options.path)
            try:
                os.symlink(self.name, path)
            except OSError as error:
                raise BlockError.from_os(f"Failed to create PTY symlink '{path}'", error) from None
            self._link = path

    def _attached(self) -> None:
        self._task = asyncio.ensure_future(self._watch())

    async def detach(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        await super().detach()

    async def _close(self) -> None:
        if self._link is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._link)
            self._link = None
        if self._master >= 0:
            os.close(self._master)
            self._master = -1

    async def _watch(self) -> None:
        while True:
            if not hung_up(self._master):
                await asyncio.wait({self._start(FdStream(self._master, self._master, self._log))})
            await asyncio.sleep(PTY_LOOK)
