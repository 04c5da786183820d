# SPDX-License-Identifier: Apache-2.0
"""Fuzz target: options as key=value, as the command line gives them. Only OptionError may come out.

Input: the kind of option, then text; or, with the highest bit of the kind, what to make up a table from.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.fuzz.python.common import Input, main
from tests.fuzz.python.text_options import argument, table


def pairs(value: Any, path: str = "") -> Iterator[str]:
    """A table in the notation of the command line."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from pairs(item, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from pairs(item, f"{path}.{i}")
    else:
        yield f"{path}={str(value).replace(',', ',,')}"


def test_one_input(data: bytes) -> None:
    input = Input(data)
    kind = input.number()
    if kind & 0x80:
        argument(kind, ",".join(pairs(table(input))))
    else:
        argument(kind, input.rest().decode(errors="surrogateescape"))


if __name__ == "__main__":
    main(test_one_input)
