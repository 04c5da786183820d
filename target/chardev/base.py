# SPDX-License-Identifier: Apache-2.0
"""The base class of character devices. A backend registers by being defined (``class Null(Chardev, type=)``).

A device has one front end at most, a coroutine function that is called with each stream that the device has:
one for each client of a socket, one for its life otherwise. The device closes a stream when the call is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, ClassVar

from target.chardev.options import CommonOptions
from target.chardev.stream import Stream
from target.graph.errors import BlockError

if TYPE_CHECKING:
    from target.fdsets import Descriptors

log = logging.getLogger("blocktarget")

Serve = Callable[[Stream], Awaitable[None]]

_types: dict[str, type[Chardev]] = {}


class Chardev(ABC):
    """One device, from ``open`` to ``close``."""

    type: ClassVar[str]

    def __init_subclass__(cls, *, type: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if type is not None:
            cls.type = type
            _types[type] = cls

    def __init__(self, id: str, options: CommonOptions, descriptors: Descriptors) -> None:
        self.id = id
        self.options = options
        self.descriptors = descriptors
        self.front: Serve | None = None
        self.opened = False
        self._clients: set[asyncio.Task[None]] = set()
        self._log_fd = -1

    @property
    def filename(self) -> str:
        """As query-chardev names it."""
        return self.type

    @property
    def clients(self) -> int:
        """Streams that are served now."""
        return len(self._clients)

    async def open(self) -> None:
        """Makes it usable. BlockError says what cannot be had; then nothing is left behind."""
        self._open_log()
        try:
            await self._open()
        except BaseException:
            await self.close()
            raise
        self.opened = True

    async def close(self) -> None:
        """Ends its streams and removes what it has made."""
        await self.detach()
        await self._close()
        if self._log_fd >= 0:
            os.close(self._log_fd)
            self._log_fd = -1

    def attach(self, serve: Serve) -> None:
        """Makes ``serve`` the front end. BlockError when there is one."""
        if self.front is not None:
            raise BlockError(f"Device '{self.id}' is in use")
        self.front = serve
        self._attached()

    async def detach(self) -> None:
        """Ends the front end's streams; another one may be attached afterwards."""
        self.front = None
        clients = list(self._clients)
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)

    # ---- for backends ----

    @abstractmethod
    async def _open(self) -> None: ...

    async def _close(self) -> None:
        """Also after an ``_open`` that failed."""
        return None

    @abstractmethod
    def _attached(self) -> None:
        """There is a front end from now on."""

    def _start(self, stream: Stream) -> asyncio.Task[None]:
        """Has the front end serve a stream, in a task of its own."""
        assert self.front is not None
        client = asyncio.ensure_future(self._serve(self.front, stream))
        self._clients.add(client)
        client.add_done_callback(self._clients.discard)
        client.add_done_callback(lambda _: stream.close())  # even if it is cancelled before it began
        return client

    async def _serve(self, serve: Serve, stream: Stream) -> None:
        try:
            await serve(stream)
        except OSError as error:
            log.info("chardev '%s': %s", self.id, error)
        except Exception:  # a front end's bug ends this stream, and nothing else
            log.exception("chardev '%s': the front end failed", self.id)

    # ---- the log of what is written ----

    def _open_log(self) -> None:
        name = self.options.logfile
        if name is None:
            return
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
        flags |= os.O_APPEND if self.options.logappend else os.O_TRUNC
        self._log_fd = open_file(name, flags)

    def _log(self, data: bytes) -> None:
        if self._log_fd >= 0:
            with contextlib.suppress(OSError):  # a full disk does not stop a conversation
                os.write(self._log_fd, data)


def open_file(name: str, flags: int) -> int:
    """A descriptor. BlockError names the file."""
    try:
        return os.open(name, flags, 0o666)
    except OSError as error:
        raise BlockError.from_os(f"Could not open '{name}'", error) from None
    except ValueError:
        raise BlockError(f"Could not open {name!r}: it contains a null byte") from None


def types() -> dict[str, type[Chardev]]:
    """All backends by name, sorted."""
    return dict(sorted(_types.items()))
