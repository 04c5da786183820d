# SPDX-License-Identifier: Apache-2.0
"""Fuzz target: what a QMP client sends, up to the typed arguments of a command.

Input: the size of the pieces that it comes in, then the bytes. The pieces change nothing; an error is the
only thing that bad bytes lead to; and byte 0xFF makes a fresh start after anything.
"""

from __future__ import annotations

import json
from typing import Any

from target import chardev, drivers, exports
from target.config.options import OptionError
from target.qmp import commands, registry
from target.qmp.dispatch import is_oob, read_arguments, read_call
from target.qmp.json_stream import Budget, JsonStream
from target.qmp.output import encode
from target.qmp.registry import CommandError
from tests.fuzz.python.common import Input, main

for package in (drivers, exports, chardev, commands):
    package.load()

FRESH = b'\xff\n{"execute":"query-version"}'


def messages(data: bytes, step: int) -> list[Any]:
    budget = Budget(1 << 20)
    stream = JsonStream(budget)
    found: list[Any] = []
    for start in range(0, len(data), step):
        stream.feed(data[start : start + step])
        while (message := stream.next()) is not None:
            found.append((message.value, message.error))
            budget.left += message.held
    stream.close()
    assert budget.left == 1 << 20
    return found


def test_one_input(data: bytes) -> None:
    input = Input(data)
    step = 1 + input.number()
    text = input.rest()
    found = messages(text, step)
    assert repr(found) == repr(messages(text, 1 << 20))
    assert messages(text + FRESH, step)[-1] == ({"execute": "query-version"}, None)
    for value, error in found:
        if error is None:
            assert json.loads(encode(value)) == value
            typed(value)


def typed(value: Any) -> None:
    """As the session does it."""
    is_oob(value)
    try:
        call = read_call(value, True)
        command = registry.find(call.name)
        if command is not None:
            read_arguments(command, call.arguments)
    except (CommandError, OptionError, RecursionError) as error:
        assert str(error)


if __name__ == "__main__":
    main(test_one_input)
