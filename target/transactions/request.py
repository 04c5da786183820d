# SPDX-License-Identifier: Apache-2.0
"""From an action as a user writes it to its class and typed data."""

from __future__ import annotations

from typing import Any

from target.config.options import Notation, OptionError, expected, member, parse
from target.qmp.dispatch import parse_custom
from target.qmp.registry import OneOf
from target.transactions.action import Action, action_type, types
from target.transactions.run import Request


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
