# SPDX-License-Identifier: Apache-2.0
"""Unions that several commands take, in the form in which QMP names them."""

from __future__ import annotations

from target import objects
from target.exports import base as exports
from target.graph import registry as graph
from target.qmp.registry import Choice, OneOf

BLOCKDEV_OPTIONS = OneOf(
    "BlockdevOptions",
    "driver",
    lambda: {name: driver.Options for name, driver in graph.drivers().items()},
    graph.parse_blockdev,
)
EXPORT_OPTIONS = OneOf(
    "BlockExportOptions",
    "type",
    lambda: {name: kind.Options for name, kind in exports.types().items()},
    exports.parse_export,
)
OBJECT_OPTIONS = OneOf(
    "ObjectOptions",
    "qom-type",
    lambda: {name: kind.Options for name, kind in objects.types().items()},
    objects.parse_object,
)


IMAGE_OPTIONS = OneOf(
    "ImageOptions",
    "driver",
    graph.image_options,
    graph.parse_image,
)


class BlockdevOptions(Choice):
    """Options of a node, as a member or in an array; ``value`` is a BlockdevRef."""

    one_of = BLOCKDEV_OPTIONS


class ExportOptions(Choice):
    """Options of an export; ``value`` is its class and its typed options."""

    one_of = EXPORT_OPTIONS


class ObjectOptions(Choice):
    """Options of an object; ``value`` is its class and its typed options."""

    one_of = OBJECT_OPTIONS
