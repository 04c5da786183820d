# SPDX-License-Identifier: Apache-2.0
"""What C tells Python: results for who waits, faults for the handlers of objects, and news of sessions."""

from __future__ import annotations

import asyncio
import errno
import sys
import traceback
from collections.abc import Callable, Coroutine
from typing import Any

from target.datapath._datapath import ffi, lib
from target.datapath.constants import Op
from target.datapath.fault import Fault
from target.datapath.objects import Gate, Object

EVENTS_AT_ONCE = 256


class Events:
    """Who gets which event, by the tag that was given to C. A part of ``Datapath``."""

    dp: Any

    def __init__(self) -> None:
        self._tag = 0
        self._objects: dict[int, Object] = {}
        self._futures: dict[int, asyncio.Future[int]] = {}
        self._kept: dict[int, Any] = {}
        self._sessions: dict[int, Callable[[int], None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._events = ffi.new("struct bt_event[]", EVENTS_AT_ONCE)

    def _new_tag(self) -> int:
        self._tag += 1
        return self._tag

    def cookie(self) -> tuple[int, asyncio.Future[int]]:
        """A cookie for a call into C, and the future that gets its DONE event's result."""
        tag = self._new_tag()
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._futures[tag] = future
        return tag, future

    def keep(self, cookie: int, buffer: Any) -> None:
        """Holds a buffer until the cookie's DONE event."""
        self._kept[cookie] = buffer

    def session(self, on_event: Callable[[int], None]) -> int:
        """A tag for a session of an export or a device; on_event gets the results of its SESSION events."""
        tag = self._new_tag()
        self._sessions[tag] = on_event
        return tag

    def end_session(self, tag: int) -> None:
        self._sessions.pop(tag, None)

    def _drain(self) -> None:
        while True:
            count = lib.bt_events(self.dp, self._events, EVENTS_AT_ONCE)
            for i in range(count):
                self._dispatch(self._events[i])
            if count < EVENTS_AT_ONCE:
                return

    def _dispatch(self, event: Any) -> None:
        kind = event.type
        if kind == lib.BT_EVENT_FAULT:
            self._fault(self._objects[event.tag], Fault(event))
        elif kind == lib.BT_EVENT_DONE:
            self._kept.pop(event.tag, None)
            future = self._futures.pop(event.tag)
            if not future.cancelled():
                future.set_result(event.result)
        elif kind == lib.BT_EVENT_GRANTS:
            on_low_grants = self._objects[event.tag].on_low_grants
            if on_low_grants is not None:
                on_low_grants(event.length)
        elif kind == lib.BT_EVENT_SESSION:
            on_event = self._sessions.get(event.tag)
            if on_event is not None:
                on_event(event.result)
        elif kind == lib.BT_EVENT_FAILED:
            gate = self._objects[event.tag]
            assert isinstance(gate, Gate)
            if gate.on_failure is not None:
                gate.on_failure(Op(event.op), event.offset, event.length, -event.result)
        elif kind == lib.BT_EVENT_THRESHOLD:
            on_threshold = self._objects[event.tag].on_threshold
            if on_threshold is not None:
                on_threshold(event.offset, event.length)
        elif kind == lib.BT_EVENT_RELEASED:
            del self._objects[event.tag]

    def _fault(self, target: Object, fault: Fault) -> None:
        """Steps the handler at once; only one that suspends becomes a task (several times dearer)."""
        if target.handler is None:
            fault.done(-errno.EIO)
            return
        try:
            coroutine = target.handler(fault)
            if coroutine is None:
                return
            waits_for = coroutine.send(None)
        except StopIteration:
            self._answer(fault, None)
        except Exception as error:  # noqa: BLE001 - whatever a driver raises fails its request, and is shown
            self._answer(fault, error)
        else:
            task = asyncio.ensure_future(self._finish(coroutine, waits_for, fault))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _finish(self, coroutine: Coroutine[Any, Any, None], waits_for: Any, fault: Fault) -> None:
        try:
            await _Resumed(coroutine, waits_for)
        except Exception as error:  # noqa: BLE001 - as in _fault
            self._answer(fault, error)
        except asyncio.CancelledError as error:
            self._answer(fault, error)
            raise
        else:
            self._answer(fault, None)

    @staticmethod
    def _answer(fault: Fault, error: BaseException | None) -> None:
        """Every fault is answered: what the handler left open, or died of, fails with the matching errno."""
        if error is not None and not (isinstance(error, OSError) and error.errno):
            traceback.print_exception(error, file=sys.stderr)
        if fault.answered:
            return
        number = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
        fault.done(-number)


class _Resumed:
    """Awaits a coroutine that has been stepped once outside of a task, and waits for something now."""

    def __init__(self, coroutine: Coroutine[Any, Any, None], waits_for: Any) -> None:
        self.coroutine = coroutine
        self.waits_for = waits_for

    def __await__(self) -> Any:
        waits_for = self.waits_for
        while True:
            try:
                value = yield waits_for
            except BaseException as error:  # noqa: BLE001 - it is for the coroutine
                try:
                    waits_for = self.coroutine.throw(error)
                except StopIteration:
                    return
            else:
                try:
                    waits_for = self.coroutine.send(value)
                except StopIteration:
                    return
