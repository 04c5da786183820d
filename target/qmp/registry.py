# SPDX-License-Identifier: Apache-2.0
"""The commands by name. A command is a coroutine function with the types of its arguments and its answer:

    class Resize(Arguments):
        node_name: str | None = None
        size: int

    @command("block_resize", Resize)
    async def block_resize(context: Context, given: Resize) -> None: ...

The types check what a client sends, and describe the command in query-qmp-schema.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import msgspec

if TYPE_CHECKING:
    from target.config.options import Notation
    from target.service import Service


class Arguments(msgspec.Struct, rename="kebab", kw_only=True, forbid_unknown_fields=True):
    """Arguments of a command. A member that QMP writes with an underscore is renamed by ``msgspec.field``."""


class Answer(msgspec.Struct, rename="kebab", kw_only=True, omit_defaults=True):
    """What a command returns, or a part of it; a member whose default is UNSET or None may be absent."""


@dataclass(frozen=True)
class OneOf:
    """Arguments whose further members follow from one of them (a QAPI flat union), such as BlockdevOptions.

    ``branches`` gives the structure for each value of the member ``tag``; ``parse`` checks and types the
    whole; OptionError names the member, whose path begins with the one given. ``name``: of the type, in the
    schema. ``data``: the further members are inside a member of that name, and may be a OneOf themselves.
    """

    name: str
    tag: str
    branches: Callable[[], Mapping[str, type[msgspec.Struct] | OneOf]]
    parse: Callable[[Any, Notation, str], Any]
    data: str = ""


class Choice:
    """The type of a member that is a OneOf: ``class BlockdevOptions(Choice): one_of = OneOf(...)``."""

    one_of: ClassVar[OneOf]

    def __init__(self, value: Any) -> None:
        self.value = value  # what ``parse`` returned


class Monitor(Protocol):
    """What commands may ask of the connection they came by."""

    def negotiate(self, capabilities: list[str]) -> None:
        """Ends the negotiation. CommandError when it has ended before."""

    def take_fd(self) -> int | None:
        """The oldest descriptor received with this command and not taken yet; the taker closes it."""


@dataclass(frozen=True)
class Context:
    """Where a command runs. ``monitor`` is None for the program's own calls."""

    service: Service
    monitor: Monitor | None = None


Handler = Callable[[Context, Any], Awaitable[Any]]


@dataclass(frozen=True)
class Command:
    """A command as clients see it. ``returns``: a Struct, a list of them, or another type; None: ``{}``."""

    name: str
    arguments: type[msgspec.Struct] | OneOf | None
    returns: Any
    oob: bool
    features: tuple[str, ...]
    handler: Handler


class CommandError(Exception):
    """An answer of another class than GenericError, such as DeviceNotFound (QAPI's QapiErrorClass)."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


_commands: dict[str, Command] = {}


def command(
    name: str,
    arguments: type[msgspec.Struct] | OneOf | None = None,
    *,
    returns: Any = None,
    oob: bool = False,
    features: tuple[str, ...] = (),
) -> Callable[[Handler], Handler]:
    """Registers the function below it. BlockError and OptionError that it raises are GenericError."""

    def register(handler: Handler) -> Handler:
        assert name not in _commands, f"two commands are named {name}"
        _commands[name] = Command(name, arguments, returns, oob, features, handler)
        return handler

    return register


def commands() -> dict[str, Command]:
    """All commands by name, sorted."""
    return dict(sorted(_commands.items()))


def find(name: str) -> Command | None:
    return _commands.get(name)
