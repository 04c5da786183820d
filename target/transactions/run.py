# SPDX-License-Identifier: Apache-2.0
"""Runs a transaction: all actions or none."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from target.graph.errors import BlockError
from target.transactions.action import Action, action_type

if TYPE_CHECKING:
    from target.service import Service

log = logging.getLogger("blocktarget")


class Request(NamedTuple):
    """An action that is asked for, with its typed data."""

    action: type[Action]
    data: Any


async def run(
    service: Service,
    requests: Sequence[Request],
    completion_mode: Literal["individual", "grouped"] = "individual",
) -> None:
    """BlockError or OSError of the first action that failed; then nothing has changed."""
    for request in requests:
        if completion_mode == "grouped" and not request.action.groupable:
            raise BlockError(
                f"Action '{request.action.type}' does not support transaction property"
                " completion-mode = grouped"
            )
    prepared: list[Action] = []
    try:
        async with service.graph.change() as change:
            change.lenient = len(requests) > 1
            for request in requests:
                action = request.action(service, change, request.data)
                await action.prepare()
                change.undo(action.abort)
                prepared.append(action)
            change.settle()
            for action in prepared:
                await action.commit()
    finally:
        for action in prepared:
            await action.clean()
    for failure in change.failures:
        log.error("after a transaction: %s", failure)


async def run_one(service: Service, type: str, data: Any) -> None:
    """A command that is an action, too, is a transaction of that one."""
    await run(service, [Request(action_type(type), data)])
