# SPDX-License-Identifier: Apache-2.0
"""A PCI device as sysfs shows it: its driver, its class, its IOMMU group. It changes nothing."""

from __future__ import annotations

import re
from pathlib import Path

from target.vfio.errors import VfioError

ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-1][0-9a-f]\.[0-7]\Z")
SYSFS = Path("/sys")
VFIO_PCI = "vfio-pci"
NO_IOMMU = "vfio-noiommu"  # the name of a group without translation
HARMLESS = {None, VFIO_PCI, "pci-stub", "pcieport"}  # drivers that leave a group viable


class PciDevice:
    """The device at an address such as 0000:00:04.0. VfioError when there is none."""

    def __init__(self, address: str, sysfs: Path = SYSFS) -> None:
        self.address = address.lower()
        self.sysfs = sysfs
        if not ADDRESS.match(self.address):
            raise VfioError(f"'{address}' is not a PCI address such as 0000:01:00.0")
        self.path = sysfs / "bus/pci/devices" / self.address
        if not self.path.is_dir():
            raise VfioError(f"there is no PCI device {self.address}")

    @property
    def driver(self) -> str | None:
        """The kernel driver that it is bound to."""
        return _link(self.path / "driver")

    @property
    def group(self) -> int | None:
        """Its IOMMU group; None without an IOMMU."""
        name = _link(self.path / "iommu_group")
        return None if name is None else int(name)

    @property
    def translated(self) -> bool:
        """False for a group that VFIO made up for a machine without an IOMMU."""
        name = self.path / "iommu_group" / "name"
        return not (name.exists() and name.read_text().strip() == NO_IOMMU)

    @property
    def code(self) -> int:
        """Class, subclass and programming interface, such as 0x010802."""
        return int((self.path / "class").read_text(), 16)

    def others_in_group(self) -> dict[str, str | None]:
        """The drivers of the other devices of its group, by address."""
        members = sorted((self.path / "iommu_group" / "devices").glob("*"))
        return {path.name: _link(path / "driver") for path in members if path.name != self.address}

    def in_the_way(self) -> list[str]:
        """What keeps the group from being viable, in words."""
        others = self.others_in_group().items()
        return [f"{address} ({driver})" for address, driver in others if driver not in HARMLESS]


def _link(path: Path) -> str | None:
    """The last part of where a link points; None when there is no link."""
    return path.resolve().name if path.is_symlink() else None
