# SPDX-License-Identifier: Apache-2.0
"""Fuzz target: options as JSON, as the command line and later QMP give them. Only OptionError may come out.

Input: the kind of option, then text; or, with the highest bit of the kind, what to make up a table from.
"""

from __future__ import annotations

import json

from tests.fuzz.python.common import Input, main
from tests.fuzz.python.text_options import argument, table


def test_one_input(data: bytes) -> None:
    input = Input(data)
    kind = input.number()
    if kind & 0x80:
        argument(kind, json.dumps(table(input)))
    else:
        argument(kind, "{" + input.rest().decode(errors="surrogateescape"))


if __name__ == "__main__":
    main(test_one_input)
