# SPDX-License-Identifier: Apache-2.0
"""Commands that show objects and their properties (QEMU's qom.json), and I/O threads.

Those that change them are actions: see target.transactions.actions.objects.
"""

from __future__ import annotations

from typing import Any

import msgspec

from target.objects import IoThread
from target.qmp import object_tree
from target.qmp.registry import Answer, Arguments, CommandError, Context, command


class PathArguments(Arguments):
    path: str


class GetArguments(Arguments):
    path: str
    property: str


class ListGetArguments(Arguments):
    paths: list[str]


class ListTypesArguments(Arguments):
    implements: str | None = None
    abstract: bool = False


class TypenameArguments(Arguments):
    typename: str


class ObjectPropertyInfo(Answer):
    name: str
    type: str


class ObjectPropertyValue(Answer):
    """``value`` is absent where the property has none."""

    name: str
    type: str
    value: Any = msgspec.UNSET


class ObjectPropertiesValues(Answer):
    properties: list[ObjectPropertyValue]


class ObjectTypeInfo(Answer):
    name: str
    abstract: bool | None = None
    parent: str | None = None


class IOThreadInfo(Answer):
    """``thread_id``: the kernel's number of the thread."""

    id: str
    thread_id: int
    poll_max_ns: int
    poll_grow: int
    poll_shrink: int
    aio_max_batch: int


@command("qom-list", PathArguments, returns=list[ObjectPropertyInfo])
async def qom_list(context: Context, given: PathArguments) -> list[ObjectPropertyInfo]:
    item = object_tree.resolve(context.service, given.path)
    return [ObjectPropertyInfo(name=name, type=kind) for name, kind in item.properties.items()]


@command("qom-get", GetArguments, returns=Any)
async def qom_get(context: Context, given: GetArguments) -> Any:
    value = object_tree.resolve(context.service, given.path).get(given.property)
    return "" if value is None else value  # the answer of QEMU for a string that is not set


@command("qom-list-get", ListGetArguments, returns=list[ObjectPropertiesValues])
async def qom_list_get(context: Context, given: ListGetArguments) -> list[ObjectPropertiesValues]:
    answer = []
    for path in given.paths:
        item = object_tree.resolve(context.service, path)
        answer.append(ObjectPropertiesValues(properties=[_value(item, name) for name in item.properties]))
    return answer


def _value(item: object_tree.Item, name: str) -> ObjectPropertyValue:
    value = item.get(name)
    given = msgspec.UNSET if value is None else value
    return ObjectPropertyValue(name=name, type=item.properties[name], value=given)


@command("qom-list-types", ListTypesArguments, returns=list[ObjectTypeInfo])
async def qom_list_types(context: Context, given: ListTypesArguments) -> list[ObjectTypeInfo]:
    return [
        ObjectTypeInfo(name=info.name, abstract=info.abstract or None, parent=info.parent)
        for info in object_tree.types().values()
        if (given.abstract or not info.abstract)
        and (given.implements is None or object_tree.implements(info, given.implements))
    ]


@command("qom-list-properties", TypenameArguments, returns=list[ObjectPropertyInfo])
async def qom_list_properties(context: Context, given: TypenameArguments) -> list[ObjectPropertyInfo]:
    info = object_tree.types().get(given.typename)
    if info is None:
        raise CommandError("DeviceNotFound", f"Class '{given.typename}' not found")
    properties = {"type": "string", **info.properties}
    return [ObjectPropertyInfo(name=name, type=kind) for name, kind in properties.items()]


@command("query-iothreads", returns=list[IOThreadInfo])
async def query_iothreads(context: Context, given: None) -> list[IOThreadInfo]:
    threads = context.service.datapath.thread_ids()
    return [
        IOThreadInfo(
            id=id,
            thread_id=threads.get(found.thread, 0),
            poll_max_ns=found.options.poll_max_ns,
            poll_grow=found.options.poll_grow,
            poll_shrink=found.options.poll_shrink,
            aio_max_batch=found.options.aio_max_batch,
        )
        for id, found in context.service.objects.items()
        if isinstance(found, IoThread)
    ]
