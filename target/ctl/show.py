# SPDX-License-Identifier: Apache-2.0
"""Answers and events for people."""

from __future__ import annotations

import json
import time
from typing import Any

import yaml

from target.ctl.schema import Schema


def answer(value: Any) -> str:
    """A table of things that are alike, else an outline; nothing for an empty answer."""
    if value is None or value == {} or value == []:
        return ""
    if not isinstance(value, dict | list):
        return _cell(value)
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        cells = [cell for item in value for cell in item.values()]
        if not any(isinstance(cell, dict | list) for cell in cells):
            return _table(value)
    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)
    return text.rstrip("\n")


def event(message: dict[str, Any]) -> str:
    """One line: the time, the name, the data."""
    stamp = message.get("timestamp", {})
    seconds, micros = stamp.get("seconds", 0), stamp.get("microseconds", 0)
    clock = time.strftime("%H:%M:%S", time.localtime(seconds)) + f".{micros // 1000:03}"
    data = " ".join(f"{name}={_cell(value)}" for name, value in message.get("data", {}).items())
    return f"{clock} {message['event']} {data}".rstrip()


def command_help(schema: Schema, name: str) -> str | None:
    """The arguments of a command; None when it is not known."""
    type = schema.arguments(name)
    if type is None:
        return None
    lines = [name]
    members = schema.members(type, {})
    lines += [_member(schema, member, *found) for member, found in members.items()]
    for case, more in schema.variants(type):
        lines.append(f"  with {case}:")
        lines += ["  " + _member(schema, member, *found) for member, found in more.items()]
    return "\n".join(lines)


def _member(schema: Schema, name: str, type: str, optional: bool) -> str:
    shown = f"[{name}]" if optional else name
    return f"  {shown:24} {schema.describe(type)}"


def _table(rows: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    grid = [columns, *([_cell(row.get(name)) for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in grid) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in grid
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict | list):
        return json.dumps(value)
    return str(value)
