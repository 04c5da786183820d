# SPDX-License-Identifier: Apache-2.0
"""What is done about commands that do not end, a controller that breaks the protocol, and errors it logs.

A stuck command is aborted; when that does not help the controller is reset, and the datapath submits again
what was in flight. A controller that cannot be reset fails its requests, once it is kept from memory, and is
tried again until the node is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NoReturn

from target.datapath import Datapath, Object, lib
from target.drivers.protocol.nvme.brake import Brake
from target.drivers.protocol.nvme.controller import Controller
from target.drivers.protocol.nvme.errors import CommandError, ControllerError
from target.drivers.protocol.nvme.spec import status_name
from target.exports.warnings import Warnings

TRY_AGAIN = 5.0  # seconds from a reset that failed to the next
SETTLE = 0.05  # seconds from one late command or error to acting, on all that came meanwhile

BREACHES = {
    lib.BT_NVME_BAD_COMMAND: "a completion of a command that is not in flight",
    lib.BT_NVME_BAD_QUEUE: "a completion for another queue",
    lib.BT_NVME_BAD_HEAD: "a queue head outside of the queue",
}


def _commands(count: int) -> str:
    return "a command takes" if count == 1 else f"{count} commands take"


class Recovery:
    """Acts on the device's events.

    ``restart`` makes the controller, which is disabled, and its queues anew. ``release`` gives the controller
    up for good, after which it reaches no memory.
    """

    def __init__(
        self,
        name: str,
        datapath: Datapath,
        controller: Controller,
        brake: Brake,
        restart: Callable[[], Awaitable[None]],
        release: Callable[[], Awaitable[None]],
        log: logging.Logger,
    ) -> None:
        self._datapath = datapath
        self._controller = controller
        self._brake = brake
        self._restart = restart
        self._release = release
        self._warnings = Warnings(log, name)
        self._tasks: set[asyncio.Task[None]] = set()
        self.resetting = False
        self._reading_log = False
        self._late: list[tuple[int, int]] = []
        self._device: Object
        self._quiet: asyncio.Future[int] | None = None
        self._leaving = asyncio.Event()
        self.aborts = self.resets = self.failed_resets = 0

    def watch(self, device: Object) -> None:
        """From here on events may come."""
        self._device = device

    async def close(self) -> None:
        """What is under way ends here; a reset may be left half done. The queues are quiet afterwards."""
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._quiet is not None:
            await asyncio.wait([self._quiet])
        await self._quiesce()
        self._warnings.close()

    def interrupt(self) -> None:
        """Requests are not to wait for a controller that does not stop."""
        self._leaving.set()

    def counters(self) -> dict[str, Any]:
        return {
            "abort-commands": self.aborts,
            "controller-resets": self.resets,
            "failed-resets": self.failed_resets,
            "resetting": self.resetting,
        }

    def on_event(self, result: int) -> None:
        """See bt_nvme_trouble in nvme.h."""
        kind, queue, detail = result & 0xFF, result >> 8 & 0xFFFF, result >> 24 & 0xFFFF
        if kind == lib.BT_NVME_TIMEOUT:
            self._abort_soon(queue, detail)
        elif kind == lib.BT_NVME_STUCK:
            self.reset(f"a command in queue {queue} does not end")
        elif kind == lib.BT_NVME_PROTOCOL:
            self.reset(f"queue {queue} broke the protocol: {BREACHES.get(detail, detail)}")
        elif kind == lib.BT_NVME_ERROR:
            self.say(f"a command in queue {queue} failed: {status_name(detail)}")
            self.read_error_log()

    def say(self, text: str) -> None:
        self._warnings.say(text)

    # ---- abort ----

    def _abort_soon(self, queue: int, command: int) -> None:
        """Those that are late at the same time make one message."""
        if not self._late:
            self._start(self._abort_late())
        self._late.append((queue, command))

    async def _abort_late(self) -> None:
        await asyncio.sleep(SETTLE)
        late, self._late = self._late, []
        if self.resetting:
            return
        failure = self._controller.failure()
        if failure is not None:
            self.reset(failure)
            return
        self.say(f"{_commands(len(late))} too long and {'is' if len(late) == 1 else 'are'} aborted")
        self.aborts += len(late)
        ended = await asyncio.gather(*(self._abort(*command) for command in late))
        if missed := len(late) - sum(ended):
            self.say(f"the controller did not abort {missed} of {len(late)}")

    async def _abort(self, queue: int, command: int) -> bool:
        """Whether the controller says that it has done it."""
        try:
            return await self._controller.abort(queue, command)
        except CommandError as error:
            self.say(str(error))
        except ControllerError as error:
            self.reset(str(error))
        return False

    # ---- reset ----

    def reset(self, reason: str) -> None:
        if not self.resetting:
            self.resetting = True
            self._start(self._reset(reason))

    async def _reset(self, reason: str) -> None:
        self.say(f"{reason}: the controller is reset")
        while not await self._try_reset():
            await asyncio.sleep(TRY_AGAIN)
        self.resetting = False
        self.say("the controller works again")

    async def _try_reset(self) -> bool:
        """Whether the controller works afterwards; if not, all requests fail until it does."""
        await self._quiesce()
        self.resets += 1
        await self._stop()
        try:
            if self._brake.held:
                raise ControllerError(self._brake.trouble)
            await self._restart()
        except (ControllerError, OSError) as error:
            self.failed_resets += 1
            self.say(f"the reset failed: {error}")
            lib.bt_nvme_resume(self._device.ptr, -errno.EIO)
            return False
        lib.bt_nvme_resume(self._device.ptr, 0)
        return True

    async def _quiesce(self) -> None:
        """Once it has begun it ends, also when nobody waits for it."""
        cookie, self._quiet = self._datapath.cookie()
        lib.bt_nvme_quiesce(self._device.ptr, cookie)
        await asyncio.shield(self._quiet)

    async def _stop(self) -> None:
        """Returns when the controller reaches no memory any more. Until then requests wait."""
        while True:
            try:
                await self._brake.stop()
                return
            except ControllerError as error:
                self.failed_resets += 1
                self.say(f"the controller cannot be stopped, and requests wait for that: {error}")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._leaving.wait(), TRY_AGAIN)
            if self._leaving.is_set():
                await self._give_up()

    async def _give_up(self) -> NoReturn:
        """The process or the node ends: requests fail for good. Does not return."""
        self.say("the controller does not stop: it is given up")
        await self._release()
        lib.bt_nvme_resume(self._device.ptr, -errno.EIO)
        await asyncio.get_running_loop().create_future()  # until close
        raise AssertionError

    # ---- errors ----

    def read_error_log(self) -> None:
        """Says what is new in the controller's error log."""
        if not self._reading_log and not self.resetting:
            self._reading_log = True
            self._start(self._read_error_log())

    async def _read_error_log(self) -> None:
        try:
            await asyncio.sleep(SETTLE)
            for error in await self._controller.new_errors():
                self.say(str(error))
        except ControllerError as error:
            self.say(str(error))
        finally:
            self._reading_log = False

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
