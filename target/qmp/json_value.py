# SPDX-License-Identifier: Apache-2.0
"""Builds a JSON value from its tokens, one at a time, without recursion. Errors are worded as by QEMU.

After an error the rest of the message is ignored: json_stream.py knows where the message ends.
"""

from __future__ import annotations

import contextlib
import re
import sys
from enum import Enum, auto
from typing import Any

import msgspec

WORDS = {b"true": True, b"false": False, b"null": None}
ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", '"': '"', "'": "'", "\\": "\\", "/": "/"}
ESCAPE = re.compile(r"\\(?:u(.{0,4})|(.))", re.DOTALL)
HEX = re.compile(r"[0-9a-fA-F]{4}")
# Code points that Unicode keeps for internal use; QEMU refuses them, too.
NONCHARACTER = re.compile(
    "[\ufdd0-\ufdef" + "".join(chr(p << 16 | 0xFFFE) + chr(p << 16 | 0xFFFF) for p in range(17)) + "]"
)
INT64 = range(-(1 << 63), 1 << 64)  # integers that stay exact; others become floats, as in QEMU
DIGITS = 20  # of the longest of them, with its sign


class JsonError(ValueError):
    """The text is not JSON, or more of it than is taken."""


class Want(Enum):
    """What may come next."""

    VALUE = auto()
    FIRST_VALUE = auto()  # or the end of the array
    FIRST_KEY = auto()  # or the end of the object
    KEY = auto()
    COLON = auto()
    MORE_VALUES = auto()  # a comma, or the end of the array
    MORE_MEMBERS = auto()  # a comma, or the end of the object
    NOTHING = auto()


SEPARATORS = {
    (":", Want.COLON): Want.VALUE,
    (",", Want.MORE_VALUES): Want.VALUE,
    (",", Want.MORE_MEMBERS): Want.KEY,
}


class Builder:
    """One value. ``result`` is complete when the caller has counted the brackets down to none."""

    def __init__(self) -> None:
        self.error: str | None = None
        self.result: Any = None
        self._want = Want.VALUE
        self._open: list[tuple[dict[str, Any] | list[Any], str]] = []  # containers, with the key that waits

    def scalar(self, value: Any) -> None:
        """A string, number, boolean or null."""
        if self.error is not None:
            return
        if self._want in (Want.FIRST_KEY, Want.KEY):
            if not isinstance(value, str):
                self.error = "key is not a string in object"
                return
            self._open[-1] = (self._open[-1][0], value)
            self._want = Want.COLON
        elif self._want in (Want.VALUE, Want.FIRST_VALUE):
            self._place(value)
        else:
            self._unexpected()

    def punctuation(self, character: str) -> None:
        """One of ``[]{}:,``."""
        if self.error is not None:
            return
        want = self._want
        if character in "[{" and want in (Want.VALUE, Want.FIRST_VALUE):
            self._open.append(([] if character == "[" else {}, ""))
            self._want = Want.FIRST_VALUE if character == "[" else Want.FIRST_KEY
        elif (character == "]" and want in (Want.FIRST_VALUE, Want.MORE_VALUES)) or (
            character == "}" and want in (Want.FIRST_KEY, Want.MORE_MEMBERS)
        ):
            self._place(self._open.pop()[0])
        elif (character, want) in SEPARATORS:
            self._want = SEPARATORS[character, want]
        elif character in "[{" and want in (Want.FIRST_KEY, Want.KEY):
            self.error = "key is not a string in object"
        else:
            self._unexpected()

    def fail(self, message: str) -> None:
        """The first error is the one to report."""
        if self.error is None:
            self.error = message

    def _unexpected(self) -> None:
        self.error = {
            Want.COLON: "missing : in object pair",
            Want.MORE_VALUES: "expected separator in list",
            Want.MORE_MEMBERS: "expected separator in dict",
        }.get(self._want, "expecting value")

    def _place(self, value: Any) -> None:
        if not self._open:
            self.result = value
            self._want = Want.NOTHING
            return
        container, key = self._open[-1]
        if isinstance(container, list):
            container.append(value)
            self._want = Want.MORE_VALUES
        elif key in container:
            self.error = "duplicate key"
        else:
            container[key] = value
            self._want = Want.MORE_MEMBERS


def word(token: bytes) -> bool | None:
    """The value of a keyword."""
    try:
        return WORDS[token]
    except KeyError:
        raise JsonError(f"invalid keyword '{token.decode()}'") from None


def number(token: bytes) -> int | float:
    """An integer where it is written as one and fits into 64 bits. What is beyond floats is the last one."""
    if token.removeprefix(b"-").isdigit() and len(token) <= DIGITS:
        value = int(token)
        if value in INT64:
            return value
    return max(-sys.float_info.max, min(float(token), sys.float_info.max))


def string(token: bytes, quote: str) -> str:
    """The text of a string; ``token`` is what stands between the quotes."""
    if quote == '"':
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
            text = msgspec.json.decode(b'"%b"' % token, type=str)
            if text.isascii() or not NONCHARACTER.search(text):
                return text
    return _read_string(token, quote)


def _read_string(token: bytes, quote: str) -> str:
    """What is QEMU's alone, and the errors."""
    try:
        text = token.decode()
    except UnicodeDecodeError:
        text = _modified_utf8(token)
    if "\\" in text:
        tail = text + quote  # so that a message shows what a client sees
        text = _unescape(tail)[:-1]
    elif NONCHARACTER.search(text):
        raise JsonError("invalid UTF-8 sequence in string")
    return text


def _modified_utf8(token: bytes) -> str:
    """QEMU writes U+0000 in two bytes."""
    try:
        return token.replace(b"\xc0\x80", b"\0").decode()
    except UnicodeDecodeError:
        raise JsonError("invalid UTF-8 sequence in string") from None


def _unescape(text: str) -> str:
    out: list[str] = []
    position = 0
    while match := ESCAPE.search(text, position):
        start = match.start()
        out.append(text[position:start])
        position = match.end()
        if match[2] is not None:
            if match[2] not in ESCAPES:
                raise JsonError("invalid escape sequence in string")
            out.append(ESCAPES[match[2]])
            continue
        point = int(match[1], 16) if HEX.fullmatch(match[1]) else -1
        if 0xD800 <= point < 0xDC00 and (low := _low_surrogate(text, position)):
            point = 0x10000 + (point - 0xD800 << 10) + low - 0xDC00
            position += 6
        if point < 0 or 0xD800 <= point < 0xE000 or NONCHARACTER.match(chr(point)):
            raise JsonError(f"{text[start:position]} is not a valid Unicode character")
        out.append(chr(point))
    out.append(text[position:])
    return "".join(out)


def _low_surrogate(text: str, position: int) -> int:
    """The second half of a pair, if it stands there, else 0."""
    digits = text[position + 2 : position + 6]
    if text.startswith("\\u", position) and HEX.fullmatch(digits):
        low = int(digits, 16)
        if 0xDC00 <= low < 0xE000:
            return low
    return 0
