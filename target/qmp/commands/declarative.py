# SPDX-License-Identifier: Apache-2.0
"""What runs as a configuration file, and the way from it to another (``blocktarget save``, ``apply``)."""

from __future__ import annotations

from typing import Any

from msgspec import UNSET, UnsetType

from target.config.yaml_file import lists
from target.declarative.apply import carry_out, make_plan
from target.declarative.state import desired, running
from target.graph.errors import BlockError
from target.qmp.registry import Answer, Arguments, Context, command


class SavedConfig(Answer):
    """``config``: the lists of a configuration file."""

    config: dict[str, Any]


class ApplyConfig(Arguments):
    """``dry_run``: makes the plan and does nothing. ``force``: what clients notice is not refused."""

    config: dict[str, Any]
    dry_run: bool = False
    force: bool = False


class PlannedAction(Answer):
    """``text``: the action for people to read; ``type`` and ``data``: as in a transaction."""

    text: str
    type: str
    data: dict[str, Any]


class AppliedConfig(Answer):
    """``refused``: why nothing was done. Absent: it was, unless it was a dry run."""

    plan: list[PlannedAction]
    refused: list[str] | UnsetType = UNSET


@command("x-config-save", returns=SavedConfig)
async def save(context: Context, given: None) -> SavedConfig:
    return SavedConfig(config=running(context.service).config())


@command("x-config-apply", ApplyConfig, returns=AppliedConfig)
async def apply(context: Context, given: ApplyConfig) -> AppliedConfig:
    plan = make_plan(context.service, desired(lists(given.config)), given.force)
    refused = plan.refused
    if plan.steps and not refused and not given.dry_run:
        try:
            await carry_out(context.service, plan)
        except (BlockError, OSError) as error:
            refused = [str(error)]
    told = [PlannedAction(text=step.text, type=step.type, data=step.data) for step in plan.steps]
    return AppliedConfig(plan=told, refused=refused or UNSET)
