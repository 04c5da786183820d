# SPDX-License-Identifier: Apache-2.0
"""An NVMe controller in memory: registers, admin and I/O queues, one namespace. It misbehaves on request.

Addresses for DMA are those of the process. It runs on a thread of its own and is slow: it is for tests of
what sets a controller up and recovers it. Sections of the specification are named in the driver's spec.py.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from target.drivers.protocol.nvme.spec import (
    COMMAND_SET_DESCRIPTOR,
    COMPLETION,
    COMPLETION_ENTRY,
    DESCRIPTOR,
    DOORBELLS,
    IDENTIFY_CONTROLLER,
    IDENTIFY_NAMESPACE,
    IDENTIFY_NVM,
    LBA_FORMAT,
    LBA_FORMATS,
    PAGE,
    SUBMISSION,
    SUBMISSION_ENTRY,
    Admin,
    Cc,
    Cns,
    Csts,
    Feature,
    Layout,
    Register,
)

INVALID_OPCODE, ABORTED = 0x001, 0x007
DEALLOCATE = 1 << 2  # CDW11 of Dataset Management
RANGE = struct.Struct("<IIQ")
STEP = 0.0005  # seconds between looks at the doorbells
SIZE = DOORBELLS + PAGE


class Command(NamedTuple):
    """A submission queue entry."""

    opcode: int
    flags: int
    identifier: int
    nsid: int
    reserved: int
    metadata: int
    prp1: int
    prp2: int
    cdw10: int
    cdw11: int
    cdw12: int
    cdw13: int
    cdw14: int
    cdw15: int


@dataclass
class Submission:
    id: int
    base: int
    size: int
    completion: int
    head: int = 0
    held: list[Command] = field(default_factory=list)


@dataclass
class Completion:
    base: int
    size: int
    vector: int
    tail: int = 0
    phase: int = 1


@dataclass
class Faults:
    """What is wrong with the controller. May be changed at any time."""

    never_ready: bool = False
    never_stops: bool = False
    never_shuts_down: bool = False
    fatal: bool = False
    gone: bool = False
    silent: set[int] = field(default_factory=set)
    """opcodes of admin commands that are not answered"""
    status: dict[int, int] = field(default_factory=dict)
    """statuses of admin commands, by opcode"""
    stalled: bool = False
    """I/O commands are taken and not completed"""
    aborts: bool = True
    failing: dict[int, int] = field(default_factory=dict)
    """statuses of I/O commands, by opcode"""
    wrong_identifier: int | None = None
    """of the next admin completion"""
    reset_refused: bool = False
    reset_useless: bool = False
    """a reset of the function changes nothing"""
    always_master: bool = False
    """bus mastering cannot be turned off"""


class NvmeController:
    """``disk`` is the namespace's content. ``start`` and ``stop`` its thread."""

    def __init__(
        self, disk: bytearray, block_size: int = 512, *, timeout: int = 2, max_queues: int = 8
    ) -> None:
        """timeout: CAP.TO, in units of 500 ms."""
        self.disk = disk
        self.block_size = block_size
        self.max_queues = max_queues
        self.vectors = 9
        self.command_set = 0
        """of the namespace"""
        self.registers = mmap.mmap(-1, SIZE)
        self.faults = Faults()
        self.controller = bytearray(PAGE)
        self.namespace = bytearray(PAGE)
        self.errors = bytearray(PAGE)
        self.seen: list[tuple[int, int]] = []
        """queue and opcode of each command"""
        self.interrupts: list[int] = []
        """eventfds by vector"""
        self.enabled = self.shut_down = False
        self.bus_master = True
        self.resets = self.shut_downs = self.function_resets = 0
        self.late = self.lost = 0
        """I/O commands done after the controller was to be disabled; those that did not reach memory"""
        self._words = memoryview(self.registers).cast("I")
        self._submissions: dict[int, Submission] = {}
        self._completions: dict[int, Completion] = {}
        self._events: list[Command] = []
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nvme")
        self.set_capabilities(timeout=timeout)
        self._set(Register.VS, 0x10400)
        self._fill_identify()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._end.set()
        self._thread.join()
        self._words.release()

    # ---- as a PCI function ----

    @property
    def harmless(self) -> bool:
        """It reaches no memory."""
        return self.faults.gone or not self.bus_master or not self.enabled

    def reset_function(self) -> bool:
        """Whether there is such a reset."""
        with self._lock:
            if not self.faults.reset_refused and not self.faults.reset_useless:
                self.function_resets += 1
                self._disable()
                self._set(Register.CC, 0)
                self._set(Register.CSTS, 0)
        return not self.faults.reset_refused

    def quiet(self) -> threading.Lock:
        """While it is held the controller does nothing."""
        return self._lock

    def master_bus(self, on: bool) -> bool:
        """Whether it is as it is to be."""
        with self._lock:
            self.bus_master = on or self.faults.always_master
        return self.bus_master == on

    def put(self, data: bytearray, layout: Layout, **values: int | bytes) -> None:
        """Sets fields of a structure by the specification's names."""
        for name, value in values.items():
            at, form = layout[name]
            struct.pack_into(f"<{form}", data, at, value)

    def set_capabilities(
        self, *, entries: int = 1023, timeout: int = 2, stride: int = 0, sets: int = 0x41, page_min: int = 0
    ) -> None:
        """CAP's fields MQES, TO, DSTRD, CSS and MPSMIN."""
        cap = entries | 1 << 16 | timeout << 24 | stride << 32 | sets << 37 | page_min << 48
        self._set(Register.CAP, cap & 0xFFFF_FFFF)
        self._set(Register.CAP + 4, cap >> 32)

    def set_format(self, shift: int, metadata: int = 0) -> None:
        LBA_FORMAT.pack_into(self.namespace, LBA_FORMATS, metadata, shift, 0)

    def notify(self, event: int) -> bool:
        """Answers an Asynchronous Event Request, if there is one."""
        with self._lock:
            if not self._events:
                return False
            self._complete(self._submissions[0], self._events.pop(0), 0, event)
            return True

    @property
    def events_asked(self) -> int:
        return len(self._events)

    def _fill_identify(self) -> None:
        self.put(
            self.controller,
            IDENTIFY_CONTROLLER,
            vid=0x1B36,
            sn=b"MOCK0001".ljust(20),
            mn=b"Mock Controller".ljust(40),
            fr=b"1.0     ",
            mdts=5,
            ver=0x10400,
            oaes=1 << 8,
            acl=3,
            elpe=7,
            nn=4,
            rtd3e=1_000_000,
            sqes=0x66,
            cqes=0x44,
            oncs=0b1100,
            vwc=1,
            subnqn=b"nqn.2014-08.test:mock",
        )
        blocks = len(self.disk) // self.block_size
        self.put(self.namespace, IDENTIFY_NAMESPACE, nsze=blocks, ncap=blocks, nuse=blocks, dlfeat=0b1001)
        self.set_format(self.block_size.bit_length() - 1)

    # ---- registers ----

    def _set(self, register: int, value: int) -> None:
        self._words[register // 4] = value

    def _get(self, register: int) -> int:
        return self._words[register // 4]

    def _run(self) -> None:
        while not self._end.wait(STEP):
            if self.faults.gone:
                for register in range(0, 0x40, 4):
                    self._set(register, 0xFFFF_FFFF)
                continue
            with self._lock:
                self._follow_configuration()
                if self.enabled and self.bus_master:
                    self._serve()
                elif not self.faults.stalled:
                    self._lose()

    def _follow_configuration(self) -> None:
        cc, faults = self._get(Register.CC), self.faults
        if cc & Cc.ENABLE and not self.enabled and not faults.never_ready:
            self._enable()
        elif not cc & Cc.ENABLE and self.enabled and not faults.never_stops:
            self._disable()
        if cc & Cc.SHUTDOWN_MASK and self.enabled and not faults.never_shuts_down:
            self.shut_downs += not self.shut_down
            self.shut_down = True
        status = Csts.READY if self.enabled else 0
        status |= Csts.FATAL if faults.fatal else 0
        status |= Csts.SHUTDOWN_COMPLETE if self.shut_down else 0
        self._set(Register.CSTS, status)

    def _enable(self) -> None:
        self.enabled, self.shut_down = True, False
        aqa = self._get(Register.AQA)
        base = self._get(Register.ASQ) | self._get(Register.ASQ + 4) << 32
        self._submissions = {0: Submission(0, base, (aqa & 0xFFF) + 1, 0)}
        base = self._get(Register.ACQ) | self._get(Register.ACQ + 4) << 32
        self._completions = {0: Completion(base, (aqa >> 16 & 0xFFF) + 1, 0)}
        for at in range(DOORBELLS, SIZE, 4):
            self._set(at, 0)

    def _disable(self) -> None:
        self.enabled = self.shut_down = False
        self.resets += 1
        self._events.clear()
        self._submissions.clear()
        self._completions.clear()

    # ---- queues ----

    def _serve(self) -> None:
        for queue in list(self._submissions.values()):
            tail = self._get(DOORBELLS + 8 * queue.id)
            while queue.head != tail % queue.size and queue.id in self._submissions:
                command = Command(
                    *SUBMISSION.unpack(read(queue.base + queue.head * SUBMISSION_ENTRY, SUBMISSION.size))
                )
                queue.head = (queue.head + 1) % queue.size
                self.seen.append((queue.id, command.opcode))
                if queue.id == 0:
                    self._admin(queue, command)
                else:
                    queue.held.append(command)
            while queue.id and queue.held and not self.faults.stalled:
                self.late += not self._get(Register.CC) & Cc.ENABLE
                self._io(queue, queue.held.pop(0))

    def _lose(self) -> None:
        """What would be done now, if memory could be reached."""
        for queue in self._submissions.values():
            self.lost += len(queue.held)
            queue.held.clear()

    def _complete(self, queue: Submission, command: Command, status: int = 0, result: int = 0) -> None:
        ring = self._completions[queue.completion]
        identifier = command.identifier
        if queue.id == 0 and self.faults.wrong_identifier is not None:
            identifier, self.faults.wrong_identifier = self.faults.wrong_identifier, None
        entry = COMPLETION.pack(result, 0, queue.head, queue.id, identifier, status << 1 | ring.phase)
        at = ring.base + ring.tail * COMPLETION_ENTRY
        write(at, entry[:14])
        write(at + 14, entry[14:])
        ring.tail = (ring.tail + 1) % ring.size
        ring.phase ^= ring.tail == 0
        if ring.vector < len(self.interrupts):
            os.eventfd_write(self.interrupts[ring.vector], 1)

    # ---- admin commands ----

    def _admin(self, queue: Submission, command: Command) -> None:
        if command.opcode in self.faults.silent:
            return
        if command.opcode in self.faults.status:
            self._complete(queue, command, self.faults.status[command.opcode])
            return
        match command.opcode:
            case Admin.IDENTIFY:
                write(command.prp1, self._identify(command))
            case Admin.GET_LOG_PAGE:
                length = ((command.cdw10 >> 16) + 1) * 4
                write(command.prp1, bytes(self.errors[:length]))
            case Admin.SET_FEATURES if command.cdw10 & 0xFF == Feature.NUMBER_OF_QUEUES:
                allowed = min(command.cdw11 & 0xFFFF, self.max_queues - 1)
                self._complete(queue, command, 0, allowed << 16 | allowed)
                return
            case Admin.CREATE_CQ | Admin.CREATE_SQ:
                self._create(command)
            case Admin.DELETE_CQ:
                del self._completions[command.cdw10]
            case Admin.DELETE_SQ:
                del self._submissions[command.cdw10]
            case Admin.ABORT:
                self._complete(
                    queue, command, 0, not self._abort(command.cdw10 & 0xFFFF, command.cdw10 >> 16)
                )
                return
            case Admin.ASYNC_EVENT:
                self._events.append(command)
                return
            case Admin.SET_FEATURES:
                pass
            case _:
                self._complete(queue, command, INVALID_OPCODE)
                return
        self._complete(queue, command)

    def _identify(self, command: Command) -> bytes:
        match command.cdw10 & 0xFF:
            case Cns.CONTROLLER:
                return bytes(self.controller)
            case Cns.NAMESPACE if command.nsid == 1:
                return bytes(self.namespace)
            case Cns.DESCRIPTORS:
                uuid = DESCRIPTOR.pack(3, 16) + bytes(range(16))
                return (uuid + DESCRIPTOR.pack(COMMAND_SET_DESCRIPTOR, 1) + bytes([self.command_set])).ljust(
                    PAGE, b"\0"
                )
            case Cns.COMMAND_SET_CONTROLLER:
                limits = bytearray(PAGE)
                self.put(limits, IDENTIFY_NVM, wzsl=4, dmrl=16, dmrsl=1 << 20)
                return bytes(limits)
        return bytes(PAGE)

    def _create(self, command: Command) -> None:
        number, size = command.cdw10 & 0xFFFF, (command.cdw10 >> 16) + 1
        if command.opcode == Admin.CREATE_CQ:
            self._completions[number] = Completion(command.prp1, size, command.cdw11 >> 16)
        else:
            self._submissions[number] = Submission(number, command.prp1, size, command.cdw11 >> 16)

    def _abort(self, number: int, identifier: int) -> bool:
        queue = self._submissions.get(number)
        if queue is None or not self.faults.aborts:
            return False
        for command in queue.held:
            if command.identifier == identifier:
                queue.held.remove(command)
                self._complete(queue, command, ABORTED)
                return True
        return False

    # ---- I/O commands ----

    def _io(self, queue: Submission, command: Command) -> None:
        if command.opcode in self.faults.failing:
            self._complete(queue, command, self.faults.failing[command.opcode])
            return
        start = (command.cdw10 | command.cdw11 << 32) * self.block_size
        length = ((command.cdw12 & 0xFFFF) + 1) * self.block_size
        match command.opcode:
            case 0x00:  # Flush
                pass
            case 0x01:  # Write
                self.disk[start : start + length] = b"".join(
                    read(*piece) for piece in pieces(command, length)
                )
            case 0x02:  # Read
                for address, part in pieces(command, length):
                    write(address, bytes(self.disk[start : start + part]))
                    start += part
            case 0x08:  # Write Zeroes
                self.disk[start : start + length] = bytes(length)
            case 0x09:  # Dataset Management
                self._deallocate(command)
            case _:
                self._complete(queue, command, INVALID_OPCODE)
                return
        self._complete(queue, command)

    def _deallocate(self, command: Command) -> None:
        count = (command.cdw10 & 0xFF) + 1
        data = b"".join(read(*piece) for piece in pieces(command, count * RANGE.size))
        for _, blocks, first in RANGE.iter_unpack(data):
            if command.cdw11 & DEALLOCATE:
                start, length = first * self.block_size, blocks * self.block_size
                self.disk[start : start + length] = bytes(length)


def pieces(command: Command, length: int) -> Iterator[tuple[int, int]]:
    """Addresses and lengths that the PRPs of a command describe (section 4.3)."""
    first = min(length, PAGE - command.prp1 % PAGE)
    yield command.prp1, first
    left = length - first
    if left <= PAGE:
        if left:
            yield command.prp2, left
        return
    entry = command.prp2
    while left:
        (address,) = struct.unpack("<Q", read(entry, 8))
        if (entry + 8) % PAGE == 0 and left > PAGE:
            entry = address
            continue
        part = min(left, PAGE)
        yield address, part
        left -= part
        entry += 8


def read(address: int, length: int) -> bytes:
    return ctypes.string_at(address, length)


def write(address: int, data: bytes) -> None:
    ctypes.memmove(address, data, len(data))
