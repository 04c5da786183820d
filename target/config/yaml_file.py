# SPDX-License-Identifier: Apache-2.0
"""A target as a YAML file: lists of what the options of the command line make, with the same members.

    objects:    [{qom-type: iothread, id: io0}]
    chardevs:   [{backend: socket, id: qmp, path: qmp.sock, server: true, wait: false}]
    monitors:   [{chardev: qmp}]
    images:     [{driver: qcow2, filename: disk.qcow2, size: 10G}]     # made when the file does not exist
    blockdevs:  [{driver: qcow2, node-name: disk, file: {driver: file, filename: disk.qcow2}}]
    nbd-server: {addr: {type: unix, path: nbd.sock}}                   # or nbd-servers, a list
    exports:    [{type: nbd, id: e0, node-name: disk, writable: true}]

They are carried out in this order. Relative names are relative to the working directory.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import yaml

from target.config.options import Notation, OptionError, expected, subject
from target.config.parse import (
    parse_blockdev,
    parse_chardev,
    parse_export,
    parse_image,
    parse_monitor,
    parse_nbd_server,
    parse_object,
)
from target.graph.errors import BlockError
from target.images import create_if_missing

if TYPE_CHECKING:
    from target.service import Service

LISTS = ("objects", "chardevs", "monitors", "images", "blockdevs", "nbd-servers", "exports")

Step = Callable[["Service"], Awaitable[object]]


class _Loader(yaml.SafeLoader):
    """Refuses a member that is given twice, of which YAML would silently take the last.

    Scalars that look like a date or a number and are none are errors of the file, not of the program.
    """

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError):  # what PyYAML's own constructors let through
            if not isinstance(node, yaml.ScalarNode):
                raise
            kind = str(node.tag).rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None, None, f"{node.value[:40]!r} is no valid {kind}", node.start_mark
            ) from None

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a name is expected", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"'{key.value}' is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class Entry:
    """One entry of the file, typed; ``where`` names it in messages."""

    def __init__(self, where: str, step: Step) -> None:
        self.where = where
        self.step = step

    async def run(self, service: Service) -> None:
        """Carries it out. BlockError names the entry."""
        try:
            await self.step(service)
        except BlockError as error:
            raise BlockError(f"{self.where}: {error}") from None


def parse_config(text: str) -> list[Entry]:
    """The entries in the order in which they are to be carried out. OptionError names what is wrong."""
    config = lists(load(text))
    entries: list[Entry] = []
    for name in LISTS:
        for i, value in enumerate(config[name]):
            where = f"{name}[{i}]"
            try:
                entries.append(Entry(where, _step(name, value)))
            except OptionError as error:
                raise OptionError(f"{where}: {subject(value)}{error}") from None
    return entries


def load(text: str) -> dict[str, Any]:
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark is not None else ""
        raise OptionError(f"{line}{error.problem or error}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise OptionError(str(error)) from None
    if not isinstance(value, dict):
        raise OptionError("expected a mapping with the members " + ", ".join(LISTS))
    return value


def lists(config: dict[str, Any]) -> dict[str, list[Any]]:
    """All lists of a file, empty where the file has none; a single nbd-server becomes a list."""
    for name in config:
        if name not in LISTS and name != "nbd-server":
            raise OptionError(f"Parameter '{name}' is unexpected")
    found: dict[str, list[Any]] = {}
    for name in LISTS:
        value = config.get(name)
        if value is not None and not isinstance(value, list):
            raise expected(name, "array")
        found[name] = value or []
    if config.get("nbd-server") is not None:
        found["nbd-servers"] = [config["nbd-server"], *found["nbd-servers"]]
    return found


def _step(name: str, value: Any) -> Step:
    """What one entry asks the service to do. Its options are checked here, before anything runs."""
    if name == "objects":
        kind, options = parse_object(value, Notation.YAML)

        async def add_object(service: Service) -> object:
            return service.add_object(kind, options)

        return add_object
    if name == "chardevs":
        request = parse_chardev(value, Notation.YAML)
        return lambda service: service.add_chardev(request)
    if name == "monitors":
        monitor = parse_monitor(value, Notation.YAML)

        async def add_monitor(service: Service) -> object:
            return service.add_monitor(monitor)

        return add_monitor
    if name == "images":
        driver, image = parse_image(value, Notation.YAML)
        return lambda service: create_if_missing(driver, image)
    if name == "blockdevs":
        ref = parse_blockdev(value, Notation.YAML)
        return lambda service: service.add_blockdev(ref)
    if name == "nbd-servers":
        server = parse_nbd_server(value, Notation.YAML)
        return lambda service: service.start_nbd_server(server)
    export, export_options = parse_export(value, Notation.YAML)
    return lambda service: service.add_export(export, export_options)
