# SPDX-License-Identifier: Apache-2.0
"""One run of a plugin's process: started, set up, watched, ended. Nothing here knows requests or restarts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from typing import Annotated, Any

import msgspec

from target.drivers.protocol.nbdkit_plugin.channel import Memory, ProtocolError
from target.exports.warnings import Warnings, printable
from target.nbdkit import boot, wire

TERM_SECONDS = 2.0  # from SIGTERM to SIGKILL
EXIT_SECONDS = 2.0  # from the end of its channel to SIGKILL

# What concerns the target alone.
SERVICE_MANAGER = {
    "NOTIFY_SOCKET",
    "LISTEN_FDS",
    "LISTEN_PID",
    "LISTEN_FDNAMES",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
}

UNLIMITED = (1 << 32) - 1  # as a maximum block size

OUTPUT_BYTES = 64 << 10  # read at once
OUTPUT_SECONDS = 0.05  # then nothing for so long
OUTPUT_LINES = 60  # of those, shown at most so many
LINE_BYTES = 4096


class Setup(msgspec.Struct, frozen=True):
    """What the process is told."""

    script: str
    config: list[tuple[str, str]]
    export: str
    readonly: bool
    threads: int
    verbose: bool


class Opened(msgspec.Struct, forbid_unknown_fields=True):
    """What an open plugin says about itself; the values are those of its callbacks."""

    thread_model: int
    size: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
    can_write: bool
    can_zero: bool
    can_fast_zero: bool
    can_trim: bool
    can_fua: int
    can_flush: bool
    is_rotational: bool
    can_multi_conn: bool
    can_cache: int
    can_extents: bool
    description: str
    minimum: Annotated[int, msgspec.Meta(ge=0, le=1 << 16)]
    maximum: Annotated[int, msgspec.Meta(ge=0, le=(1 << 32) - 1)]

    def __post_init__(self) -> None:
        whole = self.maximum == UNLIMITED or self.maximum % (self.minimum or 1) == 0
        if self.minimum & (self.minimum - 1) or not whole:
            raise ValueError("wrong block sizes")


class Answer(msgspec.Struct, forbid_unknown_fields=True):
    """``opened``, or why not, and the names that the plugin offers."""

    opened: Opened | None = None
    error: str = ""
    exports: list[str] = []


class StartError(Exception):
    """The plugin could not be started; the text says why, in the plugin's words if it has any."""


class Process:
    """One process. ``ended`` gets its exit status (negative: a signal) when it is gone."""

    def __init__(self, python: str, warnings: Warnings) -> None:
        self.loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[int] = self.loop.create_future()
        self.memory = Memory()
        self.output: Output | None = None
        try:
            self.sock, theirs = socket.socketpair()
        except OSError:
            self.memory.close()
            raise
        self.sock.setblocking(False)
        try:
            self._spawn(python, theirs, warnings)
        except BaseException:
            self.sock.close()
            self.memory.close()
            raise
        finally:
            theirs.close()

    def _spawn(self, python: str, theirs: socket.socket, warnings: Warnings) -> None:
        ours, out = os.pipe()
        fds = (theirs.fileno(), self.memory.fd)
        try:
            self._child = subprocess.Popen(
                boot.command(python, "runner", str(os.getpid()), *map(str, fds)),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                pass_fds=fds,
                env={name: value for name, value in os.environ.items() if name not in SERVICE_MANAGER},
                start_new_session=True,  # a terminal's interrupt is for the target, which ends it in order
            )
        except OSError as error:
            os.close(ours)
            raise StartError(f"option 'python': cannot run '{python}': {error.strerror}") from None
        finally:
            os.close(out)
        self.output = Output(ours, warnings)
        try:
            self._pidfd = os.pidfd_open(self._child.pid)
        except OSError:
            self._child.kill()
            self._child.wait()
            self.output.close()
            raise
        self.loop.add_reader(self._pidfd, self._exited)

    @property
    def pid(self) -> int:
        return self._child.pid

    # ---- setting up ----

    async def open(self, setup: Setup) -> Opened:
        """Has it load and open the plugin, however long that takes. StartError; then it is gone."""
        try:
            await self.loop.sock_sendall(self.sock, wire.frame(msgspec.to_builtins(setup)))
            answer = await self._answer()
        except (OSError, EOFError):
            await self.end(EXIT_SECONDS)
            how = ended_how(self.ended.result())
            raise StartError(f"{setup.script}: the plugin's process {how} before it was open") from None
        except ProtocolError as error:
            self.kill()
            await self.ended
            raise StartError(f"{setup.script}: {error}") from None
        except asyncio.CancelledError:
            self.kill()
            await self.ended
            raise
        if answer.opened is None:
            await self.end(EXIT_SECONDS)
            offers = f" (it offers: {', '.join(answer.exports)})" if answer.exports else ""
            raise StartError(printable(answer.error + offers))
        return answer.opened

    async def _answer(self) -> Answer:
        (length,) = wire.FRAME.unpack(await self._exactly(wire.FRAME.size))
        if length > wire.FRAME_MAX:
            raise ProtocolError(f"its process broke the channel: a frame of {length} bytes")
        body = await self._exactly(length)
        try:
            return msgspec.convert(json.loads(body), Answer)
        except (ValueError, msgspec.ValidationError) as error:
            raise ProtocolError(f"its process broke the channel: {error}") from None

    async def _exactly(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            more = await self.loop.sock_recv(self.sock, length - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    # ---- the end ----

    async def end(self, grace: float) -> int:
        """Waits for its end; after so many seconds it is told to, and then made to. Returns its status."""
        for seconds, number in ((grace, signal.SIGTERM), (TERM_SECONDS, signal.SIGKILL)):
            with contextlib.suppress(TimeoutError):
                return await asyncio.wait_for(asyncio.shield(self.ended), seconds)
            self.signal(number)
        return await self.ended

    def kill(self) -> None:
        self.signal(signal.SIGKILL)

    def signal(self, number: int) -> None:
        """To it and to what it started."""
        if not self.ended.done():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, number)

    def _exited(self) -> None:
        status = self._child.poll()
        if status is None:
            return
        # What it has started ends with it.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self.loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        if self.output is not None:
            self.output.close()
        self.ended.set_result(status)

    def release(self) -> None:
        """After its end."""
        self.sock.close()
        self.memory.close()


class Output:
    """What a process prints, as lines in the log. One that floods it waits, and most of it is dropped."""

    def __init__(self, fd: int, warnings: Warnings) -> None:
        self.loop = asyncio.get_running_loop()
        self.fd = fd
        self.warnings = warnings
        self._rest = b""
        self._pause: asyncio.TimerHandle | None = None
        os.set_blocking(fd, False)
        self.loop.add_reader(fd, self._readable)

    def _readable(self) -> None:
        data = self._read()
        if not data:
            self.loop.remove_reader(self.fd)
            return
        self._show(data)
        if len(data) >= OUTPUT_BYTES // 4:
            self.loop.remove_reader(self.fd)
            self._pause = self.loop.call_later(OUTPUT_SECONDS, self._go_on)

    def _go_on(self) -> None:
        self._pause = None
        self.loop.add_reader(self.fd, self._readable)

    def _read(self) -> bytes:
        try:
            return os.read(self.fd, OUTPUT_BYTES)
        except OSError:
            return b""

    def _show(self, data: bytes) -> None:
        *lines, rest = (self._rest + data).split(b"\n")
        self._rest = rest[-LINE_BYTES:]
        for line in lines[:OUTPUT_LINES]:
            self._say(line)
        if len(lines) > OUTPUT_LINES:
            self.warnings.say(f"(and {len(lines) - OUTPUT_LINES} more lines)")

    def _say(self, line: bytes) -> None:
        if line.strip():
            self.warnings.say(line[:LINE_BYTES].decode(errors="backslashreplace"))

    def close(self) -> None:
        """Shows what is there still; what a grandchild prints later is nobody's."""
        if self._pause is not None:
            self._pause.cancel()
        self._show(self._read() + b"\n")
        self.loop.remove_reader(self.fd)
        os.close(self.fd)


def ended_how(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = "unknown"
    return f"was killed by signal {-status} ({name})"


def default_python() -> str:
    return sys.executable


def described(opened: Opened) -> dict[str, Any]:
    built: dict[str, Any] = msgspec.to_builtins(opened)
    return built
