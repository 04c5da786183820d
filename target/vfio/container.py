# SPDX-License-Identifier: Apache-2.0
"""The IOMMU group of a device, in a container of its own: what the device may reach in memory.

Mapping memory is the datapath's (see nvme.h): it gets the container's descriptor and the usable addresses.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path
from typing import NamedTuple

from target.vfio import ioctl
from target.vfio.errors import VfioError
from target.vfio.ioctl import Call, Capability, GroupFlag, IommuFlag
from target.vfio.pci import VFIO_PCI, PciDevice

DEV = Path("/dev/vfio")
PAGE = 4096


class IovaRange(NamedTuple):
    """Addresses that the IOMMU translates, both ends included."""

    first: int
    last: int


class Container:
    """A container with the group of one device. VfioError says why it cannot be had."""

    def __init__(self, pci: PciDevice, dev: Path = DEV) -> None:
        self._check_device(pci)
        self.fd = self.group_fd = -1
        try:
            self.fd = self._open_container(pci, dev)
            self.group_fd = self._open_group(pci, dev / str(pci.group))
            self._join(pci)
            self.ranges, self.mappings = self._limits(pci)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """The device is closed before. Another descriptor of the container keeps its mappings."""
        if self.group_fd >= 0:
            os.close(self.group_fd)  # takes the group out of the container
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = self.group_fd = -1

    def device_fd(self, pci: PciDevice) -> int:
        """The device's descriptor."""
        name = bytearray(pci.address.encode() + b"\0")
        try:
            fd: int = fcntl.ioctl(self.group_fd, Call.GROUP_GET_DEVICE_FD, name)
        except OSError as error:
            raise VfioError.from_os(f"cannot open PCI device {pci.address}", error) from None
        return fd

    @staticmethod
    def _check_device(pci: PciDevice) -> None:
        if pci.group is None or not pci.translated:
            raise VfioError(
                f"PCI device {pci.address} is behind no IOMMU: turn it on in the firmware and the kernel "
                "(intel_iommu=on or amd_iommu=on)"
            )
        if pci.driver != VFIO_PCI:
            bound = f"is bound to '{pci.driver}'" if pci.driver else "is bound to no driver"
            raise VfioError(
                f"PCI device {pci.address} {bound}, not to '{VFIO_PCI}': "
                f"run scripts/vfio-bind bind {pci.address}"
            )

    @staticmethod
    def _open_container(pci: PciDevice, dev: Path) -> int:
        path = dev / "vfio"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
                raise VfioError(
                    f"there is no IOMMU to be had: {path} does not open: modprobe {VFIO_PCI}"
                ) from None
            raise VfioError.from_os(f"Could not open '{path}'", error) from None
        try:
            version = fcntl.ioctl(fd, Call.GET_API_VERSION)
            if version != ioctl.API_VERSION:
                raise VfioError(f"'{path}' speaks version {version} of VFIO, not {ioctl.API_VERSION}")
            if not fcntl.ioctl(fd, Call.CHECK_EXTENSION, ioctl.TYPE1V2_IOMMU):
                raise VfioError(
                    f"the IOMMU of PCI device {pci.address} is not of VFIO's type 1: "
                    "modprobe vfio_iommu_type1"
                )
        except BaseException:
            os.close(fd)
            raise
        return fd

    @staticmethod
    def _open_group(pci: PciDevice, path: Path) -> int:
        what = f"IOMMU group {pci.group} of PCI device {pci.address}"
        try:
            return os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise VfioError(f"{what} is in use, by another program or another node") from None
            raise VfioError.from_os(f"{what}: Could not open '{path}'", error) from None

    def _join(self, pci: PciDevice) -> None:
        what = f"IOMMU group {pci.group} of PCI device {pci.address}"
        try:
            _, flags = ioctl.GROUP_STATUS.unpack(
                ioctl.query(self.group_fd, Call.GROUP_GET_STATUS, ioctl.GROUP_STATUS)
            )
            if not flags & GroupFlag.VIABLE:
                others = ", ".join(pci.in_the_way()) or "others"
                raise VfioError(f"{what} is not viable: kernel drivers hold other devices of it: {others}")
            if flags & GroupFlag.CONTAINER_SET:
                raise VfioError(f"{what} is in use, by another program or another node")
            fcntl.ioctl(self.group_fd, Call.GROUP_SET_CONTAINER, bytearray(struct.pack("=i", self.fd)))
            fcntl.ioctl(self.fd, Call.SET_IOMMU, ioctl.TYPE1V2_IOMMU)
        except OSError as error:
            raise VfioError.from_os(f"{what} cannot be used", error) from None

    def _limits(self, pci: PciDevice) -> tuple[list[IovaRange], int | None]:
        """Usable addresses, and how many mappings there may be (None: the kernel does not say)."""
        try:
            answer = ioctl.query(self.fd, Call.IOMMU_GET_INFO, ioctl.IOMMU_INFO)
        except OSError as error:
            raise VfioError.from_os(f"IOMMU of PCI device {pci.address}", error) from None
        _, flags, sizes, first, _ = ioctl.IOMMU_INFO.unpack_from(answer)
        if flags & IommuFlag.PGSIZES and not sizes & PAGE:
            raise VfioError(f"the IOMMU of PCI device {pci.address} has no pages of {PAGE} bytes")
        ranges, mappings = [], None
        for identifier, at in ioctl.capabilities(answer, first if flags & IommuFlag.CAPS else 0):
            if identifier == Capability.IOVA_RANGE:
                count, _ = ioctl.RANGES.unpack_from(answer, at)
                start = at + ioctl.RANGES.size
                ranges = [
                    IovaRange(*ioctl.RANGE.unpack_from(answer, start + i * ioctl.RANGE.size))
                    for i in range(count)
                ]
            elif identifier == Capability.DMA_AVAIL:
                (mappings,) = ioctl.AVAILABLE.unpack_from(answer, at)
        # Kernels before 5.4 do not say: what every IOMMU translates, below the interrupt window of x86.
        return sorted(ranges) or [IovaRange(0, 0xFEDF_FFFF)], mappings
