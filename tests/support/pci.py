# SPDX-License-Identifier: Apache-2.0
"""A sysfs and a kernel that binds PCI drivers, in a directory; and VFIO's ioctls."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path
from typing import Any

from target.vfio import ioctl
from target.vfio.ioctl import Call


class FakeKernel:
    """PCI devices in ``sysfs``. Writes to sysfs are done by ``write``."""

    def __init__(self, top: Path) -> None:
        self.sysfs = top / "sys"
        self.dev = top / "vfio"
        self.nodes = top / "dev"
        self.state = top / "run"
        self.drivers = self.sysfs / "bus/pci/drivers"
        self.usual: dict[str, str] = {}
        self.refusing: set[str] = set()
        """drivers that take no device"""
        self.denied = False
        for path in (
            self.drivers,
            self.dev,
            self.nodes,
            self.sysfs / "bus/pci/devices",
            self.sysfs / "class/block",
        ):
            path.mkdir(parents=True)
        (self.dev / "vfio").touch()
        for driver in ("nvme", "vfio-pci", "ahci"):
            (self.drivers / driver).mkdir()

    def device(
        self, address: str, driver: str | None, *, group: int | None = 1, code: str = "0x010802"
    ) -> Path:
        path = self.sysfs / "bus/pci/devices" / address
        path.mkdir()
        (path / "class").write_text(code + "\n")
        (path / "driver_override").write_text("(null)\n")
        if driver is not None:
            self.usual[address] = driver
            self._bind(address, driver)
        if group is not None:
            members = self.sysfs / f"kernel/iommu_groups/{group}/devices"
            members.mkdir(parents=True, exist_ok=True)
            (members / address).symlink_to(path)
            (path / "iommu_group").symlink_to(members.parent)
            (self.dev / str(group)).touch()
        return path

    def disk(self, address: str, name: str) -> None:
        (self.sysfs / "bus/pci/devices" / address / "nvme/nvme0" / name).mkdir(parents=True)
        (self.sysfs / "class/block" / name).mkdir()
        (self.nodes / name).touch()

    def bound(self, address: str) -> str | None:
        link = self.sysfs / "bus/pci/devices" / address / "driver"
        return link.resolve().name if link.is_symlink() else None

    def write(self, path: Path, text: str) -> None:
        """What a write to a file of sysfs does."""
        if self.denied:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        if path.name == "driver_override":
            path.write_text(text if text.strip() else "(null)\n")
        elif path.name == "unbind":
            assert self.bound(text) == path.parent.name
            (self.sysfs / "bus/pci/devices" / text / "driver").unlink()
        elif path.name == "bind":
            self._bind(text, path.parent.name)
        elif path.name == "drivers_probe" and self.bound(text) is None:
            override = (self.sysfs / "bus/pci/devices" / text / "driver_override").read_text().strip()
            wanted = self.usual.get(text) if override == "(null)" else override
            if wanted is not None and wanted not in self.refusing:
                self._bind(text, wanted)

    def _bind(self, address: str, driver: str) -> None:
        (self.sysfs / "bus/pci/devices" / address / "driver").symlink_to(self.drivers / driver)


class FakeVfio:
    """Answers ioctls as the kernel does. Fields are for tests to change."""

    def __init__(self) -> None:
        self.version = 0
        self.type1 = 1
        self.group_flags = 1
        self.page_sizes = 0x40201000
        self.ranges = [(0, 0xFEDF_FFFF), (0xFEF0_0000, (1 << 39) - 1)]
        self.mappings: int | None = 65535
        self.regions: dict[int, tuple[int, int, int, list[tuple[int, int]]]] = {}
        """flags, size, offset, areas that can be mapped, by index"""
        self.vectors = {2: 65, 1: 1}
        self.device_flags = 3
        self.reset_error = 0
        self.device_fd = -1
        self.calls: list[tuple[Call, bytes]] = []

    def __call__(self, fd: int, request: int, argument: Any = 0) -> int:
        call = Call(request)
        self.calls.append((call, bytes(argument) if isinstance(argument, bytearray) else b""))
        match call:
            case Call.GET_API_VERSION:
                return self.version
            case Call.CHECK_EXTENSION:
                return self.type1
            case Call.GROUP_GET_DEVICE_FD:
                return os.dup(self.device_fd)
            case Call.GROUP_GET_STATUS:
                struct.pack_into("=I", argument, 4, self.group_flags)
            case Call.IOMMU_GET_INFO:
                self._iommu(argument)
            case Call.DEVICE_GET_INFO:
                struct.pack_into("=I", argument, 4, self.device_flags)
            case Call.DEVICE_RESET if self.reset_error:
                raise OSError(self.reset_error, os.strerror(self.reset_error))
            case Call.DEVICE_GET_REGION_INFO:
                self._region(argument)
            case Call.DEVICE_GET_IRQ_INFO:
                (kind,) = struct.unpack_from("=I", argument, 8)
                count = self.vectors.get(kind, 0)
                struct.pack_into("=I", argument, 4, 1 if count else 0)
                struct.pack_into("=I", argument, 12, count)
        return 0

    def _iommu(self, argument: bytearray) -> None:
        head = ioctl.IOMMU_INFO.size
        ranges = struct.pack("=II", len(self.ranges), 0) + b"".join(
            struct.pack("=QQ", *r) for r in self.ranges
        )
        following = 0 if self.mappings is None else head + 8 + len(ranges)
        data = struct.pack("=HHI", 1, 1, following) + ranges
        if self.mappings is not None:
            data += struct.pack("=HHII", 3, 1, 0, self.mappings)
        self._fill(argument, ioctl.IOMMU_INFO.pack(head + len(data), 3, self.page_sizes, head, 0), data)

    def _region(self, argument: bytearray) -> None:
        (index,) = struct.unpack_from("=I", argument, 8)
        flags, size, offset, areas = self.regions.get(index, (0, 0, 0, []))
        head = ioctl.REGION_INFO.size
        data = b""
        if areas:
            data = struct.pack("=HHIII", 1, 1, 0, len(areas), 0) + b"".join(
                struct.pack("=QQ", *a) for a in areas
            )
        first = head if areas else 0
        self._fill(
            argument, ioctl.REGION_INFO.pack(head + len(data), flags, index, first, size, offset), data
        )

    @staticmethod
    def _fill(argument: bytearray, head: bytes, data: bytes) -> None:
        """As much as there is room for; the length says how much there would be."""
        whole = head + data if len(argument) >= len(head) + len(data) else head
        argument[: len(whole)] = whole
