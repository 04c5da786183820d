# SPDX-License-Identifier: Apache-2.0
"""What ``help`` as an option's value shows: types, and the members of one with their defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import inspect

from target.config.options import type_info


def list_types(title: str, names: Mapping[str, object]) -> str:
    return "\n".join([f"{title}:", *(f"  {name}" for name in names)])


def describe(name: str, options: type[msgspec.Struct], taken: tuple[str, ...] = ()) -> str:
    """The members of an options structure: ``filename=<str>``. ``taken``: those not to show."""
    lines = [f"{name} options:"]
    for path, kind, default in sorted(_members(options)):
        if path not in taken:
            lines.append(f"  {path}=<{kind}>{default}")
    return "\n".join(lines)


def _members(options: Any, path: str = "") -> list[tuple[str, str, str]]:
    info = type_info(options)
    assert isinstance(info, inspect.StructType)
    found: list[tuple[str, str, str]] = []
    for field in info.fields:
        name = path + field.encode_name
        inner = _structs(field.type)
        if inner and inner[0].tag_field:
            found.append((f"{name}.{inner[0].tag_field}", "|".join(str(s.tag) for s in inner), " (required)"))
        if inner:
            for struct in inner:
                when = f" (with {struct.tag_field}={struct.tag})" if struct.tag_field else ""
                found += [
                    (member, kind, when or default)
                    for member, kind, default in _members(struct.cls, f"{name}.")
                ]
        else:
            found.append((name, _kind(field.type), _default(field)))
    return found


def _structs(kind: inspect.Type) -> list[inspect.StructType]:
    """The structures that a member may have; none when it is a plain value."""
    types = kind.types if isinstance(kind, inspect.UnionType) else (kind,)
    return [t for t in types if isinstance(t, inspect.StructType)]


def _kind(kind: inspect.Type) -> str:
    match kind:
        case inspect.Metadata():
            return "size" if (kind.extra or {}).get("size") else _kind(kind.type)
        case inspect.LiteralType():
            return "|".join(str(value) for value in kind.values)
        case inspect.UnionType():
            kinds = dict.fromkeys(_kind(t) for t in kind.types if not isinstance(t, inspect.NoneType))
            return "|".join(kinds)
        case inspect.ListType():
            return f"list of {_kind(kind.item_type)}"
        case inspect.CustomType():
            return "node"
    return {"Int": "int", "Str": "str", "Bool": "bool"}.get(type(kind).__name__.removesuffix("Type"), "value")


def _default(field: inspect.Field) -> str:
    if field.required:
        return " (required)"
    value = field.default
    if value in (msgspec.NODEFAULT, None, msgspec.UNSET):
        return ""
    if isinstance(value, bool):
        return f" (default: {'on' if value else 'off'})"
    return f" (default: {value})"
