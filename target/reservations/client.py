# SPDX-License-Identifier: Apache-2.0
"""Persistent reservations of one device, by whatever way its commands go."""

from __future__ import annotations

import asyncio

from target.reservations import commands
from target.reservations.commands import (
    Capabilities,
    Command,
    InAction,
    Keys,
    OutAction,
    Registration,
    Reservation,
    Type,
)
from target.reservations.sense import (
    BUSY,
    CHECK_CONDITION,
    TASK_SET_FULL,
    UNIT_ATTENTION,
    check_status,
    parse_sense,
)
from target.reservations.transports import Transport

# A device tells each unit attention once, in place of the command, which was not carried out. There is one
# for each thing that happened since the last command.
ATTENTIONS_MAX = 16
BUSY_MAX = 6
BUSY_SECONDS = 0.1  # then twice as long each time


class Reservations:
    """Raises ScsiError for what the device refuses (Conflict for a reservation), OSError for no answer."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.attentions: list[str] = []  # that were told meanwhile, in words

    # ---- changes ----

    async def register(
        self,
        key: int,
        sa_key: int,
        *,
        ignore: bool = False,
        aptpl: bool = False,
        all_target_ports: bool = False,
    ) -> None:
        """Replaces this nexus's key (0: it has none) by ``sa_key`` (0: unregister).

        ``ignore``: whatever its key was. ``aptpl``: registrations are to persist through power loss.
        """
        action = OutAction.REGISTER_IGNORE if ignore else OutAction.REGISTER
        await self._run(
            commands.reserve_out(
                action, key=key, sa_key=sa_key, aptpl=aptpl, all_target_ports=all_target_ports
            )
        )

    async def reserve(self, key: int, type: Type) -> None:
        await self._run(commands.reserve_out(OutAction.RESERVE, key=key, type=type))

    async def release(self, key: int, type: Type) -> None:
        await self._run(commands.reserve_out(OutAction.RELEASE, key=key, type=type))

    async def clear(self, key: int) -> None:
        """Removes the reservation and all keys."""
        await self._run(commands.reserve_out(OutAction.CLEAR, key=key))

    async def preempt(self, key: int, sa_key: int, type: Type, *, abort: bool = False) -> None:
        """Removes those registered with ``sa_key`` and takes over a reservation of theirs.

        ``abort``: their commands under way are aborted.
        """
        action = OutAction.PREEMPT_ABORT if abort else OutAction.PREEMPT
        await self._run(commands.reserve_out(action, key=key, sa_key=sa_key, type=type))

    # ---- reports ----

    async def read_keys(self) -> Keys:
        return commands.parse_keys(await self._run(commands.reserve_in(InAction.READ_KEYS)))

    async def read_reservation(self) -> Reservation | None:
        return commands.parse_reservation(await self._run(commands.reserve_in(InAction.READ_RESERVATION)))

    async def report_capabilities(self) -> Capabilities:
        return commands.parse_capabilities(await self._run(commands.reserve_in(InAction.REPORT_CAPABILITIES)))

    async def read_full_status(self) -> list[Registration]:
        return commands.parse_full_status(await self._run(commands.reserve_in(InAction.READ_FULL_STATUS)))

    # ---- own ----

    async def _run(self, command: Command) -> bytes:
        """Until the device has carried it out or refused it: past unit attentions and a busy device."""
        attentions = busy = 0
        while True:
            status, sense, data = await self.transport.scsi_command(*command)
            found = parse_sense(sense) if status == CHECK_CONDITION else None
            if found is not None and found.key == UNIT_ATTENTION and attentions < ATTENTIONS_MAX:
                self.attentions.append(str(found))
                attentions += 1
            elif status in (BUSY, TASK_SET_FULL) and busy < BUSY_MAX:
                await asyncio.sleep(BUSY_SECONDS * 2**busy)
                busy += 1
            else:
                check_status(status, sense)
                return data
