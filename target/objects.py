# SPDX-License-Identifier: Apache-2.0
"""Objects that users create by type and id (``--object``), beside nodes and exports: I/O threads, secrets.

A type registers by being defined, as drivers and exports do.
"""

from __future__ import annotations

import base64
import binascii
import builtins
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import msgspec

from target.config.options import Notation, OptionError, Unsigned, expected, member, parse
from target.graph.errors import BlockError

if TYPE_CHECKING:
    from target.datapath import Datapath

IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9._-]*\Z")
_types: dict[str, type[UserObject]] = {}


class ObjectOptions(msgspec.Struct, rename="kebab", kw_only=True, forbid_unknown_fields=True):
    """Options of every object (``qom-type`` chooses the class)."""

    id: str


class UserObject(ABC):
    """One object. ``close`` is called when nothing uses it any more."""

    type: ClassVar[str]
    Options: ClassVar[builtins.type[ObjectOptions]]

    def __init_subclass__(cls, *, type: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.type = type
        _types[type] = cls

    def __init__(self, options: ObjectOptions, datapath: Datapath) -> None:
        self.options = options
        self.datapath = datapath

    @abstractmethod
    def start(self) -> None:
        """Makes it usable. BlockError when a value cannot be honoured."""


class IoThread(UserObject, type="iothread"):
    """An I/O thread of the datapath. Polling adapts by itself, bounded by ``poll-max-ns``."""

    class Options(ObjectOptions):
        poll_max_ns: Unsigned = 32768
        poll_grow: Unsigned = 0
        poll_shrink: Unsigned = 0
        aio_max_batch: Unsigned = 0

    options: Options
    thread = -1

    def start(self) -> None:
        options = self.options
        for name in ("poll_grow", "poll_shrink", "aio_max_batch"):
            if getattr(options, name):
                option = name.replace("_", "-")
                raise BlockError(
                    f"iothread '{options.id}': option '{option}': only 0 (chosen by the program) is supported"
                )
        try:
            self.thread = self.datapath.add_thread(options.poll_max_ns)
        except OSError as error:
            raise BlockError.from_os(f"iothread '{options.id}'", error) from None


class Secret(UserObject, type="secret"):
    """A password or key, given or in a file, that other options name by the object's id."""

    class Options(ObjectOptions):
        data: str | None = None
        file: str | None = None
        format: Literal["raw", "base64"] = "raw"

    options: Options
    value = b""

    def start(self) -> None:
        options = self.options
        if options.data is not None and options.file is not None:
            raise self._error("'file' and 'data' are mutually exclusive")
        if options.data is not None:
            loaded = options.data.encode()
        elif options.file is not None:
            loaded = self._read(options.file)
        else:
            raise self._error("Must provide 'file' or 'data' to load secret")
        try:
            self.value = loaded if options.format == "raw" else base64.b64decode(loaded, validate=True)
        except binascii.Error:
            raise self._error("the value is not valid base64") from None

    def _read(self, path: str) -> bytes:
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise BlockError.from_os(f"secret '{self.options.id}': Unable to read {path}", error) from None

    def _error(self, message: str) -> BlockError:
        return BlockError(f"secret '{self.options.id}': {message}")


def secret(objects: Mapping[str, UserObject], id: str) -> bytes:
    """The value of the secret with that id. BlockError when there is none."""
    found = objects.get(id)
    if found is None:
        raise BlockError(f"No secret with id '{id}'")
    if not isinstance(found, Secret):
        raise BlockError(f"Object with id '{id}' is not a secret")
    return found.value


def types() -> dict[str, type[UserObject]]:
    """All object types by name, sorted."""
    return dict(sorted(_types.items()))


def parse_object(
    value: Any, notation: Notation = Notation.JSON, path: str = ""
) -> tuple[builtins.type[UserObject], ObjectOptions]:
    """The object's class and its typed options. OptionError says which member is wrong."""
    if not isinstance(value, dict):
        raise expected(path or "object", "object")
    tag = member(path, "qom-type")
    if "qom-type" not in value:
        raise OptionError(f"Parameter '{tag}' is missing")
    kind = value["qom-type"]
    if not isinstance(kind, str):
        raise expected(tag, "string")
    if kind not in _types:
        raise OptionError(f"Parameter '{tag}' does not accept value '{kind}'")
    rest = {key: item for key, item in value.items() if key != "qom-type"}
    options = parse(rest, _types[kind].Options, notation, path=path)
    if not IDENTIFIER.match(options.id):
        raise OptionError(f"Parameter '{member(path, 'id')}' expects an identifier, not '{options.id}'")
    return _types[kind], options
