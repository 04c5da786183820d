# SPDX-License-Identifier: Apache-2.0
"""The admin queue: commands as coroutines, completions by an interrupt's eventfd (sections 4 and 5).

What the controller writes is checked: a completion that fits no command fails all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from target.drivers.protocol.nvme.errors import CommandError, ControllerError
from target.drivers.protocol.nvme.registers import Registers
from target.drivers.protocol.nvme.spec import (
    COMPLETION,
    COMPLETION_ENTRY,
    PAGE,
    SUBMISSION,
    SUBMISSION_ENTRY,
    Admin,
)

DEPTH = 32
IN_FLIGHT = DEPTH // 2
LOOK_AGAIN = 0.02  # seconds between looks at the queue while no interrupt comes


class Memory(Protocol):
    """Memory that the controller reaches from ``iova`` on."""

    @property
    def iova(self) -> int: ...
    @property
    def view(self) -> memoryview: ...


class Completion(NamedTuple):
    result: int
    """dword 0"""
    data: bytes


@dataclass
class _Slot:
    """A command in flight. One that timed out keeps its page until it completes."""

    what: str
    page: int
    reads: int
    done: asyncio.Future[Completion]


class AdminQueue:
    """Both admin queues, in PAGES pages of memory. Each command may read into one of these."""

    PAGES = 2 + IN_FLIGHT

    def __init__(self, registers: Registers, stride: int, memory: Memory, interrupt: int | None) -> None:
        """interrupt: an eventfd; without one the queue is looked at while a command is waited for."""
        self._registers = registers
        self._stride = stride
        self._memory = memory
        self._interrupt = interrupt
        self._slots: dict[int, _Slot] = {}
        self._next = 0
        self._stopped = False
        self.reset()

    @property
    def submission_iova(self) -> int:
        return self._memory.iova

    @property
    def completion_iova(self) -> int:
        return self._memory.iova + PAGE

    def start(self) -> None:
        if self._interrupt is not None:
            asyncio.get_running_loop().add_reader(self._interrupt, self._on_interrupt, self._interrupt)

    def stop(self) -> None:
        """From here on commands fail, and the registers are not touched."""
        if self._interrupt is not None:
            asyncio.get_running_loop().remove_reader(self._interrupt)
        self._interrupt, self._stopped = None, True
        self.fail(ControllerError("the controller is closed"))

    def reset(self) -> None:
        """Both queues are empty from here on. The controller is disabled."""
        self.fail(ControllerError("the controller was reset"))
        self._memory.view[: 2 * PAGE] = bytes(2 * PAGE)
        self._tail = self._head = 0
        self._phase = 1
        self._pages = deque(range(2, self.PAGES))

    def fail(self, error: ControllerError) -> None:
        """Ends every command in flight."""
        slots, self._slots = self._slots, {}
        for slot in slots.values():
            if not slot.done.done():
                slot.done.set_exception(error)

    async def command(
        self,
        what: str,
        opcode: Admin,
        *,
        nsid: int = 0,
        prp: int = 0,
        dwords: tuple[int, ...] = (),
        reads: int = 0,
        timeout: float | None,
    ) -> Completion:
        """Runs a command that reads up to PAGE bytes. dwords: CDW10 and following; ``what`` is for messages.

        CommandError for a status; ControllerError when it has not ended after ``timeout`` seconds.
        """
        slot, identifier = self._new_slot(what, reads)
        if reads:
            prp = self._memory.iova + slot.page * PAGE
            self._data(slot)[:] = bytes(reads)
        arguments = (*dwords, *(0,) * (6 - len(dwords)))
        self._submit(SUBMISSION.pack(opcode, 0, identifier, nsid, 0, 0, prp, 0, *arguments))
        return await self._wait(slot, timeout)

    def _data(self, slot: _Slot) -> memoryview:
        return self._memory.view[slot.page * PAGE : slot.page * PAGE + slot.reads]

    def _new_slot(self, what: str, reads: int) -> tuple[_Slot, int]:
        if self._stopped:
            raise ControllerError(f"{what}: the controller is closed")
        if not self._pages:
            raise ControllerError(f"{what}: {IN_FLIGHT} admin commands are in flight already")
        while self._next in self._slots:
            self._next = (self._next + 1) & 0xFFFF
        identifier, self._next = self._next, (self._next + 1) & 0xFFFF
        slot = _Slot(what, self._pages.popleft(), reads, asyncio.get_running_loop().create_future())
        self._slots[identifier] = slot
        return slot, identifier

    def _submit(self, entry: bytes) -> None:
        at = self._tail * SUBMISSION_ENTRY
        self._memory.view[at : at + SUBMISSION_ENTRY] = entry
        self._tail = (self._tail + 1) % DEPTH
        self._registers.ring(0, self._stride, self._tail)

    async def _wait(self, slot: _Slot, timeout: float | None) -> Completion:
        if timeout is None:
            return await slot.done
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        while not slot.done.done():
            if loop.time() >= end:
                slot.done.cancel()
                raise ControllerError(f"{slot.what}: no completion after {timeout:g} s")
            await asyncio.wait([slot.done], timeout=LOOK_AGAIN)
            if not slot.done.done():
                self.look()
        return slot.done.result()

    def _on_interrupt(self, interrupt: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(interrupt)
        self.look()

    def look(self) -> None:
        """Takes the completions that are there."""
        taken = 0
        while taken < DEPTH and self._take():
            taken += 1
        if taken:
            self._registers.ring(1, self._stride, self._head)

    def _take(self) -> bool:
        at = PAGE + self._head * COMPLETION_ENTRY
        # The phase says that the rest of the entry is there: it is read first.
        if self._memory.view[at + 14] & 1 != self._phase:
            return False
        result, _, _, queue, identifier, status = COMPLETION.unpack_from(self._memory.view, at)
        self._head = (self._head + 1) % DEPTH
        self._phase ^= self._head == 0
        slot = self._slots.pop(identifier, None)
        if slot is None or queue != 0:
            self.fail(
                ControllerError(f"the admin queue completed a command {identifier} that is not in flight")
            )
            return True
        self._pages.append(slot.page)
        if not slot.done.done():
            code = status >> 1 & 0x7FF
            if code:
                slot.done.set_exception(CommandError(slot.what, code))
            else:
                slot.done.set_result(Completion(result, bytes(self._data(slot))))
        return True
