# SPDX-License-Identifier: Apache-2.0
"""What makes a change all or nothing: how each step is undone, and what waits until all have succeeded."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable

from target.graph.errors import BlockError

log = logging.getLogger("blocktarget")

Step = Callable[[], Awaitable[object] | object]


class Steps:
    """The lists of a change."""

    def __init__(self) -> None:
        self.failures: list[Exception] = []  # of what could not be undone any more
        self._undo: list[Step] = []
        self._later: list[Step] = []

    def undo(self, step: Step) -> None:
        """Takes back what was just done, should a later step fail. It must not fail itself."""
        self._undo.append(step)

    def later(self, step: Step) -> None:
        """For what cannot be undone: done when all else has succeeded, and requests go on."""
        self._later.append(step)

    def raise_failure(self) -> None:
        """For who wants to hear of what went wrong after the change was made."""
        if self.failures:
            raise self.failures[0]

    async def _undo_all(self) -> None:
        """The last step first. What an undo leaves for ``later`` is still to be done then."""
        self._later.clear()
        while self._undo:
            await self._try(self._undo.pop())

    async def _do_later(self) -> None:
        for step in self._later:
            await self._try(step)

    async def _try(self, step: Step) -> None:
        try:
            result = step()
            if inspect.isawaitable(result):
                await result
        except (BlockError, OSError) as error:
            self.failures.append(error)
        except Exception as error:  # a driver's bug must not keep the other steps from being done
            log.exception("a step of a change of the graph")
            self.failures.append(error)
