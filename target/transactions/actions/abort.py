# SPDX-License-Identifier: Apache-2.0
"""abort: an action that fails, for tests of the others."""

from __future__ import annotations

from typing import Literal

from target.graph.errors import BlockError
from target.qmp.registry import Arguments
from target.transactions.action import Action


class Abort(Action, type="abort"):
    """Always fails; ``x-at`` (our own): when."""

    class Data(Arguments):
        x_at: Literal["prepare", "commit"] = "prepare"

    data: Data

    async def prepare(self) -> None:
        if self.data.x_at == "prepare":
            raise BlockError("Transaction aborted using Abort action")

    async def commit(self) -> None:
        raise BlockError("Transaction aborted using Abort action")
