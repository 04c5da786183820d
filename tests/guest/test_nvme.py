# SPDX-License-Identifier: Apache-2.0
"""The target inside of a guest drives QEMU's NVMe controller over VFIO, behind an emulated IOMMU.

The programs that run there are in tests/guest/inside; what the guest wrote is compared from outside.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.guest.conftest import Guest
from tests.support.tools import image_map

pytestmark = [pytest.mark.guest, pytest.mark.slow, pytest.mark.timeout(600)]

Boot = Callable[..., Guest]
INSIDE = Path(__file__).parent / "inside"
ROOT = INSIDE.parents[2]
IOMMU = ["-machine", "kernel-irqchip=split", "-device", "intel-iommu,intremap=on"]
SIZE = 64 << 20
MIB = 1 << 20
BROKEN_SECTOR = 48 * MIB // 512


def inside() -> dict[str, bytes]:
    """The programs that run in the guest, and the graph file that one of them serves."""
    found = {f"tests/guest/inside/{path.name}": path.read_bytes() for path in INSIDE.glob("*.py")}
    return {"configs/nvme.yaml": (ROOT / "configs/nvme.yaml").read_bytes(), **found}


def job(what: str) -> str:
    return f"modprobe vfio-pci; modprobe vfio_iommu_type1; cd /; python3 -m tests.guest.inside.nvme {what}\n"


def drive(path: Path, options: str = "", block_size: int = 512) -> list[str]:
    with path.open("wb") as image:
        image.truncate(SIZE)
    size = f"logical_block_size={block_size},physical_block_size={block_size}"
    return [
        *("-drive", f"if=none,id=disk,discard=unmap,{options or f'driver=raw,file.filename={path}'}"),
        *("-device", f"nvme,drive=disk,serial=blocktarget-test,{size}"),
    ]


def other_controller(scratch: Path) -> list[str]:
    """With one interrupt and no limit of transfers; blocks of 512 and 4096 bytes, metadata, zones."""
    words = ["-device", "nvme,id=other,serial=other,mdts=0,msix_qsize=1"]
    blocks = "logical_block_size=4096,physical_block_size=4096"
    for number, kind in {1: "", 3: blocks, 4: "ms=8", 5: "zoned=on,zoned.zone_size=8M"}.items():
        path = scratch / f"other{number}.raw"
        with path.open("wb") as image:
            image.truncate(16 * MIB)
        words += ["-drive", f"if=none,id=other{number},format=raw,discard=unmap,file={path}"]
        words += ["-device", f"nvme-ns,bus=other,drive=other{number},nsid={number},{kind}".rstrip(",")]
    return words


def compare(results: dict[str, str], image: Path) -> None:
    with image.open("rb") as content:
        assert hashlib.sha256(content.read(int(results["size"]))).hexdigest() == results["sha256"]


class Monitor:
    """QMP of the guest's QEMU."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(30)
        self._socket.connect(str(path))
        self._file = self._socket.makefile("rw")
        self._answer("QMP")
        self.execute("qmp_capabilities")

    def close(self) -> None:
        self._file.close()
        self._socket.close()

    def execute(self, command: str, **arguments: Any) -> None:
        self._file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._file.flush()
        self._answer("return")

    def _answer(self, wanted: str) -> None:
        for line in self._file:
            message = json.loads(line)
            assert "error" not in message, message
            if wanted in message:
                return

    def throttle(self, requests: int) -> None:
        """So many a second; 0 for no limit."""
        limits = {"bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": requests, "iops_rd": 0, "iops_wr": 0}
        self.execute("block_set_io_throttle", device="disk", **limits)


def test_drives_a_controller_and_gives_it_back(scratch: Path, boot_python: Boot) -> None:
    image = scratch / "disk.raw"
    devices = [*IOMMU, *drive(image), *other_controller(scratch)]
    results = boot_python(job("good"), devices, inside(), cpus=2, append="intel_iommu=on").finish()
    assert results["identify"].startswith("QEMU NVMe Ctrl / blocktarget-test / ")
    compare(results, image)
    holes = [
        extent for extent in image_map(image, "raw") if extent["start"] <= 40 * MIB and not extent["data"]
    ]
    assert any(extent["start"] + extent["length"] >= 41 * MIB for extent in holes), "the discard made no hole"


def test_survives_a_stalled_drive(scratch: Path, boot_python: Boot) -> None:
    image = scratch / "disk.raw"
    broken = f"file.inject-error.0.sector={BROKEN_SECTOR},file.inject-error.0.errno=5"
    source = (
        f"driver=raw,file.driver=blkdebug,file.image.driver=file,file.image.filename={image},{broken},"
        "file.inject-error.0.event=none,file.inject-error.0.iotype=read"
    )
    qmp = scratch / "qmp"
    monitor = ["-qmp", f"unix:{qmp},server=on,wait=off"]
    devices = [*IOMMU, *monitor, *drive(image, source, 4096)]
    guest = boot_python(job("stall"), devices, inside(), cpus=2, append="intel_iommu=on")
    guest.wait_for("STALL: please")
    control = Monitor(qmp)
    control.throttle(1)
    guest.wait_for("STALL: the controller was reset")
    control.throttle(0)
    control.close()
    results = guest.finish()
    compare(results, image)


def test_refuses_without_an_iommu(scratch: Path, boot_python: Boot) -> None:
    image = scratch / "disk.raw"
    results = boot_python(job("no-iommu"), drive(image), inside(), cpus=2).finish()
    assert results["sha256"] == hashlib.sha256(bytes(MIB)).hexdigest()
