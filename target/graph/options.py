# SPDX-License-Identifier: Apache-2.0
"""The generic options of a node, the resolved settings, and how inline children inherit them.

Field names are those of QMP's BlockdevOptions. A driver's options extend NodeOptions.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from target.config.options import Size

Discard = Literal["ignore", "unmap"]
DetectZeroes = Literal["off", "on", "unmap"]


class CacheOptions(msgspec.Struct, rename="kebab", kw_only=True, forbid_unknown_fields=True):
    """How the host's page cache is used."""

    direct: bool | UnsetType = UNSET
    no_flush: bool | UnsetType = UNSET


class NodeOptions(msgspec.Struct, rename="kebab", kw_only=True, forbid_unknown_fields=True):
    """Options that every node takes. UNSET means: inherited from the parent, or the default."""

    node_name: str | None = None
    discard: Discard | UnsetType = UNSET
    cache: CacheOptions | UnsetType = UNSET
    read_only: bool | UnsetType = UNSET
    auto_read_only: bool | UnsetType = UNSET
    force_share: bool | UnsetType = UNSET
    detect_zeroes: DetectZeroes = "off"
    active: bool | UnsetType = UNSET


class ImageOptions(msgspec.Struct, rename="kebab", kw_only=True, forbid_unknown_fields=True):
    """What every driver that can make an image takes for it."""

    filename: str
    size: Size


class BlockdevRef:
    """A child in a driver's options: the name of a node that exists, or the options of one to be made."""

    def __init__(self, name: str | None = None, driver: str = "", options: NodeOptions | None = None) -> None:
        assert (name is None) != (options is None)
        self.name = name
        self.driver = driver
        self.options = options

    def __repr__(self) -> str:
        return f"BlockdevRef({self.name!r})" if self.name else f"BlockdevRef({self.driver}, {self.options!r})"


# What Node.attach takes: a node's name, options not yet parsed (from an image's header), or parsed ones.
Ref = str | dict[str, Any] | BlockdevRef


def names_child(kind: Any) -> bool:
    """Whether an option of this type names a child, or describes one."""
    return kind is BlockdevRef or any(names_child(part) for part in getattr(kind, "__args__", ()))


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The generic options in force, after inheritance."""

    read_only: bool = False
    auto_read_only: bool = False
    force_share: bool = False
    direct: bool = False
    no_flush: bool = False
    discard: Discard = "ignore"
    detect_zeroes: DetectZeroes = "off"
    active: bool = True


def inherit(parent: Settings, role: str) -> Settings:
    """Defaults for an inline child: the cache mode and sharing of its parent; a backing node is read-only.

    Discard is on below: the parent's own setting has decided already what comes down.
    """
    backing = role == "backing"
    return Settings(
        read_only=True if backing else parent.read_only,
        auto_read_only=False if backing else parent.auto_read_only,
        force_share=parent.force_share,
        direct=parent.direct,
        no_flush=parent.no_flush,
        discard="unmap",
        active=parent.active,
    )


def resolve(options: NodeOptions, defaults: Settings) -> Settings:
    """The settings of a node: its own options where given, else the defaults."""

    def pick(value: Any, default: Any) -> Any:
        return default if value is UNSET else value

    cache = CacheOptions() if options.cache is UNSET else options.cache
    return Settings(
        read_only=pick(options.read_only, defaults.read_only),
        auto_read_only=pick(options.auto_read_only, defaults.auto_read_only),
        force_share=pick(options.force_share, defaults.force_share),
        direct=pick(cache.direct, defaults.direct),
        no_flush=pick(cache.no_flush, defaults.no_flush),
        discard=pick(options.discard, defaults.discard),
        detect_zeroes=options.detect_zeroes,
        active=pick(options.active, defaults.active),
    )
