# SPDX-License-Identifier: Apache-2.0
"""The program scripts/vfio-bind: gives a PCI device to vfio-pci, and back to the driver that had it.

What was found before is kept in /run until the device is given back. Needs the standard library only.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from target.vfio.container import DEV
from target.vfio.errors import VfioError
from target.vfio.pci import SYSFS, VFIO_PCI, PciDevice

STATE = Path("/run/blocktarget/vfio")
NO_OVERRIDE = "(null)"  # how sysfs shows that there is none


@dataclass(frozen=True)
class Found:
    """How a device was before it was bound."""

    driver: str | None
    driver_override: str


class Binder:
    """Changes the driver of one device. VfioError says what is wrong; then the device is as it was."""

    def __init__(
        self,
        address: str,
        *,
        sysfs: Path = SYSFS,
        dev: Path = DEV,
        nodes: Path = Path("/dev"),
        state: Path = STATE,
    ) -> None:
        self.pci = PciDevice(address, sysfs)
        self._drivers = sysfs / "bus/pci/drivers"
        self._probe = sysfs / "bus/pci/drivers_probe"
        self._dev = dev
        self._nodes = nodes
        self._state = state / self.pci.address

    def status(self) -> str:
        pci = self.pci
        lines = [
            f"{pci.address}: class {pci.code:06x}, driver {pci.driver or 'none'}",
            self._describe_group(),
        ]
        lines += [f"block device {name}{' (in use)' if self._busy(name) else ''}" for name in self._disks()]
        return "\n".join(lines)

    def _describe_group(self) -> str:
        pci = self.pci
        if pci.group is None or not pci.translated:
            return "IOMMU group: none, the IOMMU is off"
        others = [f"{address} ({driver or 'no driver'})" for address, driver in pci.others_in_group().items()]
        return f"IOMMU group {pci.group}, {'with ' + ', '.join(others) if others else 'alone'}"

    def bind(self) -> str:
        pci = self.pci
        if pci.driver == VFIO_PCI:
            return f"{pci.address} is bound to {VFIO_PCI} already"
        if pci.group is None:
            raise VfioError(
                f"PCI device {pci.address} is behind no IOMMU: turn it on in the firmware and the kernel "
                "(intel_iommu=on or amd_iommu=on)"
            )
        for name in self._disks():
            if self._busy(name):
                raise VfioError(
                    f"PCI device {pci.address} is busy: /dev/{name} or a partition of it is in use"
                )
        self._load_driver()
        found = Found(pci.driver, self._read_override())
        try:
            self._keep(found)
            self._change(VFIO_PCI, found.driver)
        except OSError as error:
            self._undo(found)
            raise self._refused("bind", error) from None
        if pci.driver != VFIO_PCI:
            self._undo(found)
            raise VfioError(f"PCI device {pci.address}: {VFIO_PCI} does not take it (see the kernel's log)")
        return f"{pci.address} is bound to {VFIO_PCI}, IOMMU group {pci.group}"

    def unbind(self) -> str:
        pci = self.pci
        if pci.driver != VFIO_PCI:
            raise VfioError(
                f"PCI device {pci.address} is bound to {pci.driver or 'no driver'}, not to {VFIO_PCI}"
            )
        self._check_unused()
        found = self._kept()
        try:
            self._give_back(found)
        except OSError as error:
            raise self._refused("give back", error) from None
        if found.driver is not None and pci.driver != found.driver:
            raise VfioError(
                f"PCI device {pci.address}: '{found.driver}' does not take it back (see the kernel's log)"
            )
        self._state.unlink(missing_ok=True)
        return f"{pci.address} is bound to {pci.driver or 'no driver'}"

    # ---- what uses the device ----

    def _disks(self) -> list[str]:
        """Names of the disks that the kernel has made of it."""
        blocks = self.pci.sysfs / "class/block"
        below = {_shown(name) for _, names, _ in os.walk(self.pci.path) for name in names}
        disks = (name for name in below if (blocks / name).exists())
        return sorted(name for name in disks if not (blocks / name / "partition").exists())

    def _busy(self, name: str) -> bool:
        """An exclusive open fails for what is mounted, swapped to, or part of another device."""
        try:
            os.close(os.open(self._nodes / name, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
        except OSError as error:
            if error.errno == errno.EBUSY:
                return True
            if error.errno in (errno.ENOENT, errno.ENXIO, errno.ENOMEDIUM):
                return False
            raise self._refused("look at", error) from None
        return False

    def _check_unused(self) -> None:
        """The kernel would wait, without end, for the program that has the group open."""
        try:
            os.close(os.open(self._dev / str(self.pci.group), os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise VfioError(
                    f"PCI device {self.pci.address} is busy: a program uses IOMMU group {self.pci.group}"
                ) from None
            if error.errno != errno.ENOENT:
                raise self._refused("look at", error) from None

    # ---- changes ----

    def _load_driver(self) -> None:
        if not (self._drivers / VFIO_PCI).is_dir():
            try:
                subprocess.run(["modprobe", VFIO_PCI], capture_output=True, timeout=60)
            except (OSError, subprocess.TimeoutExpired) as error:
                raise VfioError(f"cannot load {VFIO_PCI}: {error}") from None
        if not (self._drivers / VFIO_PCI).is_dir():
            raise VfioError(f"the kernel has no driver {VFIO_PCI}: modprobe {VFIO_PCI}")

    def _change(self, override: str, bound: str | None) -> None:
        self._write(self.pci.path / "driver_override", override or "\n")
        if bound is not None:
            self._write(self._drivers / bound / "unbind", self.pci.address)
        self._write(self._probe, self.pci.address)

    def _give_back(self, found: Found) -> None:
        self._write(self._drivers / VFIO_PCI / "unbind", self.pci.address)
        self._write(self.pci.path / "driver_override", found.driver_override or "\n")
        if found.driver is not None:
            self._write(self._drivers / found.driver / "bind", self.pci.address)

    def _undo(self, found: Found) -> None:
        """As well as it can be done: the first error is the one to report."""
        try:
            self._change(found.driver_override, None)
            self._state.unlink(missing_ok=True)
        except OSError as error:
            print(f"vfio-bind: cannot restore {self.pci.address}: {error}", file=sys.stderr)

    def _read_override(self) -> str:
        text = (self.pci.path / "driver_override").read_text().strip()
        return "" if text == NO_OVERRIDE else text

    def _keep(self, found: Found) -> None:
        self._state.parent.mkdir(parents=True, exist_ok=True)
        self._state.write_text(json.dumps(asdict(found)))

    def _kept(self) -> Found:
        """For a device that something else has bound: the driver that the kernel would choose."""
        if self._state.exists():
            return Found(**json.loads(self._state.read_text()))
        return Found(self._usual_driver(), "")

    def _usual_driver(self) -> str | None:
        return "nvme" if self.pci.code == 0x010802 and (self._drivers / "nvme").is_dir() else None

    @staticmethod
    def _write(path: Path, text: str) -> None:
        """sysfs wants one call."""
        with path.open("w") as file:
            file.write(text)

    def _refused(self, what: str, error: OSError) -> VfioError:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return VfioError(f"no permission to {what} PCI device {self.pci.address}: {error}")
        return VfioError(f"cannot {what} PCI device {self.pci.address}: {error}")


def _shown(name: str) -> str:
    """The disk to a path of a multipath NVMe namespace: nvme0n1 for nvme0c0n1, which has no node."""
    head, part, rest = name.partition("c")
    if name.startswith("nvme") and part and rest.partition("n")[0].isdigit():
        return head + "n" + rest.partition("n")[2]
    return name


def main() -> int:
    parser = argparse.ArgumentParser(prog="vfio-bind", description="Give a PCI device to vfio-pci, or back.")
    parser.add_argument("action", choices=("bind", "unbind", "status"))
    parser.add_argument("address", help="such as 0000:01:00.0")
    options = parser.parse_args()
    try:
        binder = Binder(options.address)
        print({"bind": binder.bind, "unbind": binder.unbind, "status": binder.status}[options.action]())
    except VfioError as error:
        print(f"vfio-bind: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
