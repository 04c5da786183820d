# SPDX-License-Identifier: Apache-2.0
"""A plain QMP client for tests, which can also send what no client would, and a daemon with a monitor."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.support.daemon import Daemon

Json = dict[str, Any]
ANSWER_SECONDS = 30.0


def monitor_argv(path: Path, *, id: str = "mon", chardev: str = "", monitor: str = "") -> list[str]:
    """--chardev and --monitor for a unix socket; the last two are further options of each."""
    return [
        "--chardev",
        f"socket,id={id},path={path},server=on,wait=off{chardev}",
        "--monitor",
        f"chardev={id}{monitor}",
    ]


@contextmanager
def qmp_daemon(path: Path, *argv: str) -> Iterator[Daemon]:
    """A daemon with a monitor at ``path``; a test may have ended it by ``quit``."""
    daemon = Daemon(*monitor_argv(path), *argv)
    try:
        yield daemon.wait_ready()
        if daemon.process.poll() is None:
            daemon.stop()
    finally:
        daemon.kill()


class QmpError(Exception):
    """An answer that is an error."""

    def __init__(self, error: Json) -> None:
        super().__init__(f"{error['class']}: {error['desc']}")
        self.kind: str = error["class"]
        self.text: str = error["desc"]


class Qmp:
    """One connection. ``execute`` raises QmpError; ``events`` are those that came with answers."""

    def __init__(self, path: Path, *, negotiate: bool = True, oob: bool = False) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(ANSWER_SECONDS)
        try:
            self.socket.connect(str(path))
        except OSError:
            self.socket.close()
            raise
        self.events: list[Json] = []
        self._data = b""
        self.greeting: Json = self.receive()
        if negotiate:
            self.execute("qmp_capabilities", enable=["oob"] if oob else [])

    def __enter__(self) -> Qmp:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def receive(self) -> Json:
        """The next message. EOFError at the end."""
        while b"\n" not in self._data:
            data = self.socket.recv(65536)
            if not data:
                raise EOFError(self._data)
            self._data += data
        line, _, self._data = self._data.partition(b"\n")
        message: Json = json.loads(line)
        return message

    def answer(self) -> Json:
        """The next message that is not an event."""
        while "event" in (message := self.receive()):
            self.events.append(message)
        return message

    def ask(self, message: Json) -> Json:
        self.send(json.dumps(message).encode())
        return self.answer()

    def execute(self, command: str, /, **arguments: Any) -> Any:
        """Runs a command; underscores in the names of arguments stand for dashes."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        answer = self.ask({"execute": command, "arguments": named})
        if "error" in answer:
            raise QmpError(answer["error"])
        return answer["return"]

    def raw(self, data: bytes, answers: int) -> list[Json]:
        """Sends bytes as they are, and receives so many answers."""
        self.send(data)
        return [self.answer() for _ in range(answers)]

    def wait_event(self, name: str) -> Json:
        """The next event of that name, which may have come before."""
        while True:
            for i, event in enumerate(self.events):
                if event["event"] == name:
                    return self.events.pop(i)
            message = self.receive()
            assert "event" in message, message
            self.events.append(message)
