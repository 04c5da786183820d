# SPDX-License-Identifier: Apache-2.0
"""A controller's life: reset, enable, identify, queues, shutdown; and its admin commands.

It reaches the hardware through registers and DMA memory that it is given, so that tests can give it others.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import NamedTuple

from target.drivers.protocol.nvme.admin import DEPTH, AdminQueue, Memory
from target.drivers.protocol.nvme.errors import CommandError, ControllerError, ControllerGoneError
from target.drivers.protocol.nvme.identify import (
    SHUTDOWN_DEFAULT,
    ControllerFacts,
    LoggedError,
    NamespaceFacts,
    command_set,
    parse_error_log,
)
from target.drivers.protocol.nvme.registers import Registers
from target.drivers.protocol.nvme.spec import (
    CHANGED_NAMESPACES_LOG,
    DOORBELLS,
    ERROR_ENTRY,
    ERROR_LOG,
    GONE,
    NAMESPACE_NOTICES,
    NVM_COMMAND_SET,
    PAGE,
    QUEUE_CONTIGUOUS,
    QUEUE_INTERRUPTS,
    Admin,
    Capabilities,
    Cc,
    Cns,
    Csts,
    Feature,
    Register,
)

LOOK = 0.002  # seconds between looks at the status register
GRACE = 1.0  # seconds beyond what the controller claims for itself, for a busy machine
EVERY_NAMESPACE = 0xFFFF_FFFF
ERRORS_SHOWN = 8
MIN_ENTRIES = 2
COMMAND_SETS = {1: "key value", 2: "zoned"}


class QueuePlace(NamedTuple):
    """An I/O queue pair: its identifier, entries, interrupt vector, and where its queues lie (iova)."""

    id: int
    depth: int
    vector: int
    submission: int
    completion: int


class Controller:
    """All methods raise ControllerError, after a bounded time."""

    def __init__(self, registers: Registers, memory: Memory, interrupt: int | None, timeout: float) -> None:
        """``timeout``: seconds that an admin command may take. ``memory`` has AdminQueue.PAGES pages."""
        self._registers = registers
        self._timeout = timeout
        cap = registers.read64(Register.CAP)
        if cap == GONE << 32 | GONE:
            raise ControllerError("the controller does not answer")
        self.capabilities = Capabilities.parse(cap)
        self._check_capabilities()
        self.admin = AdminQueue(registers, self.capabilities.stride, memory, interrupt)
        self._aborts = asyncio.Semaphore(1)
        self._errors_seen = 0
        self._shutdown = SHUTDOWN_DEFAULT
        self.facts: ControllerFacts

    def _check_capabilities(self) -> None:
        if self.capabilities.page_min > PAGE:
            raise ControllerError(
                f"the controller needs pages of at least {self.capabilities.page_min} bytes"
            )
        if self.capabilities.queue_entries < MIN_ENTRIES:
            raise ControllerError("the controller's queues have less than two entries")
        self.check_doorbells(1)
        if not self.capabilities.nvm:
            raise ControllerError("the controller does not have the NVM command set")

    def check_doorbells(self, pairs: int) -> None:
        """Whether the registers hold doorbells for so many queue pairs."""
        stride = self.capabilities.stride
        if DOORBELLS + 2 * pairs * stride > self._registers.length:
            raise ControllerError(
                f"the doorbells of {pairs} queue pairs, {stride} bytes apart, do not lie in BAR 0"
            )

    # ---- states (section 7.6.1 and 7.6.2) ----

    async def enable(self) -> None:
        """Resets the controller and takes it into operation, with the admin queue and nothing else."""
        await self.disable()
        self.admin.reset()
        registers = self._registers
        registers.write32(Register.AQA, (DEPTH - 1) << 16 | (DEPTH - 1))
        registers.write64(Register.ASQ, self.admin.submission_iova)
        registers.write64(Register.ACQ, self.admin.completion_iova)
        registers.write32(Register.CC, Cc.ENTRY_SIZES | Cc.ENABLE)
        await self._until(lambda status: bool(status & Csts.READY), "did not become ready")

    async def disable(self) -> None:
        """Afterwards the controller reaches no memory. ControllerGoneError, or another one: it still may."""
        cc = self._registers.read32(Register.CC)
        if cc & Cc.ENABLE:
            self._registers.write32(Register.CC, cc & ~(Cc.ENABLE | Cc.SHUTDOWN_MASK))
        await self._until(lambda status: not status & Csts.READY, "did not stop", fatal=True)

    async def shut_down(self) -> None:
        """Tells the controller, so that it makes all data durable, and waits for it."""
        cc = self._registers.read32(Register.CC)
        if cc & Cc.ENABLE and self._registers.read32(Register.CSTS) & Csts.READY:
            self._registers.write32(Register.CC, cc & ~Cc.SHUTDOWN_MASK | Cc.SHUTDOWN_NORMAL)

            def complete(status: int) -> bool:
                return status & Csts.SHUTDOWN_MASK == Csts.SHUTDOWN_COMPLETE

            await self._until(complete, "did not shut down", seconds=self._shutdown)

    def failure(self) -> str | None:
        """What the status register says against going on."""
        status = self._registers.read32(Register.CSTS)
        if status == GONE:
            return "the controller has gone"
        return "the controller reports a fatal status" if status & Csts.FATAL else None

    async def _until(
        self, reached: Callable[[int], bool], what: str, *, seconds: float = 0, fatal: bool = False
    ) -> None:
        """Waits for a status. ``fatal``: a fatal status does not matter."""
        loop = asyncio.get_running_loop()
        limit = max(seconds, self.capabilities.timeout) + GRACE
        end = loop.time() + limit
        while True:
            status = self._registers.read32(Register.CSTS)
            if status == GONE:
                raise ControllerGoneError
            if reached(status):
                return
            if status & Csts.FATAL and not fatal:
                raise ControllerError("the controller reports a fatal status")
            if loop.time() >= end:
                raise ControllerError(f"the controller {what} within {limit:g} s (status {status:#x})")
            await asyncio.sleep(LOOK)

    # ---- admin commands (section 5) ----

    async def identify(self) -> ControllerFacts:
        data = await self._identify("Identify controller", Cns.CONTROLLER, 0)
        nvm = bytes(PAGE)
        if self.capabilities.several_command_sets:
            with contextlib.suppress(CommandError):  # then it has no limits to tell
                nvm = await self._identify("Identify command set", Cns.COMMAND_SET_CONTROLLER, 0)
        self.facts = ControllerFacts.parse(data, nvm)
        self._aborts = asyncio.Semaphore(min(self.facts.aborts, 4))
        self._shutdown = self.facts.shutdown
        return self.facts

    async def namespace(self, identifier: int) -> NamespaceFacts:
        if not 0 < identifier <= self.facts.namespaces:
            raise ControllerError(
                f"namespace {identifier} does not exist: the controller has up to {self.facts.namespaces}"
            )
        await self._check_command_set(identifier)
        data = await self._identify(f"Identify namespace {identifier}", Cns.NAMESPACE, identifier)
        return NamespaceFacts.parse(identifier, data)

    async def _check_command_set(self, identifier: int) -> None:
        """Zoned and key-value namespaces cannot be written as a disk is."""
        if not self.capabilities.several_command_sets:
            return
        try:
            data = await self._identify(f"Identify namespace {identifier}", Cns.DESCRIPTORS, identifier)
        except CommandError:
            return  # there is no such namespace, or it has nothing to say
        if (found := command_set(data)) != NVM_COMMAND_SET:
            name = COMMAND_SETS.get(found, "unknown")
            raise ControllerError(
                f"namespace {identifier} is of the command set {found} ({name}), which is not supported"
            )

    async def _identify(self, what: str, cns: Cns, nsid: int) -> bytes:
        done = await self.admin.command(
            what, Admin.IDENTIFY, nsid=nsid, dwords=(cns,), reads=PAGE, timeout=self._timeout
        )
        return done.data

    async def set_queues(self, wanted: int) -> int:
        """Asks for so many I/O queue pairs; returns how many there may be."""
        dwords = (Feature.NUMBER_OF_QUEUES, (wanted - 1) << 16 | (wanted - 1))
        done = await self._run("Set Features (number of queues)", Admin.SET_FEATURES, dwords)
        return min(wanted, (done & 0xFFFF) + 1, (done >> 16) + 1)

    async def create_queue(self, queue: QueuePlace) -> None:
        """The completion queue first: the other one names it."""
        size = (queue.depth - 1) << 16 | queue.id
        flags = queue.vector << 16 | QUEUE_INTERRUPTS | QUEUE_CONTIGUOUS
        name = f"completion queue {queue.id}"
        await self._run(f"Create {name}", Admin.CREATE_CQ, (size, flags), queue.completion)
        flags = queue.id << 16 | QUEUE_CONTIGUOUS
        name = f"submission queue {queue.id}"
        await self._run(f"Create {name}", Admin.CREATE_SQ, (size, flags), queue.submission)

    async def delete_queue(self, identifier: int) -> None:
        await self._run(f"Delete submission queue {identifier}", Admin.DELETE_SQ, (identifier,))
        await self._run(f"Delete completion queue {identifier}", Admin.DELETE_CQ, (identifier,))

    async def abort(self, queue: int, command: int) -> bool:
        """Whether the controller says that it has aborted the command."""
        async with self._aborts:
            return not await self._run("Abort", Admin.ABORT, (command << 16 | queue,)) & 1

    async def new_errors(self) -> list[LoggedError]:
        """Entries of the error log that were not returned before, the oldest first."""
        entries = min(self.facts.error_entries, PAGE // ERROR_ENTRY)
        data = await self._log_page("Get Log Page (errors)", ERROR_LOG, entries * ERROR_ENTRY)
        errors = [entry for entry in parse_error_log(data) if entry.count > self._errors_seen]
        self._errors_seen = max([self._errors_seen, *(entry.count for entry in errors)])
        return sorted(errors, key=lambda entry: entry.count)[-ERRORS_SHOWN:]

    async def watch_namespaces(self) -> None:
        """Asks for events about namespaces that change."""
        dwords = (Feature.ASYNC_EVENTS, NAMESPACE_NOTICES)
        await self._run("Set Features (asynchronous events)", Admin.SET_FEATURES, dwords)

    async def next_event(self) -> int:
        """Waits, without end, for an asynchronous event; its dword 0."""
        done = await self.admin.command("Asynchronous Event Request", Admin.ASYNC_EVENT, timeout=None)
        return done.result

    async def clear_namespace_event(self) -> None:
        """Reads the list of changed namespaces, which lets the next event come."""
        await self._log_page("Get Log Page (changed namespaces)", CHANGED_NAMESPACES_LOG, PAGE)

    async def _log_page(self, what: str, page: int, length: int) -> bytes:
        dwords = ((length // 4 - 1) << 16 | page,)
        done = await self.admin.command(
            what, Admin.GET_LOG_PAGE, nsid=EVERY_NAMESPACE, dwords=dwords, reads=length, timeout=self._timeout
        )
        return done.data

    async def _run(self, what: str, opcode: Admin, dwords: tuple[int, ...], prp: int = 0) -> int:
        done = await self.admin.command(what, opcode, dwords=dwords, prp=prp, timeout=self._timeout)
        return done.result
