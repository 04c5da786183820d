# SPDX-License-Identifier: Apache-2.0
"""What a target has, as QEMU's object model shows it: a tree of objects with types and named properties.

    /objects/ID    what object-add makes
    /chardevs/ID   character devices

A path that does not begin with a slash is the end of one, and must have one meaning.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from target import objects
from target.chardev import base as chardevs
from target.chardev.base import Chardev
from target.chardev.sockets import Socket
from target.graph.errors import BlockError
from target.objects import UserObject
from target.qmp.registry import CommandError

if TYPE_CHECKING:
    from target.service import Service


class Item(ABC):
    """One object. ``properties``: types by name; 'type' comes first, as every object has it."""

    def __init__(self, path: str, type: str, properties: dict[str, str]) -> None:
        self.path = path
        self.type = type
        self.properties = {"type": "string", **properties}

    def check(self, name: str) -> None:
        """BlockError when there is no such property."""
        if name not in self.properties:
            raise BlockError(f"Property '{self.type}.{name}' not found")

    def get(self, name: str) -> Any:
        """None when it has no value."""
        self.check(name)
        return self.type if name == "type" else self.value(name)

    async def set(self, name: str, value: Any) -> None:
        self.check(name)
        if name == "type":
            raise self.not_writable(name)
        await self.change(name, value)

    def not_writable(self, name: str) -> BlockError:
        return BlockError(f"Property '{self.type}.{name}' is not writable")

    def child(self, name: str) -> Item | None:
        return None

    def children(self) -> Iterator[Item]:
        return iter(())

    @abstractmethod
    def value(self, name: str) -> Any: ...

    async def change(self, name: str, value: Any) -> None:
        raise self.not_writable(name)


class Container(Item):
    """An object whose properties are objects."""

    def __init__(self, path: str, children: dict[str, Item]) -> None:
        self._children = children
        kinds = {name: f"child<{item.type}>" for name, item in children.items()}
        super().__init__(path, "container", kinds)

    def child(self, name: str) -> Item | None:
        return self._children.get(name)

    def children(self) -> Iterator[Item]:
        return iter(self._children.values())

    def value(self, name: str) -> Any:
        return self._children[name].path


class ObjectItem(Item):
    """One of /objects."""

    def __init__(self, found: UserObject) -> None:
        self._found = found
        super().__init__(f"/objects/{found.options.id}", found.type, found.properties())

    def value(self, name: str) -> Any:
        return self._found.get(name)

    async def change(self, name: str, value: Any) -> None:
        await self._found.set(name, value)


class ChardevItem(Item):
    """One of /chardevs."""

    def __init__(self, found: Chardev) -> None:
        self._found = found
        super().__init__(f"/chardevs/{found.id}", f"chardev-{found.type}", chardev_properties(type(found)))

    def value(self, name: str) -> Any:
        assert isinstance(self._found, Socket)
        return self._found.clients > 0 if name == "connected" else self._found.address()


def chardev_properties(kind: type[Chardev]) -> dict[str, str]:
    return {"connected": "bool", "addr": "SocketAddress"} if issubclass(kind, Socket) else {}


def root(service: Service) -> Container:
    """The tree as it is now."""
    made: dict[str, Item] = {id: ObjectItem(found) for id, found in service.objects.items()}
    devices: dict[str, Item] = {id: ChardevItem(found) for id, found in service.chardevs.items()}
    inner: dict[str, Item] = {
        "objects": Container("/objects", made),
        "chardevs": Container("/chardevs", devices),
    }
    return Container("/", inner)


def resolve(service: Service, path: str) -> Item:
    """The object at a path. CommandError DeviceNotFound, or BlockError when there are several."""
    top = root(service)
    parts = [part for part in path.split("/") if part]
    if path.startswith("/"):
        found = [item for item in [_walk(top, parts)] if item is not None]
    else:
        found = list(_search(top, parts))
    if len(found) > 1:
        raise BlockError(f"Path '{path}' is ambiguous")
    if not found:
        raise CommandError("DeviceNotFound", f"Device '{path}' not found")
    return found[0]


def _walk(item: Item | None, parts: list[str]) -> Item | None:
    for part in parts:
        item = item.child(part) if item is not None else None
    return item


def _search(item: Item, parts: list[str]) -> Iterator[Item]:
    found = _walk(item, parts)
    if found is not None:
        yield found
    for child in item.children():
        yield from _search(child, parts)


# ---- types ----


class TypeInfo(msgspec.Struct):
    """``properties`` of an instance, without 'type'."""

    name: str
    parent: str | None
    abstract: bool
    properties: dict[str, str]


def types() -> dict[str, TypeInfo]:
    """All types by name; those that QEMU derives a type from are abstract."""
    found = {
        "object": TypeInfo("object", None, True, {}),
        "container": TypeInfo("container", "object", False, {}),
        "chardev": TypeInfo("chardev", "object", True, {}),
    }
    for name, device in chardevs.types().items():
        found[f"chardev-{name}"] = TypeInfo(f"chardev-{name}", "chardev", False, chardev_properties(device))
    for name, kind in objects.types().items():
        found.setdefault(kind.parent, TypeInfo(kind.parent, "object", True, {}))
        found[name] = TypeInfo(name, kind.parent, False, kind.properties())
    return found


def implements(info: TypeInfo, wanted: str) -> bool:
    """Whether a type is, or derives from, the wanted one; user-creatable is an interface."""
    if wanted == "user-creatable":
        return info.name in objects.types()
    known = types()
    current: TypeInfo | None = info
    while current is not None and current.name != wanted:
        current = known.get(current.parent) if current.parent is not None else None
    return current is not None
