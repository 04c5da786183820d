# SPDX-License-Identifier: Apache-2.0
"""Events as clients get them: with the time, and not more often than their type permits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import msgspec

from target.events import Event, EventBus

Message = dict[str, Any]


class EventFeed:
    """Passes the bus's events on, until ``close``.

    Of a type with a rate the first one is passed on at once; of those that follow in this time, for each key,
    the newest at its end.
    """

    def __init__(self, bus: EventBus, send: Callable[[Message], None]) -> None:
        self._bus = bus
        self._send = send
        self._held: dict[object, Message | None] = {}  # keys whose time runs, with what waits for its end
        self._timers: dict[object, asyncio.TimerHandle] = {}
        bus.listen(self._hear)

    def close(self) -> None:
        self._bus.ignore(self._hear)
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    def _hear(self, event: Event) -> None:
        message = describe(event)
        if not event.rate_ns:
            self._send(message)
            return
        key = (event.name, event.key())
        if key in self._held:
            self._held[key] = message
        else:
            self._pass(key, message, event.rate_ns / 1e9)

    def _pass(self, key: object, message: Message, seconds: float) -> None:
        self._send(message)
        self._held[key] = None
        self._timers[key] = asyncio.get_running_loop().call_later(seconds, self._due, key, seconds)

    def _due(self, key: object, seconds: float) -> None:
        del self._timers[key]
        message = self._held.pop(key)
        if message is not None:
            self._pass(key, message, seconds)


def describe(event: Event) -> Message:
    """The event, with the time now."""
    seconds, nanoseconds = divmod(time.time_ns(), 10**9)
    stamp = {"seconds": seconds, "microseconds": nanoseconds // 1000}
    message: Message = {"timestamp": stamp, "event": event.name}
    data = msgspec.to_builtins(event)
    if data:
        message["data"] = data
    return message
