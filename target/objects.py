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
from msgspec import inspect

from target.config.options import MAX_INT, Notation, OptionError, expected, member, parse
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
    parent: ClassVar[str] = "object"  # QEMU's name of the type that it derives from
    Options: ClassVar[builtins.type[ObjectOptions]]
    live: ClassVar[frozenset[str]] = frozenset()  # options that qom-set may change

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

    @property
    def in_use(self) -> bool:
        """It must not be deleted now."""
        return False

    async def close(self) -> None:
        """Gives back what it holds."""
        return None

    @classmethod
    def properties(cls) -> dict[str, str]:
        """The types of the properties by name: the options, and what a type has beside them."""
        info = inspect.type_info(cls.Options)
        assert isinstance(info, inspect.StructType)
        return {field.encode_name: property_type(field.type) for field in info.fields if field.name != "id"}

    @classmethod
    def default(cls, name: str) -> Any:
        """The value of an option that is not given."""
        fields = {field.encode_name: field for field in msgspec.structs.fields(cls.Options)}
        return fields[name].default

    def get(self, name: str) -> Any:
        """The value of a property; None when an option was not given."""
        found: Any = getattr(self.options, name.replace("-", "_"))
        return found

    async def set(self, name: str, value: Any) -> None:
        """Changes a property. OptionError and BlockError say what is wrong; then nothing has changed."""
        if name not in self.live:
            raise BlockError(f"Property '{self.type}.{name}' is not writable")
        new = parse({"id": self.options.id, **self._given(), name: value}, self.Options, Notation.JSON)
        await self.update(new)
        self.options = new

    async def update(self, options: ObjectOptions) -> None:
        """Puts new values of ``live`` options into force."""
        raise NotImplementedError

    def _given(self) -> dict[str, Any]:
        """The options as they were given."""
        given: dict[str, Any] = msgspec.to_builtins(self.options)
        return {name: value for name, value in given.items() if value is not None}


class IoThread(UserObject, type="iothread"):
    """An I/O thread of the datapath. Polling adapts by itself, bounded by ``poll-max-ns``."""

    class Options(ObjectOptions):
        poll_max_ns: int = 32768
        poll_grow: int = 0
        poll_shrink: int = 0
        aio_max_batch: int = 0

    parent = "event-loop-base"
    live = frozenset({"poll-max-ns", "poll-grow", "poll-shrink", "aio-max-batch"})
    options: Options
    thread = -1

    def start(self) -> None:
        self._check(self.options)
        try:
            self.thread = self.datapath.add_thread(self.options.poll_max_ns)
        except OSError as error:
            raise BlockError.from_os(f"iothread '{self.options.id}'", error) from None
        self._set_poll(self.options)

    async def close(self) -> None:
        self.datapath.park_thread(self.thread)

    async def update(self, options: ObjectOptions) -> None:
        assert isinstance(options, IoThread.Options)
        self._check(options)
        self._set_poll(options)

    def _set_poll(self, options: Options) -> None:
        self.datapath.set_poll(self.thread, options.poll_max_ns, options.poll_grow, options.poll_shrink)

    @staticmethod
    def _check(options: Options) -> None:
        for name in ("poll_max_ns", "poll_grow", "poll_shrink", "aio_max_batch"):
            if not 0 <= getattr(options, name) <= MAX_INT:
                raise BlockError(f"{name.replace('_', '-')} value must be in range [0, {MAX_INT}]")
        if options.aio_max_batch:
            raise BlockError(
                f"iothread '{options.id}': 'aio-max-batch': only 0 (chosen by the program) is supported"
            )


class Secret(UserObject, type="secret"):
    """A password or key, given or in a file, that other options name by the object's id."""

    class Options(ObjectOptions):
        data: str | None = None
        file: str | None = None
        format: Literal["raw", "base64"] = "raw"

    parent = "secret_common"
    live = frozenset({"data", "file", "format"})
    options: Options
    value = b""

    def start(self) -> None:
        self.value = self._load(self.options)

    async def update(self, options: ObjectOptions) -> None:
        assert isinstance(options, Secret.Options)
        self.value = self._load(options)

    def _load(self, options: Options) -> bytes:
        if options.data is not None and options.file is not None:
            raise self._error("'file' and 'data' are mutually exclusive")
        if options.data is not None:
            loaded = options.data.encode()
        elif options.file is not None:
            loaded = self._read(options.file)
        else:
            raise self._error("Must provide 'file' or 'data' to load secret")
        try:
            return loaded if options.format == "raw" else base64.b64decode(loaded, validate=True)
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


def property_type(info: inspect.Type) -> str:
    """QOM's name of the type of an option."""
    match info:
        case inspect.Metadata():
            return property_type(info.type)
        case inspect.UnionType():
            return property_type(next(t for t in info.types if not isinstance(t, inspect.NoneType)))
        case inspect.StructType():
            return info.cls.__name__
        case inspect.IntType():
            return "int"
        case inspect.BoolType():
            return "bool"
        case _:
            return "string"


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
        raise OptionError(f"Parameter '{member(path, 'id')}' expects an identifier")
    return _types[kind], options
