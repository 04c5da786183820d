# SPDX-License-Identifier: Apache-2.0
"""What the target tells whoever listens: events by name, sent by the graph, by exports, by jobs.

Nothing here knows who listens; QMP monitors do, and tests.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, ClassVar

import msgspec

log = logging.getLogger("blocktarget")

SECOND_NS = 10**9

_types: dict[str, type[Event]] = {}


class Event(msgspec.Struct, rename="kebab", kw_only=True, omit_defaults=True):
    """One event; the fields are its data. It is declared by a class with a ``name``, as QMP has it.

    ``rate_ns``: of events whose ``key`` is equal, clients get one in this time, the newest (0: all).
    """

    name: ClassVar[str]
    rate_ns: ClassVar[int] = 0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _types[cls.name] = cls

    def key(self) -> object:
        """Events of a rate-limited type with different keys do not displace one another."""
        return None


def types() -> dict[str, type[Event]]:
    """All event types by name, sorted."""
    return dict(sorted(_types.items()))


Listener = Callable[[Event], None]


class EventBus:
    """Listeners hear each event at once, in the order of sending."""

    def __init__(self) -> None:
        self._listeners: list[Listener] = []

    def listen(self, listener: Listener) -> None:
        self._listeners.append(listener)

    def ignore(self, listener: Listener) -> None:
        """Ends what ``listen`` began."""
        self._listeners.remove(listener)

    def send(self, event: Event) -> None:
        for listener in list(self._listeners):
            try:
                listener(event)
            except Exception:  # a listener's bug must not fail what the sender does
                log.exception("a listener of %s failed", event.name)
