# SPDX-License-Identifier: Apache-2.0
"""What a controller does not do. The node puts its name in front."""

from __future__ import annotations

from target.drivers.protocol.nvme.spec import status_name


class ControllerError(Exception):
    """The controller does not answer, or not as the specification says; or it cannot be used."""


class ControllerGoneError(ControllerError):
    """Its registers read as all ones: it does nothing any more, and reaches no memory."""

    def __init__(self) -> None:
        super().__init__("the controller has gone")


class CommandError(ControllerError):
    """An admin command that ended with another status than success."""

    def __init__(self, what: str, status: int) -> None:
        super().__init__(f"{what}: {status_name(status)}")
        self.status = status
