# SPDX-License-Identifier: Apache-2.0
"""From a message to its answer: which command it names, and whether its arguments are right.

The wording is QEMU's (qapi/qmp-dispatch.c): managers match on it.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import msgspec

from target.config.options import Notation, OptionError, parse
from target.graph.errors import BlockError
from target.graph.registry import parse_child
from target.qmp import registry
from target.qmp.registry import Choice, Command, CommandError, Context, OneOf

log = logging.getLogger("blocktarget")

GENERIC = "GenericError"
NOT_FOUND = "CommandNotFound"
NEGOTIATION = "qmp_capabilities"


class Call(msgspec.Struct, frozen=True):
    """A message that looks like a command."""

    name: str
    oob: bool
    arguments: dict[str, Any]


def read_call(message: Any, oob_enabled: bool) -> Call:
    """What a message asks for. CommandError when it is not of the form of a command."""
    if not isinstance(message, dict):
        raise CommandError(GENERIC, "QMP input must be a JSON object")
    how = ""
    for name, value in message.items():
        if name == "execute" or (name == "exec-oob" and oob_enabled):
            if not isinstance(value, str):
                raise CommandError(GENERIC, f"QMP input member '{name}' must be a string")
            if how:
                raise CommandError(GENERIC, f"QMP input member '{name}' clashes with '{how}'")
            how = name
        elif name == "arguments":
            if not isinstance(value, dict):
                raise CommandError(GENERIC, "QMP input member 'arguments' must be an object")
        elif name != "id":
            raise CommandError(GENERIC, f"QMP input member '{name}' is unexpected")
    if not how:
        raise CommandError(GENERIC, "QMP input lacks member 'execute'")
    return Call(message[how], how == "exec-oob", message.get("arguments", {}))


def is_oob(message: Any) -> bool:
    """Whether a message is to be answered out of turn, if that is enabled."""
    return isinstance(message, dict) and "exec-oob" in message and "execute" not in message


async def execute(context: Context, call: Call, negotiated: bool) -> Any:
    """Runs a command. CommandError is what its answer says when it fails."""
    command = registry.find(call.name)
    if not negotiated and call.name != NEGOTIATION:
        raise CommandError(NOT_FOUND, f"Expecting capabilities negotiation with '{NEGOTIATION}'")
    if command is None:
        raise CommandError(NOT_FOUND, f"The command {call.name} has not been found")
    if call.oob and not command.oob:
        raise CommandError(GENERIC, f"The command {call.name} does not support OOB")
    try:
        result = await command.handler(context, read_arguments(command, call.arguments))
        return {} if result is None else msgspec.to_builtins(result)
    except (BlockError, OptionError) as error:
        raise CommandError(GENERIC, str(error)) from None
    except OSError as error:
        raise CommandError(GENERIC, error.strerror or str(error)) from None
    except RecursionError:
        raise CommandError(GENERIC, "The arguments are nested too deeply") from None
    except CommandError:
        raise
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        log.exception("command '%s' waited for what was cancelled", call.name)
        raise _internal(call, error) from None
    except Exception as error:
        log.exception("command '%s' failed", call.name)
        raise _internal(call, error) from None


def _internal(call: Call, error: BaseException) -> CommandError:
    """A handler's bug, which fails its command and not the monitor."""
    text = f"Internal error in command {call.name}: {type(error).__name__}: {error}"
    return CommandError(GENERIC, text)


def read_arguments(command: Command, arguments: dict[str, Any]) -> Any:
    """The typed arguments of a command. OptionError names the member that is wrong."""
    if command.arguments is None:
        for name in arguments:
            raise OptionError(f"Parameter '{name}' is unexpected")
        return None
    if isinstance(command.arguments, OneOf):
        return command.arguments.parse(arguments, Notation.JSON, "")
    return parse(arguments, command.arguments, Notation.JSON, parse_custom)


def parse_custom(kind: type, value: Any, path: str, notation: Notation) -> Any:
    """The hook for members that are unions."""
    if issubclass(kind, Choice):
        return kind(kind.one_of.parse(value, notation, path))
    return parse_child(kind, value, path, notation)
