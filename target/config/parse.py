# SPDX-License-Identifier: Apache-2.0
"""The typed options of each kind of thing that a target is made of, in one place for all notations.

Importing it makes all drivers and export types known, so it comes after a fork.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from target import chardev, drivers, exports, objects
from target.chardev import command_line
from target.chardev.command_line import parse_chardev
from target.config.options import Notation, parse
from target.exports import base
from target.exports.base import parse_export
from target.exports.nbd.server import NbdServerOptions
from target.graph import registry
from target.graph.registry import parse_blockdev, parse_image
from target.objects import parse_object
from target.qmp.monitor import MonitorOptions, parse_monitor

__all__ = [
    "kinds",
    "parse_blockdev",
    "parse_chardev",
    "parse_export",
    "parse_image",
    "parse_monitor",
    "parse_nbd_server",
    "parse_object",
]

chardev.load()
drivers.load()
exports.load()


def parse_nbd_server(value: Any, notation: Notation = Notation.JSON) -> NbdServerOptions:
    """Options of a listener for NBD."""
    return parse(value, NbdServerOptions, notation)


def kinds(option: str) -> Mapping[str, type[msgspec.Struct]]:
    """The types that an option of the command line can make, each with its structure."""
    match option:
        case "blockdev":
            return {name: driver.Options for name, driver in registry.drivers().items()}
        case "export":
            return {name: kind.Options for name, kind in base.types().items()}
        case "object":
            return {name: kind.Options for name, kind in objects.types().items()}
        case "chardev":
            return command_line.LINES
        case "monitor":
            return {"monitor": MonitorOptions}
        case "nbd-server":
            return {"nbd-server": NbdServerOptions}
    raise AssertionError(option)
