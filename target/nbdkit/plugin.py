# SPDX-License-Identifier: Apache-2.0
"""A plugin's script and its callbacks, with nbdkit's rules: defaults, both API versions, errors.

Callbacks are looked up by name at each call, in the script's globals. One that fails has been reported when
Failed is raised; the caller takes the errno from the thread.
"""

from __future__ import annotations

import sys
import traceback
import types
from collections.abc import Callable
from typing import Any, cast

from target.nbdkit.module import Server

API_MAX = 2
REQUIRED = ("open", "get_size", "pread")
SERIALIZE_ALL_REQUESTS, PARALLEL = 1, 3

Callback = Callable[..., Any]


class Failed(Exception):
    """A callback did not do what it was asked for. The text is the last line of what was reported."""


class Plugin:
    """The script, loaded. ``call`` runs a callback; the named methods are those without a handle."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.script = server.script
        self.main = types.ModuleType("__main__")
        self.api = 1
        self._told: set[str] = set()

    # ---- loading ----

    def load(self) -> None:
        self._run()
        if not all(self.find(name) for name in REQUIRED):
            raise self.failed(
                f"{self.script}: one of the required callbacks 'open', 'get_size' or 'pread' is not defined"
                " by this Python script.  nbdkit requires these callbacks."
            )
        self.api = self._api_version()

    def _run(self) -> None:
        self.main.__dict__.update(__file__=self.script, __builtins__=__builtins__, __annotations__={})
        sys.modules["__main__"] = self.main
        try:
            with open(self.script, "rb") as file:
                source = file.read()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise self.failed(f"{self.script}: cannot open file: {reason}") from None
        try:
            exec(compile(source, self.script, "exec", dont_inherit=True), self.main.__dict__)
        except SystemExit:
            raise
        except BaseException as error:  # noqa: BLE001 - whatever a script raises is shown
            self.server.report("".join(traceback.format_exception(type(error), error, _own(error))))
            raise self.failed(f"{self.script}: error running this script: {_brief(error)}") from None
        finally:
            self.main.__dict__.pop("__file__", None)  # gone when callbacks run, as in nbdkit

    def _api_version(self) -> int:
        value = getattr(self.main, "API_VERSION", 1)
        number = as_long(value)
        if number is None or not 1 <= number <= API_MAX:
            shown = -1 if number is None else number
            raise self.failed(
                f"{self.script}: API_VERSION requested unknown version: {shown}.  "
                f"This plugin supports API versions between 1 and {API_MAX}."
            )
        return number

    # ---- calling ----

    def find(self, name: str) -> Callback | None:
        """The callback, or None when the script has none now."""
        try:
            found = getattr(self.main, name)
        except Exception:  # noqa: BLE001 - a module's own __getattr__ may raise anything
            return None
        if callable(found):
            self._told.discard(name)
            return cast("Callback", found)
        if name not in self._told:
            self._told.add(name)
            self.server.report(f"{self.script}: object {name} isn't callable")
        return None

    def call(self, name: str, callback: Callback, *arguments: Any) -> Any:
        try:
            return callback(*arguments)
        except BaseException as error:  # noqa: BLE001 - whatever a callback raises fails it, and is shown
            raise self.raised(name, error) from None

    def call_if(self, name: str, *arguments: Any) -> Any:
        """Calls it when there is one; returns None otherwise."""
        callback = self.find(name)
        return None if callback is None else self.call(name, callback, *arguments)

    def need(self, name: str, *arguments: Any) -> Any:
        callback = self.find(name)
        if callback is None:
            raise self.failed(f"{self.script}: missing callback: {name}")
        return self.call(name, callback, *arguments)

    def raised(self, name: str, error: BaseException) -> Failed:
        """Reports an exception with its traceback, from the plugin's frames on."""
        lines = traceback.format_exception(type(error), error, _own(error))
        self.server.report(f"{self.script}: {name}: error: {''.join(lines)}")
        return Failed(f"{self.script}: {name}: {_brief(error)}")

    def failed(self, text: str) -> Failed:
        self.server.report(text)
        return Failed(text)

    # ---- callbacks of the whole plugin ----

    def config(self, key: str, value: str) -> None:
        callback = self.find("config")
        if callback is None:
            raise self.failed(f"{self.script}: this plugin does not need command line configuration")
        self.call("config", callback, key, value)

    def thread_model(self) -> int:
        callback = self.find("thread_model")
        if callback is None:
            return SERIALIZE_ALL_REQUESTS
        number = as_int(self.call("thread_model", callback))
        if number is None or number < 0:
            raise self.failed(f"{self.script}: thread_model method did not return a thread model")
        return min(number, PARALLEL)

    def default_export(self, readonly: bool) -> str:
        callback = self.find("default_export")
        if callback is None:
            return ""
        name = as_text(self.call("default_export", callback, readonly, False))
        if name is None:
            raise self.failed("default_export method did not return a string")
        return name

    def list_exports(self, readonly: bool) -> list[tuple[str, str]]:
        """Names and descriptions."""
        callback = self.find("list_exports")
        if callback is None:
            return [("", "")]
        found = self.call("list_exports", callback, readonly, False)
        try:
            items = iter(found)
        except TypeError:
            raise self.failed("list_exports method did not return something which is iterable") from None
        return [self._export(item) for item in _until_raised(items)]

    def _export(self, item: Any) -> tuple[str, str]:
        name = as_text(item)
        if name is not None:
            return name, ""
        if not isinstance(item, tuple) or len(item) != 2:
            raise self.failed("list_exports method did not return an iterable of 2-tuples")
        name, description = map(as_text, item)
        if name is None or description is None:
            raise self.failed("list_exports method did not return an iterable of string 2-tuples")
        return name, description


def as_text(value: Any) -> str | None:
    """nbdkit's string: str or bytes, up to the first NUL."""
    if isinstance(value, bytes):
        value = value.decode(errors="surrogateescape")
    return value.partition("\0")[0] if isinstance(value, str) else None


def as_int(value: Any) -> int | None:
    """The same, assigned to an int of C."""
    number = as_long(value)
    return None if number is None else ((number + (1 << 31)) & 0xFFFFFFFF) - (1 << 31)


def as_long(value: Any) -> int | None:
    """What C's PyLong_AsLong makes of it; None where that fails."""
    try:
        number = value.__index__()
    except Exception:  # noqa: BLE001 - an __index__ of a plugin's own may raise anything
        return None
    if not isinstance(number, int) or not -(1 << 63) <= number < 1 << 63:
        return None
    return int(number)


def _until_raised(items: Any) -> Any:
    """nbdkit takes an iterator that raises for one that has ended."""
    while True:
        try:
            item = next(items)
        except BaseException:  # noqa: BLE001 - as the docstring says
            return
        yield item


def _own(error: BaseException) -> types.TracebackType | None:
    """The traceback without this module's frames at its top."""
    frame = error.__traceback__
    while frame is not None and frame.tb_frame.f_code.co_filename == __file__:
        frame = frame.tb_next
    return frame


def _brief(error: BaseException) -> str:
    return "".join(traceback.format_exception_only(type(error), error)).strip().splitlines()[-1]
