# SPDX-License-Identifier: Apache-2.0
"""Makes calls from what query-qmp-schema says, right and wrong, with the answer that each must get."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

Json = dict[str, Any]

DEPTH = 3  # of unions inside unions; below, a reference by name
HUGE = 1 << 80


class Call(NamedTuple):
    """``error``: the exact text that the answer must have; None: any answer that is not about the form."""

    command: str
    arguments: Json
    error: str | None
    what: str


class Path(NamedTuple):
    """A place in arguments, as keys and as QEMU names it."""

    keys: tuple[str | int, ...] = ()
    name: str = ""

    def member(self, name: str) -> Path:
        return Path((*self.keys, name), f"{self.name}.{name}" if self.name else name)

    def element(self, index: int) -> Path:
        return Path((*self.keys, index), f"{self.name}[{index}]")


class Schema:
    """An answer to query-qmp-schema. ``text(member)`` gives the value of a string member."""

    def __init__(self, infos: list[Json], text: Callable[[str], str]) -> None:
        self.infos = {info["name"]: info for info in infos}
        self.text = text

    def commands(self) -> list[str]:
        return [name for name, info in self.infos.items() if info["meta-type"] == "command"]

    def calls(self, command: str) -> Iterator[Call]:
        """All calls of a command: for each branch of a union, the least, the full, and each wrong one."""
        kind = self.infos[command]["arg-type"]
        for full in (False, True):
            for value in self.values(kind, full=full, depth=0):
                yield Call(command, value, None, "full" if full else "least")
                if full:
                    yield from self.wrong(command, value, kind, Path(), value)

    # ---- right values ----

    def values(self, kind: str, *, full: bool, depth: int, member: str = "") -> Iterator[Any]:
        """Values of a type: one, or one for each branch of a union that is not deep inside others."""
        info = self.infos[kind]
        match info["meta-type"]:
            case "builtin":
                yield {
                    "string": self.text(member),
                    "int": 1,
                    "number": 1.5,
                    "boolean": False,
                    "null": None,
                    "value": {},
                }[info["json-type"]]
            case "enum":
                yield info["members"][0]["name"]
            case "array":
                for value in self.values(info["element-type"], full=full, depth=depth, member=member):
                    yield [value]
            case "alternate":
                kinds = [each["type"] for each in info["members"]]
                yield from self.values(kinds[0], full=full, depth=depth, member=member)
                if full and depth == 0:
                    for other in kinds[1:]:
                        yield from self.values(other, full=full, depth=DEPTH, member=member)
            case "object":
                yield from self._objects(info, full=full, depth=depth)

    def _objects(self, info: Json, *, full: bool, depth: int) -> Iterator[Json]:
        cases: list[tuple[Json, list[Json]]] = [({}, info["members"])]
        if "tag" in info:
            own = [member for member in info["members"] if member["name"] != info["tag"]]
            cases = [
                ({info["tag"]: variant["case"]}, own + self.infos[variant["type"]]["members"])
                for variant in info["variants"]
            ]
            if depth >= DEPTH:
                cases = cases[:1]
        for start, members in cases:
            given = [member for member in members if full or "default" not in member]
            choices = {
                m["name"]: list(self.values(m["type"], full=full, depth=depth + 1, member=m["name"]))
                for m in given
            }
            first = {**start, **{name: values[0] for name, values in choices.items()}}
            yield first
            for name, values in choices.items():
                for value in values[1:]:
                    yield {**first, name: value}

    # ---- wrong ones ----

    def wrong(self, command: str, whole: Json, kind: str, path: Path, value: Any) -> Iterator[Call]:
        """Each member below this value missing, unknown, or of a wrong type."""
        info = self.infos[kind]
        if info["meta-type"] == "array":
            yield from self.wrong(command, whole, info["element-type"], path.element(0), value[0])
        if info["meta-type"] == "alternate":
            objects = [m["type"] for m in info["members"] if self._json(m["type"]) is dict]
            if isinstance(value, dict) and objects:
                yield from self.wrong(command, whole, objects[0], path, value)
        if info["meta-type"] != "object":
            return
        members = {member["name"]: member for member in info["members"]}
        if "tag" in info:
            for variant in info["variants"]:
                if variant["case"] == value[info["tag"]]:
                    members |= {m["name"]: m for m in self.infos[variant["type"]]["members"]}
        for name, member in members.items():
            if name not in value:
                continue
            here = path.member(name)
            if "default" not in member:
                error = f"Parameter '{here.name}' is missing"
                yield Call(command, changed(whole, here, remove=True), error, "missing")
            few = 3 if len(path.keys) > 1 else 100  # deep inside, the same types come again and again
            for other, error in itertools.islice(self._misfits(member["type"], here.name), few):
                yield Call(command, changed(whole, here, other), error, "wrong type")
            yield from self.wrong(command, whole, member["type"], here, value[name])
        if "x-no-such" not in value:
            here = path.member("x-no-such")
            yield Call(command, changed(whole, here, 1), f"Parameter '{here.name}' is unexpected", "unknown")

    def _misfits(self, kind: str, name: str) -> Iterator[tuple[Any, str]]:
        info = self.infos[kind]
        if info["meta-type"] == "alternate":
            if not any(self._json(m["type"]) in (float, object) for m in info["members"]):
                yield 1.5, f"Invalid parameter type for '{name}', expected: "
            return
        wanted = self._json(kind)
        if wanted is object:
            return
        words = {
            str: "string",
            int: "integer",
            float: "number",
            bool: "boolean",
            list: "array",
            dict: "object",
            type(None): "null",
        }
        error = f"Invalid parameter type for '{name}', expected: {words[wanted]}"
        others: list[Any] = [None, 1, "x", True, [], {}, 1.5]
        for other in others:
            if type(other) is wanted or (wanted is float and type(other) is int):
                continue
            yield other, error
        if wanted is int:
            yield HUGE, error
            yield -HUGE, error
            yield 1 << 64, error
        if info["meta-type"] == "enum":
            yield "x-no-such", f"Parameter '{name}' does not accept value 'x-no-such'"

    def _json(self, kind: str) -> type:
        """The Python type of a type's values; ``object`` if any."""
        info = self.infos[kind]
        match info["meta-type"]:
            case "enum":
                return str
            case "array":
                return list
            case "object":
                return dict
        return {
            "string": str,
            "int": int,
            "number": float,
            "boolean": bool,
            "null": type(None),
            "value": object,
        }[info["json-type"]]


def changed(value: Json, path: Path, new: Any = None, *, remove: bool = False) -> Json:
    """A copy with another value at one place, or without it."""
    result = copy.deepcopy(value)
    place: Any = result
    for key in path.keys[:-1]:
        place = place[key]
    if remove:
        del place[path.keys[-1]]
    else:
        place[path.keys[-1]] = new
    return result
