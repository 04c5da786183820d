# SPDX-License-Identifier: Apache-2.0
"""QEMU's command-line notation: ``key=value,outer.inner=value,list.0=value``, with ``,,`` for a comma.

Values stay strings here; which of them are numbers or booleans is the schema's to say (options.py). An
argument that begins with a brace is JSON instead.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import msgspec

from target.config.options import Notation, OptionError

# A name, or an index of a list, which is digits only.
FRAGMENT = re.compile(r"[A-Za-z][A-Za-z0-9_-]*|[0-9]+")
FRAGMENT_MAX = 127


class Argument(NamedTuple):
    """What an option's argument says. ``help``: it asks for help, as a word by itself."""

    value: dict[str, Any]
    notation: Notation
    help: bool


def parse_argument(text: str, implied_key: str | None = None) -> Argument:
    """JSON or key=value. ``implied_key`` is the key of a first value that has none."""
    if text.startswith("{"):
        return Argument(parse_json(text), Notation.JSON, False)
    parser = _Parser(text, implied_key)
    return Argument(parser.parse(), Notation.KEYVAL, parser.help)


def parse_flat(text: str, implied_key: str) -> Argument:
    """The older notation, in which names have no parts: ``implied,name=value``.

    A word by itself is a switch, and off when it begins with ``no``: server,nowait.
    """
    value: dict[str, Any] = {}
    help = False
    position = 0
    while position < len(text):
        part, position = _unescape(text, position)
        name, equals, given = part.partition("=")
        if equals:
            value[name] = given
        elif part in ("help", "?"):
            help = True
        elif not value and not help:
            value[implied_key] = part
        elif part.startswith("no"):
            value[part[2:]] = "off"
        else:
            value[part] = "on"
    return Argument(value, Notation.KEYVAL, help)


def parse_json(text: str) -> dict[str, Any]:
    """One JSON object."""
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
        raise OptionError(f"JSON parse error, {error}") from None
    assert isinstance(value, dict)
    return value


class _Parser:
    """One pass over the text, then lists are made of tables whose keys are all indices."""

    def __init__(self, text: str, implied_key: str | None) -> None:
        self.text = text
        self.implied_key = implied_key
        self.help = False
        self.root: dict[str, Any] = {}

    def parse(self) -> dict[str, Any]:
        position = 0
        while position < len(self.text):
            position = self._pair(position, position == 0)
        result = _lists(self.root, "")
        assert isinstance(result, dict)
        return result

    def _pair(self, start: int, first: bool) -> int:
        """Reads one pair; returns where the next one begins."""
        end = _find(self.text, start, "=,")
        word = self.text[start:end]
        if self.text[end : end + 1] != "=":
            if word in ("help", "?"):
                self.help = True
                return end + 1
            if first and word and self.implied_key is not None:
                self._put(self.implied_key, word)
                return end + 1
        self._check_key(word)
        if self.text[end : end + 1] != "=":
            raise OptionError(f"Expected '=' after parameter '{word}'")
        value, position = _unescape(self.text, end + 1)
        self._put(word, value)
        return position

    @staticmethod
    def _check_key(key: str) -> None:
        for i, fragment in enumerate(key.split(".")):
            if not FRAGMENT.fullmatch(fragment) or (i == 0 and fragment.isdigit()):
                raise OptionError(f"Invalid parameter '{key}'")
            if len(fragment) > FRAGMENT_MAX:
                raise OptionError(f"Parameter '{fragment}' is too long")

    def _put(self, key: str, value: str) -> None:
        table = self.root
        *outer, last = key.split(".")
        for i, fragment in enumerate(outer):
            inner = table.setdefault(fragment, {})
            if not isinstance(inner, dict):
                raise _inconsistent(".".join(outer[: i + 1]))
            table = inner
        if isinstance(table.get(last), dict):
            raise _inconsistent(key)
        table[last] = value


def _find(text: str, start: int, stops: str) -> int:
    return next((i for i in range(start, len(text)) if text[i] in stops), len(text))


def _unescape(text: str, start: int) -> tuple[str, int]:
    """The value at start, up to a comma that is not doubled, and where the next pair begins."""
    parts: list[str] = []
    while True:
        end = text.find(",", start)
        if end < 0:
            return "".join([*parts, text[start:]]), len(text)
        parts.append(text[start:end])
        if text[end + 1 : end + 2] != ",":
            return "".join(parts), end + 1
        parts.append(",")
        start = end + 2


def _lists(value: Any, path: str) -> Any:
    """Turns tables whose keys are indices into lists, at all levels."""
    if not isinstance(value, dict):
        return value
    result = {key: _lists(item, f"{path}{key}.") for key, item in value.items()}
    indices = [key for key in result if key.isdigit()]
    if not indices:
        return result
    if len(indices) < len(result):
        raise _inconsistent(path.rstrip("."))
    by_index = {int(key): item for key, item in result.items()}
    for i in range(len(result)):
        if i not in by_index:
            raise OptionError(f"Parameter '{path}{i}' missing")
    return [by_index[i] for i in range(len(result))]


def _inconsistent(key: str) -> OptionError:
    return OptionError(f"Parameters '{key}.*' used inconsistently")
