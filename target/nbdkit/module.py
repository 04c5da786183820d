# SPDX-License-Identifier: Apache-2.0
"""The ``nbdkit`` module that a plugin imports: nbdkit 1.42's functions and constants."""

from __future__ import annotations

import operator
import os
import sys
import threading
import time
import types
from collections.abc import Callable
from typing import TypeVar

from target.nbdkit import parse

CONSTANTS = {
    "THREAD_MODEL_SERIALIZE_CONNECTIONS": 0,
    "THREAD_MODEL_SERIALIZE_ALL_REQUESTS": 1,
    "THREAD_MODEL_SERIALIZE_REQUESTS": 2,
    "THREAD_MODEL_PARALLEL": 3,
    "FLAG_MAY_TRIM": 1,
    "FLAG_FUA": 2,
    "FLAG_REQ_ONE": 4,
    "FLAG_FAST_ZERO": 8,
    "FUA_NONE": 0,
    "FUA_EMULATE": 1,
    "FUA_NATIVE": 2,
    "CACHE_NONE": 0,
    "CACHE_EMULATE": 1,
    "CACHE_NATIVE": 2,
    "EXTENT_HOLE": 1,
    "EXTENT_ZERO": 2,
}
T = TypeVar("T")

INT_MAX = (1 << 31) - 1
STDERR = 2


class ThreadError(threading.local):
    """The errno that set_error recorded in this thread, 0 for none."""

    error = 0


class Server:
    """What the module's functions stand on: the state of this process, and ways to the target."""

    def __init__(self, script: str, verbose: bool, ask: Callable[[int], None], own: frozenset[int]) -> None:
        self.script = script
        self.verbose = verbose
        self.ask = ask  # sends a SHUTDOWN or DISCONNECT
        self.own = own  # descriptors of the channel
        self.export_name: str | None = None  # while there is a connection
        self.ending = threading.Event()
        self.thread = ThreadError()

    def report(self, text: str) -> None:
        """An error for the log. Straight to the descriptor: a plugin may have replaced sys.stderr."""
        data = f"{text.rstrip()}\n".encode(errors="backslashreplace")
        while data:
            data = data[os.write(STDERR, data) :]

    def debug(self, text: str) -> None:
        if self.verbose:
            self.report(f"{self.script}: debug: {text}")


class Functions:
    """The functions by their names in the module."""

    def __init__(self, server: Server, shutdown: int, disconnect: int) -> None:
        self._server = server
        self._shutdown = shutdown
        self._disconnect = disconnect

    def debug(self, msg: str, /) -> None:
        self._server.debug(_text(msg, "debug"))

    def set_error(self, err: int, /) -> None:
        number = operator.index(err)
        if not -INT_MAX - 1 <= number <= INT_MAX:
            raise OverflowError("signed integer is out of the range of a C int")
        self._server.thread.error = number

    def export_name(self) -> str:
        if self._server.export_name is None:
            self._server.report("no connection in this thread")
            raise RuntimeError("nbdkit.export_name failed")
        return self._server.export_name

    def is_tls(self) -> bool:
        self._need_connection("is_tls")
        return False

    def shutdown(self) -> None:
        self._server.ending.set()
        self._server.ask(self._shutdown)

    def disconnect(self, force: object, /) -> None:
        self._server.ask(self._disconnect)

    def stdio_safe(self) -> bool:
        return False

    def parse_size(self, str: str, /) -> int:
        return self._parsed("size", lambda: parse.parse_size(_text(str, "parse_size")))

    def parse_delay(self, what: str, str: str, /) -> tuple[int, int]:
        texts = _text(what, "parse_delay"), _text(str, "parse_delay")
        return self._parsed("delay", lambda: parse.parse_delay(*texts))

    def parse_probability(self, what: str, str: str, /) -> float:
        texts = _text(what, "parse_probability"), _text(str, "parse_probability")
        return self._parsed("probability", lambda: parse.parse_probability(*texts))

    def read_password(self, value: str, /) -> bytes:
        try:
            return parse.read_password(_text(value, "read_password"), self._server.own)
        except ValueError as error:
            self._server.report(str(error))
            raise RuntimeError("nbdkit.read_password failed") from None

    def nanosleep(self, sec: int, nsec: int, /) -> None:
        """Ends early, with an error, when the node is closed or the plugin asked for a shutdown."""
        seconds = sec + nsec // 10**9
        if sec < 0 or nsec < 0 or seconds >= INT_MAX:
            self._server.report("sleep request is too long")
            raise RuntimeError("nbdkit.nanosleep failed")
        end = time.monotonic() + seconds + nsec % 10**9 / 1e9
        while (left := end - time.monotonic()) > 0:
            if self._server.ending.wait(min(left, threading.TIMEOUT_MAX)):
                self._server.report("aborting sleep because of server shut down")
                raise RuntimeError("nbdkit.nanosleep failed")

    # The peer is the target itself, which has no address; nbdkit says the same where a socket is not open.

    def peer_pid(self) -> int:
        raise self._no_peer("peer_pid")

    def peer_uid(self) -> int:
        raise self._no_peer("peer_uid")

    def peer_gid(self) -> int:
        raise self._no_peer("peer_gid")

    def peer_security_context(self) -> str:
        raise self._no_peer("peer_security_context")

    def peer_tls_dn(self) -> str:
        self._need_connection("peer_tls_dn")
        return ""

    def peer_tls_issuer_dn(self) -> str:
        self._need_connection("peer_tls_issuer_dn")
        return ""

    def _need_connection(self, name: str) -> None:
        if self._server.export_name is None:
            self._server.report("no connection in this thread")
            raise RuntimeError(f"nbdkit.{name} failed")

    def _no_peer(self, name: str) -> RuntimeError:
        self._need_connection(name)
        self._server.report("socket not open")
        return RuntimeError(f"nbdkit.{name} failed")

    def _parsed(self, what: str, parse: Callable[[], T]) -> T:
        try:
            return parse()
        except ValueError as error:
            self._server.report(str(error))
            raise ValueError(f"Unable to parse string as {what}") from None


def _text(value: object, function: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{function}() argument must be str, not {type(value).__name__}")
    if "\0" in value:
        raise ValueError("embedded null character")
    return value


def install(server: Server, shutdown: int, disconnect: int) -> None:
    """Makes ``import nbdkit`` work."""
    module = types.ModuleType("nbdkit", "Module used to access nbdkit server API")
    functions = Functions(server, shutdown, disconnect)
    for name in dir(functions):
        if not name.startswith("_"):
            setattr(module, name, getattr(functions, name))
    for name, value in CONSTANTS.items():
        setattr(module, name, value)
    sys.modules["nbdkit"] = module
