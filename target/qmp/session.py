# SPDX-License-Identifier: Apache-2.0
"""One client of a monitor, from the greeting to the end of its stream.

Commands run one after another; while QUEUE of them wait, nothing is read. Without the capability ``oob``
none waits: commands and answers alternate. With it, commands sent by ``exec-oob`` overtake those that wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from target.chardev.stream import Stream
from target.qmp.dispatch import GENERIC, NOT_FOUND, execute, is_oob, read_call
from target.qmp.json_stream import MAX_SIZE, Budget, JsonStream, Message
from target.qmp.output import Output, encode
from target.qmp.registry import CommandError, Context

if TYPE_CHECKING:
    from target.service import Service

QUEUE = 8
PIECE = 2048  # bytes that are parsed at a stretch: the loop is others', too
LOOK_SECONDS = 0.25  # while commands run, how often it is looked whether the client is still there
FLUSH_SECONDS = 1.0


class Request(NamedTuple):
    """A message in its turn, with the descriptors that came with it."""

    message: Message
    fds: list[int]


class Gone(Exception):
    """The client cannot receive answers any more."""


class Session:
    """The conversation. It is the Monitor that commands see."""

    def __init__(self, service: Service, stream: Stream, budget: Budget, pretty: bool = False) -> None:
        self._service = service
        self._stream = stream
        self._budget = budget
        self._parser = JsonStream(budget)
        self._pretty = pretty
        self._negotiated = False
        self._oob = False
        self._output = Output(stream)
        self._queue: deque[Request] = deque()
        self._running = False  # a command in its turn
        self._ended = False
        self._changed = asyncio.Event()  # of the four above
        self._arrived: list[int] = []  # descriptors, for the next message
        self._fds: list[int] = []  # those that commands may take
        self._taken = False

    # ---- what commands see ----

    def take_fd(self) -> int | None:
        self._taken = True
        return self._fds.pop(0) if self._fds else None

    def negotiate(self, capabilities: list[str]) -> None:
        if self._negotiated:
            text = "Capabilities negotiation is already complete, command ignored"
            raise CommandError(NOT_FOUND, text)
        self._negotiated = True
        self._oob = "oob" in capabilities

    # ---- what the monitor calls ----

    def send(self, message: Any) -> None:
        self._output.put(encode(message, self._pretty))

    def send_event(self, event: Any) -> None:
        if self._negotiated:
            self._output.put_event(encode(event, self._pretty))

    async def serve(self) -> None:
        """Receives commands until the client is gone. ``work``, in another task, runs them."""
        sender = asyncio.ensure_future(self._output.run())
        try:
            with contextlib.suppress(Gone, OSError):
                await self._receive()
                await self._until(lambda: not (self._running or self._queue))
        finally:
            self._ended = True
            self._changed.set()
            self._parser.close()
            try:
                async with asyncio.timeout(FLUSH_SECONDS):
                    await self._output.flush()
            except TimeoutError:
                pass
            finally:
                sender.cancel()
                _close(self._arrived)

    async def work(self) -> None:
        """Runs the commands in turn. A client's end leaves the one that runs; those that wait are dropped."""
        try:
            while not self._ended:
                if self._queue:
                    await self._run(self._queue.popleft())
                else:
                    self._changed.clear()
                    await self._changed.wait()
        finally:
            for request in self._queue:
                _close(request.fds)
                self._budget.left += request.message.held
            self._queue.clear()
            _close(self._fds)

    # ---- receiving ----

    async def _receive(self) -> None:
        parser = self._parser
        while data := await self._stream.read():
            if fds := self._stream.take_fds():  # in place of those for which no message has come
                _close(self._arrived)
                self._arrived = fds
            for start in range(0, len(data), PIECE):
                parser.feed(data[start : start + PIECE])
                while (message := parser.next()) is not None:
                    await self._accept(message)
                await asyncio.sleep(0)

    async def _accept(self, message: Message) -> None:
        if self._oob and is_oob(message.value):
            await self._answer(message)
            return
        self._queue.append(Request(message, self._arrived))
        self._arrived = []
        self._changed.set()
        await self._until(self._may_read)

    def _may_read(self) -> bool:
        if not self._oob:
            return not (self._running or self._queue)
        return len(self._queue) < QUEUE and sum(r.message.size for r in self._queue) < MAX_SIZE

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Waits for what commands change, as long as the client is there."""
        while not condition():
            self._changed.clear()
            try:
                # Not wait_for, which begins to wait later, in a task: what changes until then is missed.
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._changed.wait()
            except TimeoutError:
                if self._stream.hung_up():
                    raise Gone from None

    # ---- running ----

    async def _run(self, request: Request) -> None:
        self._running = True
        self._changed.set()
        if request.fds:  # else those that nobody has taken stay for this command
            _close(self._fds)
            self._fds = request.fds
        self._taken = False
        try:
            if self._output.closed:
                self._budget.left += request.message.held
            else:
                await self._answer(request.message)
        finally:
            if self._taken:
                _close(self._fds)
            self._running = False
            self._changed.set()

    async def _answer(self, message: Message) -> None:
        """Runs a command. Its memory is given back when the client has read most of what is there for it."""
        try:
            self.send(await self._execute(message))
            await self._output.room()
        finally:
            self._budget.left += message.held

    async def _execute(self, message: Message) -> dict[str, Any]:
        answer: dict[str, Any]
        try:
            if message.error is not None:
                raise CommandError(GENERIC, message.error)
            call = read_call(message.value, self._oob)
            answer = {"return": await execute(Context(self._service, self), call, self._negotiated)}
        except CommandError as error:
            answer = {"error": {"class": error.kind, "desc": str(error)}}
        if isinstance(message.value, dict) and "id" in message.value:
            answer["id"] = message.value["id"]
        return answer


def _close(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())
