# SPDX-License-Identifier: Apache-2.0
"""Keeps a controller from memory, also one that does not do what it is told.

What is in flight may end, and its memory may become something else, only after that: a command that hangs may
be done at any later time.
"""

from __future__ import annotations

from typing import Protocol

from target.drivers.protocol.nvme.controller import Controller
from target.drivers.protocol.nvme.errors import ControllerError, ControllerGoneError
from target.vfio.errors import VfioError


class Function(Protocol):
    """The controller as a PCI function. VfioError, OSError."""

    async def reset(self) -> None: ...
    def master_bus(self, on: bool) -> None: ...


class Brake:
    """``held``: bus mastering is off, and the controller cannot be used until a ``stop`` that disables it."""

    def __init__(self, controller: Controller, function: Function) -> None:
        self._controller = controller
        self._function = function
        self._trouble: list[str] = []
        self.held = False

    async def stop(self) -> None:
        """Afterwards the controller reaches no memory. ControllerError when nothing helps: it still may.

        It is disabled; else its function is reset; else its bus mastering is turned off.
        """
        self._trouble.clear()
        try:
            stopped = await self._disable() or await self._reset()
        except ControllerGoneError as error:
            self._trouble.append(str(error))
            stopped = False
        try:
            if self.held or not stopped:
                self._function.master_bus(stopped)
        except (VfioError, OSError) as error:
            self._trouble.append(str(error))
            raise ControllerError(self.trouble) from None
        self.held = not stopped

    @property
    def trouble(self) -> str:
        """What did not work in the last ``stop``."""
        return "; ".join(self._trouble)

    async def _disable(self) -> bool:
        try:
            await self._controller.disable()
        except ControllerGoneError:
            raise
        except ControllerError as error:
            self._trouble.append(str(error))
            return False
        return True

    async def _reset(self) -> bool:
        try:
            await self._function.reset()
        except (VfioError, OSError) as error:
            self._trouble.append(str(error))
            return False
        return await self._disable()
