# SPDX-License-Identifier: Apache-2.0
"""Words of a command line: to the arguments of a command, and what may come next."""

from __future__ import annotations

import json
from typing import Any

from target.config.keyval import parse_argument
from target.config.options import OptionError
from target.ctl.schema import ArgumentError, Schema


def arguments(schema: Schema, command: str, words: list[str]) -> dict[str, Any]:
    """Typed arguments from one word of JSON, or name=value words. ArgumentError."""
    if len(words) == 1 and words[0].startswith("{"):
        try:
            value = json.loads(words[0])
        except (ValueError, RecursionError) as error:
            raise ArgumentError(f"JSON parse error, {error}") from None
        return dict(value)
    given = table(words)
    wanted = schema.arguments(command)
    if wanted is None:
        return given
    converted = schema.convert(given, wanted, "")
    assert isinstance(converted, dict)
    return converted


def table(words: list[str]) -> dict[str, Any]:
    """Nested tables of text from outer.inner=value words. ArgumentError."""
    for word in words:
        if "=" not in word:
            raise ArgumentError(f"'{word}': expected name=value")
    try:
        # Each word is one pair, whatever commas its value has.
        return parse_argument(",".join(word.replace(",", ",,") for word in words)).value
    except OptionError as error:
        raise ArgumentError(str(error)) from None


def candidates(schema: Schema, words: list[str], others: tuple[str, ...] = ()) -> list[str]:
    """What the last of the words may become. ``others``: first words besides the commands."""
    if len(words) <= 1:
        known = [*schema.commands, *others]
        return sorted(name for name in known if name.startswith(words[0] if words else ""))
    command, *pairs, last = words
    if command == "help":
        return sorted(name for name in schema.commands if name.startswith(last))
    type = schema.arguments(command)
    if type is None:
        return []
    given = [word for word in pairs if "=" in word]
    name, equals, value = last.partition("=")
    if equals:
        found = _values(schema, type, name, given)
        return sorted(f"{name}={choice}" for choice in found if choice.startswith(value))
    return _names(schema, type, name, given)


def _inside(
    schema: Schema, type: str, path: list[str], given: list[str]
) -> tuple[str | None, dict[str, Any]]:
    """The type of the object at a path, and what is given in it."""
    current = schema.object_of(type)
    try:
        values: Any = table(given)
    except ArgumentError:
        values = {}
    for name in path:
        if name.isdigit():
            values = values[int(name)] if isinstance(values, list) and int(name) < len(values) else {}
            continue
        values = values if isinstance(values, dict) else {}
        member = schema.members(current, values).get(name) if current is not None else None
        if member is None:
            return None, {}
        current = schema.object_of(schema.element_of(member.type) or member.type)
        values = values.get(name, {})
    return current, values if isinstance(values, dict) else {}


def _values(schema: Schema, type: str, name: str, given: list[str]) -> list[str]:
    *outer, last = name.split(".")
    inside, values = _inside(schema, type, outer, given)
    member = schema.members(inside, values).get(last) if inside is not None else None
    return [] if member is None else schema.values(member.type)


def _names(schema: Schema, type: str, start: str, given: list[str]) -> list[str]:
    """Members that are not given yet; an object's end in a dot, others in an equals sign."""
    *outer, last = start.split(".")
    inside, values = _inside(schema, type, outer, given)
    if inside is None:
        return []
    prefix = "".join(f"{name}." for name in outer)
    found: list[str] = []
    for name, member in schema.members(inside, values).items():
        if name.startswith(last) and (name not in values or isinstance(values[name], dict)):
            found += [f"{prefix}{name}{end}" for end in _ends(schema, member.type)]
    return sorted(found)


def _ends(schema: Schema, type: str) -> list[str]:
    if schema.object_of(schema.element_of(type) or type) is None:
        return ["="]
    nested = ".0." if schema.element_of(type) else "."
    return [nested] if schema.object_of(type) == type else ["=", nested]
