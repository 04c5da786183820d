# SPDX-License-Identifier: Apache-2.0
"""Another backing file name in the header of an image, in steps of which each leaves a complete header.

The name goes where neither the old one nor an extension is; the first sector, which a disk writes whole, then
points to it. Only where there is no room for that (clusters of 1 or 2 KiB) are both in one place.
"""

from __future__ import annotations

from typing import NamedTuple

from target.drivers.format.qcow2 import spec
from target.drivers.format.qcow2.errors import ImageError
from target.drivers.format.qcow2.header import Header

SECTOR = 512


class Extension(NamedTuple):
    kind: int
    data: bytes

    def pack(self) -> bytes:
        return spec.EXTENSION.pack(type=self.kind, length=len(self.data)) + _padded(self.data)


def _padded(data: bytes) -> bytes:
    return data.ljust(len(data) + 7 & ~7, b"\0")


def renamed(cluster: bytes, header: Header, name: str | None, format: str | None) -> list[bytes]:
    """What the header cluster is to hold after each step, the last with the new name. ImageError."""
    text = (name or "").encode()
    if len(text) > spec.MAX_BACKING_NAME:
        raise ImageError(
            f"the backing file name is {len(text)} bytes long, more than {spec.MAX_BACKING_NAME}"
        )
    extensions, end = _extensions(cluster, header)
    area = _area(extensions, header, format if text else None)
    at = _place(cluster, header.header_length + len(area), end, len(text))
    last = bytearray(cluster)
    last[header.header_length : header.header_length + len(area)] = area
    last[at : at + len(text)] = text
    _point(last, at if text else 0, len(text))
    return [*_steps(cluster, bytes(last), header, end), bytes(last)]


def _extensions(cluster: bytes, header: Header) -> tuple[list[Extension], int]:
    """All of them, and where they end."""
    found: list[Extension] = []
    at = header.header_length
    end = min(spec.HEADER_V2.unpack(cluster)["backing_file_offset"] or len(cluster), len(cluster))
    while at + spec.EXTENSION.size <= end:
        extension = spec.EXTENSION.unpack(cluster, at)
        at += spec.EXTENSION.size
        if extension["type"] == spec.EXT_END:
            break
        found.append(Extension(extension["type"], cluster[at : at + extension["length"]]))
        at += extension["length"] + 7 & ~7
    return found, at


def _area(extensions: list[Extension], header: Header, format: str | None) -> bytes:
    """The extensions with another backing format, the feature names, which nobody depends on, last."""
    if format != header.backing_format:
        rest = [e for e in extensions if e.kind not in (spec.EXT_BACKING_FORMAT, spec.EXT_FEATURE_NAMES)]
        first = [] if format is None else [Extension(spec.EXT_BACKING_FORMAT, format.encode())]
        extensions = first + rest + [e for e in extensions if e.kind == spec.EXT_FEATURE_NAMES]
    return b"".join(e.pack() for e in extensions) + Extension(spec.EXT_END, b"").pack()


def _place(cluster: bytes, after: int, end: int, length: int) -> int:
    """Where the name goes: after the extensions, old and new, and not over the old name."""
    fields = spec.HEADER_V2.unpack(cluster)
    old, old_end = fields["backing_file_offset"], fields["backing_file_offset"] + fields["backing_file_size"]
    for at in (max(after, end), old_end + 7 & ~7):
        apart = not old or at >= old_end or at + length <= old
        if at >= max(after, end) and apart and at + length <= len(cluster):
            return at
    if after + length > len(cluster):
        raise ImageError("the header has no room for this backing file name")
    return after


def _point(cluster: bytearray, offset: int, length: int) -> None:
    at = spec.HEADER_V2.offsets["backing_file_offset"]
    cluster[at : at + 12] = offset.to_bytes(8, "big") + length.to_bytes(4, "big")


def _steps(old: bytes, last: bytes, header: Header, end: int) -> list[bytes]:
    """Before the last: everything but the first sector. Extensions there that change are taken out before."""
    if old[SECTOR:] == last[SECTOR:]:
        return []
    rest_of_old = old[:SECTOR] + last[SECTOR:]
    if old[SECTOR:end] == last[SECTOR:end] or end <= SECTOR:
        return [rest_of_old]
    cut = bytearray(old)
    at = header.header_length
    for extension in _extensions(old, header)[0]:
        if at + len(extension.pack()) + spec.EXTENSION.size > SECTOR:
            break
        at += len(extension.pack())
    cut[at : at + spec.EXTENSION.size] = bytes(spec.EXTENSION.size)
    return [bytes(cut), bytes(cut[:SECTOR]) + last[SECTOR:]]
