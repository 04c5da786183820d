# SPDX-License-Identifier: Apache-2.0
"""The NVMe driver on a controller in memory, in the test's own process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from typing import Any

import pytest

from target import drivers, exports
from target.config.options import Notation, parse
from target.datapath import Datapath, ffi, lib
from target.drivers.protocol.nvme import node, recovery
from target.drivers.protocol.nvme.hardware import Dma, dma_limits
from target.drivers.protocol.nvme.registers import Registers
from target.exports.base import parse_export
from target.exports.nbd.server import NbdServerOptions
from target.graph.registry import parse_blockdev
from target.peers.nvme_controller import NvmeController
from target.service import Service
from target.vfio.errors import VfioError


class MemoryHardware:
    """In place of ``Hardware``: an IOMMU that maps each address to itself, and counts."""

    def __init__(self, controller: NvmeController) -> None:
        self.controller = controller
        self.registers = Registers(controller.registers)
        self.bar = ffi.from_buffer(controller.registers)
        self.bar_length = len(controller.registers)
        self.interrupts: list[int] = []
        self.mapped: dict[int, int] = {}
        self.closed = self.released = False
        self._calls = (
            ffi.callback("int(void *, void *, uint64_t, uint64_t *)", self._map),
            ffi.callback("int(void *, uint64_t, uint64_t)", self._unmap),
        )

    async def open(self, datapath: Datapath, queues: int, dma_limit: int) -> None:
        vectors = min(queues + 1, self.controller.vectors)
        self.interrupts = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(vectors)]
        self.controller.interrupts = self.interrupts
        ops = ffi.new("struct bt_dma_ops *", {"map": self._calls[0], "unmap": self._calls[1]})
        self.dma = Dma(datapath, lib.bt_dma_new(datapath.dp, ops, ffi.NULL, dma_limits(dma_limit, None)))
        self._ops = ops

    async def close(self) -> None:
        await self.release_device()
        assert self.controller.harmless, "memory is unmapped that the controller may reach"
        await self.dma.close()
        self.closed = True

    async def release_device(self) -> None:
        """As the kernel does, whatever the device does with its command register."""
        if self.released:
            return
        self.released = True
        with self.controller.quiet():
            self.controller.bus_master = False
            self.controller.interrupts = []
        for fd in self.interrupts:
            os.close(fd)
        self.registers.close()
        ffi.release(self.bar)

    async def reset(self) -> None:
        if not self.controller.reset_function():
            raise VfioError("PCI device 0000:01:00.0 cannot be reset by itself")

    def master_bus(self, on: bool) -> None:
        if not self.controller.master_bus(on):
            raise VfioError("PCI device 0000:01:00.0: bus mastering stays on")

    def _map(self, _: Any, address: Any, length: int, iova: Any) -> int:
        start = int(ffi.cast("uintptr_t", address))
        self.mapped[start] = length
        iova[0] = start
        return 0

    def _unmap(self, _: Any, iova: int, length: int) -> int:
        return 0 if self.mapped.pop(iova, None) == length else -22


class Rig:
    """A service with the node `disk` on the controller, once it is opened."""

    def __init__(self, controller: NvmeController) -> None:
        self.controller = controller
        self.service = Service()
        self.closed = False
        self.hardware: MemoryHardware

    async def open(self, **options: Any) -> node.Nvme:
        given = {"driver": "nvme", "node-name": "disk", "device": "0000:01:00.0", "namespace": 1}
        await self.service.add_blockdev(parse_blockdev({**given, **options}))
        opened = self.service.graph.get("disk")
        assert isinstance(opened, node.Nvme)
        return opened

    async def serve(self, path: str) -> None:
        """Exports the node over NBD."""
        exports.load()
        server = {"addr": {"type": "unix", "path": path}}
        await self.service.start_nbd_server(parse(server, NbdServerOptions, Notation.JSON))
        wanted = {"type": "nbd", "id": "nbd", "node-name": "disk", "name": "disk", "writable": True}
        await self.service.add_export(*parse_export(wanted))

    async def close(self) -> list[Exception]:
        """What went wrong; the second time nothing."""
        if self.closed:
            return []
        self.closed = True
        return await self.service.close()


class WatchedLib:
    """The datapath as the driver calls it; ``wrong``: calls against the rules of nvme.h."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._quiescing = 0
        self.wrong: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(lib, name)

    def bt_nvme_quiesce(self, nvme: Any, cookie: int) -> None:
        self._check_quiet("quiesce")
        self._quiescing = cookie
        lib.bt_nvme_quiesce(nvme, cookie)

    def bt_nvme_resume(self, nvme: Any, error: int) -> None:
        self._check_quiet("resume")
        if error and not self._rig.controller.harmless:
            self.wrong.append("requests ended while the controller could reach their memory")
        lib.bt_nvme_resume(nvme, error)

    def bt_nvme_stop(self, nvme: Any, cookie: int) -> None:
        self._check_quiet("stop")
        lib.bt_nvme_stop(nvme, cookie)

    def _check_quiet(self, what: str) -> None:
        if self._quiescing in self._rig.service.datapath._futures:
            self.wrong.append(f"{what} in the midst of a quiesce")


@contextlib.asynccontextmanager
async def rig(monkeypatch: pytest.MonkeyPatch, controller: NvmeController) -> AsyncIterator[Rig]:
    """The controller runs; at the end nothing is left mapped or open."""
    drivers.load()
    made = Rig(controller)

    def hardware(address: str) -> MemoryHardware:
        made.hardware = MemoryHardware(controller)
        controller.bus_master = True
        return made.hardware

    watched = WatchedLib(made)
    monkeypatch.setattr(node, "Hardware", hardware)
    monkeypatch.setattr(node, "lib", watched)
    monkeypatch.setattr(recovery, "lib", watched)
    controller.start()
    try:
        yield made
        await made.close()
    finally:
        controller.stop()
    assert made.hardware.closed and not made.hardware.mapped
    assert not watched.wrong
