# SPDX-License-Identifier: Apache-2.0
"""transaction, and the commands that are actions of their own."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from target.qmp.registry import Arguments, Choice, Context, OneOf, command
from target.transactions import actions
from target.transactions.action import action_type, types
from target.transactions.request import parse_action
from target.transactions.run import run, run_one

actions.load()


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

    @command(name, action_type(name).Data, features=action_type(name).features)
    async def handler(context: Context, given: Any) -> None:
        await run_one(context.service, name, given)


for name in types():
    if name not in ("abort",):
        action_is_command(name)
