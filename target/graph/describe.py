# SPDX-License-Identifier: Apache-2.0
"""What a driver says of its node when somebody asks, and the names by which images refer to nodes.

The structures are those of QAPI's block-core.json. target/qmp/answers puts them together to answers.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from msgspec import NODEFAULT

from target.graph.options import NodeOptions, names_child

if TYPE_CHECKING:
    from target.graph.node import Node


class Described(msgspec.Struct, rename="kebab", kw_only=True, omit_defaults=True):
    """A member whose default is None is absent when it is not known."""


class SnapshotInfo(Described):
    """An internal snapshot. Sizes in bytes; icount: recorded instructions."""

    id: str
    name: str
    vm_state_size: int
    date_sec: int
    date_nsec: int
    vm_clock_sec: int
    vm_clock_nsec: int
    icount: int | None = None


class ImageInfoSpecificQCow2(Described, kw_only=True):
    """``corrupt``, ``lazy-refcounts`` and ``extended-l2``: of images of version 3 (compat 1.1) only."""

    compat: Literal["0.10", "1.1"]
    lazy_refcounts: bool | None = None
    refcount_bits: int
    corrupt: bool | None = None
    extended_l2: bool | None = None
    compression_type: Literal["zlib", "zstd"]


class ImageInfoSpecificQCow2Wrapper(Described, tag_field="type", tag="qcow2"):
    data: ImageInfoSpecificQCow2


class ImageInfoSpecificFile(Described):
    """``extent-size-hint``: bytes, of file systems that have one (XFS)."""

    extent_size_hint: int | None = None


class ImageInfoSpecificFileWrapper(Described, tag_field="type", tag="file"):
    data: ImageInfoSpecificFile


ImageInfoSpecific = ImageInfoSpecificQCow2Wrapper | ImageInfoSpecificFileWrapper


class BlockStatsSpecificFile(Described, tag_field="driver", tag="file"):
    """Discards that the driver passed to the file."""

    discard_nb_ok: int
    discard_nb_failed: int
    discard_bytes_ok: int


class BlockStatsSpecificHostDevice(BlockStatsSpecificFile, tag_field="driver", tag="host_device"):
    """The same for a block device."""


class BlockStatsSpecificNvme(Described, tag_field="driver", tag="nvme"):
    """Commands that failed, and requests whose buffers a controller could use as they were or not."""

    completion_errors: int
    aligned_accesses: int
    unaligned_accesses: int


BlockStatsSpecific = BlockStatsSpecificFile | BlockStatsSpecificHostDevice | BlockStatsSpecificNvme


class Description(msgspec.Struct, kw_only=True):
    """What a driver knows of its image; None: there is no such thing.

    ``cluster_size`` is in bytes, ``dirty`` means not closed cleanly. ``backing_filename`` and
    ``backing_format`` are those in the image, whatever node is attached; ``full_backing_filename`` is where
    that file is for this process.
    """

    cluster_size: int | None = None
    dirty: bool | None = None
    encrypted: bool = False
    backing_filename: str | None = None
    full_backing_filename: str | None = None
    backing_format: str | None = None
    snapshots: list[SnapshotInfo] = []
    specific: ImageInfoSpecific | None = None


_GENERIC = frozenset(NodeOptions.__struct_fields__)


def filename(node: Node) -> str:
    """What an image can name this node by: its file, or ``json:`` and the options that matter."""
    return plain_filename(node) or "json:" + json.dumps(full_options(node))


def plain_filename(node: Node) -> str | None:
    """The file's name, where opening it with this driver gives the same data; else None."""
    if node.is_protocol:
        return node.filename
    child = node.children.get("file")
    if child is not None and node.named_as_file:
        return plain_filename(child.node)
    if child is None or node.is_filter or not child.node.is_protocol or _own_options(node) or _rewired(node):
        return None
    return child.node.filename


def full_options(node: Node) -> dict[str, Any]:
    """Options that open the same data again: of this node and, recursively, of its children."""
    rewired = _rewired(node)
    found: dict[str, Any] = {"driver": node.driver, **_own_options(node)}
    for role, edge in node.children.items():
        if role != "backing" or rewired:
            found[edge.name] = full_options(edge.node)
    if rewired and "backing" not in node.children:
        found["backing"] = None
    return found


def _own_options(node: Node) -> dict[str, Any]:
    """The driver's own options that are not at their default and decide what data the node has.

    Children are found in the graph, where they may have been replaced since.
    """
    kind = type(node.options)
    defaults = dict(zip(kind.__struct_fields__[::-1], kind.__struct_defaults__[::-1], strict=False))
    skipped = _GENERIC | node.tuning
    found = {}
    for field in msgspec.structs.fields(kind):
        value = getattr(node.options, field.name)
        made = field.default_factory
        same = value == (defaults.get(field.name, NODEFAULT) if made is NODEFAULT else made())
        if field.name not in skipped and not same and not names_child(field.type):
            found[field.encode_name] = msgspec.to_builtins(value)
    return found


def _rewired(node: Node) -> bool:
    """Whether the backing node is another than the one that opening the image would attach."""
    edge = node.children.get("backing")
    named = node.describe().full_backing_filename
    if edge is None:
        return named is not None
    opened_for_it = edge.node.options.node_name is None and edge.node.opener is edge
    return not opened_for_it and not _same_file(filename(edge.node), named)


def _same_file(name: str, other: str | None) -> bool:
    """Two names that nodes or images give a file, relative to where the target runs."""
    if other is None or name.startswith("json:") or other.startswith("json:"):
        return name == other
    return os.path.abspath(name) == os.path.abspath(other)
