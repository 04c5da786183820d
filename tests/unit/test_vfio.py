# SPDX-License-Identifier: Apache-2.0
"""VFIO: what is refused and why, what the kernel's answers mean, and the program that binds devices."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from target.vfio import bind, container, device, ioctl
from target.vfio.bind import Binder
from target.vfio.container import Container
from target.vfio.device import Device
from target.vfio.errors import VfioError
from target.vfio.ioctl import Call, Irq
from target.vfio.pci import PciDevice
from tests.support.pci import FakeKernel, FakeVfio

NVME = "0000:00:04.0"
OTHER = "0000:00:05.0"
CONFIG_OFFSET = 4096


@pytest.fixture
def kernel(tmp_path: Path) -> FakeKernel:
    return FakeKernel(tmp_path)


@pytest.fixture
def vfio(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeVfio]:
    fake = FakeVfio()
    for module in (ioctl, container, device):
        monkeypatch.setattr(module, "fcntl", type("fcntl", (), {"ioctl": staticmethod(fake)}))
    fake.device_fd = os.memfd_create("device")
    os.truncate(fake.device_fd, 64 << 10)
    fake.regions = {0: (7, 16384, 16384, []), 7: (3, 256, CONFIG_OFFSET, [])}
    yield fake
    os.close(fake.device_fd)


def open_container(kernel: FakeKernel, address: str = NVME) -> Container:
    return Container(PciDevice(address, kernel.sysfs), kernel.dev)


def why(call: Callable[[], Any]) -> str:
    with pytest.raises(VfioError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


# ---- containers ----


@pytest.mark.parametrize(
    "address", ["", "nvme0", "00:04.0", "0000:00:04.8", "0000:00:20.0", "../x", "0000:00:04.0 "]
)
def test_addresses(kernel: FakeKernel, address: str) -> None:
    assert "is not a PCI address" in why(lambda: PciDevice(address, kernel.sysfs))


def test_device_that_is_not_there(kernel: FakeKernel) -> None:
    assert f"there is no PCI device {NVME}" in why(lambda: PciDevice(NVME, kernel.sysfs))


@pytest.mark.parametrize("driver, words", [("nvme", "is bound to 'nvme'"), (None, "is bound to no driver")])
def test_device_bound_to_something_else(kernel: FakeKernel, driver: str | None, words: str) -> None:
    kernel.device(NVME, driver)
    text = why(lambda: open_container(kernel))
    assert words in text and f"run scripts/vfio-bind bind {NVME}" in text


def test_no_iommu(kernel: FakeKernel) -> None:
    kernel.device(NVME, "vfio-pci", group=None)
    assert "behind no IOMMU" in why(lambda: open_container(kernel))


def test_group_without_translation(kernel: FakeKernel) -> None:
    path = kernel.device(NVME, "vfio-pci")
    (path / "iommu_group/name").write_text("vfio-noiommu\n")
    assert "behind no IOMMU" in why(lambda: open_container(kernel))


def test_no_vfio(kernel: FakeKernel) -> None:
    kernel.device(NVME, "vfio-pci")
    (kernel.dev / "vfio").unlink()
    assert "no IOMMU" in why(lambda: open_container(kernel))


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("version", 1, "version 1"),
        ("type1", 0, "type 1"),
        ("group_flags", 3, "is in use"),
        ("page_sizes", 0x200000, "no pages of 4096 bytes"),
    ],
)
def test_kernels_that_will_not_do(
    kernel: FakeKernel, vfio: FakeVfio, field: str, value: int, words: str
) -> None:
    kernel.device(NVME, "vfio-pci")
    setattr(vfio, field, value)
    before = len(os.listdir("/proc/self/fd"))
    assert words in why(lambda: open_container(kernel))
    assert len(os.listdir("/proc/self/fd")) == before


def test_group_that_is_not_viable_names_what_is_in_the_way(kernel: FakeKernel, vfio: FakeVfio) -> None:
    kernel.device(NVME, "vfio-pci")
    kernel.device(OTHER, "ahci")
    vfio.group_flags = 0
    text = why(lambda: open_container(kernel))
    assert "not viable" in text and f"{OTHER} (ahci)" in text


@pytest.mark.parametrize("number, words", [(errno.EBUSY, "is in use"), (errno.EACCES, "Permission denied")])
def test_group_that_does_not_open(
    kernel: FakeKernel, vfio: FakeVfio, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    kernel.device(NVME, "vfio-pci")
    deny(monkeypatch, container, kernel.dev / "1", number)
    text = why(lambda: open_container(kernel))
    assert words in text and NVME in text


def deny(monkeypatch: pytest.MonkeyPatch, module: Any, path: Path, number: int) -> None:
    real = os.open

    def opened(name: Any, flags: int, *rest: Any) -> int:
        if Path(name) == path:
            raise OSError(number, os.strerror(number), str(name))
        return real(name, flags, *rest)

    monkeypatch.setattr(module.os, "open", opened)


def test_limits_of_the_iommu(kernel: FakeKernel, vfio: FakeVfio) -> None:
    kernel.device(NVME, "vfio-pci")
    held = open_container(kernel)
    assert [tuple(r) for r in held.ranges] == vfio.ranges
    assert held.mappings == 65535
    held.close()
    vfio.mappings = None
    held = open_container(kernel)
    assert held.mappings is None and [tuple(r) for r in held.ranges] == vfio.ranges
    held.close()


# ---- devices ----


@pytest.fixture
def opened(kernel: FakeKernel, vfio: FakeVfio) -> Iterator[Device]:
    pci = PciDevice(str(kernel.device(NVME, "vfio-pci").name), kernel.sysfs)
    os.pwrite(vfio.device_fd, struct.pack("<H", 0x0400), CONFIG_OFFSET + 4)
    held = Container(pci, kernel.dev)
    yield Device(held, pci)
    held.close()


def command(vfio: FakeVfio) -> int:
    value: int = struct.unpack("<H", os.pread(vfio.device_fd, 2, CONFIG_OFFSET + 4))[0]
    return value


def test_command_register_is_restored(opened: Device, vfio: FakeVfio) -> None:
    opened.enable()
    assert command(vfio) == 0x0406
    opened.close()
    assert command(vfio) == 0x0400


def test_bus_mastering_that_was_turned_off_stays_off(opened: Device, vfio: FakeVfio) -> None:
    """Also where it was on before: a controller that hangs must not write to memory after the close."""
    os.pwrite(vfio.device_fd, struct.pack("<H", 0x0404), CONFIG_OFFSET + 4)
    opened._command = 0x0404
    opened.enable()
    opened.master_bus(False)
    assert command(vfio) == 0x0402
    opened.master_bus(True)
    assert command(vfio) == 0x0406
    opened.master_bus(False)
    opened.close()
    assert command(vfio) == 0x0400


def test_bus_mastering_that_does_not_change(
    opened: Device, vfio: FakeVfio, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened.enable()
    with monkeypatch.context() as patch:
        patch.setattr(opened, "_write_command", lambda value: None)
        assert "bus mastering stays on" in why(lambda: opened.master_bus(False))
        patch.setattr(opened, "_read_command", lambda: 0xFFFF)
        opened.master_bus(False)  # nothing is there any more
    opened.close()


def test_reset_of_the_function(opened: Device, vfio: FakeVfio) -> None:
    opened.reset()
    assert vfio.calls[-1][0] == Call.DEVICE_RESET
    vfio.reset_error = errno.EAGAIN
    assert f"PCI device {NVME} cannot be reset: Resource temporarily" in why(opened.reset)
    vfio.device_flags = 2
    assert f"PCI device {NVME} cannot be reset by itself" in why(opened.reset)
    opened.close()


def test_registers_are_mapped(opened: Device, vfio: FakeVfio) -> None:
    os.pwrite(vfio.device_fd, b"registers", 16384)
    with opened.map_registers(8192) as mapped:
        assert mapped[:9] == b"registers" and len(mapped) == 16384
    vfio.regions[0] = (15, 16384, 16384, [(0, 12288), (12288, 4096)])
    with opened.map_registers(8192) as mapped:
        assert len(mapped) == 12288


@pytest.mark.parametrize(
    "region", [(3, 16384, 16384, []), (7, 4096, 16384, []), (15, 16384, 16384, [(4096, 12288)])]
)
def test_registers_that_cannot_be_mapped(opened: Device, vfio: FakeVfio, region: Any) -> None:
    vfio.regions[0] = region
    assert "BAR 0" in why(lambda: opened.map_registers(8192))


def test_interrupts(opened: Device, vfio: FakeVfio) -> None:
    assert opened.vectors() == (Irq.MSIX, 65)
    opened.enable_interrupts(Irq.MSIX, [40, 41])
    call, data = vfio.calls[-1]
    assert call == Call.DEVICE_SET_IRQS
    # argsz, DATA_EVENTFD | ACTION_TRIGGER, index, start, count; see linux/vfio.h
    assert struct.unpack("=IIIII2i", data) == (28, 0x24, 2, 0, 2, 40, 41)
    opened.close()
    assert struct.unpack("=IIIII", vfio.calls[-1][1]) == (20, 0x21, 2, 0, 0)


def test_other_kinds_of_interrupts(opened: Device, vfio: FakeVfio) -> None:
    vfio.vectors = {1: 8}
    assert opened.vectors() == (Irq.MSI, 8)
    vfio.vectors = {0: 1}
    assert "message-signalled" in why(opened.vectors)


# ---- vfio-bind ----


@pytest.fixture
def binder(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Binder]:
    monkeypatch.setattr(Binder, "_write", staticmethod(kernel.write))

    def make(address: str = NVME) -> Binder:
        return Binder(address, sysfs=kernel.sysfs, dev=kernel.dev, nodes=kernel.nodes, state=kernel.state)

    return make


@pytest.mark.parametrize("driver", ["nvme", None])
def test_binds_and_gives_back_as_found(
    kernel: FakeKernel, binder: Callable[..., Binder], driver: str | None
) -> None:
    path = kernel.device(NVME, driver)
    assert "is bound to vfio-pci, IOMMU group 1" in binder().bind()
    assert kernel.bound(NVME) == "vfio-pci"
    assert "already" in binder().bind()
    assert (driver or "no driver") in binder().unbind()
    assert kernel.bound(NVME) == driver
    assert (path / "driver_override").read_text().strip() == "(null)"
    assert not list(kernel.state.iterdir())


def test_an_override_is_kept(kernel: FakeKernel, binder: Callable[..., Binder]) -> None:
    path = kernel.device(NVME, "nvme")
    (path / "driver_override").write_text("nvme\n")
    binder().bind()
    binder().unbind()
    assert (path / "driver_override").read_text().strip() == "nvme"


def test_device_that_something_else_has_bound(kernel: FakeKernel, binder: Callable[..., Binder]) -> None:
    kernel.device(NVME, "vfio-pci")
    assert "is bound to nvme" in binder().unbind()


@pytest.mark.parametrize("trouble", ["refused", "denied"])
def test_failure_to_bind_changes_nothing(
    kernel: FakeKernel, binder: Callable[..., Binder], monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    path = kernel.device(NVME, "nvme")
    if trouble == "refused":
        kernel.refusing.add("vfio-pci")
        assert "vfio-pci does not take it" in why(binder().bind)
    else:
        kernel.denied = True
        assert "no permission to bind" in why(binder().bind)
    assert kernel.bound(NVME) == "nvme"
    assert (path / "driver_override").read_text().strip() == "(null)"


def test_no_bind_without_an_iommu(kernel: FakeKernel, binder: Callable[..., Binder]) -> None:
    kernel.device(NVME, "nvme", group=None)
    assert "behind no IOMMU" in why(binder().bind)
    assert "IOMMU group: none" in binder().status()


def test_no_bind_without_the_driver(
    kernel: FakeKernel, binder: Callable[..., Binder], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel.device(NVME, "nvme")
    (kernel.drivers / "vfio-pci").rmdir()
    monkeypatch.setattr("subprocess.run", lambda *args, **kwargs: None)
    assert "no driver vfio-pci" in why(binder().bind)


def test_busy_disk(
    kernel: FakeKernel, binder: Callable[..., Binder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that the kernel reaches by several paths, which have no node."""
    kernel.device(NVME, "nvme")
    kernel.disk(NVME, "nvme0n1")
    (kernel.sysfs / "bus/pci/devices" / NVME / "nvme/nvme0/nvme0n1").rename(
        kernel.sysfs / "bus/pci/devices" / NVME / "nvme/nvme0/nvme0c0n1"
    )
    assert "block device nvme0n1" in binder().status()
    deny(monkeypatch, bind, kernel.nodes / "nvme0n1", errno.EBUSY)
    assert "busy: /dev/nvme0n1" in why(binder().bind)
    assert "nvme0n1 (in use)" in binder().status()
    assert kernel.bound(NVME) == "nvme"


def test_device_in_use_is_not_given_back(
    kernel: FakeKernel, binder: Callable[..., Binder], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel.device(NVME, "nvme")
    binder().bind()
    deny(monkeypatch, bind, kernel.dev / "1", errno.EBUSY)
    assert "busy: a program uses IOMMU group 1" in why(binder().unbind)
    assert kernel.bound(NVME) == "vfio-pci"


def test_status_names_the_group(kernel: FakeKernel, binder: Callable[..., Binder]) -> None:
    kernel.device(NVME, "nvme")
    assert "IOMMU group 1, alone" in binder().status()
    kernel.device(OTHER, "ahci")
    assert f"IOMMU group 1, with {OTHER} (ahci)" in binder().status()
    assert "bound to nvme, not to vfio-pci" in why(binder().unbind)
