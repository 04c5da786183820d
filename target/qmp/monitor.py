# SPDX-License-Identifier: Apache-2.0
"""A QMP monitor: serves the clients of a character device (``--monitor chardev=<id>``)."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from target.chardev.stream import Stream
from target.config.options import Notation, parse
from target.graph.errors import BlockError
from target.qmp import commands
from target.qmp.commands.control import version
from target.qmp.events import EventFeed
from target.qmp.json_stream import Budget
from target.qmp.session import Session

if TYPE_CHECKING:
    from target.service import Service


class MonitorOptions(msgspec.Struct, rename="kebab", kw_only=True, forbid_unknown_fields=True):
    """Options of a monitor, named as in QMP's MonitorOptions."""

    chardev: str
    id: str | None = None
    mode: Literal["readline", "control"] = "control"
    pretty: bool = False


def parse_monitor(value: Any, notation: Notation = Notation.JSON) -> MonitorOptions:
    """The typed options. OptionError says which member is wrong."""
    return parse(value, MonitorOptions, notation)


class Monitor:
    """One monitor, from ``start`` to ``close``; its clients come and go, several at a time."""

    budget = Budget()  # of all monitors: it is the process's memory

    def __init__(self, service: Service, options: MonitorOptions) -> None:
        if options.mode != "control":
            raise BlockError("Only QMP is supported")
        if options.chardev not in service.chardevs:
            raise BlockError(f'chardev "{options.chardev}" not found')
        self.options = options
        self._service = service
        self._sessions: set[Session] = set()
        self._working: set[asyncio.Task[None]] = set()
        self._feed: EventFeed | None = None
        self._names = service.fds.add_monitor()  # of descriptors: see getfd

    def start(self) -> None:
        """From here on clients are served. BlockError when something else has the device."""
        commands.load()
        self._service.chardevs[self.options.chardev].attach(self.serve)
        self._feed = EventFeed(self._service.events, self._send_event)

    async def stop(self) -> None:
        """Gives up the commands that run, and runs no more. Clients still get events."""
        for task in self._working:
            task.cancel()
        await asyncio.gather(*self._working, return_exceptions=True)

    def close(self) -> None:
        """The end, after its device's."""
        self._service.fds.remove_monitor(self._names)
        if self._feed is not None:
            self._feed.close()

    async def serve(self, stream: Stream) -> None:
        """One client, to its end. A command that runs then goes on by itself.

        Who comes while the program starts waits for the greeting: nobody sees half of what it serves.
        """
        await self._service.started.wait()
        session = Session(self._service, stream, self.budget, self.options.pretty)
        self._service.fds.use_names(self._names)
        work = asyncio.ensure_future(session.work())
        self._working.add(work)
        work.add_done_callback(self._working.discard)
        self._sessions.add(session)
        self._service.fds.monitor_opened()
        try:
            session.send({"QMP": {"version": version(), "capabilities": ["oob"]}})
            await session.serve()
        finally:
            self._sessions.discard(session)
            self._service.fds.monitor_closed()

    def _send_event(self, event: dict[str, Any]) -> None:
        for session in self._sessions:
            session.send_event(event)
