# SPDX-License-Identifier: Apache-2.0
"""transaction, and the commands that are actions of their own."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from target.config.options import Notation, OptionError, expected, member, parse
from target.qmp.dispatch import parse_custom
from target.qmp.registry import Arguments, Choice, Context, OneOf, command
from target.transactions import actions
from target.transactions.action import Action, action_type, types
from target.transactions.run import Request, run, run_one

actions.load()


def parse_action(value: Any, notation: Notation = Notation.JSON, path: str = "") -> Request:
    """An element of ``actions``. OptionError says which member is wrong."""
    if not isinstance(value, dict):
        raise expected(path, "object")
    for name in ("type", "data"):
        if name not in value:
            raise OptionError(f"Parameter '{member(path, name)}' is missing")
    for name in value:
        if name not in ("type", "data"):
            raise OptionError(f"Parameter '{member(path, str(name))}' is unexpected")
    kind = value["type"]
    if not isinstance(kind, str):
        raise expected(member(path, "type"), "string")
    if kind not in types():
        raise OptionError(f"Parameter '{member(path, 'type')}' does not accept value '{kind}'")
    action = action_type(kind)
    return Request(action, parse_data(action, value["data"], notation, member(path, "data")))


def parse_data(action: type[Action], value: Any, notation: Notation, path: str) -> Any:
    if isinstance(action.Data, OneOf):
        return action.Data.parse(value, notation, path)
    return parse(value, action.Data, notation, parse_custom, path)


class TransactionAction(Choice):
    """``value`` is a Request."""

    one_of = OneOf(
        "TransactionAction",
        "type",
        lambda: {name: action.Data for name, action in types().items()},
        parse_action,
        data="data",
    )


class Properties(Arguments):
    completion_mode: Literal["individual", "grouped"] = "individual"


class Transaction(Arguments):
    actions: list[TransactionAction]
    properties: Properties = msgspec.field(default_factory=Properties)


@command("transaction", Transaction)
async def transaction(context: Context, given: Transaction) -> None:
    requests = [action.value for action in given.actions]
    await run(context.service, requests, given.properties.completion_mode)


def action_is_command(name: str) -> None:
    """A command with the arguments of an action: a transaction of that one."""

    @command(name, action_type(name).Data)
    async def handler(context: Context, given: Any) -> None:
        await run_one(context.service, name, given)


for name in types():
    if name not in ("abort",):
        action_is_command(name)
