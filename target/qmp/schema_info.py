# SPDX-License-Identifier: Apache-2.0
"""The parts of an answer to query-qmp-schema (QAPI's SchemaInfo)."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, UnsetType

from target.qmp.registry import Answer

JsonType = Literal["string", "number", "int", "boolean", "null", "object", "array", "value"]


class EnumMember(Answer):
    name: str


class Member(Answer):
    """Of an object. ``default``: null where the member may be absent."""

    name: str
    type: str
    default: UnsetType | None = UNSET


class Variant(Answer):
    """What an object has more when its tag has this value."""

    case: str
    type: str


class AlternateMember(Answer):
    type: str


class BuiltinInfo(Answer, tag_field="meta-type", tag="builtin"):
    name: str
    json_type: JsonType


class EnumInfo(Answer, tag_field="meta-type", tag="enum"):
    name: str
    members: list[EnumMember]
    values: list[str]


class ArrayInfo(Answer, tag_field="meta-type", tag="array"):
    name: str
    element_type: str


class ObjectInfo(Answer, tag_field="meta-type", tag="object"):
    name: str
    members: list[Member]
    tag: str | UnsetType = UNSET
    variants: list[Variant] | UnsetType = UNSET


class AlternateInfo(Answer, tag_field="meta-type", tag="alternate"):
    name: str
    members: list[AlternateMember]


class CommandInfo(Answer, tag_field="meta-type", tag="command"):
    name: str
    arg_type: str
    ret_type: str
    allow_oob: bool = False
    features: list[str] | UnsetType = UNSET


class EventInfo(Answer, tag_field="meta-type", tag="event"):
    name: str
    arg_type: str


SchemaInfo = BuiltinInfo | EnumInfo | ArrayInfo | ObjectInfo | AlternateInfo | CommandInfo | EventInfo
