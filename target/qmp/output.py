# SPDX-License-Identifier: Apache-2.0
"""What waits to be sent to a client. It is bounded, whatever the client does not read.

Answers are never dropped: who makes them waits for ``room`` before the next command. Events are, while more
than EVENTS_MAX bytes wait.
"""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

from target.chardev.stream import Stream

log = logging.getLogger("blocktarget")

ROOM = 64 << 10  # bytes that wait before the next command must
EVENTS_MAX = 1 << 20


def encode(message: Any, pretty: bool = False) -> bytes:
    """A message as QEMU writes it: ASCII only, with blanks, and a line end that terminals like."""
    try:
        text = json.dumps(message, indent=4 if pretty else None, allow_nan=False)
        if "\\ud" in text:
            text = json.dumps(_clean(message), indent=4 if pretty else None, allow_nan=False)
    except RecursionError:
        text = _failure("The answer is nested too deeply")
    except (TypeError, ValueError) as error:  # a handler's bug
        log.exception("an answer is not JSON")
        text = _failure(f"Internal error: the answer is not JSON: {error}")
    return text.encode() + b"\r\n"


def _failure(text: str) -> str:
    return json.dumps({"error": {"class": "GenericError", "desc": text}})


def _clean(value: Any) -> Any:
    """Names of files need not be text; bytes that are not become U+FFFD."""
    if isinstance(value, str):
        return value.encode(errors="surrogateescape").decode(errors="replace")
    if isinstance(value, dict):
        return {_clean(name): _clean(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return value


class Output:
    """The direction to the client; ``run`` sends what ``put`` took, until the client is gone or ``close``."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._waiting: list[bytes] = []
        self._bytes = 0
        self._changed = asyncio.Event()
        self._dropped = 0
        self.closed = False

    def put(self, data: bytes) -> None:
        if self.closed:
            return
        self._waiting.append(data)
        self._bytes += len(data)
        self._changed.set()

    def put_event(self, data: bytes) -> None:
        """Sends it unless the client has not read for long."""
        if self._bytes > EVENTS_MAX:
            if not self._dropped:
                log.warning("a QMP client does not read: it misses events")
            self._dropped += 1
            return
        self._dropped = 0
        self.put(data)

    async def room(self, below: int = ROOM) -> None:
        """Waits until so little is left to send that more may come."""
        while self._bytes > below and not self.closed:
            self._changed.clear()
            await self._changed.wait()

    async def flush(self) -> None:
        """Waits until the kernel has all."""
        await self.room(0)

    async def run(self) -> None:
        try:
            while True:
                while not self._waiting:
                    self._changed.clear()
                    await self._changed.wait()
                data = b"".join(self._waiting)
                self._waiting.clear()
                await self._stream.write(data)
                self._bytes -= len(data)
                self._changed.set()
        except OSError:
            pass  # the client is gone
        finally:
            self.closed = True
            self._waiting.clear()
            self._changed.set()
