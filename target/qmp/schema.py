# SPDX-License-Identifier: Apache-2.0
"""Describes commands and events for query-qmp-schema, from the types that check what clients send.

The form is QEMU's (qapi/introspect.json). Types have their own names, where QEMU hides them behind numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, cast

from msgspec import UNSET, inspect

from target import events
from target.config.options import type_info, without_none
from target.graph.options import BlockdevRef
from target.qmp import registry
from target.qmp.registry import Choice, Command, OneOf
from target.qmp.schema_info import (
    AlternateInfo,
    AlternateMember,
    ArrayInfo,
    BuiltinInfo,
    CommandInfo,
    EnumInfo,
    EnumMember,
    EventInfo,
    JsonType,
    Member,
    ObjectInfo,
    SchemaInfo,
    Variant,
)
from target.qmp.types import BLOCKDEV_OPTIONS

BUILTINS: dict[str, JsonType] = {
    "str": "string",
    "int": "int",
    "number": "number",
    "bool": "boolean",
    "null": "null",
    "any": "value",
}


@cache
def describe() -> list[SchemaInfo]:
    """All of it: commands, events, and the types that they use, in the order of their use."""
    return Schema().infos


class Schema:
    """The descriptions made so far."""

    def __init__(self) -> None:
        self.infos: list[SchemaInfo] = []
        self._names: dict[object, str] = {}  # of types that are described, or are about to be
        self._taken: set[str] = set()
        for command in registry.commands().values():
            self.infos.append(
                CommandInfo(
                    name=command.name,
                    arg_type=self._arguments(command.arguments),
                    ret_type="q_empty" if command.returns is None else self._type(type_info(command.returns)),
                    allow_oob=command.oob,
                    features=_features(command) or UNSET,
                )
            )
        for name, event in events.types().items():
            self.infos.append(EventInfo(name=name, arg_type=self._type(type_info(event))))
        self._add(ObjectInfo(name="q_empty", members=[]), "q_empty")
        for name, json_type in BUILTINS.items():
            self.infos.append(BuiltinInfo(name=name, json_type=json_type))

    def _arguments(self, kind: Any) -> str:
        if kind is None:
            return "q_empty"
        return self._one_of(kind) if isinstance(kind, OneOf) else self._type(type_info(kind))

    # ---- types ----

    def _type(self, info: inspect.Type) -> str:
        """The name of a type, which is described if it is not yet."""
        match info:
            case inspect.Metadata():
                return self._type(info.type)
            case inspect.StrType():
                return "str"
            case inspect.IntType():
                return "int"
            case inspect.FloatType():
                return "number"
            case inspect.BoolType():
                return "bool"
            case inspect.NoneType():
                return "null"
            case inspect.AnyType() | inspect.DictType():
                return "any"
            case inspect.ListType():
                return self._array(self._type(info.item_type))
            case inspect.LiteralType():
                return self._enum([str(value) for value in info.values])
            case inspect.StructType():
                return self._struct(info)
            case inspect.UnionType():
                return self._union(info)
            case inspect.CustomType():
                return self._custom(info.cls)
        raise AssertionError(f"type {info} cannot be described")

    def _custom(self, kind: type) -> str:
        if issubclass(kind, Choice):
            return self._one_of(kind.one_of)
        assert kind is BlockdevRef, f"type {kind} cannot be described"
        return self._alternate("BlockdevRef", ["str", self._one_of(BLOCKDEV_OPTIONS)])

    def _array(self, element: str) -> str:
        name = f"[{element}]"
        return self._once(name, lambda: ArrayInfo(name=name, element_type=element))

    def _enum(self, values: list[str], name: str = "") -> str:
        key = (name, *values)
        if key not in self._names:
            name = self._names[key] = self._free(name or "-or-".join(values[:4]))
            members = [EnumMember(name=value) for value in values]
            self.infos.append(EnumInfo(name=name, members=members, values=values))
        return self._names[key]

    def _alternate(self, name: str, types: list[str]) -> str:
        members = [AlternateMember(type=kind) for kind in types]
        return self._once(name, lambda: AlternateInfo(name=name, members=members))

    def _union(self, info: inspect.UnionType) -> str:
        structs = [t for t in info.types if isinstance(t, inspect.StructType)]
        if len(structs) == len(info.types) and structs[0].tag_field is not None:
            return self._tagged(structs)
        others = [t for t in info.types if not isinstance(t, inspect.NoneType)]
        types = [self._type(t) for t in others]
        if "any" in types:
            return "any"
        name = "-or-".join(types)
        if types == ["BlockdevRef"]:
            types = ["str", self._one_of(BLOCKDEV_OPTIONS)]
        if len(others) == len(info.types):
            return self._alternate(name, types)
        return self._alternate(f"{name}OrNull", [*types, "null"])

    # ---- objects ----

    def _struct(self, info: inspect.StructType) -> str:
        if info.cls not in self._names:
            self._names[info.cls] = name = self._free(info.cls.__name__)
            tag = [] if info.tag_field is None else [self._tag_member(info.tag_field, name, [str(info.tag)])]
            self.infos.append(ObjectInfo(name=name, members=tag + self._members(info.fields)))
        return self._names[info.cls]

    def _tagged(self, structs: list[inspect.StructType]) -> str:
        """A union of structures that tell themselves apart by a member."""
        names = [struct.cls.__name__ for struct in structs]
        tag = cast(str, structs[0].tag_field)
        branches = {str(struct.tag): struct.fields for struct in structs}
        key = tuple(struct.cls for struct in structs)
        name = _last_word(names) or "-or-".join(names)
        return self._flat(key, name, tag, branches, dict(zip(branches, names, strict=True)))

    def _one_of(self, one_of: OneOf) -> str:
        names = {case: f"{one_of.name}-{case}" for case in one_of.branches()}
        if one_of.data:
            return self._wrapped(one_of, names)
        branches: dict[str, tuple[inspect.Field, ...]] = {}
        for case, kind in one_of.branches().items():
            info = type_info(cast(type, kind))
            assert isinstance(info, inspect.StructType)
            branches[case] = info.fields
        return self._flat(one_of.name, one_of.name, one_of.tag, branches, names)

    def _wrapped(self, one_of: OneOf, names: Mapping[str, str]) -> str:
        """The members of each branch are inside one member."""
        if one_of.name in self._names:
            return self._names[one_of.name]
        name = self._names[one_of.name] = self._free(one_of.name)
        variants = []
        for case, kind in one_of.branches().items():
            branch = self._free(names[case])
            data = Member(name=one_of.data, type=self._arguments(kind))
            self.infos.append(ObjectInfo(name=branch, members=[data]))
            variants.append(Variant(case=case, type=branch))
        tag = self._tag_member(one_of.tag, name, list(names))
        self.infos.append(ObjectInfo(name=name, members=[tag], tag=one_of.tag, variants=variants))
        return name

    def _flat(
        self,
        key: object,
        name: str,
        tag: str,
        branches: Mapping[str, tuple[inspect.Field, ...]],
        names: Mapping[str, str],
    ) -> str:
        """An object with a tag, members of all its branches, and each branch's own."""
        if key in self._names:
            return self._names[key]
        name = self._names[key] = self._free(name)
        common = _common(list(branches.values()))
        members = [self._tag_member(tag, name, list(branches)), *self._members(common)]
        variants = []
        for case, fields in branches.items():
            own = [field for field in fields if field not in common]
            if own:
                branch = self._free(names[case])
                self.infos.append(ObjectInfo(name=branch, members=self._members(own)))
                variants.append(Variant(case=case, type=branch))
            else:
                variants.append(Variant(case=case, type="q_empty"))
        self.infos.append(ObjectInfo(name=name, members=members, tag=tag, variants=variants))
        return name

    def _tag_member(self, tag: str, name: str, values: list[str]) -> Member:
        return Member(name=tag, type=self._enum(values, f"{name}-{tag}"))

    def _members(self, fields: Iterable[inspect.Field]) -> list[Member]:
        return [self._member(field) for field in fields if not _refused(field.type)]

    def _member(self, field: inspect.Field) -> Member:
        kind = without_none(field.type) if field.default is None else field.type
        default = UNSET if field.required else None
        return Member(name=field.encode_name, type=self._type(kind), default=default)

    # ---- names ----

    def _once(self, name: str, make: Any) -> str:
        if name not in self._names:
            self._names[name] = name
            self._add(make(), name)
        return name

    def _add(self, info: SchemaInfo, name: str) -> None:
        self._taken.add(name)
        self.infos.append(info)

    def _free(self, name: str) -> str:
        """The name, with a number if something else has it."""
        found, number = name, 1
        while found in self._taken or found in BUILTINS:
            number += 1
            found = f"{name}-{number}"
        self._taken.add(found)
        return found


def _common(branches: list[tuple[inspect.Field, ...]]) -> list[inspect.Field]:
    """The members that all branches have alike."""
    if not branches:
        return []
    return [field for field in branches[0] if all(field in fields for fields in branches[1:])]


def _last_word(names: list[str]) -> str:
    """What the names of classes end with: Address for UnixAddress and InetAddress."""
    words = {re.findall("[A-Z]+[a-z0-9]*", name)[-1] for name in names}
    return words.pop() if len(words) == 1 else ""


def _features(command: Command) -> list[str]:
    features = list(command.features)
    if command.name.startswith("x-") and "unstable" not in features:
        features.append("unstable")
    return features


def _refused(info: inspect.Type) -> bool:
    """Members that are known only to be refused with a reason."""
    return isinstance(info, inspect.Metadata) and bool((info.extra or {}).get("refused"))
