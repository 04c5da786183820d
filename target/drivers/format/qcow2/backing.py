# SPDX-License-Identifier: Apache-2.0
"""From the backing file name in a header to the options of the node to attach. It opens no node."""

from __future__ import annotations

import json
import os
import re
from typing import Any

from target.drivers.format import probe
from target.drivers.format.qcow2.errors import ImageError
from target.drivers.format.qcow2.header import Header, printable

_PROTOCOL = re.compile(r"([^/:]+):")  # whatever comes before a colon and any slash, as in QEMU
_NO_FORMAT = ("file", "host_device")  # a protocol named as the format: no format layer above it


def backing_options(header: Header, overlay: str | None) -> dict[str, Any] | None:
    """Options for the header's backing file, or None. ``overlay``: the path that relative names start from.

    ImageError when the name cannot be used, OSError when a file whose format is not stated cannot be read.
    """
    name = header.backing_file
    if name is None:
        return None
    if name.startswith("json:"):
        return _from_json(name, header.backing_format)
    path = _path(name, overlay)
    protocol = probe.protocol_driver(path)
    driver = header.backing_format or probe.probe_file(path)
    file = {"driver": protocol, "filename": path}
    return file if driver in _NO_FORMAT else {"driver": driver, "file": file}


def backing_path(header: Header, overlay: str | None) -> str | None:
    """Where the header's backing file is for this process; None when it names none, or none can tell."""
    name = header.backing_file
    if name is None or name.startswith("json:"):
        return name
    try:
        return _path(name, overlay)
    except ImageError:
        return name if _PROTOCOL.match(name) else None


def _path(name: str, overlay: str | None) -> str:
    protocol = _PROTOCOL.match(name)
    if protocol and protocol[1] in _NO_FORMAT:
        name = name[protocol.end() :]  # the driver follows from what is there
    elif protocol:
        raise ImageError(f"backing file '{printable(name)}': protocol '{protocol[1]}' is not supported")
    if os.path.isabs(name):
        return name
    if overlay is None:
        raise ImageError(f"backing file '{printable(name)}': a relative name needs an image in a file")
    return os.path.join(os.path.dirname(overlay), name)


def _from_json(name: str, driver: str | None) -> dict[str, Any]:
    try:
        value = json.loads(name[len("json:") :])
    except (ValueError, RecursionError):
        raise ImageError(f"backing file '{printable(name)}' is not valid JSON") from None
    if not isinstance(value, dict):
        raise ImageError(f"backing file '{printable(name)}' is not a JSON object")
    value = _nested(value)
    if driver is not None:
        value.setdefault("driver", driver)
    if "driver" not in value:
        raise ImageError(f"backing file '{printable(name)}' names no driver")
    return value


def _nested(value: dict[str, Any]) -> dict[str, Any]:
    """QEMU writes inner members either nested or as "file.filename"; both become nested."""
    out: dict[str, Any] = {}
    for key, item in value.items():
        *outer, last = key.split(".")
        table = out
        for part in outer:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise ImageError(f"backing file: member '{printable(key)}' is used inconsistently")
        table[last] = _nested(item) if isinstance(item, dict) else item
    return out
