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


def is_transparent(name: str) -> bool:
    """Whether nodes of a driver show the data of their child: filters do, and raw without a window."""
    return name in _drivers and (_drivers[name].is_filter or name in ("raw", "quorum"))


def driver(name: str) -> type[Node]:
    return _drivers[name]


def parse_blockdev(value: Any, notation: Notation = Notation.JSON, path: str = "") -> BlockdevRef:
    """Options of a node and, recursively, of its inline children. OptionError says which member is wrong."""
    name, rest = _split(value, path or "blockdev", member(path, "driver"))
    options = parse(rest, _drivers[name].Options, notation, parse_child, path)
    return BlockdevRef(driver=name, options=options)


def image_options() -> dict[str, type[ImageOptions]]:
    """The options for making an image, of each driver that can."""
    found = {name: kind.CreateOptions for name, kind in drivers().items()}
    return {name: options for name, options in found.items() if options is not None}


def parse_image(
    value: Any, notation: Notation = Notation.JSON, path: str = ""
) -> tuple[type[Node], ImageOptions]:
    """The driver that makes an image, and its options for it."""
    name, rest = _split(value, path or "image", member(path, "driver"))
    kind = _drivers[name].CreateOptions
    if kind is None:
        raise OptionError(f"Parameter '{member(path, 'driver')}': driver '{name}' cannot make images")
    return _drivers[name], parse(rest, kind, notation, path=path)


def _split(value: Any, what: str, where: str) -> tuple[str, dict[str, Any]]:
    """The driver's name, which is known, and the other members."""
    if not isinstance(value, dict):
        raise expected(what, "object")
    if "driver" not in value:
        raise OptionError(f"Parameter '{where}' is missing")
    name = value["driver"]
    if not isinstance(name, str):
        raise expected(where, "string")
    if name not in _drivers:
        raise OptionError(f"Parameter '{where}' does not accept value '{name}'")
    return name, {key: item for key, item in value.items() if key != "driver"}


def parse_child(kind: type, value: Any, path: str, notation: Notation) -> BlockdevRef:
    """The hook for options that name a node or describe one."""
    assert kind is BlockdevRef, f"{kind} is not a type for options"
    if isinstance(value, str):
        return BlockdevRef(name=value) if value else _no_node(path)
    if not isinstance(value, dict):
        raise expected(path, "BlockdevRef")
    return parse_blockdev(value, notation, path)


def _no_node(path: str) -> BlockdevRef:
    raise OptionError(f"Parameter '{path}' expects the name of a node, or the options of one")
