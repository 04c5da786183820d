# SPDX-License-Identifier: Apache-2.0
"""What the driver has of the machine: the device under VFIO, its registers, interrupts, and memory for DMA.

It is taken in one order and given back in the other. Calls that block run on a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import mmap
import os
import resource
from typing import Any, Self

from target.datapath import Datapath, ffi, lib
from target.datapath import check as checked
from target.drivers.protocol.nvme.errors import ControllerError
from target.drivers.protocol.nvme.registers import Registers
from target.drivers.protocol.nvme.spec import CLASS_CODE, DOORBELLS, PAGE
from target.vfio.container import Container
from target.vfio.device import Device
from target.vfio.errors import VfioError
from target.vfio.pci import PciDevice

MAPPINGS_KEPT = 1024  # of the kernel's limit, for queues and for what else maps
MAPPINGS = 32768
PIECE = 2 << 20  # bytes of shared memory mapped at a time: a large page
IDLE_NS = 1_000_000_000
MAX_RANGES = 64


class DmaMemory:
    """Zeroed memory of whole pages that the controller reaches."""

    def __init__(self, length: int) -> None:
        self.length = -(-length // PAGE) * PAGE
        self._mmap = mmap.mmap(-1, self.length)
        self.view = memoryview(self._mmap)
        self.pointer: Any = ffi.from_buffer(self._mmap)
        self.iova = 0

    def close(self) -> None:
        """The controller does not reach it any more."""
        ffi.release(self.pointer)
        self.view.release()
        self._mmap.close()


class Dma:
    """Memory that the device reaches: the datapath's mappings of shared memory, and fixed ones."""

    def __init__(self, datapath: Datapath, ptr: Any) -> None:
        """ptr: a bt_dma, which this owns from here on."""
        if ptr == ffi.NULL:
            raise OSError(ffi.errno, os.strerror(ffi.errno))
        self._datapath = datapath
        self.ptr = ptr
        self._fixed: list[DmaMemory] = []

    @classmethod
    def over_vfio(cls, datapath: Datapath, container: Container, limit: int) -> Self:
        """limit: bytes of shared memory mapped at a time."""
        ranges = ffi.new("struct bt_iova_range[]", [tuple(r) for r in container.ranges[:MAX_RANGES]])
        limits = dma_limits(limit, container.mappings)
        return cls(datapath, lib.bt_dma_vfio_new(datapath.dp, container.fd, ranges, len(ranges), limits))

    async def allocate(self, length: int) -> DmaMemory:
        """Memory for queues. ControllerError when the kernel does not let it be mapped."""
        memory = DmaMemory(length)
        iova = ffi.new("uint64_t *")
        result = await asyncio.to_thread(lib.bt_dma_map, self.ptr, memory.pointer, memory.length, iova)
        if result < 0:
            memory.close()
            raise ControllerError(f"cannot map memory for DMA: {os.strerror(-result)}{_memlock(-result)}")
        memory.iova = iova[0]
        self._fixed.append(memory)
        return memory

    async def close(self) -> None:
        """After the release of what uses it. Nothing is mapped afterwards."""
        while self._fixed:
            memory = self._fixed.pop()
            checked(await asyncio.to_thread(lib.bt_dma_unmap, self.ptr, memory.iova, memory.length))
            memory.close()
        cookie, future = self._datapath.cookie()
        lib.bt_dma_free(self.ptr, cookie)
        await future

    def counters(self) -> dict[str, int]:
        raw = ffi.new("struct bt_dma_counters *")
        lib.bt_dma_get_counters(self.ptr, raw)
        return as_dict(raw)


def dma_limits(bytes: int, available: int | None) -> Any:
    """available: how many mappings the kernel lets be made; None when it does not say."""
    limits = ffi.new("struct bt_dma_limits *")
    limits.bytes = bytes
    limits.mappings = _mappings(available)
    limits.piece = PIECE
    limits.idle_ns = IDLE_NS
    return limits


def as_dict(raw: Any) -> dict[str, int]:
    """A C structure of numbers by its members' names."""
    return {name.replace("_", "-"): getattr(raw, name) for name, _ in ffi.typeof(raw).item.fields}


def _mappings(available: int | None) -> int:
    return MAPPINGS if available is None else max(1, min(MAPPINGS, available - MAPPINGS_KEPT))


def _memlock(number: int) -> str:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limited = number == errno.ENOMEM and soft != resource.RLIM_INFINITY
    return f" (the limit on locked memory is {soft >> 10} KiB: ulimit -l)" if limited else ""


class Hardware:
    """The device, opened. ``close`` leaves it as it was found, but for what the controller was told."""

    container: Container
    device: Device
    registers: Registers
    dma: Dma
    bar: Any
    """BAR 0 as C has it, bar_length bytes"""
    bar_length: int

    def __init__(self, address: str) -> None:
        self.pci = PciDevice(address)
        if self.pci.code != CLASS_CODE:
            raise VfioError(
                f"PCI device {address} is not an NVMe controller (its class is {self.pci.code:06x})"
            )
        self.interrupts: list[int] = []
        self._undo = contextlib.AsyncExitStack()
        self._undo_device = contextlib.AsyncExitStack()
        self._call: asyncio.Future[None] | None = None
        self._releasing: asyncio.Future[None] | None = None

    async def open(self, datapath: Datapath, queues: int, dma_limit: int) -> None:
        """With interrupts for the admin queue and up to so many I/O queues. VfioError, OSError.

        A device that has only one interrupt uses it for an I/O queue.
        """
        await asyncio.to_thread(self._open_container)
        self.dma = Dma.over_vfio(datapath, self.container, dma_limit)
        self._undo.push_async_callback(self.dma.close)
        await asyncio.to_thread(self._open_device)
        self._map_registers()
        self._enable_interrupts(queues)

    async def close(self) -> None:
        """No queue uses it any more. OSError when the kernel refuses."""
        try:
            await self.release_device()
        finally:
            await self._undo.aclose()

    async def release_device(self) -> None:
        """The device goes, its memory stays. Nobody touches registers or interrupts from here on.

        The kernel turns bus mastering off and resets the device when its last descriptor is closed: whatever
        the controller is at, it reaches no memory afterwards. OSError.
        """
        if self._releasing is None:
            self._releasing = asyncio.ensure_future(self._release_device())
        await asyncio.shield(self._releasing)

    async def _release_device(self) -> None:
        if self._call is not None:
            await asyncio.wait([self._call])
        await self._undo_device.aclose()

    async def reset(self) -> None:
        """Resets the function. VfioError."""
        self._call = asyncio.ensure_future(asyncio.to_thread(self.device.reset))
        await asyncio.shield(self._call)

    def master_bus(self, on: bool) -> None:
        """Whether the controller may reach memory. VfioError, OSError: it does not take it."""
        self.device.master_bus(on)

    def _open_container(self) -> None:
        self.container = Container(self.pci)
        self._undo.push_async_callback(asyncio.to_thread, self.container.close)

    def _open_device(self) -> None:
        self.device = Device(self.container, self.pci)
        self._undo_device.push_async_callback(asyncio.to_thread, self.device.close)
        self.device.enable()

    def _map_registers(self) -> None:
        mapped = self._undo_device.enter_context(self.device.map_registers(DOORBELLS + PAGE))
        self.bar, self.bar_length = ffi.from_buffer(mapped), len(mapped)
        self._undo_device.callback(ffi.release, self.bar)
        self.registers = Registers(mapped)
        self._undo_device.callback(self.registers.close)

    def _enable_interrupts(self, queues: int) -> None:
        kind, count = self.device.vectors()
        for _ in range(min(count, queues + 1)):
            self.interrupts.append(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
            self._undo_device.callback(os.close, self.interrupts[-1])
        self.device.enable_interrupts(kind, self.interrupts)
