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
from target.drivers.protocol.nvme import node
from target.drivers.protocol.nvme.hardware import Dma, dma_limits
from target.drivers.protocol.nvme.registers import Registers
from target.exports.base import parse_export
from target.exports.nbd.server import NbdServerOptions
from target.graph.registry import parse_blockdev
from target.peers.nvme_controller import NvmeController
from target.service import Service


class MemoryHardware:
    """In place of ``Hardware``: an IOMMU that maps each address to itself, and counts."""

    def __init__(self, controller: NvmeController) -> None:
        self.controller = controller
        self.registers = Registers(controller.registers)
        self.bar = ffi.from_buffer(controller.registers)
        self.bar_length = len(controller.registers)
        self.interrupts: list[int] = []
        self.mapped: dict[int, int] = {}
        self.closed = False
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
        await self.dma.close()
        self.controller.interrupts = []
        for fd in self.interrupts:
            os.close(fd)
        self.registers.close()
        ffi.release(self.bar)
        self.closed = True

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


@contextlib.asynccontextmanager
async def rig(monkeypatch: pytest.MonkeyPatch, controller: NvmeController) -> AsyncIterator[Rig]:
    """The controller runs; at the end nothing is left mapped or open."""
    drivers.load()
    made = Rig(controller)

    def hardware(address: str) -> MemoryHardware:
        made.hardware = MemoryHardware(controller)
        return made.hardware

    monkeypatch.setattr(node, "Hardware", hardware)
    controller.start()
    try:
        yield made
        await made.close()
    finally:
        controller.stop()
    assert made.hardware.closed and not made.hardware.mapped
