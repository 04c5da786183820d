# SPDX-License-Identifier: Apache-2.0
"""A plugin over its life: one process after another as the policy says, and what requests meet meanwhile."""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any, Literal

from target.datapath import Fault
from target.drivers.protocol.nbdkit_plugin.channel import Channel
from target.drivers.protocol.nbdkit_plugin.process import (
    EXIT_SECONDS,
    Opened,
    Process,
    Setup,
    StartError,
    ended_how,
)
from target.exports.warnings import Warnings
from target.nbdkit import wire

log = logging.getLogger("blocktarget")

FIRST_DELAY = 1.0  # seconds before the second restart in a row; it doubles each time
LONGEST_DELAY = 30.0
STEADY_SECONDS = 30.0  # a process that served so long is restarted at once again
HOLD_SECONDS = 30.0  # how long requests wait for a process that starts

Restart = Literal["never", "on-failure"]


class Plugin:
    """``open``, then ``submit`` requests, then ``close``."""

    def __init__(self, label: str, python: str, setup: Setup, restart: Restart, close_seconds: float) -> None:
        self.label = label
        self.python = python
        self.setup = setup
        self.policy = restart
        self.close_seconds = close_seconds
        self.loop = asyncio.get_running_loop()
        self.warnings = Warnings(log, label)
        self.opened: Opened
        self.restarts = 0
        self._process: Process | None = None
        self._channel: Channel | None = None
        self._shut = False  # by the plugin itself
        self._held: list[Fault] | None = None  # requests that wait for a process, while one starts
        self._delay = 0.0
        self._since = 0.0
        self._closing = False
        self._why = ""
        self._timers: list[asyncio.TimerHandle] = []
        self._tasks: set[asyncio.Task[None]] = set()

    # ---- opening ----

    async def open(self) -> None:
        """StartError when the plugin cannot be had."""
        self.opened = await self._start()

    async def _start(self, check: Callable[[Opened], str] | None = None) -> Opened:
        process = Process(self.python, self.warnings)
        try:
            opened = await process.open(self.setup)
            if wrong := check(opened) if check else "":
                await self._end_opened(process)
                raise StartError(wrong)
        except BaseException:
            process.release()
            raise
        self._process = process
        self._channel = Channel(process.sock, process.memory, opened.maximum, self._asked, self._broken)
        self._since = time.monotonic()
        process.ended.add_done_callback(self._ended)
        return opened

    async def _end_opened(self, process: Process) -> None:
        process.sock.send(wire.REQUEST.pack(wire.CLOSE, 0, 0, 0, 0))
        await process.end(self.close_seconds)

    # ---- requests ----

    def submit(self, fault: Fault) -> None:
        if self._channel is not None and not self._shut:
            self._channel.submit(fault)
        elif self._held is not None:
            self._held.append(fault)
        else:
            fault.done(-errno.ESHUTDOWN if self._shut else -errno.EIO)

    # ---- what a process does by itself ----

    def _asked(self, kind: int) -> None:
        """nbdkit.shutdown or nbdkit.disconnect: what is under way is done, what comes later is refused."""
        what = "shutdown" if kind == wire.SHUTDOWN else "disconnect"
        self.warnings.say(f"the plugin asked for a {what}: further requests fail")
        if not self._shut and self._process is not None and self._channel is not None:
            self._shut = True
            self._spawn_task(self._wind_up(self._process, self._channel))

    async def _wind_up(self, process: Process, channel: Channel) -> None:
        end = time.monotonic() + self.close_seconds
        while channel.open and not channel.idle and time.monotonic() < end:
            await asyncio.sleep(0.01)
        if channel.open and channel.idle:
            channel.close_connection()
            await process.end(self.close_seconds)
        else:
            process.kill()

    def _broken(self, why: str) -> None:
        """Its channel is at its end, or holds nonsense. The process may be ending, too."""
        self._channel = None
        if self._process is None or self._closing or (self._shut and not why):
            return
        if why:
            self._why = f"broke its channel ({why}) and "
            self._process.kill()
        else:
            self._spawn_task(self._end_late(self._process))
        if self.policy == "on-failure" and not self._shut and self._held is None:
            self._held = []  # what comes before the process is seen to have ended waits for the next one, too

    async def _end_late(self, process: Process) -> None:
        await process.end(EXIT_SECONDS)

    def _ended(self, ended: asyncio.Future[int]) -> None:
        process, self._process = self._process, None
        channel, self._channel = self._channel, None
        assert process is not None
        if channel is not None:
            channel.take_last()
            channel.close(errno.EIO)
        process.release()
        why, self._why = self._why, ""
        if self._closing or (self._shut and not why):
            return
        self.warnings.say(f"the plugin's process {why}{ended_how(ended.result())}{self._outlook()}")
        if self.policy == "on-failure" and not self._shut:
            self._restart_later()

    def _outlook(self) -> str:
        if self._shut:
            return ""
        if self.policy == "never":
            return "; its requests fail from here on (restart=never)"
        if time.monotonic() - self._since >= STEADY_SECONDS:
            self._delay = 0.0
        return f"; it is started again in {self._delay:g} s" if self._delay else "; it is started again"

    # ---- restarting ----

    def _restart_later(self) -> None:
        delay = self._delay
        self._delay = min(max(FIRST_DELAY, 2 * delay), LONGEST_DELAY)
        if delay:
            self._fail_held()
            self._timer(delay, self._restart)
        else:
            self._restart()

    def _restart(self) -> None:
        self._held = self._held or []
        self._timer(HOLD_SECONDS, self._fail_held)
        self._spawn_task(self._start_again())

    async def _start_again(self) -> None:
        try:
            await self._start(self._same)
        except (StartError, OSError) as error:
            self._cancel_timers()  # the bound on waiting for this attempt is not one on the next
            self._fail_held()
            if not self._closing:
                self.warnings.say(f"the plugin cannot be started again: {error}")
                self._restart_later()
            return
        self.restarts += 1
        self._cancel_timers()
        held, self._held = self._held or [], None
        for fault in held:
            self.submit(fault)

    def _same(self, opened: Opened) -> str:
        """The users of the node know its size and what it can do: that has to stay."""
        for name in ("size", "can_write", "minimum"):
            before, now = getattr(self.opened, name), getattr(opened, name)
            if before != now:
                return f"{name} was {before} and is {now} now"
        self.opened = opened
        return ""

    def _fail_held(self) -> None:
        held, self._held = self._held or [], None
        for fault in held:
            fault.done(-errno.EIO)

    # ---- closing ----

    def interrupt(self) -> None:
        """The process is about to end: a request that the plugin does not answer may not hold that up."""
        self._closing = True
        self._cancel_timers()
        self._timer(self.close_seconds, self._kill)

    def _kill(self) -> None:
        self._fail_held()
        if self._process is not None and self._channel is not None and not self._channel.idle:
            self.warnings.say(f"the plugin has not answered for {self.close_seconds:g} s and is killed")
            self._process.kill()

    async def close(self) -> None:
        """The plugin's close and cleanup, within bounds."""
        self._closing = True
        self._cancel_timers()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._fail_held()
        process, channel = self._process, self._channel
        if process is not None:
            if channel is not None and channel.open:
                channel.close_connection()
            await self._end(process)
        self.warnings.close()

    async def _end(self, process: Process) -> None:
        status = await process.end(self.close_seconds)
        await asyncio.sleep(0)  # its done callback
        if status:
            self.warnings.say(f"the plugin's process {ended_how(status)} while it was closed")

    # ---- small things ----

    def _timer(self, seconds: float, call: Callable[[], None]) -> None:
        self._timers.append(self.loop.call_later(seconds, call))

    def _cancel_timers(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()

    def _spawn_task(self, work: Coroutine[Any, Any, None]) -> None:
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
