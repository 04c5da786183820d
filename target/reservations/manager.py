# SPDX-License-Identifier: Apache-2.0
"""The object ``pr-manager-helper``: a helper program by which nodes of files and devices reserve."""

from __future__ import annotations

from collections.abc import Mapping

from target.graph.errors import BlockError
from target.objects import ObjectOptions, UserObject
from target.reservations.transports import Helper, connect_helper


class PrManagerHelper(UserObject, type="pr-manager-helper"):
    """Names the socket of a program that speaks the protocol of qemu-pr-helper; it has to run already."""

    class Options(ObjectOptions):
        path: str

    options: Options

    def start(self) -> None:
        path = self.options.path
        try:
            connect_helper(path).close()
        except ValueError as error:
            raise BlockError(f"pr-manager-helper '{self.options.id}': 'path': {error}") from None
        except OSError as error:
            reason = error.strerror or str(error)
            raise BlockError(
                f"pr-manager-helper '{self.options.id}': Failed to connect to '{path}': {reason}"
            ) from None

    def transport(self, fd: int) -> Helper:
        """The way for commands to the device that the descriptor is of."""
        return Helper(self.options.path, fd)


def pr_manager(objects: Mapping[str, UserObject], id: str) -> PrManagerHelper:
    """The manager with that id. BlockError when there is none."""
    found = objects.get(id)
    if found is None:
        raise BlockError(f"No persistent reservation manager with id '{id}'")
    if not isinstance(found, PrManagerHelper):
        raise BlockError(f"Object with id '{id}' is not a persistent reservation manager")
    return found
