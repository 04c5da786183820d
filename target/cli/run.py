# SPDX-License-Identifier: Apache-2.0
"""The life of a target process: start, announce, wait, stop. Shared by ``daemon`` and ``serve``."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import msgspec

from target.cli import systemd
from target.cli.background import Background, daemonize
from target.cli.errors import EXIT_ERROR, UsageError, report
from target.drivers.locking import open_locked_pidfile
from target.graph.errors import BlockError

if TYPE_CHECKING:
    from target.service import Service

COMMAND_GRACE = 5.0  # seconds that --run's command has to end after SIGTERM

ENDS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

Start = Callable[["Service"], Awaitable[None]]


class RunOptions(msgspec.Struct, kw_only=True):
    """How the process behaves, whatever it serves."""

    pidfile: str = ""
    background: bool = False
    command: str = ""
    describe: bool = False


class StartError(Exception):
    """What was asked for cannot be had; the text is for the user and says which option asked for it."""


def execute(start: Start, options: RunOptions) -> int:
    """Runs a target until it is told to stop; returns the exit status. May fork, and then ends the parent."""
    if options.background and options.command:
        raise UsageError("--daemonize and --run exclude each other")
    passed = systemd.passed_fds()  # before a fork: they are for this process
    background = daemonize() if options.background else None
    # From here on threads may start: these imports make some.
    import uvloop

    from target import chardev, drivers, exports
    from target.chardev.posix import Stdio

    chardev.load()
    Stdio.background = options.background
    drivers.load()
    exports.load()
    logging.basicConfig(stream=sys.stderr, format="blocktarget: %(message)s", level=logging.WARNING)
    return uvloop.run(Process(start, options, background, passed).run())


class Process:
    """One run of a target."""

    def __init__(
        self, start: Start, options: RunOptions, background: Background | None, passed: dict[str, int]
    ) -> None:
        self.start = start
        self.options = options
        self.background = background
        self.pidfile: PidFile | None = None
        self.passed = passed  # descriptors of the service manager by name
        self.signalled = False

    async def run(self) -> int:
        from target.service import Service

        loop = asyncio.get_running_loop()
        service = Service()
        service.started.clear()
        service.fds.named.update(self.passed)
        for number in ENDS:
            loop.add_signal_handler(number, self._stop, service, number)
        loop.add_signal_handler(signal.SIGUSR1, self._print_counters, service)
        status = EXIT_ERROR
        try:
            status = await self._serve(service)
        except (StartError, BlockError) as error:
            report(str(error))
        finally:
            systemd.notify("STOPPING=1")
            for failure in await service.close():
                report(f"while stopping: {failure}")
                status = EXIT_ERROR
            if self.pidfile is not None:
                self.pidfile.remove()
            for number in (*ENDS, signal.SIGUSR1):  # the interpreter's end would make them deadly
                signal.signal(number, signal.SIG_IGN)
        return status

    async def _serve(self, service: Service) -> int:
        """From the start to the moment to stop."""
        if not await self._until_stopped(service, self.start(service)):
            return service.end_status
        service.started.set()
        if self.options.pidfile:
            self.pidfile = PidFile(self.options.pidfile)
        self._announce(service)
        if self.options.command:
            return await self._run_command(service)
        await service.end.wait()
        return service.end_status

    @staticmethod
    async def _until_stopped(service: Service, work: Awaitable[None]) -> bool:
        """Does the work, or gives it up when the process is to end; False then."""
        task = asyncio.ensure_future(work)
        stop = asyncio.ensure_future(service.end.wait())
        await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            return False
        task.result()
        return True

    def _stop(self, service: Service, number: int) -> None:
        """First signal: an orderly end. Second: at once."""
        if self.signalled:
            os._exit(128 + number)
        self.signalled = True
        service.request_end()

    def _announce(self, service: Service) -> None:
        if not self.options.command:
            if self.options.describe:
                for id, export in service.exports.items():
                    for line in export.describe():
                        _print(f"{id}: {line}")
            _print("blocktarget: ready")
        systemd.notify("READY=1")
        if self.background is not None:
            self.background.ready()

    @staticmethod
    def _print_counters(service: Service) -> None:
        _print(json.dumps(service.counters()))

    async def _run_command(self, service: Service) -> int:
        """--run: the command's status becomes ours; when we are to end, the command ends first."""
        variables: dict[str, str] = {}
        for export in service.exports.values():
            variables = {**export.uri(), **variables}
        process = await asyncio.create_subprocess_exec(
            "/bin/sh", "-c", self.options.command, env={**os.environ, **variables}
        )
        waiting = asyncio.ensure_future(process.wait())
        stop = asyncio.ensure_future(service.end.wait())
        await asyncio.wait({waiting, stop}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if not waiting.done():
            process.terminate()
            await asyncio.wait({waiting}, timeout=COMMAND_GRACE)
        if not waiting.done():
            process.kill()
        status = await waiting
        if service.end_status:
            return service.end_status
        return status if status >= 0 else 128 - status


class PidFile:
    """A file with our process number, locked while we run and removed at the end."""

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)
        self.fd = open_locked_pidfile(self.path)
        os.ftruncate(self.fd, 0)
        os.write(self.fd, f"{os.getpid()}\n".encode())

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self.fd), os.stat(self.path)):
                os.unlink(self.path)
        os.close(self.fd)


def _print(line: str) -> None:
    # Nobody may be reading any more; that is no reason to stop serving.
    with contextlib.suppress(OSError):
        print(line, flush=True)
