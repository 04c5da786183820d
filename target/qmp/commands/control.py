# SPDX-License-Identifier: Apache-2.0
"""Commands about the conversation itself, and the end of the program."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from target import __version__
from target.qmp import registry
from target.qmp.registry import Answer, Arguments, Context, command
from target.qmp.schema import describe
from target.qmp.schema_info import SchemaInfo

# The version of QEMU's QMP that is spoken here: clients choose by it what they may use.
SPOKEN = (10, 2, 0)


class Capabilities(Arguments):
    enable: list[Literal["oob"]] = msgspec.field(default_factory=list)


class VersionTriple(Answer):
    major: int
    minor: int
    micro: int


class VersionInfo(Answer):
    qemu: VersionTriple
    package: str


class CommandInfo(Answer):
    name: str


def version() -> Any:
    """As query-version and the greeting say it."""
    triple = VersionTriple(**dict(zip(("major", "minor", "micro"), SPOKEN, strict=True)))
    return msgspec.to_builtins(VersionInfo(qemu=triple, package=f"blocktarget {__version__}"))


@command("qmp_capabilities", Capabilities)
async def qmp_capabilities(context: Context, given: Capabilities) -> None:
    assert context.monitor is not None
    context.monitor.negotiate(list(given.enable))


@command("query-version", returns=VersionInfo)
async def query_version(context: Context, given: None) -> Any:
    return version()


@command("query-commands", returns=list[CommandInfo])
async def query_commands(context: Context, given: None) -> list[CommandInfo]:
    return [CommandInfo(name=name) for name in registry.commands()]


@command("query-qmp-schema", returns=list[SchemaInfo])
async def query_qmp_schema(context: Context, given: None) -> list[SchemaInfo]:
    return describe()


@command("quit")
async def quit(context: Context, given: None) -> None:
    """As from QEMU, clients hear that the exports are gone before they get the answer."""
    await context.service.remove_exports()
    context.service.request_end()
