# SPDX-License-Identifier: Apache-2.0
"""One QMP connection that blocks, for programs that do one thing at a time. It passes descriptors along."""

from __future__ import annotations

import array
import json
import os
import socket
import time
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Any

Json = dict[str, Any]

RECEIVE_BYTES = 1 << 16
ANSWER_MAX = 256 << 20  # bytes; a server that sends more in one message is none


class ClientError(Exception):
    """There is no server, or it does not speak QMP, or it has gone."""


class CommandFailed(Exception):
    """The server's answer is an error. ``message`` is the whole answer."""

    def __init__(self, message: Json) -> None:
        error = message["error"]
        super().__init__(f"{error.get('class')}: {error.get('desc')}")
        self.message = message


def default_socket() -> str:
    """$BLOCKTARGET_SOCKET, or the first that exists of the user's and the system's."""
    given = os.environ.get("BLOCKTARGET_SOCKET")
    if given:
        return given
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    places = [f"{runtime}/blocktarget/qmp.sock"] if runtime else []
    places.append("/run/blocktarget/qmp.sock")
    return next((place for place in places if os.path.exists(place)), places[-1])


class Client:
    """Connected and negotiated. ``timeout``: seconds for each answer; None waits for ever."""

    def __init__(self, path: str, timeout: float | None = None) -> None:
        self.events: deque[Json] = deque()
        self._timeout = timeout
        self._buffer = b""
        self._lines: list[bytes] = []  # of a message that is not complete
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(timeout)
            try:
                self._socket.connect(path)
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
                raise ClientError(f"Could not connect to '{path}': {reason}") from None
            if "QMP" not in self._message(self._deadline()):
                raise ClientError(f"'{path}' is not a QMP server")
            self.execute("qmp_capabilities")
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def execute(self, name: str, arguments: Json | None = None, fds: Sequence[int] = ()) -> Any:
        """The command's result. CommandFailed, ClientError."""
        return self.ask({"execute": name, "arguments": arguments or {}}, fds)["return"]

    def ask(self, message: Json, fds: Sequence[int] = ()) -> Json:
        """The answer to a message; events that come before it are kept."""
        self._send(json.dumps(message).encode(), fds)
        deadline = self._deadline()
        while True:
            answer = self._message(deadline)
            if "event" in answer:
                self.events.append(answer)
            elif "error" in answer:
                raise CommandFailed(answer)
            elif "return" in answer:
                return answer

    def next_event(self, timeout: float | None = None) -> Json | None:
        """The next event; None when there was none in this time (seconds)."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.events:
            try:
                message = self._message(deadline)
            except TimeoutError:
                return None
            if "event" in message:
                self.events.append(message)
        return self.events.popleft()

    def _deadline(self) -> float | None:
        return None if self._timeout is None else time.monotonic() + self._timeout

    def _send(self, data: bytes, fds: Sequence[int]) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            sent = self._socket.sendmsg([data], rights)
            self._socket.sendall(data[sent:])
        except TimeoutError:
            raise ClientError("the server does not take the command") from None
        except OSError as error:
            raise ClientError(f"Could not send: {error.strerror}") from None

    def _message(self, deadline: float | None) -> Json:
        """The next message, which may be spread over lines. TimeoutError, ClientError."""
        while True:
            line = self._line(deadline)
            self._lines.append(line)
            if len(self._lines) > 1 and line.rstrip() != b"}":
                continue
            try:
                found = json.loads(b"\n".join(self._lines))
            except ValueError:
                if sum(map(len, self._lines)) > ANSWER_MAX:
                    raise ClientError("the server does not speak QMP") from None
                continue
            self._lines.clear()
            if not isinstance(found, dict):
                raise ClientError("the server does not speak QMP")
            return found

    def _line(self, deadline: float | None) -> bytes:
        parts = [self._buffer]
        while b"\n" not in parts[-1]:
            if deadline is not None and deadline <= time.monotonic():
                self._buffer = b"".join(parts)
                raise TimeoutError
            self._socket.settimeout(None if deadline is None else max(deadline - time.monotonic(), 0.001))
            try:
                part = self._socket.recv(RECEIVE_BYTES)
            except TimeoutError:
                continue
            except OSError as error:
                raise ClientError(f"The connection is lost: {error.strerror}") from None
            if not part:
                raise ClientError("The server has closed the connection")
            parts.append(part)
            if sum(map(len, parts)) > ANSWER_MAX:
                raise ClientError("the server does not speak QMP")
        line, _, self._buffer = b"".join(parts).partition(b"\n")
        return line
