# SPDX-License-Identifier: Apache-2.0
"""The drivers by name. A driver registers by being defined: see Node.__init_subclass__."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from target.config.options import Notation, OptionError, expected, member, parse
from target.graph.options import BlockdevRef, ImageOptions

if TYPE_CHECKING:
    from target.graph.node import Node

_drivers: dict[str, type[Node]] = {}


def register(name: str, driver: type[Node]) -> None:
    assert name not in _drivers, f"two drivers are named {name}"
    _drivers[name] = driver


def drivers() -> dict[str, type[Node]]:
    """All drivers by name, sorted."""
    return dict(sorted(_drivers.items()))


def names(kind: type[Node]) -> tuple[str, ...]:
    """The names that a driver goes by."""
    return tuple(name for name, found in _drivers.items() if found is kind)


def driver(name: str) -> type[Node]:
    return _drivers[name]


def parse_blockdev(value: Any, notation: Notation = Notation.JSON, path: str = "") -> BlockdevRef:
    """Options of a node and, recursively, of its inline children. OptionError says which member is wrong."""
    name, rest = _split(value, path or "blockdev", member(path, "driver"))
    options = parse(rest, _drivers[name].Options, notation, _hook, path)
    return BlockdevRef(driver=name, options=options)


def parse_image(value: Any, notation: Notation = Notation.JSON) -> tuple[type[Node], ImageOptions]:
    """The driver that makes an image, and its options for it."""
    name, rest = _split(value, "image", "driver")
    kind = _drivers[name].CreateOptions
    if kind is None:
        raise OptionError(f"Parameter 'driver': driver '{name}' cannot make images")
    return _drivers[name], parse(rest, kind, notation)


def _split(value: Any, what: str, where: str) -> tuple[str, dict[str, Any]]:
    """The driver's name, which is known, and the other members."""
    if not isinstance(value, dict):
        raise expected(what, "object")
    name = value.get("driver")
    if name is None:
        raise OptionError(f"Parameter '{where}' is missing")
    if not isinstance(name, str):
        raise expected(where, "string")
    if name not in _drivers:
        raise OptionError(f"Parameter '{where}' does not accept value '{name}'")
    return name, {key: item for key, item in value.items() if key != "driver"}


def _hook(kind: type, value: Any, path: str, notation: Notation) -> BlockdevRef:
    assert kind is BlockdevRef, f"{kind} is not a type for options"
    if isinstance(value, str):
        return BlockdevRef(name=value) if value else _no_node(path)
    return parse_blockdev(value, notation, path)


def _no_node(path: str) -> BlockdevRef:
    raise OptionError(f"Parameter '{path}' expects the name of a node, or the options of one")
