# SPDX-License-Identifier: Apache-2.0
"""A PCI device under VFIO: its registers in memory, its configuration space, its interrupts as eventfds."""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections.abc import Sequence

from target.vfio import ioctl
from target.vfio.container import Container
from target.vfio.errors import VfioError
from target.vfio.ioctl import Call, Capability, DeviceFlag, Irq, IrqFlag, Region, RegionFlag
from target.vfio.pci import PciDevice

COMMAND = 0x04  # PCI Local Bus Specification 3.0, section 6.2.2: the command register
MEMORY_SPACE, BUS_MASTER = 2, 4
NOTHING = 0xFFFF  # what is read where there is no device any more
HALF = struct.Struct("<H")


class Device:
    """The open device. ``close`` leaves its command register as it was, and no interrupt behind."""

    def __init__(self, container: Container, pci: PciDevice) -> None:
        self.address = pci.address
        self.fd = container.device_fd(pci)
        self._irq: Irq | None = None
        try:
            self._config = self._region(Region.CONFIG)[1]
            self._command = self._read_command()
        except BaseException:
            os.close(self.fd)
            raise

    def close(self) -> None:
        """Everything mapped of it is unmapped before."""
        try:
            self.disable_interrupts()
            self._write_command(self._command)
        finally:
            os.close(self.fd)

    # ---- registers ----

    def map_registers(self, least: int) -> mmap.mmap:
        """BAR 0, at least so many bytes of it from its start."""
        size, offset, areas = self._mappable(Region.BAR0)
        mapped = next((length for start, length in areas if start == 0), 0)
        if min(size, mapped) < least:
            raise VfioError(
                f"PCI device {self.address}: {min(size, mapped)} bytes of BAR 0 can be mapped, not {least}"
            )
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        try:
            return mmap.mmap(self.fd, mapped, mmap.MAP_SHARED, protection, offset=offset)
        except OSError as error:
            raise VfioError.from_os(f"PCI device {self.address}: cannot map BAR 0", error) from None

    def _region(self, index: Region) -> tuple[int, int]:
        """Size, and offset in the descriptor."""
        answer = ioctl.query(self.fd, Call.DEVICE_GET_REGION_INFO, ioctl.REGION_INFO, 0, index)
        *_, size, offset = ioctl.REGION_INFO.unpack_from(answer)
        return size, offset

    def _mappable(self, index: Region) -> tuple[int, int, list[tuple[int, int]]]:
        """Size, offset in the descriptor, and the parts (offset, length) that can be mapped."""
        answer = ioctl.query(self.fd, Call.DEVICE_GET_REGION_INFO, ioctl.REGION_INFO, 0, index)
        _, flags, _, first, size, offset = ioctl.REGION_INFO.unpack_from(answer)
        needed = RegionFlag.READ | RegionFlag.WRITE | RegionFlag.MMAP
        areas = [(0, size)] if flags & needed == needed else []
        for identifier, at in ioctl.capabilities(answer, first if flags & RegionFlag.CAPS else 0):
            if identifier == Capability.SPARSE_MMAP:
                count, _ = ioctl.RANGES.unpack_from(answer, at)
                start = at + ioctl.RANGES.size
                areas = [ioctl.RANGE.unpack_from(answer, start + i * ioctl.RANGE.size) for i in range(count)]
        return size, offset, areas

    # ---- configuration space ----

    def enable(self) -> None:
        """Lets the device answer at its registers and reach memory."""
        self._write_command(self._read_command() | MEMORY_SPACE | BUS_MASTER)

    def master_bus(self, on: bool) -> None:
        """Whether the device may reach memory. VfioError when it does not take it.

        Off, it stays so when the device is closed.
        """
        if not on:
            self._command &= ~BUS_MASTER
        command = self._read_command()
        wanted = command | BUS_MASTER if on else command & ~BUS_MASTER
        self._write_command(wanted)
        # The answer comes behind all that the device wrote to memory before.
        found = self._read_command()
        if (found ^ wanted) & BUS_MASTER and (on or found != NOTHING):
            raise VfioError(f"PCI device {self.address}: bus mastering stays {'off' if on else 'on'}")

    def reset(self) -> None:
        """Resets the function, as far as the kernel can; its configuration stays. BLOCKS. VfioError."""
        what = f"PCI device {self.address} cannot be reset"
        try:
            answer = ioctl.query(self.fd, Call.DEVICE_GET_INFO, ioctl.DEVICE_INFO)
            _, flags, *_ = ioctl.DEVICE_INFO.unpack_from(answer)
            if not flags & DeviceFlag.RESET:
                raise VfioError(f"{what} by itself")
            fcntl.ioctl(self.fd, Call.DEVICE_RESET)
        except OSError as error:
            raise VfioError.from_os(what, error) from None

    def _read_command(self) -> int:
        value: int = HALF.unpack(os.pread(self.fd, HALF.size, self._config + COMMAND))[0]
        return value

    def _write_command(self, value: int) -> None:
        os.pwrite(self.fd, HALF.pack(value), self._config + COMMAND)

    # ---- interrupts ----

    def vectors(self) -> tuple[Irq, int]:
        """The kind of message-signalled interrupts that it has, and how many."""
        for kind in (Irq.MSIX, Irq.MSI):
            answer = ioctl.query(self.fd, Call.DEVICE_GET_IRQ_INFO, ioctl.IRQ_INFO, 0, kind)
            _, flags, _, count = ioctl.IRQ_INFO.unpack_from(answer)
            if flags & IrqFlag.EVENTFD and count:
                return kind, count
        raise VfioError(f"PCI device {self.address} has no message-signalled interrupts")

    def enable_interrupts(self, kind: Irq, eventfds: Sequence[int]) -> None:
        """Vector i makes eventfds[i] readable, from now on. OSError."""
        flags = IrqFlag.DATA_EVENTFD | IrqFlag.ACTION_TRIGGER
        self._set_irqs(kind, flags, len(eventfds), struct.pack(f"={len(eventfds)}i", *eventfds))
        self._irq = kind

    def disable_interrupts(self) -> None:
        if self._irq is not None:
            kind, self._irq = self._irq, None
            self._set_irqs(kind, IrqFlag.DATA_NONE | IrqFlag.ACTION_TRIGGER, 0, b"")

    def _set_irqs(self, kind: Irq, flags: int, count: int, data: bytes) -> None:
        head = ioctl.IRQ_SET.pack(ioctl.IRQ_SET.size + len(data), flags, kind, 0, count)
        fcntl.ioctl(self.fd, Call.DEVICE_SET_IRQS, bytearray(head + data))
