# SPDX-License-Identifier: Apache-2.0
"""What query-qmp-schema says: commands, the members of their arguments; and text to values that fit them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from target.config.options import FALSE, TRUE, parse_size

Entry = dict[str, Any]


class ArgumentError(ValueError):
    """A word that cannot be what the command wants there."""


class Member(NamedTuple):
    """``optional``: it may be absent."""

    type: str
    optional: bool


class Schema:
    """The entries by name."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._types: dict[str, Entry] = {}
        self.commands: dict[str, Entry] = {}
        self.events: dict[str, Entry] = {}
        tables = {"command": self.commands, "event": self.events}
        for entry in entries:
            tables.get(entry["meta-type"], self._types)[entry["name"]] = entry

    def arguments(self, command: str) -> str | None:
        """The type of a command's arguments; None for a command that is not known."""
        found = self.commands.get(command)
        return None if found is None else str(found["arg-type"])

    def members(self, type: str, given: Mapping[str, Any]) -> dict[str, Member]:
        """Of an object, with those that follow from the values given."""
        entry = self._types.get(type, {})
        found = {
            m["name"]: Member(m["type"], "default" in m) for m in entry.get("members", ()) if "name" in m
        }
        tag = entry.get("tag")
        for variant in entry.get("variants", ()):
            if given.get(str(tag)) == variant["case"]:
                found |= self.members(variant["type"], given)
        return found

    def variants(self, type: str) -> list[tuple[str, dict[str, Member]]]:
        """What each value of the tag adds: "driver=file" and members."""
        entry = self._types.get(type, {})
        return [
            (f"{entry['tag']}={variant['case']}", self.members(variant["type"], {}))
            for variant in entry.get("variants", ())
        ]

    def object_of(self, type: str) -> str | None:
        """The object that a value may be, itself or as one of alternatives."""
        entry = self._types.get(type, {})
        if entry.get("meta-type") == "object":
            return type
        branches = entry.get("members", ()) if entry.get("meta-type") == "alternate" else ()
        return next((found for b in branches if (found := self.object_of(b["type"]))), None)

    def element_of(self, type: str) -> str | None:
        """The type of an array's elements."""
        found: str | None = self._types.get(type, {}).get("element-type")
        return found

    def values(self, type: str) -> list[str]:
        """Those that a value may have, where they are few."""
        entry = self._types.get(type, {})
        if entry.get("meta-type") == "enum":
            return [m["name"] for m in entry["members"]] if "members" in entry else list(entry["values"])
        if entry.get("json-type") == "boolean":
            return ["on", "off"]
        if entry.get("meta-type") == "alternate":
            return [value for branch in entry["members"] for value in self.values(branch["type"])]
        return []

    def describe(self, type: str) -> str:
        """In help: a|b for few values, else the type."""
        entry = self._types.get(type, {})
        match entry.get("meta-type"):
            case "builtin":
                return str(entry["name"])
            case "enum":
                return "|".join(self.values(type))
            case "array":
                return f"[{self.describe(entry['element-type'])}]"
            case "alternate":
                return " or ".join(self.describe(branch["type"]) for branch in entry["members"])
            case _:
                return "object"

    # ---- from words to values ----

    def convert(self, value: Any, type: str, path: str) -> Any:
        """A value given as text, or as a table or list of such, in the type that is wanted. ArgumentError."""
        entry = self._types.get(type, {})
        if isinstance(value, str) and value[:1] in ("{", "[") and entry.get("name") != "str":
            return _json(value, path)
        match entry.get("meta-type"):
            case "builtin":
                return _scalar(value, str(entry.get("json-type")), path)
            case "object" if isinstance(value, dict):
                return self._object(value, type, path)
            case "array":
                return self._array(value, str(entry["element-type"]), path)
            case "alternate":
                return self._alternate(value, entry, path)
        return value  # an enumeration, or what the server will refuse

    def _object(self, value: dict[str, Any], type: str, path: str) -> dict[str, Any]:
        members = self.members(type, value)
        return {
            name: self.convert(item, members[name].type, f"{path}{name}.") if name in members else item
            for name, item in value.items()
        }

    def _array(self, value: Any, element: str, path: str) -> Any:
        if isinstance(value, str):
            value = [word for word in value.split(",") if word]
        if not isinstance(value, list):
            return value
        return [self.convert(item, element, f"{path}{i}.") for i, item in enumerate(value)]

    def _alternate(self, value: Any, entry: Entry, path: str) -> Any:
        types = [branch["type"] for branch in entry["members"]]
        if isinstance(value, dict):
            wanted = next((t for t in types if self.object_of(t)), None)
        elif isinstance(value, list):
            wanted = next((t for t in types if self.element_of(t)), None)
        else:
            wanted = next((t for t in types if self._takes_text(t)), None)
            if wanted is None:
                return self._first(value, types, path)
        return value if wanted is None else self.convert(value, wanted, path)

    def _takes_text(self, type: str) -> bool:
        return type == "str" or self._types.get(type, {}).get("meta-type") == "enum"

    def _first(self, value: str, types: list[str], path: str) -> Any:
        """As the first of the types that it can be."""
        for type in types:
            try:
                return self.convert(value, type, path)
            except ArgumentError:
                continue
        return value


def _scalar(value: Any, kind: str, path: str) -> Any:
    if not isinstance(value, str):
        return value
    name = path.rstrip(".")
    match kind:
        case "boolean":
            if value not in TRUE + FALSE:
                raise ArgumentError(f"Parameter '{name}' expects 'on' or 'off', not '{value}'")
            return value in TRUE
        case "int":
            try:
                return -parse_size(value[1:]) if value.startswith("-") else parse_size(value)
            except ValueError:
                raise ArgumentError(f"Parameter '{name}' expects a number, not '{value}'") from None
        case "number":
            try:
                return float(value)
            except ValueError:
                raise ArgumentError(f"Parameter '{name}' expects a number, not '{value}'") from None
        case "null":
            if value != "null":
                raise ArgumentError(f"Parameter '{name}' expects null, not '{value}'")
            return None
        case "value":
            try:
                return json.loads(value)
            except ValueError:
                return value
    return value


def _json(text: str, path: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"Parameter '{path.rstrip('.')}': JSON parse error, {error}") from None
