# SPDX-License-Identifier: Apache-2.0
"""Finds the messages in a stream of JSON values that nothing separates (QEMU: docs/interop/qmp-spec).

Accepts what QEMU accepts, single quotes too, and goes on after an error where QEMU goes on: an error of
the grammar ends with the message (its brackets are counted), an unknown character at the next structural
character, line end, or byte 0xFE or 0xFF, with which a client can force a fresh start. A message that is
larger than the limits is skipped to its end, where QEMU takes the rest of it for others.
"""

from __future__ import annotations

import re
from enum import Enum, auto
from typing import Any, NamedTuple

from target.qmp.json_value import Builder, JsonError, number, string, word

MAX_SIZE = 4 << 20  # bytes of tokens in a message
MAX_TOKENS = 128 << 10
MAX_NESTING = 500
MAX_WORD = 1024  # bytes of a number or keyword
SHOWN = 1000  # bytes of a token that a message repeats
TOTAL = 64 << 20  # what messages may take together, beyond FREE bytes each
FREE = 64 << 10
TOKEN_COST = 64  # bytes that a token takes besides its text

PUNCTUATION, QUOTE, WORD, NUMBER, OTHER = range(1, 6)
TOKEN = re.compile(
    rb"""[ \t\r\n]*+(?:([\[\]{}:,])|(["'])|([a-z]+)
    |(-?(?:(?:0|[1-9][0-9]*)(?:\.(?:[0-9]+(?:[eE][-+]?[0-9]*)?)?|[eE][-+]?[0-9]*)?)?)
    |(.))""",
    re.DOTALL | re.VERBOSE,
)
WHOLE_NUMBER = re.compile(rb"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
# What a string goes on with: not its quote, nor what is not permitted in it, nor half an escape.
IN_STRING = {
    b'"': re.compile(rb'[^"\\\x00-\x1f\xfe\xff]*+(?:\\[\x20-\xfd][^"\\\x00-\x1f\xfe\xff]*+)*+'),
    b"'": re.compile(rb"[^'\\\x00-\x1f\xfe\xff]*+(?:\\[\x20-\xfd][^'\\\x00-\x1f\xfe\xff]*+)*+"),
}
# In a message that is skipped: what does not change the nesting, and then brackets of one direction.
FLAT = rb"""(?:[^\[\]{}"'\xfe\xff]|"[^"\\\x00-\x1f\xfe\xff]*+")"""
BRACKETS = re.compile(rb"(?:%b|\{%b*+\}|\[%b*+\])*+(?:([\[{]++)|([\]}]++))?" % (FLAT, FLAT, FLAT))
RECOVERED = re.compile(rb"[\x00-\x08\x0a-\x1f\xfe\xff\[\]{}:,]")


class Budget:
    """Memory for the messages of many streams."""

    def __init__(self, total: int = TOTAL) -> None:
        self.left = total


class Message(NamedTuple):
    """A value, or what is wrong with it.

    ``size``: bytes of its tokens. ``held``: of the budget, to be given back when the message is dealt with.
    """

    value: Any
    error: str | None
    size: int = 0
    held: int = 0


class State(Enum):
    BETWEEN = auto()  # between tokens
    STRING = auto()  # in a string that is not complete yet
    RECOVERY = auto()  # after an unknown character


class JsonStream:
    """``feed`` it bytes, then take messages from ``next`` until there is none."""

    def __init__(self, budget: Budget | None = None) -> None:
        self._budget = budget or Budget()
        self._held = 0
        self._data = b""
        self._at = 0
        self._state = State.BETWEEN
        self._quote = b""
        self._string = bytearray()
        self._new_message()

    def close(self) -> None:
        """Gives back what an unfinished message holds."""
        self._budget.left += self._held
        self._held = 0

    def feed(self, data: bytes) -> None:
        self._data = self._data[self._at :] + data
        self._at = 0

    def next(self) -> Message | None:
        """The next message; None when more bytes are needed."""
        while self._at < len(self._data):
            before = (self._at, self._state)
            try:
                complete = self._step()
            except JsonError as error:  # an unknown character
                self._state = State.RECOVERY
                self._new_message()
                return Message(None, f"JSON parse error, {error}")
            if complete is not None:
                return complete
            if (self._at, self._state) == before:
                return None
        return None

    def _new_message(self) -> None:
        self._builder = Builder()
        self._braces = self._brackets = 0
        self._size = self._tokens = 0
        self._skipping = False
        self._string.clear()
        self.close()

    def _step(self) -> Message | None:
        if self._state is State.STRING:
            return self._go_on_with_string()
        if self._state is State.RECOVERY:
            found = RECOVERED.search(self._data, self._at)
            self._at = found.start() if found else len(self._data)
            if found:
                self._state = State.BETWEEN
            return None
        if self._skipping:
            self._skip()
        return self._token()

    def _skip(self) -> None:
        """Goes on to what may be the end of a message that is too large, or to a string."""
        while run := BRACKETS.match(self._data, self._at):
            opened, closed = run.groups(b"")
            braces = self._braces + opened.count(b"{") - closed.count(b"}")
            brackets = self._brackets + opened.count(b"[") - closed.count(b"]")
            self._at = run.start(run.lastindex or 0)
            if braces < 0 or brackets < 0 or braces + brackets == 0:
                return
            self._braces, self._brackets = braces, brackets
            self._at = run.end()
            if run.lastindex is None:
                return

    def _token(self) -> Message | None:
        match = TOKEN.match(self._data, self._at)
        if match is None or match.lastindex is None:  # blanks only
            self._at = len(self._data)
            return None
        kind = match.lastindex
        token: bytes = match[kind]
        if kind == PUNCTUATION:
            self._at = match.end()
            return self._punctuation(token.decode())
        if kind == QUOTE:
            self._at = match.end()
            self._quote = token
            self._state = State.STRING
            return None
        if kind == OTHER:
            raise self._stray(token, match.end())
        return self._word(kind, token, match.start(kind), match.end())

    def _word(self, kind: int, token: bytes, start: int, end: int) -> Message | None:
        """A keyword or number, which ends where something else begins."""
        if len(token) > MAX_WORD:
            self._at = end
            raise JsonError(f"a number or keyword is longer than {MAX_WORD} bytes")
        if end == len(self._data):
            self._at = start
            self._wait()
            return None
        if kind == NUMBER:
            following = self._data[end : end + 1]
            if not WHOLE_NUMBER.fullmatch(token) or (token in (b"0", b"-0") and following.isdigit()):
                raise self._stray(token + following, end + 1)
        self._at = end
        try:
            value = number(token) if kind == NUMBER else word(token)
        except JsonError as error:
            self._builder.fail(str(error))
            value = None
        self._builder.scalar(value)
        return self._counted(len(token))

    def _wait(self) -> None:
        """More bytes are needed: keeps what is there, from ``_at``, and makes ``next`` return."""
        self._data = self._data[self._at :]
        self._at = 0

    def _stray(self, token: bytes, end: int) -> JsonError:
        self._at = end
        return JsonError(f"stray '{token[:SHOWN].decode(errors='replace')}'")

    def _go_on_with_string(self) -> Message | None:
        data = self._data
        match = IN_STRING[self._quote].match(data, self._at)
        assert match is not None
        if not self._skipping:
            self._string += match[0]
        self._at = end = match.end()
        if end == len(data):
            return self._too_large(len(self._string))
        stop = data[end : end + 1]
        if stop == self._quote:
            self._at = end + 1
            return self._end_string()
        if stop == b"\\":
            if end + 1 == len(data):
                self._wait()
                return None
            stop = data[end : end + 2]
        raise self._stray(self._quote + bytes(self._string[:SHOWN]) + stop, end + len(stop))

    def _end_string(self) -> Message | None:
        self._state = State.BETWEEN
        size = len(self._string)
        too_large = self._too_large(size)
        if not self._skipping and self._builder.error is None:
            try:
                self._builder.scalar(string(bytes(self._string), self._quote.decode()))
            except JsonError as error:
                self._builder.fail(str(error))
        self._string.clear()
        return self._counted(size + 2) or too_large

    def _punctuation(self, character: str) -> Message | None:
        if character in "{}":
            self._braces += 1 if character == "{" else -1
        elif character in "[]":
            self._brackets += 1 if character == "[" else -1
        if not self._skipping:
            self._builder.punctuation(character)
        return self._counted(1)

    def _counted(self, size: int) -> Message | None:
        """After each token: the message if it is complete, or the limit that it breaks."""
        self._size += size
        self._tokens += 1
        braces, brackets = self._braces, self._brackets
        if braces >= 0 and brackets >= 0 and braces + brackets > 0:
            return self._too_large(0)
        skipped, builder = self._skipping, self._builder
        message = Message(builder.result, None, self._size, self._held)
        if builder.error is None and not skipped:
            self._held = 0  # it goes with the message
        self._new_message()
        if skipped:
            return None
        return message if builder.error is None else Message(None, f"JSON parse error, {builder.error}")

    def _too_large(self, pending: int) -> Message | None:
        """Reports the first limit that is broken, once for a message, and frees what was built."""
        if self._skipping:
            return None
        if self._size + pending > MAX_SIZE or not self._hold(self._size + pending):
            what = "token size"
        elif self._tokens > MAX_TOKENS:
            what = "token count"
        elif self._braces + self._brackets > MAX_NESTING:
            what = "nesting depth"
        else:
            return None
        self._skipping = True
        self._builder = Builder()
        self._string.clear()
        self.close()
        return Message(None, f"JSON {what} limit exceeded")

    def _hold(self, size: int) -> bool:
        """Takes from the budget what the message needs by now."""
        more = size + self._tokens * TOKEN_COST - FREE - self._held
        if more > 0:
            if more > self._budget.left:
                return False
            self._budget.left -= more
            self._held += more
        return True
