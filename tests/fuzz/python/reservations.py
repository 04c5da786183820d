# SPDX-License-Identifier: Apache-2.0
"""Fuzz target: what a device answers to commands for persistent reservations, and its sense data.

Only Malformed may come out, and nothing that is told lies past what came. Input: the kind, then the answer;
or, with the highest bit of the kind, what follows a header whose length fits, so that it is looked at.
"""

from __future__ import annotations

import contextlib
import struct

import atheris

from tests.fuzz.python.common import Input, main

with atheris.instrument_imports(include=["target.reservations"]):
    from target.reservations.commands import (
        KEY_MAX,
        Malformed,
        parse_capabilities,
        parse_full_status,
        parse_keys,
        parse_reservation,
    )
    from target.reservations.sense import CheckCondition, fixed_sense, parse_sense


def keys(data: bytes) -> None:
    found = parse_keys(data)
    assert len(data) >= 8 + 8 * len(found.keys) and all(0 <= key <= KEY_MAX for key in found.keys)
    assert found.more == (8 * len(found.keys) < int.from_bytes(data[4:8], "big"))


def reservation(data: bytes) -> None:
    found = parse_reservation(data)
    assert (found is None) == (data[4:8] == bytes(4))


def capabilities(data: bytes) -> None:
    found = parse_capabilities(data)
    assert len(data) >= 8 and (found.types is None or len(set(found.types)) == len(found.types))


def full_status(data: bytes) -> None:
    found = parse_full_status(data)
    assert 24 * len(found) <= len(data) - 8
    assert all(one.holder or one.type is None for one in found)
    # A name is text of its descriptor: four bytes of head, or two digits for each byte.
    assert sum(len(one.initiator) for one in found) <= 2 * len(data)


def sense(data: bytes) -> None:
    found = parse_sense(data)
    if found is not None:
        assert max(found) <= 255 and parse_sense(fixed_sense(found)) == found
    assert "\n" not in str(CheckCondition(data))


KINDS = (keys, reservation, capabilities, full_status, sense)


def test_one_input(data: bytes) -> None:
    input = Input(data)
    kind = input.number()
    rest = input.rest()
    answer = struct.pack(">II", 1, len(rest)) + rest if kind & 0x80 else rest
    with contextlib.suppress(Malformed):
        KINDS[(kind & 0x7F) % len(KINDS)](answer)


if __name__ == "__main__":
    main(test_one_input)
