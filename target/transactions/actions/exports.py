# SPDX-License-Identifier: Apache-2.0
"""Actions on exports: add and remove."""

from __future__ import annotations

from typing import Literal

from target.exports.base import Export, ExportOptions
from target.qmp.registry import Arguments
from target.qmp.types import EXPORT_OPTIONS
from target.transactions.action import Action


class ExportAdd(Action, type="block-export-add"):
    """Starts an export."""

    Data = EXPORT_OPTIONS
    data: tuple[type[Export], ExportOptions]

    async def prepare(self) -> None:
        await self.service.add_export_in(self.change, *self.data)


class ExportDel(Action, type="block-export-del"):
    """Ends an export, its clients according to the mode."""

    class Data(Arguments):
        id: str
        mode: Literal["safe", "hard", "soft", "hide"] = "safe"

    data: Data

    async def prepare(self) -> None:
        await self.service.remove_export_in(self.change, self.data.id, self.data.mode)


class ExportSetIothread(Action, type="x-export-set-iothread"):
    """Moves an export, with its clients, to other I/O threads; null: to the main one."""

    class Data(Arguments):
        id: str
        iothread: str | list[str] | None

    data: Data

    async def prepare(self) -> None:
        await self.service.set_export_iothread_in(self.change, self.data.id, self.data.iothread)
