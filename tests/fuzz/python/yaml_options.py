# SPDX-License-Identifier: Apache-2.0
"""Fuzz target: a configuration file in YAML. Only OptionError may come out.

Input: a mode, then text; or, with the highest bit of the mode, what to make up a table from.
"""

from __future__ import annotations

import json

from tests.fuzz.python.common import Input, main
from tests.fuzz.python.text_options import made_up, table, yaml_file

LISTS = ("objects", "images", "blockdevs", "nbd-servers", "exports")


def text(input: Input) -> str:
    mode = input.number()
    if not mode & 0x80:
        return input.rest().decode(errors="replace")
    if mode & 0x40:
        return json.dumps(table(input))
    return json.dumps({LISTS[mode % len(LISTS)]: [made_up(input) for _ in range(3)]})


def test_one_input(data: bytes) -> None:
    yaml_file(text(Input(data)))


if __name__ == "__main__":
    main(test_one_input)
