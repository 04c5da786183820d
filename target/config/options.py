# SPDX-License-Identifier: Apache-2.0
"""Checks plain values (from key=value, JSON or YAML) against msgspec structs, with QEMU's wording of errors.

One walk over the type does what differs between the three notations and names the member that is wrong;
msgspec makes the structures afterwards. It does not read text: see keyval.py and yaml_file.py.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from enum import Enum
from functools import cache
from typing import Annotated, Any, TypeVar, cast

import msgspec
from msgspec import inspect

T = TypeVar("T")

# A number of bytes. In key=value and YAML it may carry a suffix: 64k, 1.5G.
MAX_INT = (1 << 63) - 1
Size = Annotated[int, msgspec.Meta(ge=0, le=MAX_INT, extra={"size": True})]
# A member that is known only to be refused with a reason; the schema leaves it out.
Refused = Annotated[Any, msgspec.Meta(extra={"refused": True})]
Unsigned = Annotated[int, msgspec.Meta(ge=0, le=MAX_INT)]
UInt32 = Annotated[int, msgspec.Meta(ge=0, le=(1 << 32) - 1)]

SUFFIXES = {"b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}
TRUE = ("on", "yes", "true", "y")
FALSE = ("off", "no", "false", "n")


class Options(msgspec.Struct, rename="kebab", kw_only=True, forbid_unknown_fields=True):
    """The base of structures whose members have QMP's names."""


class OptionError(ValueError):
    """A member that is missing, unknown, of the wrong type, or has a value that is not permitted."""


class Notation(Enum):
    """Where the values come from, which decides what a string may stand for."""

    KEYVAL = "key=value"  # every scalar is a string
    JSON = "JSON"  # exact types
    YAML = "YAML"  # exact types; sizes may be strings with a suffix, numbers may stand for strings


# Turns a value into an instance of a class that msgspec does not know: (class, value, path, notation).
Hook = Callable[[type, Any, str, Notation], Any]


def parse_size(text: str) -> int:
    """Bytes from "64k", "1.5G", "0x1000", "512". ValueError when it is not a size."""
    shift = 0
    if text and text[-1].lower() in SUFFIXES and not text.lower().startswith("0x"):
        shift = SUFFIXES[text[-1].lower()]
        text = text[:-1]
    if "." in text:
        whole, _, fraction = text.partition(".")
        if not (whole + fraction).isdecimal() or not text.isascii() or not shift:
            raise ValueError(text)
        scale: int = 10 ** len(fraction)
        return (int(whole + fraction) << shift) // scale
    return parse_int(text) << shift


def parse_int(text: str) -> int:
    """An integer as C's strtoll with base 0 takes it, but for octal, which is refused as ambiguous."""
    if "_" in text or not text.isascii() or text != text.rstrip():
        raise ValueError(text)
    return int(text, 0)


def parse(value: Any, kind: type[T], notation: Notation, hook: Hook | None = None, path: str = "") -> T:
    """The typed structure that ``value`` describes. OptionError says which member is wrong."""
    info = type_info(cast(Hashable, kind))
    checked = Checker(notation, hook).check(value, info, path)
    try:
        return msgspec.convert(checked, kind, dec_hook=lambda cls, obj: obj)
    except msgspec.ValidationError as error:
        raise OptionError(_reword(str(error), path)) from None


@cache
def type_info(kind: Hashable) -> inspect.Type:
    return inspect.type_info(kind)


def subject(value: Any) -> str:
    """The name of what the value would have made, if it says so, to begin a message about it with."""
    if not isinstance(value, dict):
        return ""
    what, key = "object", "id"
    if "driver" in value:
        what, key = "node", "node-name"
    elif "backend" in value:
        what = "chardev"
    elif "type" in value:
        what = "export"
    name = value.get(key)
    return f"{what} '{name}': " if isinstance(name, str) else ""


def member(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _reword(message: str, path: str) -> str:
    """msgspec's "Expected `int` >= 0 - at `$.size`" as "Parameter 'size': expected `int` >= 0"."""
    what, _, where = message.partition(" - at `$")
    where = where.rstrip("`")
    name = path + where if path else where.lstrip(".")
    return f"Parameter '{name}': {what[:1].lower()}{what[1:]}"


class Checker:
    """One walk over a value and its type."""

    def __init__(self, notation: Notation, hook: Hook | None) -> None:
        self.notation = notation
        self.hook = hook

    def check(self, value: Any, info: inspect.Type, path: str) -> Any:
        """The value in the form that msgspec takes strictly."""
        match info:
            case inspect.Metadata():
                size = bool((info.extra or {}).get("size"))
                if isinstance(info.type, inspect.IntType):
                    return self.integer(value, path, size, info.type)
                return self.check(value, info.type, path)
            case inspect.StructType():
                return self.struct(value, info, path)
            case inspect.UnionType():
                return self.union(value, info, path)
            case inspect.ListType():
                return self.list(value, info, path)
            case inspect.BoolType():
                return self.boolean(value, path)
            case inspect.IntType():
                return self.integer(value, path, False, info)
            case inspect.FloatType():
                return self.number(value, path)
            case inspect.StrType():
                return self.string(value, path)
            case inspect.LiteralType():
                return self.literal(value, info, path)
            case inspect.CustomType():
                assert self.hook is not None
                return self.hook(info.cls, value, path, self.notation)
            case inspect.AnyType() | inspect.DictType():
                return value
        raise AssertionError(f"option type {info} is not supported")

    def struct(self, value: Any, info: inspect.StructType, path: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise expected(path, "object")
        result: dict[str, Any] = {}
        for field in info.fields:
            name = member(path, field.encode_name)
            if field.encode_name in value:
                kind = field.type
                if self.notation is Notation.JSON and field.default is None:
                    kind = without_none(kind)  # None says that the member is absent; null is a value
                result[field.encode_name] = self.check(value[field.encode_name], kind, name)
            elif field.required:
                raise OptionError(f"Parameter '{name}' is missing")
        if info.tag_field is not None:
            result[info.tag_field] = info.tag
        for key in value:
            if key not in result:
                raise OptionError(f"Parameter '{member(path, str(key))}' is unexpected")
        return result

    def union(self, value: Any, info: inspect.UnionType, path: str) -> Any:
        types = [t for t in info.types if not isinstance(t, inspect.NoneType)]
        if value is None and len(types) < len(info.types):
            return None
        if len(types) == 1:
            return self.check(value, types[0], path)
        structs = [t for t in types if isinstance(t, inspect.StructType)]
        if structs and len(structs) == len(types) and structs[0].tag_field is not None:
            return self.check(value, self.tagged(value, structs, path), path)
        wanted: type = type(value)
        for kind in types:
            if isinstance(kind, inspect.ListType) == (wanted is list) and self.fits(wanted, kind):
                return self.check(value, kind, path)
        return self.check(value, types[0], path)

    @staticmethod
    def fits(wanted: type, kind: inspect.Type) -> bool:
        """Whether a branch of a union is the one for a value of this Python type."""
        if isinstance(kind, inspect.StructType):
            return wanted is dict
        if isinstance(kind, inspect.StrType | inspect.LiteralType):
            return wanted is str
        return True

    def tagged(self, value: Any, structs: list[inspect.StructType], path: str) -> inspect.StructType:
        if not isinstance(value, dict):
            raise expected(path, "object")
        field = structs[0].tag_field
        assert field is not None
        name = member(path, field)
        if field not in value:
            raise OptionError(f"Parameter '{name}' is missing")
        self.string(value[field], name)
        for struct in structs:
            if struct.tag == value[field]:
                return struct
        raise OptionError(f"Parameter '{name}' does not accept value '{value[field]}'")

    def list(self, value: Any, info: inspect.ListType, path: str) -> list[Any]:
        if not isinstance(value, list):
            raise expected(path, "array")
        return [self.check(item, info.item_type, self.element(path, i)) for i, item in enumerate(value)]

    def element(self, path: str, index: int) -> str:
        return member(path, str(index)) if self.notation is Notation.KEYVAL else f"{path}[{index}]"

    def boolean(self, value: Any, path: str) -> bool:
        if isinstance(value, bool):
            return value
        if self.notation is Notation.JSON or not isinstance(value, str):
            raise expected(path, "boolean")
        if value in TRUE:
            return True
        if value in FALSE:
            return False
        raise OptionError(f"Parameter '{path}' expects 'on' or 'off'")

    def integer(self, value: Any, path: str, size: bool, info: inspect.IntType) -> int:
        if self.notation is not Notation.JSON and isinstance(value, str):
            try:
                value = parse_size(value) if size else parse_int(value)
            except ValueError:
                what = "a size, such as 512, 64k or 1.5G" if size else "integer"
                raise OptionError(f"Parameter '{path}' expects {what}") from None
        if not isinstance(value, int) or isinstance(value, bool):
            raise expected(path, "integer")
        if self.notation is Notation.JSON:
            largest = MAX_INT if info.le is None else max(info.le, MAX_INT)
            if not -MAX_INT - 1 <= value <= largest:
                raise expected(path, "integer")
        return value

    def number(self, value: Any, path: str) -> float:
        if self.notation is Notation.KEYVAL and isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                raise OptionError(f"Parameter '{path}' expects number") from None
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise expected(path, "number")
        return float(value)

    def string(self, value: Any, path: str) -> str:
        if isinstance(value, str):
            if "\0" in value:
                raise OptionError(f"Parameter '{path}' must not contain a null character")
            return value
        if self.notation is Notation.YAML and isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        raise expected(path, "string")

    def literal(self, value: Any, info: inspect.LiteralType, path: str) -> Any:
        # YAML reads a bare on or off as a boolean.
        if self.notation is Notation.YAML and isinstance(value, bool):
            value = "on" if value else "off"
        if not isinstance(value, str):
            raise expected(path, "string")
        if value not in info.values:
            raise OptionError(f"Parameter '{path}' does not accept value '{value}'")
        return value


def without_none(info: inspect.Type) -> inspect.Type:
    """The type of a member that may be absent."""
    if not isinstance(info, inspect.UnionType):
        return info
    types = tuple(t for t in info.types if not isinstance(t, inspect.NoneType))
    return types[0] if len(types) == 1 else inspect.UnionType(types)


def expected(path: str, what: str) -> OptionError:
    return OptionError(f"Invalid parameter type for '{path}', expected: {what}")
