# SPDX-License-Identifier: Apache-2.0
"""What the fuzz targets of options share: text to typed options of every kind. Not a target itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import atheris
import msgspec

from tests.fuzz.python.common import Input

with atheris.instrument_imports(include=["target.config", "target.graph.registry", "target.objects"]):
    from target.config.keyval import Argument, parse_argument
    from target.config.options import Notation, OptionError, subject
    from target.config.parse import (
        kinds,
        parse_blockdev,
        parse_export,
        parse_image,
        parse_nbd_server,
        parse_object,
    )
    from target.config.yaml_file import parse_config
    from target.exports import address as addresses

KINDS: list[tuple[str | None, Callable[[Any, Notation], Any]]] = [
    ("driver", parse_blockdev),
    ("type", parse_export),
    ("qom-type", parse_object),
    (None, parse_nbd_server),
    ("driver", parse_image),
]

OPTIONS = ("blockdev", "export", "object", "nbd-server")
STRUCTS = {name: struct for option in OPTIONS for name, struct in kinds(option).items()}
STRUCTS |= {"": addresses.UnixAddress, "inet": addresses.InetAddress, "fd": addresses.FdAddress}
# Names of members and types, so that inputs come past the first one that is not known.
TYPES = [name for name in STRUCTS if name] + ["unix"]
NAMES = sorted({field.encode_name for struct in STRUCTS.values() for field in msgspec.structs.fields(struct)})
NAMES += ["driver", "type", "qom-type", *TYPES, "", "0", "1", "x", "blockdevs", "exports", "nbd-servers"]
WORDS = ["on", "off", "ignore", "unmap", "disk", "64k", "1.5G", "0x10", "1e3", "threads", "", "a" * 200]
NUMBERS = [0, 1, -1, 511, 1 << 31, 1 << 63, (1 << 64) - 1, 1 << 64, -(1 << 63) - 1, 10**40]


def made_up(input: Input, depth: int = 0) -> Any:
    """A value as JSON or YAML could give it, mostly with names that mean something."""
    kind = input.number() % (12 if depth < 6 else 8)
    if kind < 3:
        return TYPES[input.number() % len(TYPES)]
    if kind == 3:
        return WORDS[input.number() % len(WORDS)]
    if kind == 4:
        return NUMBERS[input.number() % len(NUMBERS)]
    if kind == 5:
        return [None, True, False, 1.5, float("inf")][input.number() % 5]
    if kind == 6:
        return input.number(4)
    if kind == 7:
        return input.take(input.number() % 16).decode(errors="surrogateescape")
    if kind == 8:
        return [made_up(input, depth + 1) for _ in range(input.number() % 5)]
    return table(input, depth)


def table(input: Input, depth: int = 0) -> dict[str, Any]:
    names = [NAMES[input.number() % len(NAMES)] for _ in range(input.number() % 9)]
    return {name: made_up(input, depth + 1) for name in names}


def one_line(error: OptionError) -> None:
    """An error is for a user's eyes."""
    str(error).encode(errors="surrogateescape")


def typed(kind: int, value: dict[str, Any], notation: Notation) -> None:
    _, parse = KINDS[kind % len(KINDS)]
    try:
        parse(value, notation)
    except OptionError as error:
        one_line(error)
    subject(value)


def argument(kind: int, text: str) -> None:
    """As the command line does it."""
    implied, _ = KINDS[kind % len(KINDS)]
    try:
        parsed: Argument = parse_argument(text, implied)
    except OptionError as error:
        one_line(error)
        return
    typed(kind, parsed.value, parsed.notation)


def yaml_file(text: str) -> None:
    try:
        parse_config(text)
    except OptionError as error:
        one_line(error)
