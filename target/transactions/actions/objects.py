# SPDX-License-Identifier: Apache-2.0
"""Actions on objects: add, delete, and properties such as the limits of a throttle group."""

from __future__ import annotations

from typing import Any

from target.objects import ObjectOptions, UserObject
from target.qmp import object_tree
from target.qmp.registry import Arguments
from target.qmp.types import OBJECT_OPTIONS
from target.transactions.action import Action


class ObjectAdd(Action, type="object-add"):
    """Makes an object."""

    Data = OBJECT_OPTIONS
    data: tuple[type[UserObject], ObjectOptions]

    async def prepare(self) -> None:
        made = self.service.add_object(*self.data)

        async def remove() -> None:
            del self.service.objects[made.options.id]
            await made.close()

        self.change.undo(remove)


class ObjectDel(Action, type="object-del"):
    """Takes an object out; it ends when all has succeeded."""

    class Data(Arguments):
        id: str

    data: Data

    async def prepare(self) -> None:
        objects = self.service.objects
        before = dict(objects)
        found = self.service.take_object(self.data.id)

        def put_back() -> None:
            objects.clear()
            objects.update(before)  # in its place

        self.change.undo(put_back)
        self.change.later(found.close)


class QomSet(Action, type="qom-set"):
    """A new value of a property."""

    class Data(Arguments):
        path: str
        property: str
        value: Any

    data: Data

    async def prepare(self) -> None:
        item = object_tree.resolve(self.service, self.data.path)
        before = item.get(self.data.property)
        await item.set(self.data.property, self.data.value)
        self.change.undo(lambda: item.set(self.data.property, before))
