# SPDX-License-Identifier: Apache-2.0
"""What the Python fuzz targets share: reading the input, and running a coroutine that never waits."""

from __future__ import annotations

import sys
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Input:
    """Takes numbers and bytes off the front; zeros past the end."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    @property
    def left(self) -> int:
        return max(0, len(self.data) - self.at)

    def number(self, size: int = 1) -> int:
        """Little-endian, ``size`` bytes."""
        return int.from_bytes(self.take(size), "little")

    def take(self, size: int) -> bytes:
        part = self.data[self.at : self.at + size]
        self.at += size
        return part

    def rest(self) -> bytes:
        return self.take(self.left)


def finish(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine over streams in memory, stepped without a loop."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    raise AssertionError("it waits for something")


def main(test_one_input: Callable[[bytes], None]) -> None:
    """Runs the target under libFuzzer with the arguments of the command line."""
    import atheris

    atheris.Setup(sys.argv, test_one_input)
    atheris.Fuzz()
